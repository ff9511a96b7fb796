"""A reward model as a folder: what is written, and how it is found again. Nothing is pickled.

config.json, *.safetensors, tokenizer   the text tower, as transformers and vLLM read it
reward_model.json                       format, the ids of tag, + and −, lengths, where both towers came from
fusion.safetensors, image_tower/        the image part, where there is one
README.md                               the model card
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from medmm_ray.engines.reward_model.fusion import Fusion, FusionConfig
from medmm_ray.engines.reward_model.packing import Fit

if TYPE_CHECKING:
    from medmm_ray.engines.reward_model.model import RewardModel

CONFIG = "reward_model.json"
FUSION = "fusion.safetensors"
TOWER = "image_tower"
FORMAT = 1
FAMILY = "medprm"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class CheckpointError(ValueError):
    """A checkpoint that is no reward model; the message says what was looked for."""


@dataclass(frozen=True)
class Saved:
    """What ``reward_model.json`` says."""

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
    if (saved["format"], saved["family"]) != (FORMAT, FAMILY):
        raise CheckpointError(
            f"{file}: format {saved['format']}, family {saved['family']!r}; this version reads {FORMAT}, {FAMILY!r}"
        )
    fusion = FusionConfig(**saved["fusion"]) if saved["fusion"] else None
    return Saved(saved["ids"], saved["max_length"], saved["reserve"], saved["fit"], fusion)


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
        "family": FAMILY,
        "ids": {"tag": model.tag_id, "plus": model.plus_id, "minus": model.minus_id},
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
