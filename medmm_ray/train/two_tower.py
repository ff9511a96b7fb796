"""Stage `two_tower`: the image part of a reward model, trained on the cached states of its frozen text tower.

Enters: states (text-tower states at the tags, step summaries, text log-odds), labels, the questions' images and their
reference images. Leaves: the whole `RewardModel` folder. The text tower never runs: it is constant, and its part of the
log-odds is in the states. A frozen image tower runs once an image.

Legend: T tags, D text width, B images, W image width, P patches.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from medmm_ray.config import execution
from medmm_ray.engines.checkpoints import resolve
from medmm_ray.records import Labels, States
from medmm_ray.tables import Table
from medmm_ray.targets import AfterFirstError, LabelPolicy, Target, targets
from medmm_ray.train.image_text import augment
from medmm_ray.train.labelled import group_labels
from medmm_ray.train.launch import fit
from medmm_ray.train.loop import Stage, TrainConfig
from medmm_ray.train.policy import read_parquet
from medmm_ray.train.schedule import held_out
from medmm_ray.train.text_prm import validation_figures, weighted_loss

if TYPE_CHECKING:
    import torch

    from medmm_ray.engines.image_tower import ImageTower
    from medmm_ray.engines.reward_model import Fusion, ImageFeatures

SCHEMA = pa.schema(
    {
        "question_id": pa.string(),
        "diagnosis": pa.string(),
        "image_uris": pa.list_(pa.string()),
        "reference_uris": pa.list_(pa.string()),
        "solution_ids": pa.list_(pa.string()),
        "targets": pa.list_(pa.list_(pa.float64())),
    }
)


class TwoTowerConfig(TrainConfig):
    """Training of fusion and image tower."""

    label_policy: LabelPolicy = "hybrid"
    """How label rows become targets, see targets.py."""
    after_first_error: AfterFirstError = "collapse"
    """What a step behind the first wrong one trains as: wrong, as labelled, or not at all."""
    tokens: Literal["pooled", "patches", "both"] = "pooled"
    """Which image tokens the fusion looks at. The pooled one is enough on phantoms (step AUROC .967, patches .962)."""
    summary: bool = True
    """The query also carries the mean state of the step's tokens (.967 against .947 without)."""
    width: int | None = None
    """Width of the fusion; null: the text tower's."""
    num_heads: int = 4
    """Attention heads of the fusion."""
    num_references: int = 3
    """Reference images (similar training cases) that are looked at beside the question's own; 0: none."""
    learning_rate: float = 1e-4
    """Highest learning rate of the fusion. Short runs take 1e-3: at 1e-4, 240 updates are far from enough."""
    image_learning_rate: float = 1e-5
    """Highest learning rate of the image tower, where it is not frozen."""
    freeze_image_tower: bool = True
    """Keep the image tower as it is: its tokens are computed once."""
    augment: bool = False
    """Show the pictures moved and brighter or darker. A frozen tower caches `augmented_views` of each."""
    augmented_views: int = 4
    """Views of each picture that a frozen tower caches, where `augment`."""
    max_shift: int = 3
    """Augmentation: pictures move by up to so many pixels."""
    max_brightness: float = 0.1
    """Augmentation: brightness changes by up to this share of the full range."""
    swapped_share: float = 0.0
    """Share of questions shown with the image of another diagnosis: their right steps then train as wrong, and nothing
    is said of the others."""
    epochs: int = 5
    """Times that every solution is seen."""
    batch_size: int = 64
    """Solutions of one update, over all workers; a question's solutions stay together."""
    validation_fraction: float = 0.1
    """Share of the training questions held out, to measure the step AUROC and to keep the best epoch."""
    micro_batch_tokens: int = execution(65536)
    """Steps (tags) of one forward pass of a worker; one question at least."""


def train_two_tower(
    config: TwoTowerConfig,
    states: Table,
    labels: Sequence[pa.Table],
    questions: pa.Table,
    images: pa.Table,
    evidence: pa.Table,
    text_prm: str,
    image_tower: str,
    folder: str,
    name: str,
    solutions: pa.Table | None = None,
) -> dict[str, float]:
    """Train the image part under Ray Train and leave the whole reward model in `folder`; gives `launch.figures`.

    `states` is read by the workers, not by the driver. `text_prm` and `image_tower` are names for
    `checkpoints.resolve`. `solutions` are needed by the label policy ``outcome`` alone.
    """
    if config.label_policy == "outcome" and solutions is None:
        raise ValueError("label policy 'outcome' needs the table solutions: it says which final answers are right")
    held = states.to_arrow(["question_id", "solution_id", "num_steps", "error"])
    rows = illustrated_questions(config, held, group_labels(labels), questions, images, evidence, solutions)
    if rows.num_rows == 0:
        raise ValueError(
            f"train_two_tower: no training question has an image, states and a target ({held.num_rows} states, label "
            f"policy {config.label_policy!r}). Look at the tables states and labels."
        )
    inputs = {"states": states.uri, "text_prm": text_prm, "image_tower": image_tower}
    return fit(TwoTowerStage, config, {"questions": rows}, inputs, folder, name)


