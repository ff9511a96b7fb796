"""A reward model as a folder: what is written, and how it is found again. Nothing is pickled.

config.json, *.safetensors, tokenizer   the text tower, as transformers and vLLM read it
reward_model.json                       format, the ids of tag, + and −, lengths, where both towers came from, figures
fusion.safetensors, image_tower/        the image part, where there is one
README.md                               the model card
"""

import json
import re
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer
from transformers.utils.hub import cached_file

from medmm_ray.engines.origin import Origin, commit_of
from medmm_ray.engines.reward_model import attention, card, families, hub
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


class CheckpointError(ValueError):
    """A checkpoint that is no reward model; the message says what was looked for."""


@dataclass(frozen=True)
class Saved:
    """What ``reward_model.json`` says."""

    family: FamilyName
    ids: dict[str, int]
    max_length: int
    reserve: int
    fit: Fit
    fusion: FusionConfig | None
    text_origin: Origin
    image_origin: Origin | None
    figures: dict[str, float]


def check_path(path: str | Path) -> None:
    """Raise where `path` is no folder and cannot be a hub id either."""
    if not Path(path).is_dir() and not _HUB_ID.fullmatch(str(path)):
        raise CheckpointError(f"model path {path} does not exist; expected a checkpoint folder or a hub id (org/name)")


def locate(path: str | Path, revision: str | None) -> str | Path:
    """Where `path` can be read: the local copy of a hub id that `RewardModel.push_to_hub` wrote, else as it is."""
    check_path(path)
    if revision is not None and Path(path).is_dir():
        raise CheckpointError(f"revision is {revision!r}, but {path} is a folder; only a hub id has revisions")
    try:
        return hub.fetched(path, CONFIG, revision)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be fetched from the hub: {error}") from error


def read(path: str | Path) -> Saved | None:
    """What a folder of `write` says of itself; None for any other checkpoint."""
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
    text, image = saved["text_tower"], saved["image_tower"]
    return Saved(
        saved["family"], saved["ids"], saved["max_length"], saved["reserve"], saved["fit"], fusion,
        Origin(text["source"], text["revision"]),
        Origin(image["source"], image["revision"]) if image else None,
        saved["figures"],
    )  # fmt: skip


@dataclass(frozen=True)
class Text:
    """A text tower as it was read."""

    model: Any
    tokenizer: Any
    family: FamilyName
    origin: Origin


def read_text(
    path: str | Path,
    dtype: torch.dtype,
    family: FamilyName | None,
    revision: str | None = None,
    gguf_file: str | None = None,
) -> Text:
    """The text tower and its family (detected where it is None), ready for shared-prefix reading."""
    if gguf_file is not None:
        return _read_gguf(path, gguf_file, dtype, family, revision)
    try:
        commit = commit_of(path, "config.json", revision)  # all is of one commit, whatever is pushed meanwhile
        config = AutoConfig.from_pretrained(path, revision=commit)
        tokenizer = AutoTokenizer.from_pretrained(path, revision=commit)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a language model that can be read: {error}") from error
    architectures = config.architectures or []
    found = family or families.detect(architectures, tokenizer)
    if found is None:
        raise CheckpointError(
            f"{path} fits no family of reward models: its architecture is {', '.join(architectures) or 'not stated'}"
            f"{'' if tokenizer.chat_template else ', its tokenizer has no chat template'}. Looked for: a causal "
            'language model with a chat template (medprm) or the token "ки" (math_shepherd), a ...ProcessRewardModel '
            "(qwen_prm), a ...ForTokenClassification (token_classification)"
        )
    try:
        model = _TEXT_MODELS[found].from_pretrained(
            path, revision=commit, dtype=dtype, attn_implementation=attention.NAME
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a reward model of the family {found}: {error}") from error
    return _ready(model, tokenizer, found, Origin.of(path, commit))


def _read_gguf(
    path: str | Path, gguf_file: str, dtype: torch.dtype, family: FamilyName | None, revision: str | None
) -> Text:
    from medmm_ray.engines.gguf import read_gguf

    try:
        file = str(cached_file(str(path), gguf_file, revision=revision))
        model, tokenizer = read_gguf(file, dtype, attn_implementation=attention.NAME)
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path}: {gguf_file} is not a language model that can be read: {error}") from error
    found = family or families.detect(["ForCausalLM"], tokenizer)
    if found is None or _TEXT_MODELS[found] is not AutoModelForCausalLM:
        raise CheckpointError(
            f"{path}: {gguf_file} cannot be read as a reward model of the family {found}: a GGUF holds a language "
            'model alone. Expected one with a chat template (medprm) or the token "ки" (math_shepherd)'
        )
    commit = commit_of(path, gguf_file, revision)
    return _ready(model, tokenizer, found, Origin(str(path), commit) if commit else Origin.of(file))


def _ready(model: Any, tokenizer: Any, family: FamilyName, origin: Origin) -> Text:
    check_vocabulary(model, tokenizer)
    if family == "medprm":
        _add_tag(model, tokenizer)
    return Text(model, tokenizer, family, origin)


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raise where the tokenizer gives ids that the model has no row for."""
    rows, entries = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if entries > rows:
        raise CheckpointError(
            f"the tokenizer has {entries} entries but the model's vocabulary {rows}; they are not of one checkpoint"
        )


_TEXT_MODELS: dict[FamilyName, Any] = {
    "medprm": AutoModelForCausalLM,
    "math_shepherd": AutoModelForCausalLM,
    "qwen_prm": families.QwenProcessRewardModel,
    "token_classification": AutoModelForTokenClassification,
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


def write(model: "RewardModel", folder: str | Path, figures: Mapping[str, float], name: str | None = None) -> None:
    """Write `model` to `folder`; the file that makes it a reward model comes last.

    `name` is what the card calls it: a hub id, by default the folder's name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.text_model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    if model.fusion is not None and model.image_tower is not None:
        save_file({k: v.detach().contiguous() for k, v in model.fusion.state_dict().items()}, folder / FUSION)
        model.image_tower.save_pretrained(tower_folder(folder))
    described = _describe(model, figures)
    (folder / "README.md").write_text(card.write(name or folder.resolve().name, described, model.family))
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n")


def push(
    model: "RewardModel",
    repo_id: str,
    figures: Mapping[str, float],
    private: bool | None,
    token: str | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Write `model` to a folder that lives as long as the upload; gives the commit's address."""
    with tempfile.TemporaryDirectory(prefix="reward-model-") as folder:
        write(model, folder, figures, repo_id)
        return hub.upload(Path(folder), repo_id, private, token, revision, commit_message)


def _describe(model: "RewardModel", figures: Mapping[str, float]) -> dict[str, Any]:
    tower = model.image_tower
    return {
        "format": FORMAT,
        "family": model.family.name,
        "ids": dict(model.family.ids),
        "max_length": model.max_length,
        "reserve": model.reserve,
        "fit": model.fit,
        "text_tower": {**asdict(model.text_origin), "architecture": type(model.text_model).__name__},
        "image_tower": tower and {**asdict(tower.origin), "width": tower.width, "image_size": tower.image_size},
        "fusion": asdict(model.fusion.config) if model.fusion else None,
        "figures": dict(figures),
    }
