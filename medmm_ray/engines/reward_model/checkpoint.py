"""A reward model as a folder: what is written, and how it is found again. Nothing is pickled.

config.json, *.safetensors, tokenizer   the text tower, as transformers and vLLM read it
reward_model.json                       format, the ids of tag, + and −, lengths, where both towers came from, figures
fusion.safetensors, image_tower/        the image part, where there is one
README.md                               the model card
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from medmm_ray.engines.origin import Origin
from medmm_ray.engines.reward_model import card, families, hub, text_tower
from medmm_ray.engines.reward_model.errors import CheckpointError
from medmm_ray.engines.reward_model.families import FamilyName
from medmm_ray.engines.reward_model.fusion import Fusion, FusionConfig
from medmm_ray.engines.reward_model.packing import Fit

if TYPE_CHECKING:
    from medmm_ray.engines.reward_model.model import RewardModel

CONFIG = "reward_model.json"
FUSION = "fusion.safetensors"
TOWER = "image_tower"
FORMAT = 2


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


def locate(path: str | Path, revision: str | None) -> str | Path:
    """Where `path` can be read: the local copy of a hub id that `RewardModel.push_to_hub` wrote, else as it is."""
    text_tower.check_path(path)
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
    if model.vision is not None:
        model.vision.save_pretrained(folder)
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
