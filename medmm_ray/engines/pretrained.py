"""Models of transformers: read with every weight accounted for, and written so that what was read can be written back.

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
    """The model that ``kind.from_pretrained`` reads; `options` are its own.

    Raises `WeightsError` where a file is not whole, and where the files lack a weight of the model or hold others:
    transformers would fill it with random numbers. `missing` and `unexpected` are beginnings of names that may be.
    """
    model, unmatched = load_with_report(kind, name, **options)
    unmatched.without(missing, unexpected).check(name)
    return model


def load_with_report(kind: Any, name: str | Path, **options: Any) -> tuple[Any, WeightMismatch]:
    """As `load`, with what does not match for the caller to judge."""
    from safetensors import SafetensorError

    try:
        if Path(name).is_dir() and "gguf_file" not in options:
            check_files(Path(name))
        model, report = kind.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except WeightsError:
        raise
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise WeightsError(f"the weights of {name} cannot be read: {error}") from error
    return model, _unmatched(report)


def checkpoint_folder(name: str | Path, revision: str | None = None) -> Path:
    """Where config and weights lie: a folder itself, of a hub id its copy in the hub's cache, fetched if need be.

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


def check_weights(
    kind: Any, config: Any, folder: Path, *, unexpected: Sequence[str] = (), missing: Sequence[str] = ()
) -> Any:
    """What `load` checks, of files that another library reads: by their headers, in a fraction of a second.

    Gives the model without data, on torch's meta device.
    """
    files = weight_files(folder)
    if not files:
        raise WeightsError(f"{folder} has none of the weight files {', '.join(TRANSFORMERS_FILES)}")
    model, report = kind.from_pretrained(
        None, config=config, state_dict=dict(shapes(files)), device_map="meta",
        output_loading_info=True, ignore_mismatched_sizes=True,
    )  # fmt: skip
    _unmatched(report).without(missing, unexpected).check(folder)
    return model


def check_adapter(model: Any, folder: Path) -> None:
    """Raise `WeightsError` unless a peft adapter's weights are those that its config asks of `model`.

    `model` (without data) is changed. Embeddings that were resized are refused too: vLLM leaves them out.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    config = PeftConfig.from_pretrained(folder)
    config.task_type = None  # the plain wrapper
    in_file = dict(shapes(weight_files(folder, ADAPTER_FILES)))
    of_model = {f"base_model.model.{name}": weight.shape for name, weight in model.state_dict().items()}
    whole = {
        name: of_model[name.replace(".base_layer", "")]
        for name in in_file
        if name.replace(".base_layer", "") in of_model
    }
    changed = sorted(name for name, shape in whole.items() if in_file[name].shape != shape)
    if changed:
        raise WeightsError(
            f"the adapter {folder} brings whole weights of another shape than its base's ({', '.join(changed)}); they "
            "are not read from an adapter here: merge it into its base (peft's merge_and_unload) and name that"
        )
    wrapped = PeftModel(model, config, low_cpu_mem_usage=True)
    wanted = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    WeightMismatch.between(wanted, {n: weight for n, weight in in_file.items() if n not in whole}).check(folder)


def _unmatched(report: dict[str, Any]) -> WeightMismatch:
    misshapen = sorted((name, tuple(found), tuple(model)) for name, found, model in report["mismatched_keys"])
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
        named = get_tokenizer_config(name, **options).get("tokenizer_class")
        as_filed = named in ("TokenizersBackend", "PreTrainedTokenizerFast")
        reader: Any = PreTrainedTokenizerFast if as_filed else AutoTokenizer
        return reader.from_pretrained(name, **options)
    except Exception as error:  # the tokenizers library raises no other kind
        raise WeightsError(f"{name} has no tokenizer that can be read: {error}") from error


def save(model: Any, folder: Path) -> None:
    """``model.save_pretrained(folder)``, the generation config as it was read.

    transformers refuses to write some that it reads: ``do_sample`` false beside a temperature, as in Llama 2 chat,
    Vicuna and LLaVA.
    """
    from transformers import GenerationConfig

    if not model.can_generate() or _can_be_written(model.generation_config):
        model.save_pretrained(folder)
        return
    as_read = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = as_read
    as_read.to_json_file(folder / GENERATION_CONFIG)


def _can_be_written(generation_config: Any) -> bool:
    try:
        generation_config.validate(strict=True)
    except ValueError:
        return False
    return True


def resize_vocabulary(model: Any, size: int) -> None:
    """Give embeddings and head `size` rows; new ones are the mean of the others."""
    import torch

    rows = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            if part is not None and size > rows:
                part.weight[rows:] = part.weight[:rows].float().mean(dim=0).to(part.weight.dtype)


@contextmanager
def atomic_folder(folder: Path, last: str, owned: Sequence[str] = ()) -> Iterator[Path]:
    """An empty folder to write a checkpoint to, which becomes `folder` at the end; nothing is left where that fails.

    Of a `folder` that exists, files are replaced by those of the same name, and those that match `owned` go: an earlier
    save's. The file `last` is what makes the folder a checkpoint: it goes first and comes last.
    """
    folder = folder.resolve()
    exists = folder.is_dir()
    (folder if exists else folder.parent).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder if exists else folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch) / "checkpoint"
        made.mkdir()
        yield made
        if not exists:
            made.rename(folder)
            return
        stale = [path for pattern in (last, *owned) for path in folder.glob(pattern)]
        for path in stale:
            _remove(path)
        for path in sorted(made.iterdir(), key=lambda path: path.name == last):
            if (folder / path.name).is_dir():
                _remove(folder / path.name)
            path.replace(folder / path.name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
