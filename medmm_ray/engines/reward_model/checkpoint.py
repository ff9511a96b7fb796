"""A reward model as a folder: what is written, and how it is found again. Nothing is pickled.

config.json, *.safetensors, tokenizer   the text tower, as transformers and vLLM read it
reward_model.json                       format, the ids of tag, + and −, lengths, where both towers came from
fusion.safetensors, image_tower/        the image part, where there is one
README.md                               the model card
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
)

from medmm_ray.engines.reward_model import adapters, attention, families, vision
from medmm_ray.engines.reward_model.errors import CheckpointError
from medmm_ray.engines.reward_model.families import FamilyName
from medmm_ray.engines.reward_model.fusion import Fusion, FusionConfig
from medmm_ray.engines.reward_model.packing import Fit
from medmm_ray.text import TAG

if TYPE_CHECKING:
    from medmm_ray.engines.reward_model.model import RewardModel

CONFIG = "reward_model.json"
FUSION = "fusion.safetensors"
TOWER = "image_tower"
FORMAT = 1
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Saved:
    """What ``reward_model.json`` says."""

    family: FamilyName
    ids: dict[str, int]
    max_length: int
    reserve: int
    fit: Fit
    fusion: FusionConfig | None


def check_path(path: str | Path) -> None:
    """Raise where `path` is no folder and cannot be a hub id either."""
    if not Path(path).is_dir() and not _HUB_ID.fullmatch(str(path)):
        raise CheckpointError(f"model path {path} does not exist; expected a checkpoint folder or a hub id (org/name)")


def read(path: str | Path) -> Saved | None:
    """What a folder of `write` says of itself; None for any other checkpoint."""
    check_path(path)
    file = Path(path) / CONFIG
    if not file.is_file():
        return None
    saved = json.loads(file.read_text())
    if saved["format"] != FORMAT or saved["family"] not in families.NAMES:
        raise CheckpointError(
            f"{file}: format {saved['format']}, family {saved['family']!r}; this version reads format {FORMAT} and the "
            f"families {', '.join(families.NAMES)}"
        )
    fusion = FusionConfig(**saved["fusion"]) if saved["fusion"] else None
    return Saved(saved["family"], saved["ids"], saved["max_length"], saved["reserve"], saved["fit"], fusion)


def read_text(
    path: str | Path,
    dtype: torch.dtype,
    family: FamilyName | None,
    base: str | Path | None = None,
    merge: Sequence[str | Path] = (),
) -> tuple[Any, Any, FamilyName]:
    """The text tower, its tokenizer and its family (detected where it is None), ready for shared-prefix reading.

    `base` and `merge` are those of `adapters.read`, for a checkpoint that is an adapter.
    """
    if adapters.is_adapter(path):
        model, tokenizer, found = _read_adapter(path, dtype, family, base or adapters.base_of(path), merge)
    elif base or merge:
        raise CheckpointError(f"{path} is no adapter, so it takes no base= and no merge=; name the adapter's folder")
    else:
        model, tokenizer, found = _read_whole(path, dtype, family)
    if found in ("medprm", "medprm_vision"):
        _add_tag(model, tokenizer)
    return model, tokenizer, found


def _read_whole(path: str | Path, dtype: torch.dtype, family: FamilyName | None) -> tuple[Any, Any, FamilyName]:
    try:
        _refuse_original_layout(path)
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a language model that can be read: {error}") from error
    found = family or _detected(path, config.architectures or [], tokenizer)
    if found in families.SEEING:
        vision.check(path, config)
        tokenizer.chat_template = tokenizer.chat_template or vision.chat_template(path)
    try:
        model = _TEXT_MODELS[found].from_pretrained(path, dtype=dtype, attn_implementation=attention.NAME)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a reward model of the family {found}: {error}") from error
    return model, tokenizer, found


def _read_adapter(
    path: str | Path, dtype: torch.dtype, family: FamilyName | None, base: str | Path, merge: Sequence[str | Path]
) -> tuple[Any, Any, FamilyName]:
    """An adapter that classifies tokens is MedS3's unless `family` says that it is TRL's."""
    try:
        check_path(base)
    except CheckpointError as error:
        raise CheckpointError(f"the base of the adapter {path}: {error}; say it: from_pretrained(..., base=)") from None
    for below in merge:
        check_path(below)
    model = adapters.read(path, base, merge, dtype)
    place = adapters.tokenizer_of(path, base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{place} has no tokenizer that can be read: {error}") from error
    if family is None and adapters.task_of(path) == "TOKEN_CLS":
        return model, tokenizer, "meds3"
    return model, tokenizer, family or _detected(path, [type(model).__name__], tokenizer)


def _detected(path: str | Path, architectures: Sequence[str], tokenizer: Any) -> FamilyName:
    found = families.detect(architectures, tokenizer)
    if found is None:
        raise CheckpointError(
            f"{path} fits no family of reward models: its architecture is {', '.join(architectures) or 'not stated'}"
            f"{'' if tokenizer.chat_template else ', its tokenizer has no chat template'}. Looked for: a causal "
            'language model with a chat template (medprm) or the token "ки" (math_shepherd), a ...ProcessRewardModel '
            "(qwen_prm), a ...ForTokenClassification (token_classification), a peft adapter for token classification "
            "(meds3), a LlavaForConditionalGeneration (medprm_vision), an InternVLForConditionalGeneration (visualprm)"
        )
    return found


def _refuse_original_layout(path: str | Path) -> None:
    """Say what to do about InternVL's and LLaVA's own checkpoints, which come with code of their own to be run."""
    described, _ = PreTrainedConfig.get_config_dict(path)
    names = described.get("architectures") or []
    if any(name.startswith(("InternVLChat", "InternVLReward", "LlavaLlama", "LlavaMistral")) for name in names):
        raise CheckpointError(
            f"{path} is in its authors' own layout ({', '.join(names)}), which needs code from the checkpoint; none is "
            "ever run. Convert it to the layout of transformers (its repository has a convert_*_weights_to_hf.py for "
            "each of InternVL and LLaVA), or take a checkpoint whose name ends in -hf"
        )


_TEXT_MODELS: dict[FamilyName, Any] = {
    "medprm": AutoModelForCausalLM,
    "math_shepherd": AutoModelForCausalLM,
    "qwen_prm": families.QwenProcessRewardModel,
    "token_classification": AutoModelForTokenClassification,
    "meds3": AutoModelForTokenClassification,
    "medprm_vision": AutoModelForImageTextToText,
    "visualprm": AutoModelForImageTextToText,
}


def _add_tag(text_model: Any, tokenizer: Any) -> None:
    """Make `TAG` one token, its embedding (and head row) the mean of the others."""
    if len(tokenizer(TAG, add_special_tokens=False)["input_ids"]) == 1:
        return
    tokenizer.add_tokens([AddedToken(TAG, special=True, normalized=False)], special_tokens=True)
    rows = text_model.get_input_embeddings().num_embeddings
    if len(tokenizer) <= rows:
        return
    text_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for part in (text_model.get_input_embeddings(), text_model.get_output_embeddings()):
            part.weight[rows:] = part.weight[:rows].float().mean(dim=0).to(part.weight.dtype)


def tower_folder(path: str | Path) -> Path:
    return Path(path) / TOWER


def load_fusion(path: str | Path, fusion: Fusion) -> None:
    fusion.load_state_dict(load_file(Path(path) / FUSION))


def write(model: "RewardModel", folder: str | Path, figures: Mapping[str, float]) -> None:
    """Write `model` to `folder`; the file that makes it a reward model comes last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.text_model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    if model.vision is not None:
        model.vision.save_pretrained(folder)
    if model.fusion is not None and model.image_tower is not None:
        save_file({k: v.detach().contiguous() for k, v in model.fusion.state_dict().items()}, folder / FUSION)
        model.image_tower.save_pretrained(tower_folder(folder))
    described = _describe(model)
    (folder / "README.md").write_text(_card(described, figures))
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n")