def illustrated_questions(
    config: TwoTowerConfig,
    states: pa.Table,
    labels: Mapping[str, Sequence[Labels]],
    questions: pa.Table,
    images: pa.Table,
    evidence: pa.Table,
    solutions: pa.Table | None = None,
) -> pa.Table:
    """One row a training question that has an image, with the targets of its solutions (`SCHEMA`)."""
    by_image = {i["image_id"]: i for i in images.to_pylist() if i["error"] is None}
    references = {
        row["question_id"]: [image["uri"] for image in row["images"][: config.num_references]]
        for row in evidence.to_pylist()
        if row["error"] is None
    }
    correct: dict[str, bool | None] = {
        solution["solution_id"]: solution["correct"]
        for row in (solutions.to_pylist() if solutions is not None else [])
        for solution in row["solutions"]
    }
    aims: dict[str, dict[str, list[Target]]] = {}
    for row in states.to_pylist():
        if row["error"] is None:
            name = row["solution_id"]
            own = targets(
                config.label_policy,
                labels.get(name, []),
                row["num_steps"],
                config.after_first_error,
                correct.get(name),
            )
            if any(aim is not None for aim in own):
                aims.setdefault(row["question_id"], {})[name] = own
    rows = []
    for question in questions.to_pylist():
        name = question["question_id"]
        own_images = [by_image[i] for i in question["image_ids"] if i in by_image]
        if question["split"] == "train" and question["error"] is None and own_images and name in aims:
            ids = sorted(aims[name])
            rows.append(
                {
                    "question_id": name,
                    "diagnosis": own_images[0]["diagnosis"],
                    "image_uris": [image["uri"] for image in own_images],
                    "reference_uris": references.get(name, []),
                    "solution_ids": ids,
                    "targets": [aims[name][i] for i in ids],
                }
            )
    return pa.Table.from_pylist(sorted(rows, key=lambda r: str(r["question_id"])), schema=SCHEMA)


@dataclass(frozen=True)
class Cached:
    """One question's constants: states and summaries of all its tags, text log-odds, targets and weights."""

    states_TD: "torch.Tensor"
    summaries_TD: "torch.Tensor"
    log_odds_T: "torch.Tensor"
    targets_T: "torch.Tensor"
    weights_T: "torch.Tensor"
    num_solutions: int


