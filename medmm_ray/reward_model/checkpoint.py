"""A reward model as a folder: what is written, and how it is found again. Nothing is pickled.

config.json, *.safetensors, tokenizer   the text tower, as transformers and vLLM read it
reward_model.json                       format, the ids of tag, + and −, lengths, what it was trained to read, how the
                                        chat template is used, where both towers came from, figures
fusion.safetensors, image_tower/        the image part, where there is one
README.md                               the model card
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from medmm_ray.data.hub import upload
from medmm_ray.engines import pretrained
from medmm_ray.engines.chat_template import ChatTemplate, TemplateUse
from medmm_ray.engines.model_source import ModelSource
from medmm_ray.engines.weights import WeightMismatch, WeightsError, check_file
from medmm_ray.reward_model import card, families, hub, text_tower
from medmm_ray.reward_model.errors import CheckpointError
from medmm_ray.reward_model.families import Family, FamilyName
from medmm_ray.reward_model.fusion import Fusion, FusionConfig
from medmm_ray.reward_model.packing import Fit
from medmm_ray.reward_model.vision_language import Vision

if TYPE_CHECKING:
    from medmm_ray.engines.image_tower import ImageTower

CONFIG = "reward_model.json"
FUSION = "fusion.safetensors"
TOWER = "image_tower"
FORMAT = 2
# What an earlier save left in a folder: a reader would find it beside the new files.
_OWNED = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors", FUSION, TOWER)


@dataclass(frozen=True)
class TrainedInputs:
    """What a model read beside question and solution when it was trained; None: it is not known."""

    num_documents: int | None = None
    """Retrieved documents that were offered, best first."""
    num_references: int | None = None
    """Similar images beside a question's own, most similar first."""


@dataclass(frozen=True)
class SavedConfig:
    """What ``reward_model.json`` says."""

    family: FamilyName
    ids: dict[str, int]
    max_length: int
    reserve: int
    fit: Fit
    fusion: FusionConfig | None
    text_origin: ModelSource
    image_origin: ModelSource | None
    figures: dict[str, float]
    template: TemplateUse | None
    system_prompt: str | None
    trained_inputs: TrainedInputs


class WritableModel(Protocol):
    """What is written of a `RewardModel`."""

    text_model: Any
    tokenizer: Any
    vision: Vision | None
    image_tower: "ImageTower | None"
    fusion: Fusion | None
    family: Family
    max_length: int
    reserve: int
    fit: Fit
    text_origin: ModelSource
    trained_inputs: TrainedInputs

    @property
    def system_prompt(self) -> str | None:
        """The instruction in the place of the family's own."""


def locate(path: str | Path, revision: str | None) -> str | Path:
    """The folder in which `path` can be read.

    A run's name of a result (``<run>/two_tower``) is followed, a URI is copied to this machine, a hub id that
    `RewardModel.push_to_hub` wrote is downloaded; anything else is given back as it is.
    """
    if "://" in str(path) or _names_a_result(Path(path)):
        path = _result(str(path))
    text_tower.check_path(path)
    if revision is not None and Path(path).is_dir():
        raise CheckpointError(f"revision is {revision!r}, but {path} is a folder; only a hub id has revisions")
    try:
        return hub.fetched(path, CONFIG, revision)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be fetched from the hub: {error}") from error


def _names_a_result(path: Path) -> bool:
    """Whether a run's pointer to its latest result lies there."""
    return ((path.parent if path.name == "latest" else path) / "latest.json").is_file()


def _result(name: str) -> str:
    """The folder on this machine of a URI or of a run's name of a result."""
    # Here, not above: whoever reads a plain folder needs torch and transformers alone.
    from medmm_ray.config import ConfigError
    from medmm_ray.engines.checkpoints import resolve

    try:
        return resolve(name)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def read(path: str | Path) -> SavedConfig | None:
    """What a folder of `write` says of itself; None for any other checkpoint."""
    file = Path(path) / CONFIG
    if not file.is_file():
        return None
    try:
        check_file(file)
        saved = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is no reward model that can be read: {error}") from error
    if saved["format"] != FORMAT or saved["family"] not in families.NAMES:
        raise CheckpointError(
            f"{file}: format {saved['format']}, family {saved['family']!r}; this version reads format {FORMAT} and the "
            f"families {', '.join(families.NAMES)}"
        )
    fusion = FusionConfig(**saved["fusion"]) if saved["fusion"] else None
    text, image = saved["text_tower"], saved["image_tower"]
    return SavedConfig(
        family=saved["family"],
        ids=saved["ids"],
        max_length=saved["max_length"],
        reserve=saved["reserve"],
        fit=saved["fit"],
        fusion=fusion,
        text_origin=ModelSource(text["source"], text["revision"]),
        image_origin=ModelSource(image["source"], image["revision"]) if image else None,
        figures=saved["figures"],
        template=_template_use(saved.get("template")),
        system_prompt=saved.get("system_prompt"),
        trained_inputs=TrainedInputs(**saved.get("trained_inputs", {})),
    )


