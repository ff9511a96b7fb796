"""Reward models that are published as peft adapters on a base, as MedS3's: read as one plain model.

Enters: an adapter's folder or hub id, its base, other adapters that belong between the two (MedS3's first policy and
reward model are both adapters on one base, the second on top of the first). Leaves: the base with all of them merged
in, which needs no peft from then on.

The base may have an adapter of its own beside its full weights, as MedS3's later policy has; it is left out, as
MedS3's own code does: name it in `merge` where it is wanted.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from medmm_ray.engines.reward_model import attention
from medmm_ray.engines.reward_model.errors import CheckpointError

if TYPE_CHECKING:
    from peft import PeftConfig

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model"]
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
    own = cached_file(str(path), "tokenizer_config.json", _raise_exceptions_for_missing_entries=False)
    return base if own is None else path


def read(path: str | Path, base: str | Path, merge: Sequence[str | Path], dtype: torch.dtype) -> Any:
    """The base with the adapters `merge` merged in, in order, and the adapter `path` last."""
    kind, options = _MODELS[task_of(path)]
    if is_adapter(base):
        raise CheckpointError(
            f"the base {base} is itself an adapter; name the full model below it: from_pretrained(..., base=<model>, "
            f"merge=[{str(base)!r}])"
        )
    try:
        with _without_adapter(base) as folder:
            model, found = kind.from_pretrained(
                folder, dtype=dtype, attn_implementation=attention.NAME, output_loading_info=True, **options
            )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the base {base} of the adapter {path} cannot be read: {error}. Name a folder or hub id that can be: "
            "from_pretrained(..., base=...)"
        ) from error
    model.config.name_or_path = str(base)
    untrained = set(found["missing_keys"])
    for adapter in (*merge, path):
        model, brought = _merged(model, adapter)
        untrained -= brought
    if untrained:
        raise CheckpointError(
            f"{path} brings no weights for {', '.join(sorted(untrained))}, and its base {base} has none; expected an "
            "adapter that was saved with its head (modules_to_save)"
        )
    return model


def _merged(model: Any, path: str | Path) -> tuple[Any, set[str]]:
    """The model with an adapter merged in, and the names of the weights that it replaced."""
    from peft import PeftModel

    config = _config(path)
    config.task_type = None  # the plain wrapper, which takes a language model's adapter for a classifier as well
    try:
        wrapped = PeftModel(model, config)
        loaded = wrapped.load_adapter(str(path), "default")
    except (ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(f"the adapter {path} does not fit its base: {error}") from error
    strange = [*loaded.missing_keys, *loaded.unexpected_keys]
    if strange:
        raise CheckpointError(
            f"the adapter {path} does not fit its base: {len(strange)} weights are on one side only, e.g. {strange[0]}"
        )
    whole = {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        for name in wrapped.state_dict()
        if ".modules_to_save.default." in name
    }
    return wrapped.merge_and_unload(), whole


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
def _without_adapter(base: str | Path) -> Iterator[str | Path]:
    """A base as transformers reads it without the adapter beside its weights, which it would put in unasked."""
    if find_adapter_config_file(str(base)) is None:
        yield base
        return
    with tempfile.TemporaryDirectory() as links:
        for file in local(base).iterdir():
            if not file.name.startswith("adapter_"):
                (Path(links) / file.name).symlink_to(file.absolute())
        yield links
