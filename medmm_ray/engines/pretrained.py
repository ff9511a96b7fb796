"""Models of transformers: loaded with every weight accounted for, saved so that what was loaded can be saved again.

Needs transformers, which is imported where it is used.
"""

import pickle
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medmm_ray.engines.weights import (
    ADAPTER_FILES,
    OPEN_CLIP_FILES,
    TRANSFORMERS_FILES,
    WeightMismatch,
    WeightsError,
    check_files,
    shapes,
    weight_files,
)

GENERATION_CONFIG = "generation_config.json"


def load(
    kind: Any, name: str | Path, *, unexpected: Sequence[str] = (), missing: Sequence[str] = (), **options: Any
) -> Any:
    """The model that ``kind.from_pretrained`` loads; `options` are its own.

    Raises `WeightsError` where a file is not whole, and where the files lack a weight of the model or hold others:
    transformers would fill it with random numbers. `missing` and `unexpected` are beginnings of names that are
    no fault.
    """
    model, mismatch = load_with_report(kind, name, **options)
    mismatch.without(missing, unexpected).check(name)
    return model


def load_with_report(kind: Any, name: str | Path, **options: Any) -> tuple[Any, WeightMismatch]:
    """The model as `load` gives it, and the mismatch of its weights for the caller to judge."""
    from safetensors import SafetensorError

    try:
        if Path(name).is_dir() and "gguf_file" not in options:
            check_files(Path(name))
        # With shapes ignored transformers reports what differs, all of it, instead of raising at the first.
        model, report = kind.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except WeightsError:
        raise
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise WeightsError(f"the weights of {name} cannot be read: {error}") from error
    return model, _mismatch(report)


def checkpoint_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of config and weights: `name` itself, or the hub's cache of a hub id, downloaded if need be.

    Raises `WeightsError` where there are no weights of transformers' names, OSError where there is no such repository.
    """
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    if Path(name).is_dir():
        return Path(name)
    for file_name in TRANSFORMERS_FILES:
        file = cached_file(str(name), file_name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if file is None:
            continue
        if file_name.endswith(".json"):
            get_checkpoint_shard_files(str(name), file, revision=revision)  # type: ignore[no-untyped-call]
        return Path(file).parent
    raise WeightsError(f"{name} has none of the weight files {', '.join(TRANSFORMERS_FILES)}")


def open_clip_folder(hub_id: str, revision: str | None = None) -> str:
    """The folder of an open_clip checkpoint in the hub's cache, downloaded if need be."""
    from huggingface_hub import snapshot_download

    return snapshot_download(hub_id, revision=revision, allow_patterns=["*.json", "*.txt", *OPEN_CLIP_FILES])


def check_weights(
    kind: Any, config: Any, folder: Path, *, unexpected: Sequence[str] = (), missing: Sequence[str] = ()
) -> Any:
    """Check what `load` checks for files that another library loads: by their headers, in a fraction of a second.

    Gives the model without data, on torch's meta device.
    """
    files = weight_files(folder)
    if not files:
        raise WeightsError(f"{folder} has none of the weight files {', '.join(TRANSFORMERS_FILES)}")
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=dict(shapes(files)),
        device_map="meta",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    _mismatch(report).without(missing, unexpected).check(folder)
    return model