def _describe(model: "RewardModel") -> dict[str, Any]:
    text_config = model.text_model.config
    tower = model.image_tower
    return {
        "format": FORMAT,
        "family": model.family.name,
        "ids": dict(model.family.ids),
        "max_length": model.max_length,
        "reserve": model.reserve,
        "fit": model.fit,
        "text_tower": {"source": text_config.name_or_path, "architecture": type(model.text_model).__name__},
        "image_tower": tower and {"source": tower.path, "width": tower.width, "image_size": tower.image_size},
        "fusion": asdict(model.fusion.config) if model.fusion else None,
    }


def _card(described: Mapping[str, Any], figures: Mapping[str, float]) -> str:
    towers = "text and image" if described["fusion"] else "text"
    lines = [
        "---",
        "library_name: transformers",
        "tags: [process-reward-model, medical]",
        "---",
        "",
        "# Process reward model",
        "",
        f"Scores each step of a solution to a medical question ({towers}), as log-odds that the step is right.",
        "",
        "```python",
        "from medmm_ray.engines.reward_model import RewardModel",
        "",
        'model = RewardModel.from_pretrained("path/to/this/folder")',
        'scores = model.score(question, ["Step 1: … Step 2: … the answer is (B)."], documents=[…], image=picture)',
        "scores[0].plus_probs",
        "```",
        "",
        f"Format: Med-PRM's (arXiv 2506.11474). Text tower: {described['text_tower']['architecture']}.",
    ]
    if described["image_tower"]:
        lines.append(f"Image tower: {described['image_tower']['image_size']} pixels. Fusion: {described['fusion']}.")
    if figures:
        lines += ["", "| measured | value |", "|---|---|", *(f"| {k} | {v:.4g} |" for k, v in figures.items())]
    lines += ["", "For research; it ranks candidate answers and is no medical device.", ""]
    return "\n".join(lines)