class TwoTowerStage(Stage):
    """Cached questions, their images, and the part of the reward model that looks at them."""

    padded = False

    def __init__(self, config: TwoTowerConfig, inputs: dict[str, str], device: str) -> None:
        import torch

        from medmm_ray.engines.reward_model import FusionConfig, RewardModel

        self.config, self.device, self.budget = config, device, config.micro_batch_tokens
        rows = read_parquet(inputs["questions"]).to_pylist()
        self.rows = rows
        self.names = [row["question_id"] for row in rows]
        self.cached, dtype = read_states(inputs["states"], rows)
        self.model = RewardModel.from_pretrained(resolve(inputs["text_prm"]), dtype=dtype)
        torch.manual_seed(config.seed)
        self.model.add_image_tower(
            resolve(inputs["image_tower"]),
            FusionConfig(tokens=config.tokens, summary=config.summary, width=config.width, num_heads=config.num_heads),
        )
        assert self.model.image_tower is not None
        assert self.model.fusion is not None
        self.tower: ImageTower = self.model.image_tower
        self.fusion: Fusion = self.model.fusion
        self.tower.requires_grad_(not config.freeze_image_tower)
        self.module = torch.nn.ModuleDict({"image_tower": self.tower, "fusion": self.fusion})
        with torch.no_grad():  # linear, so its values on the unit vectors are all of it
            self.head_D = self.model.head_log_odds(torch.eye(self.model.hidden_size)).to(device)
        self.held_out = held_out(self.names, config.validation_fraction, config.seed)
        self.sizes = [
            0 if name in self.held_out else c.num_solutions for name, c in zip(self.names, self.cached, strict=True)
        ]
        self.costs = [len(c.targets_T) for c in self.cached]
        self.uris = sorted({uri for row in rows for uri in (*row["image_uris"], *row["reference_uris"])})
        self._load_images()
        self._calibrate()

    def _calibrate(self, most: int = 20_000) -> None:
        """Fit the fusion's first weights to the training data: to about `most` tags, and to all pictures."""
        import torch

        from medmm_ray.train.calibrate import calibrate

        units = [u for u, size in enumerate(self.sizes) if size]
        number = max(1, most * len(units) // max(1, sum(self.costs[u] for u in units)))
        cached = [self.cached[u] for u in random.Random(self.config.seed).sample(units, min(number, len(units)))]
        if not cached:
            return
        pooled_BW, patches_BPW = self.views[0] if self.views else self._encode_all(0)
        tokens = {"pooled": [pooled_BW], "patches": [], "both": [pooled_BW]}[self.config.tokens]
        if patches_BPW is not None:
            tokens.append(patches_BPW.flatten(0, 1))
        calibrate(
            self.fusion.to(self.device),
            torch.cat([c.states_TD for c in cached]).to(self.device, torch.float32),
            torch.cat([c.summaries_TD for c in cached]).to(self.device, torch.float32),
            torch.cat(tokens),
        )

    def learning_rates(self) -> dict[str, float]:
        return {"image_tower.": self.config.image_learning_rate}

    # Images

    def _load_images(self) -> None:
        """The pixels of all images, or, of a frozen tower, their tokens: several views, the first one as it is."""
        import torch

        from medmm_ray.engines.images import open_image

        self.index = {uri: i for i, uri in enumerate(self.uris)}
        self.pixels = [self.tower.preprocess(open_image(uri)) for uri in self.uris]
        self.views: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self.tower.to(self.device).eval()
        if self.config.freeze_image_tower:
            for view in range(self.config.augmented_views if self.config.augment else 1):
                self.views.append(self._encode_all(view))
            self.pixels = []

    def _encode_all(self, view: int, batch_size: int = 64) -> "tuple[torch.Tensor, torch.Tensor | None]":
        import torch

        pooled, patches = [], []
        for start in range(0, len(self.uris), batch_size):
            uris = self.uris[start : start + batch_size]
            with torch.no_grad():
                tokens = self.tower(torch.stack([self._view(uri, view) for uri in uris]).to(self.device))
            pooled.append(tokens.pooled_BD)
            if self.fusion.reads_patches:
                patches.append(tokens.patches_BPD)
        return torch.cat(pooled), torch.cat(patches) if patches else None

    def _view(self, uri: str, view: int) -> "torch.Tensor":
        """A picture's pixels, moved and brightened where `view` is not 0."""
        pixels_3HW = self.pixels[self.index[uri]]
        if not self.config.augment or view == 0:
            return pixels_3HW
        rng = random.Random(f"{self.config.seed}/{view}/{self.index[uri]}")
        return augment(pixels_3HW, rng, self.config.max_shift, self.config.max_brightness)

    def _features(self, shown: Sequence[int], owners: Sequence[int], view: int) -> "ImageFeatures":
        """Image tokens for questions `owners`, each seeing the own images of question ``shown`` and its own references.

        `view` 0 is the picture as it is; a trained tower runs here, on each distinct picture once.
        """
        import torch

        from medmm_ray.engines.reward_model import ImageFeatures

        own = [self.rows[q]["image_uris"] for q in shown]
        more = [self.rows[q]["reference_uris"] for q in owners]
        if self.config.freeze_image_tower:
            pooled_BW, patches_BPW = self.views[view % len(self.views)]
            place: Mapping[str, int] = self.index
        else:
            uris = sorted({uri for group in (*own, *more) for uri in group})
            place = {uri: i for i, uri in enumerate(uris)}
            dtype = next(self.tower.parameters()).dtype
            tokens = self.tower(torch.stack([self._view(uri, view) for uri in uris]).to(self.device, dtype))
            pooled_BW, patches_BPW = tokens.pooled_BD, tokens.patches_BPD if self.fusion.reads_patches else None
        return ImageFeatures.gather(
            pooled_BW, patches_BPW, [[place[u] for u in g] for g in own], [[place[u] for u in g] for g in more]
        )

    # Loss

    def _log_odds(self, units: Sequence[int], shown: Sequence[int], view: int) -> "torch.Tensor":
        """Log-odds of all tags of these questions [T]: the text's, which is cached, and the image's."""
        import torch

        cached = [self.cached[u] for u in units]
        counts = torch.tensor([len(c.targets_T) for c in cached])
        question_T = torch.repeat_interleave(torch.arange(len(units)), counts).to(self.device)
        delta_TD = self.fusion(
            torch.cat([c.states_TD for c in cached]).to(self.device),
            torch.cat([c.summaries_TD for c in cached]).to(self.device),
            self._features(shown, units, view),
            question_T,
        )
        log_odds_T: torch.Tensor = torch.cat([c.log_odds_T for c in cached]).to(self.device)
        return log_odds_T.add(delta_TD.float() @ self.head_D)

    def loss(self, units: Sequence[int], epoch: int) -> "torch.Tensor":
        """Sum over solutions of the mean two-class loss of their labelled steps."""
        import torch

        shown, targets, weights = [], [], []
        for unit in units:
            cached, other = self.cached[unit], self._swapped(unit, epoch)
            shown.append(unit if other is None else other)
            targets.append(cached.targets_T if other is None else torch.zeros_like(cached.targets_T))
            weights.append(cached.weights_T if other is None else cached.weights_T * (cached.targets_T >= 0.5))
        log_odds_T = self._log_odds(units, shown, view=epoch)
        return weighted_loss(log_odds_T, torch.cat(targets).to(self.device), torch.cat(weights).to(self.device))

    def _swapped(self, unit: int, epoch: int) -> int | None:
        """The question whose image is shown instead, one of another diagnosis; None: its own."""
        rng = random.Random(f"{self.config.seed}/{epoch}/{self.names[unit]}")
        if rng.random() >= self.config.swapped_share:
            return None
        own = self.rows[unit]["diagnosis"]
        others = [q for q, row in enumerate(self.rows) if row["diagnosis"] != own and self.sizes[q]]
        return rng.choice(others) if others else None

    def validate(self) -> dict[str, float]:
        """Step AUROC on the held-out questions, with the images and by the text alone."""
        scores: list[float] = []
        text: list[float] = []
        right: list[bool] = []
        for unit, name in enumerate(self.names):
            if name in self.held_out:
                cached = self.cached[unit]
                labelled_T = cached.weights_T > 0
                scores += self._log_odds([unit], [unit], view=0).cpu()[labelled_T].tolist()
                text += cached.log_odds_T[labelled_T].tolist()
                right += (cached.targets_T[labelled_T] >= 0.5).tolist()
        by_text = validation_figures(text, right)
        more = {"validation_auroc_text_only": by_text["validation_auroc"]} if by_text else {}
        return validation_figures(scores, right) | more

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)


