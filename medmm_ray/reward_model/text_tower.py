"""A text tower as it is published: a language model, an adapter on one, or a GGUF file, in a family's format.

Enters: a folder or hub id. Leaves: `TextTower`, the model with shared-prefix attention, its tokenizer, its family.
"""

import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)
from transformers.utils.hub import cached_file

from medmm_ray.engines import pretrained
from medmm_ray.engines.dtype_device import Dtype
from medmm_ray.engines.model_source import ModelSource, commit_of
from medmm_ray.engines.weights import WeightsError, check_files
from medmm_ray.reward_model import adapters, attention, families
from medmm_ray.reward_model import vision_language as vision
from medmm_ray.reward_model.errors import CheckpointError
from medmm_ray.reward_model.families import FamilyName
from medmm_ray.reward_model.vision_language import Vision
from medmm_ray.text import TAG

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def check_path(path: str | Path) -> None:
    """Raise where `path` is no folder and cannot be a hub id either."""
    if not Path(path).is_dir() and not _HUB_ID.fullmatch(str(path)):
        raise CheckpointError(f"model path {path} does not exist; expected a checkpoint folder or a hub id (org/name)")


@dataclass(frozen=True)
class TextTower:
    """A text tower as it was read."""

    model: Any
    tokenizer: Any
    family: FamilyName
    origin: ModelSource
    vision: Vision | None = None