def _template_use(saved: Mapping[str, Any] | None) -> TemplateUse | None:
    """None where the checkpoint was written before the use of its template was."""
    return TemplateUse(saved["date"], saved["folds_system"], tuple(saved["alters"])) if saved else None


def restore_template(path: str | Path, template: ChatTemplate, saved: TemplateUse) -> None:
    """Use `template` as it was used when the checkpoint was written; raises where it is not the same any more."""
    use = template.use
    now, then = ((u.folds_system, u.alters, u.date is None) for u in (use, saved))
    if now != then:
        raise CheckpointError(
            f"{path}: its chat template is now used as {use}, its {CONFIG} says {saved}; restore the template with "
            "which it was written, or save the model anew from its source"
        )
    template.use = saved


def tower_folder(path: str | Path) -> Path:
    """Where a checkpoint's image tower lies."""
    return Path(path) / TOWER


def load_fusion(path: str | Path, fusion: Fusion) -> None:
    """Read the fusion's weights; raises `CheckpointError` where they are not there, not whole or not the fusion's."""
    file = Path(path) / FUSION
    if not file.is_file():
        raise CheckpointError(
            f"{path}: its {CONFIG} tells of a fusion, and {FUSION} is not there; get the folder again"
        )
    try:
        check_file(file)
        weights = load_file(file)
        WeightMismatch.between(fusion.state_dict(), weights).check(file)
    except (WeightsError, SafetensorError) as error:
        raise CheckpointError(str(error)) from error
    fusion.load_state_dict(weights)


def write(model: WritableModel, folder: str | Path, figures: Mapping[str, float], name: str | None = None) -> None:
    """Write `model` to `folder`, whole or not at all; the file that makes it a reward model comes last.

    `name` is what the card calls it: a hub id, by default the folder's name.
    """
    described = _describe(model, figures)
    # A folder without its reward_model.json is none of ours: a save that was cut off is never read as whole.
    with pretrained.atomic_folder(Path(folder), last=CONFIG, owned=_OWNED) as new_folder:
        pretrained.save(model.text_model, new_folder)
        model.tokenizer.save_pretrained(new_folder)
        if model.vision is not None:
            model.vision.save_pretrained(new_folder)
        if model.fusion is not None and model.image_tower is not None:
            weights = {key: value.detach().contiguous() for key, value in model.fusion.state_dict().items()}
            save_file(weights, new_folder / FUSION)
            model.image_tower.save_pretrained(tower_folder(new_folder))
        card_text = card.write(name or Path(folder).resolve().name, described)
        (new_folder / "README.md").write_text(card_text)
        (new_folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n")


def push(
    model: WritableModel,
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
        return upload(Path(folder), repo_id, "model", private, token, revision, commit_message, hub.FILES)


def _describe(model: WritableModel, figures: Mapping[str, float]) -> dict[str, Any]:
    tower, template = model.image_tower, model.family.template
    return {
        "format": FORMAT,
        "family": model.family.name,
        "ids": dict(model.family.ids),
        "max_length": model.max_length,
        "reserve": model.reserve,
        "fit": model.fit,
        "template": template and asdict(template.use),
        "system_prompt": model.system_prompt,
        "trained_inputs": asdict(model.trained_inputs),
        "text_tower": {**asdict(model.text_origin), "architecture": type(model.text_model).__name__},
        "image_tower": tower and {**asdict(tower.origin), "width": tower.width, "image_size": tower.image_size},
        "fusion": asdict(model.fusion.config) if model.fusion else None,
        "figures": dict(figures),
    }
