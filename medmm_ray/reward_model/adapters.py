"""Reward models that are published as peft adapters on a base, as MedS3's: read as one plain model.

Enters: an adapter's folder or hub id, its base, other adapters that belong between the two (MedS3's first policy and
reward model are both adapters on one base, the second on top of the first). Leaves: the base with all of them merged
in, which needs no peft from then on.

The base may have an adapter of its own beside its full weights, as MedS3's later policy has; it is left out, as
MedS3's own code does: name it in `merge` where it is wanted.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from medmm_ray.engines import pretrained
from medmm_ray.engines.dtype_device import Dtype
from medmm_ray.engines.weights import ADAPTER_FILES, WeightMismatch, WeightsError, check_files, shapes, weight_files
from medmm_ray.reward_model import attention
from medmm_ray.reward_model.errors import CheckpointError

if TYPE_CHECKING:
    from peft import PeftConfig

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "adapter_model.bin"]
_HEADS = ("score.", "classifier.", "lm_head.")  # what an adapter may bring that its base has not
# Of embeddings and head, what peft writes a second time where the vocabulary was resized, and never reads.
_COPIES = ("modules_to_save.weight", "token_adapter.trainable_tokens_delta")
_MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "TOKEN_CLS": (AutoModelForTokenClassification, {"num_labels": 2}),
    "CAUSAL_LM": (AutoModelForCausalLM, {}),
}


def is_adapter(path: str | Path, revision: str | None = None) -> bool:
    """Whether a checkpoint is an adapter alone, without a model of its own beside it."""
    model = None
    try:
        model = cached_file(str(path), "config.json", revision=revision)
    except OSError as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):  # the hub cannot be asked, not even for more
            raise CheckpointError(f"{path} is not a language model that can be read: {error}") from error
    return model is None and find_adapter_config_file(str(path), revision=revision) is not None


def local(path: str | Path, revision: str | None = None) -> Path:
    """A checkpoint's folder, which for a hub id is a local copy."""
    if Path(path).is_dir():
        return Path(path)
    return Path(snapshot_download(str(path), revision=revision, allow_patterns=_FILES))


def check(folder: Path) -> None:
    """Raise where a file of an adapter is not whole."""
    try:
        check_files(folder, ADAPTER_FILES)
    except WeightsError as error:
        raise CheckpointError(str(error)) from error


def task_of(path: str | Path) -> str:
    """What the adapter's model does: TOKEN_CLS or CAUSAL_LM."""
    task = str(_config(path).task_type)
    if task not in _MODELS:
        raise CheckpointError(
            f"{path} is an adapter for the task {task}; expected {' or '.join(_MODELS)}: a reward model classifies "
            "tokens or is a language model"
        )
    return task


def base_of(path: str | Path) -> str:
    """The base that an adapter names."""
    base = _config(path).base_model_name_or_path
    if not base:
        raise CheckpointError(f"{path} names no base model; say which: from_pretrained(..., base='org/name')")
    return str(base)


def tokenizer_of(path: str | Path, base: str | Path) -> str | Path:
    """Where the tokenizer lies: with the adapter, or with its base."""
    file = cached_file(str(path), "tokenizer_config.json", _raise_exceptions_for_missing_entries=False)
    return base if file is None else path


def read(path: str | Path, base: str | Path, merge: Sequence[str | Path], dtype: Dtype) -> Any:
    """The base with the adapters `merge` merged in, in order, and the adapter `path` last."""
    kind, options = _MODELS[task_of(path)]
    if is_adapter(base):
        raise CheckpointError(
            f"the base {base} is itself an adapter; name the full model below it: from_pretrained(..., base=<model>, "
            f"merge=[{str(base)!r}])"
        )
    folder = base
    try:
        with without_adapter(base) as folder:
            model, unmatched = pretrained.load_with_report(
                kind, folder, dtype=dtype, attn_implementation=attention.NAME, **options
            )
        unused = ("lm_head.",) if kind is AutoModelForTokenClassification else ()
        unmatched.without(_HEADS, unused).check(base)
    except (OSError, ValueError) as error:
        reason = str(error).replace(str(folder), str(base))
        raise CheckpointError(
            f"the base {base} of the adapter {path} cannot be read: {reason}. Name a folder or hub id that can be: "
            "from_pretrained(..., base=...)"
        ) from error
    model.config.name_or_path = str(base)
    untrained = set(unmatched.missing)
    for adapter in (*merge, path):
        model, brought = merged(model, adapter)
        untrained -= brought
    if untrained:
        raise CheckpointError(
            f"{path} brings no weights for {', '.join(sorted(untrained))}, and its base {base} has none; expected an "
            "adapter that was saved with its head (modules_to_save)"
        )
    return model