def read_states(uri: str, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Cached], str]:
    """The states of each row's solutions, in its order, and their dtype."""
    import torch

    from medmm_ray.engines.reward_model.states import from_bytes

    wanted = {name for row in rows for name in row["solution_ids"]}
    held: dict[str, dict[str, Any]] = {}
    dtypes = set()
    columns = ["solution_id", "num_steps", "hidden_size", "dtype", "states", "summaries", "text_log_odds"]
    for batch in Table(uri, States).to_arrow(columns).to_batches():
        for row in batch.to_pylist():
            if row["solution_id"] in wanted:
                held[row["solution_id"]] = row
                dtypes.add(row["dtype"])
    if len(dtypes) != 1:
        raise ValueError(f"{uri}: states of the dtypes {sorted(dtypes)}; expected one text tower's, of one dtype")
    cached = []
    for row in rows:
        own = [held[name] for name in row["solution_ids"]]
        aims = row["targets"]
        labelled = [sum(aim is not None for aim in a) for a in aims]
        cached.append(
            Cached(
                torch.cat([from_bytes(s["states"], s["num_steps"], s["hidden_size"], s["dtype"]) for s in own]),
                torch.cat([from_bytes(s["summaries"], s["num_steps"], s["hidden_size"], s["dtype"]) for s in own]),
                torch.tensor([value for s in own for value in s["text_log_odds"]]),
                torch.tensor([0.0 if aim is None else aim for a in aims for aim in a]),
                torch.tensor([0.0 if aim is None else 1 / n for a, n in zip(aims, labelled, strict=True) for aim in a]),
                len(own),
            )
        )
    return cached, dtypes.pop()