def check_adapter(model: Any, folder: Path) -> None:
    """Raise `WeightsError` unless a peft adapter's weights are those that its config asks of `model`.

    `model` (without data) is changed. Embeddings that were resized are refused too: vLLM leaves them out.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    config = PeftConfig.from_pretrained(folder)
    config.task_type = None  # the plain wrapper
    stored = dict(shapes(weight_files(folder, ADAPTER_FILES)))
    base_shapes = {f"base_model.model.{name}": weight.shape for name, weight in model.state_dict().items()}
    # Beside its matrices an adapter may hold whole weights of the base (modules_to_save, embeddings).
    whole_weights: set[str] = set()
    resized: list[str] = []
    for name, weight in stored.items():
        base_shape = base_shapes.get(name.replace(".base_layer", ""))
        if base_shape is not None:
            whole_weights.add(name)
            if weight.shape != base_shape:
                resized.append(name)
    if resized:
        raise WeightsError(
            f"the adapter {folder} brings whole weights of another shape than its base's "
            f"({', '.join(sorted(resized))}); they are not read from an adapter here: merge it into its base (peft's "
            "merge_and_unload) and name that"
        )
    wrapped = PeftModel(model, config, low_cpu_mem_usage=True)
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    matrices = {name: weight for name, weight in stored.items() if name not in whole_weights}
    WeightMismatch.between(expected, matrices).check(folder)


def _mismatch(report: dict[str, Any]) -> WeightMismatch:
    """transformers' report of loading a model as a `WeightMismatch`."""
    mismatched_keys = report["mismatched_keys"]
    misshapen = sorted((name, tuple(in_file), tuple(in_model)) for name, in_file, in_model in mismatched_keys)
    return WeightMismatch(frozenset(report["missing_keys"]), frozenset(report["unexpected_keys"]), tuple(misshapen))


def load_tokenizer(name: str | Path, **options: Any) -> Any:
    """The tokenizer of a checkpoint, as its files have it; `WeightsError` where they are not whole or not readable.

    `AutoTokenizer` gives some types of models (Qwen2's among them) their usual splitting of words, whatever
    ``tokenizer.json`` says; a checkpoint that names no class of its own is read from that file alone.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if Path(name).is_dir():
        check_files(Path(name), names=())
    try:
        tokenizer_class = get_tokenizer_config(name, **options).get("tokenizer_class")
        is_generic = tokenizer_class in ("TokenizersBackend", "PreTrainedTokenizerFast")
        loader: Any = PreTrainedTokenizerFast if is_generic else AutoTokenizer
        return loader.from_pretrained(name, **options)
    except Exception as error:  # the tokenizers library raises no other kind
        raise WeightsError(f"{name} has no tokenizer that can be read: {error}") from error


def save(model: Any, folder: Path) -> None:
    """Save a model as ``model.save_pretrained`` does, its generation config as it was loaded.

    transformers refuses to write some that it loads: ``do_sample`` false beside a temperature, as in Llama 2 chat,
    Vicuna and LLaVA.
    """
    from transformers import GenerationConfig

    if not model.can_generate() or _can_be_written(model.generation_config):
        model.save_pretrained(folder)
        return
    generation_config = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = generation_config
    generation_config.to_json_file(folder / GENERATION_CONFIG)


def _can_be_written(generation_config: Any) -> bool:
    try:
        generation_config.validate(strict=True)
    except ValueError:
        return False
    return True


def resize_vocabulary(model: Any, size: int) -> None:
    """Give embeddings and head `size` rows; new rows are the mean of those that are there."""
    import torch

    num_rows = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            if part is not None and size > num_rows:
                mean_D = part.weight[:num_rows].float().mean(dim=0)
                part.weight[num_rows:] = mean_D.to(part.weight.dtype)


@contextmanager
def atomic_folder(folder: Path, last: str, owned: Sequence[str] = ()) -> Iterator[Path]:
    """An empty folder to write a checkpoint to, which becomes `folder` at the end; nothing is left where that fails.

    Where `folder` exists, its files are replaced by those of the same name, and those that match `owned`, an earlier
    save's, are removed. The file `last` is what makes the folder a checkpoint: it is removed first and comes last.
    """
    folder = folder.resolve()
    exists = folder.is_dir()
    parent = folder if exists else folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    # On the same filesystem, so that a file or folder moves into its place at once.
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{folder.name}-") as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        checkpoint.mkdir()
        yield checkpoint
        if not exists:
            checkpoint.rename(folder)
            return
        for pattern in (last, *owned):
            for path in list(folder.glob(pattern)):
                _remove(path)
        for path in sorted(checkpoint.iterdir(), key=lambda path: path.name == last):
            if (folder / path.name).is_dir():
                _remove(folder / path.name)
            path.replace(folder / path.name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