def merged(model: Any, path: str | Path) -> tuple[Any, set[str]]:
    """The model with an adapter merged in, and the names of the weights that it replaced.

    A base whose vocabulary has another size grows (or shrinks) to that of the embeddings that the adapter brings.
    """
    from peft import PeftModel, get_peft_model_state_dict

    config = _config(path)
    config.task_type = None  # the plain wrapper, which takes a language model's adapter for a classifier as well
    try:
        folder = local(path)
        check_files(folder, ADAPTER_FILES)
        weights = dict(shapes(weight_files(folder, ADAPTER_FILES)))
        copies: list[str] = []
        for part in _vocabulary(model):
            copies += [f"base_model.model.{part}.{ending}" for ending in _COPIES]
        _fit_vocabulary(model, config, weights)
        wrapped = PeftModel(model, config)
        expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        try:
            loaded = wrapped.load_adapter(str(folder), "default")
        except KeyError as error:  # a weight outside of LoRA, which peft looks up unasked
            WeightMismatch.between(expected, weights).without(unexpected=copies).check("its file")
            raise WeightsError(f"its file has no weight {error}") from error
        unmatched = WeightMismatch(frozenset(loaded.missing_keys), frozenset(loaded.unexpected_keys))
        unmatched.without(unexpected=copies).check("its file")
    except WeightsError as error:
        raise CheckpointError(f"the adapter {path} cannot be read, or does not fit its base: {error}") from error
    except (ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(f"the adapter {path} does not fit its base: {error}") from error
    replaced: set[str] = set()
    for name in wrapped.state_dict():
        if ".modules_to_save.default." in name:
            replaced.add(name.removeprefix("base_model.model.").replace(".modules_to_save.default", ""))
    return wrapped.merge_and_unload(), replaced


def _vocabulary(model: Any) -> list[str]:
    """The names of the modules with a row a token: the embeddings, and the head where there is one."""
    with_rows = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    return sorted(name for name, module in model.named_modules() if id(module) in with_rows)


def _fit_vocabulary(model: Any, config: "PeftConfig", weights: Mapping[str, torch.Tensor]) -> None:
    """Give the base the vocabulary that the adapter was trained with, where the adapter brings all rows that differ."""
    parts = _vocabulary(model)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = embeddings.num_embeddings
    brought: dict[str, int] = {}  # rows of each part in the adapter
    for part in parts:
        for ending in ("weight", "base_layer.weight", "token_adapter.base_layer.weight"):
            weight = weights.get(f"base_model.model.{part}.{ending}")
            if weight is not None:
                brought[part] = len(weight)
    if set(brought.values()) - {rows}:
        tied = head is None or head.weight is embeddings.weight
        if len(set(brought.values())) > 1 or not (tied or len(brought) == len(parts)):
            raise WeightsError(
                f"the base has {rows} rows, the adapter brings {brought or 'none'}; expected all of "
                f"{', '.join(parts)} with one number of rows: save it with save_embedding_layers=True"
            )
        pretrained.resize_vocabulary(model, next(iter(brought.values())))
        return
    indices = getattr(config, "trainable_token_indices", None) or []
    trained = set(chain.from_iterable(indices.values() if isinstance(indices, Mapping) else [indices]))
    added = set(range(rows, max(trained, default=0) + 1))
    if added - trained:
        raise WeightsError(
            f"the base has {rows} rows and the adapter brings those of the tokens {sorted(trained)}; expected all rows "
            "that the base has not"
        )
    if added:
        pretrained.resize_vocabulary(model, max(added) + 1)


def _config(path: str | Path) -> "PeftConfig":
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise CheckpointError(f"{path} is an adapter, and peft is not installed: pip install peft") from error
    try:
        config: PeftConfig = PeftConfig.from_pretrained(str(path))
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is no adapter that can be read: {error}") from error
    return config


@contextmanager
def without_adapter(base: str | Path, revision: str | None = None) -> Iterator[str | Path]:
    """A base as transformers reads it without the adapter beside its weights, which it would put in unasked."""
    if find_adapter_config_file(str(base), revision=revision) is None:
        yield base
        return
    with tempfile.TemporaryDirectory() as links:
        for file in local(base, revision).iterdir():
            if not file.name.startswith("adapter_"):
                (Path(links) / file.name).symlink_to(file.absolute())
        yield links