def load_text_tower(
    path: str | Path,
    dtype: Dtype,
    family: FamilyName | None,
    revision: str | None = None,
    gguf_file: str | None = None,
    base: str | Path | None = None,
    merge: Sequence[str | Path] = (),
) -> TextTower:
    """The text tower and its family (detected where it is None), ready for rows with a shared prefix.

    `base` and `merge` are those of `adapters.read`, for a checkpoint that is an adapter.
    """
    is_adapter = gguf_file is None and adapters.is_adapter(path, revision)
    if (base or merge) and not is_adapter:
        raise CheckpointError(f"{path} is no adapter, so it takes no base= and no merge=; name the adapter's folder")
    if gguf_file is not None:
        text = _read_gguf(path, gguf_file, dtype, family, revision)
    elif is_adapter:
        text = _read_adapter(path, dtype, family, revision, base, merge)
    else:
        text = _read_whole(path, dtype, family, revision)
    check_vocabulary(text.model, text.tokenizer)
    if text.family in ("medprm", "medprm_vision"):
        _add_tag(text.model, text.tokenizer)
    return text


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raise where the tokenizer gives ids that the model has no row for."""
    rows, entries = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if entries > rows:
        raise CheckpointError(
            f"the tokenizer has {entries} entries but the model's vocabulary {rows}; they are not of one checkpoint. "
            "(An adapter trained with added tokens must bring their rows: save it with save_embedding_layers=True.)"
        )


def _config_and_tokenizer(path: str | Path, revision: str | None) -> tuple[str | None, Any, Any]:
    """The commit, the config and the tokenizer of a whole checkpoint whose files are checked."""
    try:
        if Path(path).is_dir():
            check_files(Path(path))
        commit = commit_of(path, "config.json", revision)  # all is of one commit, whatever is pushed meanwhile
        _refuse_original_layout(path, commit)
        config = AutoConfig.from_pretrained(path, revision=commit)
        tokenizer = pretrained.load_tokenizer(path, revision=commit)
    except CheckpointError:
        raise
    except WeightsError as error:
        raise CheckpointError(str(error)) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a language model that can be read: {error}") from error
    return commit, config, tokenizer


def _read_whole(path: str | Path, dtype: Dtype, family: FamilyName | None, revision: str | None) -> TextTower:
    commit, config, tokenizer = _config_and_tokenizer(path, revision)
    detected = family or _detected(path, config.architectures or [], tokenizer)
    if detected in families.VISION_LANGUAGE:
        vision.check(path, config)
        tokenizer.chat_template = tokenizer.chat_template or vision.chat_template(path, commit)
    model = _load(path, detected, dtype, commit)
    image_input = None
    if detected in families.VISION_LANGUAGE:
        image_input = Vision.from_pretrained(path, model, tokenizer, commit)
    return TextTower(model, tokenizer, detected, ModelSource.of(path, commit), image_input)


def _load(path: str | Path, family: FamilyName, dtype: Dtype, commit: str | None) -> Any:
    """The model of a family, the adapter that may lie beside its weights merged in, as transformers would use it."""
    with adapters.without_adapter(path, commit) as folder:
        try:
            model = pretrained.load(
                _MODELS[family],
                folder,
                unexpected=_UNUSED.get(family, ()),
                revision=commit,
                dtype=dtype,
                attn_implementation=attention.NAME,
            )
        except WeightsError as error:
            message = str(error).replace(str(folder), str(path))
            raise CheckpointError(f"{message} (read as the family {family})") from error
    if folder != path:
        model, _ = adapters.merged(model, adapters.local(path, commit))
        model.config.name_or_path = str(path)
    return model


def _read_adapter(
    path: str | Path,
    dtype: Dtype,
    family: FamilyName | None,
    revision: str | None,
    base: str | Path | None,
    merge: Sequence[str | Path],
) -> TextTower:
    """An adapter that classifies tokens is MedS3's unless `family` says that it is TRL's."""
    commit = commit_of(path, "adapter_config.json", revision)
    adapter = adapters.local(path, commit)
    adapters.check(adapter)
    base = base or adapters.base_of(adapter)
    try:
        check_path(base)
    except CheckpointError as error:
        raise CheckpointError(f"the base of the adapter {path}: {error}; say it: from_pretrained(..., base=)") from None
    for below in merge:
        check_path(below)
    model = adapters.read(adapter, base, merge, dtype)
    place = adapters.tokenizer_of(adapter, base)
    try:
        tokenizer = pretrained.load_tokenizer(place)
    except WeightsError as error:
        raise CheckpointError(f"the adapter {path}: {error}") from error
    if family is None and adapters.task_of(adapter) == "TOKEN_CLS":
        family = "meds3"
    detected = family or _detected(path, [type(model).__name__], tokenizer)
    return TextTower(model, tokenizer, detected, ModelSource.of(path, commit))


def _detected(path: str | Path, architectures: Sequence[str], tokenizer: Any) -> FamilyName:
    detected = families.detect(architectures, tokenizer)
    if detected is None:
        raise CheckpointError(
            f"{path} fits no family of reward models: its architecture is {', '.join(architectures) or 'not stated'}"
            f"{'' if tokenizer.chat_template else ', its tokenizer has no chat template'}. Looked for: a causal "
            'language model with a chat template (medprm) or the token "ки" (math_shepherd), a ...ProcessRewardModel '
            "(qwen_prm), a ...ForTokenClassification (token_classification), a peft adapter for token classification "
            "(meds3), a LlavaForConditionalGeneration (medprm_vision), an InternVLForConditionalGeneration (visualprm)"
        )
    return detected


_ORIGINAL_LAYOUTS = ("InternVLChat", "InternVLReward", "LlavaLlama", "LlavaMistral")


def _refuse_original_layout(path: str | Path, commit: str | None) -> None:
    """Say what to do about InternVL's and LLaVA's own checkpoints, which come with code of their own to be run."""
    config, _ = PreTrainedConfig.get_config_dict(path, revision=commit)
    names = config.get("architectures") or []
    if any(name.startswith(_ORIGINAL_LAYOUTS) for name in names):
        raise CheckpointError(
            f"{path} is in its authors' own layout ({', '.join(names)}), which needs code from the checkpoint; none is "
            "ever run. Convert it to the layout of transformers (its repository has a convert_*_weights_to_hf.py for "
            "each of InternVL and LLaVA), or take a checkpoint whose name ends in -hf"
        )


def _read_gguf(
    path: str | Path, gguf_file: str, dtype: Dtype, family: FamilyName | None, revision: str | None
) -> TextTower:
    from medmm_ray.engines.gguf import read_gguf

    try:
        file = str(cached_file(str(path), gguf_file, revision=revision))
        model, tokenizer = read_gguf(file, dtype, attn_implementation=attention.NAME)
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path}: {gguf_file} is not a language model that can be read: {error}") from error
    detected = family or families.detect(["ForCausalLM"], tokenizer)
    if detected is None or _MODELS[detected] is not AutoModelForCausalLM:
        raise CheckpointError(
            f"{path}: {gguf_file} cannot be read as a reward model of the family {detected}: a GGUF holds a language "
            'model alone. Expected one with a chat template (medprm) or the token "ки" (math_shepherd)'
        )
    commit = commit_of(path, gguf_file, revision)
    return TextTower(model, tokenizer, detected, ModelSource(str(path), commit) if commit else ModelSource.of(file))


_MODELS: dict[FamilyName, Any] = {
    "medprm": AutoModelForCausalLM,
    "math_shepherd": AutoModelForCausalLM,
    "qwen_prm": families.QwenProcessRewardModel,
    "token_classification": AutoModelForTokenClassification,
    "meds3": AutoModelForTokenClassification,
    "medprm_vision": AutoModelForImageTextToText,
    "visualprm": AutoModelForImageTextToText,
}

# A classifier of tokens that was made of a language model may keep that one's head, which it never reads.
_UNUSED: dict[FamilyName, tuple[str, ...]] = {
    "qwen_prm": ("lm_head.",),
    "token_classification": ("lm_head.",),
    "meds3": ("lm_head.",),
}


def _add_tag(text_model: Any, tokenizer: Any) -> None:
    """Make `TAG` one token, its embedding (and head row) the mean of the others."""
    if len(tokenizer(TAG, add_special_tokens=False)["input_ids"]) == 1:
        return
    # Special, as Med-PRM's code adds it: found in the text before anything is split.
    tokenizer.add_tokens([AddedToken(TAG, special=True, normalized=False)], special_tokens=True)
    if len(tokenizer) > text_model.get_input_embeddings().num_embeddings:
        pretrained.resize_vocabulary(text_model, len(tokenizer))


def load_without_weights(path: str | Path, family: FamilyName | None, dtype: str) -> TextTower:
    """A text tower without its weights (they are on the meta device, in `dtype`), for an engine that has them.

    Refuses what such an engine cannot read from `path`: adapters, images, a tag that would have to be added.
    """
    if adapters.is_adapter(path):
        raise CheckpointError(f"{path} is an adapter, and vLLM reads whole checkpoints; {_SAVE_IT}")
    commit, config, tokenizer = _config_and_tokenizer(path, None)
    detected = family or _detected(path, config.architectures or [], tokenizer)
    if detected in families.VISION_LANGUAGE:
        raise CheckpointError(
            f"{path} is a vision-language model (family {detected}); vLLM scores texts alone: take engine=torch"
        )
    if detected == "medprm" and len(tokenizer(TAG, add_special_tokens=False)["input_ids"]) != 1:
        raise CheckpointError(f"{path}: its tokenizer has no token {TAG!r}, and vLLM cannot add one; {_SAVE_IT}")
    # On the meta device: the shapes and names of the weights, and none of their memory.
    maker = _MODELS[detected]
    with torch.device("meta"):
        model = maker(config) if detected == "qwen_prm" else maker.from_config(config)
        model.to(getattr(torch, dtype))
    check_vocabulary(model, tokenizer)
    if not hasattr(config, "quantization_config"):  # else the files have an engine's own names
        try:
            folder = pretrained.checkpoint_folder(path, commit)
            pretrained.check_weights(type(model), config, folder, unexpected=_UNUSED.get(detected, ()))
        except WeightsError as error:
            raise CheckpointError(f"{error} (read as the family {detected})") from error
    return TextTower(model, tokenizer, detected, ModelSource.of(path, commit))


def load_head_rows(path: str | Path, model: Any, rows: Sequence[int]) -> torch.Tensor:
    """Some rows of a causal language model's head, of its files alone, in the model's number format [rows, width]."""
    name = "model.embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"
    index = cached_file(str(path), "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    # One file, or several with an index that says which has the head.
    file = "model.safetensors"
    if index:
        file = json.loads(Path(index).read_text())["weight_map"].get(name)
    try:
        with safe_open(cached_file(str(path), file), framework="pt") as weights:
            head_VD = weights.get_slice(name)
            return torch.stack([head_VD[row] for row in rows]).to(model.dtype)
    except (OSError, SafetensorError, TypeError) as error:
        raise CheckpointError(f"{path}: its head {name} cannot be read from safetensors files: {error}") from error


_SAVE_IT = "write one with RewardModel.from_pretrained(...).save_pretrained(folder) and name that folder"
