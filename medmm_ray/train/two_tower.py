"""Stage `two_tower`: the image part of a reward model, trained on the cached states of its frozen text tower.

Enters: states (text-tower states at the tags, step summaries, text log-odds), labels, the questions' images and their
reference images. Leaves: the whole `RewardModel` folder. The text tower never runs: it is constant, and its part of the
log-odds is in the states. A frozen image tower runs once an image.

Legend: T tags, D text width, B images, W image width, P patches.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
from pydantic import Field

from medmm_ray.config import execution
from medmm_ray.data.tables import Table
from medmm_ray.engines.checkpoints import resolve
from medmm_ray.stats.decoders import aggregate, expected_best, expected_oracle
from medmm_ray.stats.targets import AfterFirstError, LabelPolicy, checked_consensus_counts
from medmm_ray.train.image_text import augment
from medmm_ray.train.launch import fit, read_input
from medmm_ray.train.loop import Stage, TrainConfig
from medmm_ray.train.schedule import held_out
from medmm_ray.train.text_prm import validation_figures, weighted_loss
from medmm_ray.train.text_prm_data import group_labels
from medmm_ray.train.two_tower_data import (
    class_weights,
    labels_of_states,
    load_examples,
    positive_rate,
    questions_with_images,
)

if TYPE_CHECKING:
    import torch

    from medmm_ray.engines.image_tower import ImageTower
    from medmm_ray.reward_model import Fusion, ImageFeatures

VERSION = 2  # of what a step makes: raise it when the same config makes something else


class TwoTowerConfig(TrainConfig):
    """Training of fusion and image tower."""

    label_policy: LabelPolicy = "hybrid"
    """How label rows become targets, see targets.py."""
    after_first_error: AfterFirstError = "collapse"
    """What a step behind the first wrong one trains as: wrong, as labelled, or not at all."""
    tokens: Literal["pooled", "patches", "both"] = "pooled"
    """Which image tokens the fusion looks at. On hard phantoms (docs/two_tower_arms.md) the step AUROC is .781 ± .007
    with the pooled one, .791 ± .010 with both, .729 ± .014 with patches."""
    summary: bool = True
    """The query also carries the mean state of the step's tokens (.781 ± .007 against .621 ± .012 without)."""
    width: int | None = None
    """Width of the fusion; null: the text tower's."""
    num_heads: int = 4
    """Attention heads of the fusion."""
    num_references: int = 3
    """Reference images (similar training cases) that are looked at beside the question's own; 0: none. On hard phantoms
    they made no difference (.765 ± .010 with three). Score with as many."""
    learning_rate: float = Field(1e-4, gt=0)
    """Highest learning rate of the fusion. Short runs take 1e-3: at 1e-4, 240 updates are far from enough."""
    image_learning_rate: float = Field(1e-5, ge=0)
    """Highest learning rate of the image tower, where it is not frozen."""
    freeze_image_tower: bool = True
    """Keep the image tower as it is: its tokens are computed once."""
    augment: bool = False
    """Show the pictures moved and brighter or darker. A frozen tower caches `augmented_views` of each."""
    augmented_views: int = Field(4, ge=1)
    """Views of each picture that a frozen tower caches, where `augment`."""
    max_shift: int = Field(3, ge=0)
    """Augmentation: pictures move by up to so many pixels."""
    max_brightness: float = Field(0.1, ge=0, le=1)
    """Augmentation: brightness changes by up to this share of the full range."""
    swapped_share: float = Field(0.0, ge=0, le=1)
    """Share of questions shown with the image of another diagnosis: their right steps then train as wrong, and nothing
    is said of the others. On hard phantoms a quarter of them costs .043 ± .019: two diagnoses may share a finding."""
    class_balance: Literal["none", "balanced"] = "none"
    """balanced: right and wrong steps weigh the same in the loss, however rare one of them is; the weights of all
    solutions together stay as they are. none: a step weighs the same, right or wrong."""
    epochs: int = Field(5, ge=1)
    """Times that every solution is seen."""
    batch_size: int = Field(64, ge=1)
    """Solutions of one update, over all workers; a question's solutions stay together."""
    validation_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the training questions held out, to measure each epoch and to keep the best one."""
    select_by: Literal["step_auroc", "best_of_n"] = "step_auroc"
    """Which figure on the held-out questions picks the epoch that is kept: how well right steps are told from wrong
    ones, or the share of questions whose best solution (by its worst step) answers rightly."""
    micro_batch_tokens: int = execution(65536)
    """Steps (tags) of one forward pass of a worker; one question at least."""


def train_two_tower(
    config: TwoTowerConfig,
    states: Sequence[Table],
    labels: Sequence[pa.Table],
    questions: pa.Table,
    images: pa.Table,
    evidence: pa.Table,
    solutions: pa.Table,
    text_prm: str,
    image_tower: str,
    folder: str,
    name: str,
) -> dict[str, float]:
    """Train the image part under Ray Train and leave the whole reward model in `folder`; gives `launch.figures`.

    Each table of `states` is read by the workers, not by the driver; of `solutions` only which answers are right. A
    question may have rows of several sources in both. `text_prm` and `image_tower` are names for `checkpoints.resolve`.
    """
    held = pa.concat_tables(table.to_arrow(["question_id", "solution_id", "num_steps", "error"]) for table in states)
    grouped = group_labels(labels)
    settled: dict[str, float] = {}
    if config.label_policy == "consensus":
        settled = checked_consensus_counts(labels_of_states(held, grouped, solutions))
    rows = questions_with_images(config, held, grouped, questions, images, evidence, solutions)
    if rows.num_rows == 0:
        raise ValueError(
            f"train_two_tower: no training question has an image, states and a target ({held.num_rows} states, label "
            f"policy {config.label_policy!r}). Look at the tables states and labels."
        )
    inputs = {"text_prm": text_prm, "image_tower": image_tower}
    inputs |= {f"states-{number}": table.uri for number, table in enumerate(states)}
    return fit(TwoTowerStage, config, {"questions": rows}, inputs, folder, name) | settled


class TwoTowerStage(Stage):
    """Cached questions, their images, and the part of the reward model that looks at them."""

    padded = False

    def __init__(self, config: TwoTowerConfig, inputs: dict[str, str], device: str) -> None:
        import torch

        from medmm_ray.reward_model import FusionConfig, RewardModel

        self.config, self.device, self.budget = config, device, config.micro_batch_tokens
        rows = read_input(inputs["questions"]).to_pylist()
        self.rows = rows
        self.names = [row["question_id"] for row in rows]
        self.cached, dtype = load_examples([uri for name, uri in inputs.items() if name.startswith("states")], rows)
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
            0 if name in self.held_out else len(c.lengths) for name, c in zip(self.names, self.cached, strict=True)
        ]
        self.costs = [len(c.targets_T) for c in self.cached]
        self.right_steps = positive_rate([c for c, size in zip(self.cached, self.sizes, strict=True) if size])
        self.class_weights = _class_weights(config, self.right_steps)
        self.uris = sorted({uri for row in rows for uri in (*row["image_uris"], *row["reference_uris"])})
        self._load_images()
        self._calibrate()

    def _calibrate(self, most: int = 20_000) -> None:
        """Fit the fusion's first weights to the training data: to about `most` tags, and to all pictures."""
        import torch

        from medmm_ray.train.fusion_init import initialize_fusion

        units = [u for u, size in enumerate(self.sizes) if size]
        number = max(1, most * len(units) // max(1, sum(self.costs[u] for u in units)))
        cached = [self.cached[u] for u in random.Random(self.config.seed).sample(units, min(number, len(units)))]
        if not cached:
            return
        pooled_BW, patches_BPW = self.views[0] if self.views else self._encode_all(0)
        tokens = {"pooled": [pooled_BW], "patches": [], "both": [pooled_BW]}[self.config.tokens]
        if patches_BPW is not None:
            tokens.append(patches_BPW.flatten(0, 1))
        initialize_fusion(
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

        from medmm_ray.reward_model import ImageFeatures

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
        """Sum over solutions of the mean two-class loss of their labelled steps, each times its class's weight."""
        import torch

        shown, targets, weights = [], [], []
        of_right, of_wrong = self.class_weights
        for unit in units:
            cached, other = self.cached[unit], self._swapped(unit, epoch)
            shown.append(unit if other is None else other)
            targets.append(cached.targets_T if other is None else torch.zeros_like(cached.targets_T))
            weights.append(cached.weights_T if other is None else cached.weights_T * (cached.targets_T >= 0.5))
        log_odds_T = self._log_odds(units, shown, view=epoch)
        targets_T = torch.cat(targets)
        weights_T = torch.cat(weights) * (of_right * targets_T + of_wrong * (1 - targets_T))
        return weighted_loss(log_odds_T, targets_T.to(self.device), weights_T.to(self.device))

    def _swapped(self, unit: int, epoch: int) -> int | None:
        """The question whose image is shown instead, one of another diagnosis; None: its own."""
        rng = random.Random(f"{self.config.seed}/{epoch}/{self.names[unit]}")
        if rng.random() >= self.config.swapped_share:
            return None
        own = self.rows[unit]["diagnosis"]
        others = [q for q, row in enumerate(self.rows) if row["diagnosis"] != own and self.sizes[q]]
        return rng.choice(others) if others else None

    def validate(self) -> dict[str, float]:
        """On the held-out questions: step AUROC, with the images and by the text alone, and best-of-N."""
        import torch

        scores: list[float] = []
        text: list[float] = []
        right: list[bool] = []
        reranked: list[tuple[list[float], list[bool]]] = []
        for unit, name in enumerate(self.names):
            if name in self.held_out:
                cached = self.cached[unit]
                labelled_T = cached.weights_T > 0
                log_odds_T = self._log_odds([unit], [unit], view=0).cpu()
                scores += log_odds_T[labelled_T].tolist()
                text += cached.log_odds_T[labelled_T].tolist()
                right += (cached.targets_T[labelled_T] >= 0.5).tolist()
                reranked.append(
                    ([aggregate(own.tolist()) for own in torch.split(log_odds_T, cached.lengths)], cached.correct)
                )
        found = validation_figures(scores, right) | rerank_figures(reranked) | {"right_steps": self.right_steps}
        by_text = validation_figures(text, right)
        if by_text:
            found["validation_auroc_text_only"] = by_text["validation_auroc"]
        if self.config.select_by == "best_of_n" and reranked:
            found["selection"] = found["validation_best_of_n"]
        return found

    def save(self, folder: Path, figures: Mapping[str, float]) -> None:
        self.model.save_pretrained(folder, figures)


def _class_weights(config: TwoTowerConfig, share: float) -> tuple[float, float]:
    if config.class_balance == "none":
        return 1.0, 1.0
    if not 0.0 < share < 1.0:
        raise ValueError(
            f"class_balance is 'balanced', but {share:.0%} of the training steps are right (label policy "
            f"{config.label_policy!r}): there is one class only. Look at the labels, or take class_balance=none"
        )
    return class_weights(share)


def rerank_figures(questions: Sequence[tuple[Sequence[float], Sequence[bool]]]) -> dict[str, float]:
    """Of questions, each with its solutions' rewards and which of them are correct: the shares answered rightly by the
    solution of the highest reward, by one taken at random, and by the best that there is. Nothing without questions.
    """
    if not questions:
        return {}
    import numpy as np

    rows = [(np.array(rewards), np.array(correct, dtype=bool)) for rewards, correct in questions]
    return {
        "validation_best_of_n": mean(expected_best(rewards, correct, len(correct)) for rewards, correct in rows),
        "validation_one_sample": mean(float(correct.mean()) for _, correct in rows),
        "validation_oracle": mean(expected_oracle(correct, len(correct)) for _, correct in rows),
    }
