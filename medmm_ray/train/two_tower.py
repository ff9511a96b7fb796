"""Stage `two_tower`: the image part of a reward model, trained on the stored states of its frozen text tower.

Enters: states (text-tower states at the tags, step summaries, text log-odds), labels, the questions' images and their
reference images. Leaves: the whole `RewardModel` folder. The text tower never runs: it is constant, and its part of the
log-odds is in the states. A frozen image tower runs once an image.

Legend: T tags, D text width, B images, W image width, P patches.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
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
from medmm_ray.train.config import QuestionTrainConfig
from medmm_ray.train.image_text import augment
from medmm_ray.train.launch import fit, read_input
from medmm_ray.train.schedule import Part, Units, validation_ids
from medmm_ray.train.stage import Stage
from medmm_ray.train.text_prm import validation_figures, weighted_loss
from medmm_ray.train.text_prm_data import group_labels
from medmm_ray.train.two_tower_data import (
    TwoTowerExample,
    class_weights,
    concatenated,
    labels_of_states,
    load_examples,
    positive_rate,
    questions_with_images,
)

if TYPE_CHECKING:
    import torch

    from medmm_ray.engines.image_tower import ImageTower
    from medmm_ray.reward_model import Fusion, ImageFeatures

VERSION = 3  # of what a step makes: raise it when the same config makes something else


_STATES_INPUT = "states"  # inputs whose names begin so are tables of states


class TwoTowerConfig(QuestionTrainConfig):
    """Training of fusion and image tower."""

    label_policy: LabelPolicy = "hybrid"
    """How label rows become targets, see stats/targets.py."""
    after_first_error: AfterFirstError = "collapse"
    """What steps after the first wrong one train as: collapse (wrong), keep (their labels) or drop (nothing)."""
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
    they made no difference (.765 ± .010 with three). The checkpoint keeps the number: scoring reads as many."""
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
    questions_per_update: int = Field(4, ge=1)
    """Of one question an update takes at most batch_size / this many solutions, the rest of them later in the epoch. So
    its gradient is not one question's. Where the image tower is trained, each of a question's parts runs it anew: take
    as many questions as there are workers, or more."""
    validation_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the training questions held out, to measure each epoch and to keep the best one."""
    select_by: Literal["step_auroc", "best_of_n"] = "step_auroc"
    """Which figure on the held-out questions picks the epoch that is kept: how well right steps are told from wrong
    ones, or the share of questions whose best solution (by its worst step) answers rightly."""
    micro_batch_tokens: int = execution(65536)
    """Most steps (tags) of one forward pass of a worker; one solution at least."""


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
    columns = ["question_id", "solution_id", "num_steps", "error"]
    state_rows = pa.concat_tables(table.to_arrow(columns) for table in states)
    labels_by_solution = group_labels(labels)
    consensus: dict[str, float] = {}
    if config.label_policy == "consensus":
        consensus = checked_consensus_counts(labels_of_states(state_rows, labels_by_solution, solutions))
    rows = questions_with_images(
        state_rows,
        labels_by_solution,
        questions,
        images,
        evidence,
        solutions,
        config.label_policy,
        config.after_first_error,
        config.num_references,
    )
    if rows.num_rows == 0:
        raise ValueError(
            f"train_two_tower: no training question has an image, states and a target ({state_rows.num_rows} states, "
            f"label policy {config.label_policy!r}). Look at the tables states and labels."
        )
    inputs = {"text_prm": text_prm, "image_tower": image_tower}
    for number, table in enumerate(states):
        inputs[f"{_STATES_INPUT}-{number}"] = table.uri
    num_documents = states[0].manifest().config.get("num_documents")
    if num_documents is not None:  # else the states were computed with as many as the text tower was trained on
        inputs["num_documents"] = str(num_documents)
    return fit(TwoTowerStage, config, {"questions": rows}, inputs, folder, name) | consensus


class TwoTowerStage(Stage):
    """Questions with their stored states and images, and the part of the reward model that looks at them.

    A `view` of a picture is one of its augmentations; view 0 is the picture as it is.
    """

    def __init__(self, config: TwoTowerConfig, inputs: dict[str, str], device: str) -> None:
        self.config = config
        self.device = device
        self.micro_batch_budget = config.micro_batch_tokens
        questions = read_input(inputs["questions"])
        self.rows = questions.to_pylist()
        self.names = questions["question_id"].to_pylist()
        states_uris = [uri for name, uri in inputs.items() if name.startswith(_STATES_INPUT)]
        # Several tables: states of sampled solutions and of those that search trees found.
        self.examples, dtype = load_examples(states_uris, self.rows)
        self._load_model(inputs, dtype)
        self.validation_ids = validation_ids(self.names, config.validation_fraction, config.seed)
        self.held_out = [unit for unit, name in enumerate(self.names) if name in self.validation_ids]
        self.units = self._units()
        self.positive_rate = positive_rate([self.examples[unit] for unit in self._training_units()])
        self.class_weights = _class_weights(config, self.positive_rate)
        self._load_images()
        self._initialize_fusion()

    def _load_model(self, inputs: dict[str, str], dtype: str) -> None:
        """Make `model` of both towers, and `module`, what is trained of it: the fusion, and the image tower if asked
        for."""
        import torch

        from medmm_ray.reward_model import FusionConfig, RewardModel

        config = self.config
        self.model = RewardModel.from_pretrained(resolve(inputs["text_prm"]), dtype=dtype)
        fusion_config = FusionConfig(
            tokens=config.tokens, summary=config.summary, width=config.width, num_heads=config.num_heads
        )
        torch.manual_seed(config.seed)  # for the fusion's first weights
        self.model.add_image_tower(resolve(inputs["image_tower"]), fusion_config)
        trained_inputs = replace(self.model.trained_inputs, num_references=config.num_references)
        if "num_documents" in inputs:
            trained_inputs = replace(trained_inputs, num_documents=int(inputs["num_documents"]))
        self.model.trained_inputs = trained_inputs
        assert self.model.image_tower is not None
        assert self.model.fusion is not None
        self.tower: ImageTower = self.model.image_tower
        self.fusion: Fusion = self.model.fusion
        self.tower.requires_grad_(not config.freeze_image_tower)
        self.module = torch.nn.ModuleDict({"image_tower": self.tower, "fusion": self.fusion})
        with torch.no_grad():  # linear, so its values on the unit vectors are all of it
            self.head_D = self.model.head_log_odds(torch.eye(self.model.hidden_size)).to(self.device)

    def _units(self) -> Units:
        """What each solution costs: the fusion of its tags; and what all of a question share: its pictures' tokens."""
        count_flops = FusionFlops(
            self.fusion, _num_weights([self.tower]), _num_patches(self.tower), self.config.freeze_image_tower
        )
        samples: list[list[int]] = []
        tokens: list[list[int]] = []
        flops: list[list[float]] = []
        pictures: list[float] = []
        for name, row, example in zip(self.names, self.rows, self.examples, strict=True):
            samples.append([int(name not in self.validation_ids)] * len(example.tags_per_solution))
            tokens.append(example.tags_per_solution)
            flops.append([count_flops.per_tag * num_tags for num_tags in example.tags_per_solution])
            pictures.append(count_flops.per_picture * (len(row["image_uris"]) + len(row["reference_uris"])))
        return Units.of(self.names, samples, tokens, flops, [0] * len(self.names), pictures)

    def _training_units(self) -> list[int]:
        return [unit for unit, name in enumerate(self.names) if name not in self.validation_ids]

    def _initialize_fusion(self, max_tags: int = 20_000) -> None:
        """Fit the fusion's first weights to the training data: to about `max_tags` tags, and to all pictures."""
        import torch

        from medmm_ray.train.fusion_init import initialize_fusion

        units = self._training_units()
        num_tags = self.units.num_tokens(map(self.units.whole, units))
        num_units = min(len(units), max(1, max_tags * len(units) // max(1, num_tags)))
        sample = random.Random(self.config.seed).sample(units, num_units)
        if not sample:
            return
        pooled_BW, patches_BPW = self.views[0] if self.views else self._encode_all(0)
        # The tokens that the fusion will attend to, of all pictures.
        tokens = {"pooled": [pooled_BW], "patches": [], "both": [pooled_BW]}[self.config.tokens]
        if patches_BPW is not None:
            tokens.append(patches_BPW.flatten(0, 1))
        states_TD, summaries_TD, _ = concatenated([self.examples[unit] for unit in sample])
        initialize_fusion(
            self.fusion.to(self.device),
            states_TD.to(self.device, torch.float32),
            summaries_TD.to(self.device, torch.float32),
            torch.cat(tokens),
        )

    def learning_rates(self) -> dict[str, float]:
        """The image tower's rate; the fusion takes the config's."""
        return {"image_tower.": self.config.image_learning_rate}

    # Images

    def _load_images(self) -> None:
        """Read the pixels of all images, or, of a frozen tower, the tokens of several views of them."""
        from medmm_ray.engines.images import open_image

        uris: set[str] = set()
        for row in self.rows:
            uris.update(row["image_uris"], row["reference_uris"])
        self.uris = sorted(uris)
        self.index = {uri: place for place, uri in enumerate(self.uris)}
        self.pixels = [self.tower.preprocess(open_image(uri)) for uri in self.uris]
        self.views: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self.tower.to(self.device).eval()
        if self.config.freeze_image_tower:
            num_views = self.config.augmented_views if self.config.augment else 1
            self.views = [self._encode_all(view) for view in range(num_views)]
            self.pixels = []  # the tokens are all that is read from here on

    def _encode_all(self, view: int, batch_size: int = 64) -> "tuple[torch.Tensor, torch.Tensor | None]":
        """Pooled tokens [B, W] and, where the fusion reads them, patches [B, P, W] of a view of all images."""
        import torch

        pooled: list[torch.Tensor] = []
        patches: list[torch.Tensor] = []
        for start in range(0, len(self.uris), batch_size):
            pixels_B3HW = self._pixels_of(self.uris[start : start + batch_size], view)
            with torch.no_grad():
                tokens = self.tower(pixels_B3HW.to(self.device))
            pooled.append(tokens.pooled_BD)
            if self.fusion.reads_patches:
                patches.append(tokens.patches_BPD)
        return torch.cat(pooled), torch.cat(patches) if patches else None

    def _pixels_of(self, uris: Sequence[str], view: int) -> "torch.Tensor":
        """A view of some images [B, 3, H, W], moved and brightened where it is not view 0."""
        import torch

        pictures: list[torch.Tensor] = []
        for uri in uris:
            place = self.index[uri]
            pixels_3HW = self.pixels[place]
            if self.config.augment and view != 0:
                # The same view of a picture whatever the batch, and whichever worker makes it.
                rng = random.Random(f"{self.config.seed}/{view}/{place}")
                pixels_3HW = augment(pixels_3HW, rng, self.config.max_shift, self.config.max_brightness)
            pictures.append(pixels_3HW)
        return torch.stack(pictures)

    def _features(self, image_units: Sequence[int], units: Sequence[int], view: int) -> "ImageFeatures":
        """Image tokens for questions `units`: each sees the images of its question in `image_units`, mostly itself, and
        its own references.

        A trained tower runs here, on each distinct picture once.
        """

        from medmm_ray.reward_model import ImageFeatures

        image_uris = [self.rows[unit]["image_uris"] for unit in image_units]
        reference_uris = [self.rows[unit]["reference_uris"] for unit in units]
        if self.config.freeze_image_tower:
            # An epoch has a view of its own until they repeat.
            pooled_BW, patches_BPW = self.views[view % len(self.views)]
            places: Mapping[str, int] = self.index
        else:
            uris = sorted(set(chain.from_iterable([*image_uris, *reference_uris])))
            places = {uri: place for place, uri in enumerate(uris)}
            dtype = next(self.tower.parameters()).dtype
            tokens = self.tower(self._pixels_of(uris, view).to(self.device, dtype))
            pooled_BW = tokens.pooled_BD
            patches_BPW = tokens.patches_BPD if self.fusion.reads_patches else None
        return ImageFeatures.gather(
            pooled_BW, patches_BPW, _places_of(image_uris, places), _places_of(reference_uris, places)
        )

    # Loss

    def _log_odds(
        self, examples: Sequence[TwoTowerExample], units: Sequence[int], image_units: Sequence[int], view: int
    ) -> "torch.Tensor":
        """Log-odds of all tags of these questions [T]: the text's, which is stored, and the image's."""
        import torch

        num_tags = torch.tensor([len(example.targets_T) for example in examples])
        question_T = torch.repeat_interleave(torch.arange(len(units)), num_tags).to(self.device)
        states_TD, summaries_TD, log_odds_T = concatenated(examples)
        features = self._features(image_units, units, view)
        delta_TD = self.fusion(states_TD.to(self.device), summaries_TD.to(self.device), features, question_T)
        return log_odds_T.to(self.device).add(delta_TD.float() @ self.head_D)

    def loss(self, parts: Sequence[Part], epoch: int) -> "torch.Tensor":
        """Sum over solutions of the mean two-class loss of their labelled steps, each times its class's weight."""
        import torch

        examples = [self.examples[part.unit].take(part.solutions) for part in parts]
        units = [part.unit for part in parts]
        image_units: list[int] = []
        targets: list[torch.Tensor] = []
        weights: list[torch.Tensor] = []
        for unit, example in zip(units, examples, strict=True):
            swapped = self._swapped_question(unit, epoch)
            if swapped is None:
                image_units.append(unit)
                targets.append(example.targets_T)
                weights.append(example.weights_T)
            else:
                # What is right of the own picture is wrong of this one; a wrong step may be right of it by chance.
                image_units.append(swapped)
                targets.append(torch.zeros_like(example.targets_T))
                weights.append(example.weights_T * (example.targets_T >= 0.5))
        log_odds_T = self._log_odds(examples, units, image_units, view=epoch)
        positive_weight, negative_weight = self.class_weights
        targets_T = torch.cat(targets)
        weights_T = torch.cat(weights) * (positive_weight * targets_T + negative_weight * (1 - targets_T))
        return weighted_loss(log_odds_T, targets_T.to(self.device), weights_T.to(self.device))

    def _swapped_question(self, unit: int, epoch: int) -> int | None:
        """The question whose image is shown instead, one of another diagnosis; None: its own is shown."""
        rng = random.Random(f"{self.config.seed}/{epoch}/{self.names[unit]}")
        if rng.random() >= self.config.swapped_share:
            return None
        diagnosis = self.rows[unit]["diagnosis"]
        candidates = [u for u in self._training_units() if self.rows[u]["diagnosis"] != diagnosis]
        return rng.choice(candidates) if candidates else None

    # Validation

    def measure(self, unit: int) -> "_Measured":
        """A held-out question's steps and solutions as the model scores them, with its image and by the text alone."""
        import torch

        example = self.examples[unit]
        labelled_T = example.weights_T > 0
        log_odds_T = self._log_odds([example], [unit], [unit], view=0).cpu()
        by_solution = torch.split(log_odds_T, example.tags_per_solution)
        return _Measured(
            scores=log_odds_T[labelled_T].tolist(),
            text_scores=example.log_odds_T[labelled_T].tolist(),
            is_right=(example.targets_T[labelled_T] >= 0.5).tolist(),
            rewards=[aggregate(solution_T.tolist()) for solution_T in by_solution],
            correct=example.correct,
        )

    def figures(self, measured: Sequence["_Measured"]) -> dict[str, float]:
        """On the held-out questions: step AUROC, with the images and by the text alone, and best-of-N."""
        scores: list[float] = []
        text_scores: list[float] = []
        is_right: list[bool] = []
        for question in measured:
            scores += question.scores
            text_scores += question.text_scores
            is_right += question.is_right
        reranked = [(question.rewards, question.correct) for question in measured]
        figures = validation_figures(scores, is_right) | rerank_figures(reranked)
        figures["right_steps"] = self.positive_rate
        # The baseline: what the images are worth is the difference.
        text_figures = validation_figures(text_scores, is_right)
        if text_figures:
            figures["validation_auroc_text_only"] = text_figures["validation_auroc"]
        if self.config.select_by == "best_of_n" and reranked:
            figures["selection"] = figures["validation_best_of_n"]
        return figures

    def save(self, folder: Path, figures: Mapping[str, float]) -> None:
        """Write the whole reward model's folder."""
        self.model.save_pretrained(folder, figures)


@dataclass(frozen=True)
class _Measured:
    """A held-out question: of its labelled steps the scores and whether they are right; of its solutions the rewards
    and whether their answers are right."""

    scores: list[float]
    text_scores: list[float]
    is_right: list[bool]
    rewards: list[float]
    correct: list[bool]


class FusionFlops:
    """FLOPs of training the image part, of a tag and of a picture: six a weight that is trained, for each token that it
    meets; two where a frozen tower runs, which is once, and so not counted."""

    def __init__(self, fusion: "Fusion", tower_weights: int, num_patches: int, is_frozen: bool) -> None:
        of_tag = (fusion.query, fusion.attend_query, fusion.attend_out, fusion.mlp, fusion.output)
        of_token = (fusion.projector, fusion.attend_key, fusion.attend_value)
        num_tokens = {"pooled": 1, "patches": num_patches, "both": num_patches + 1}[fusion.config.tokens]
        self.per_tag = 6.0 * _num_weights(of_tag)
        self.per_picture = 6.0 * num_tokens * _num_weights(of_token)
        if not is_frozen:
            self.per_picture += 6.0 * (num_patches + 1) * tower_weights


def _num_patches(tower: "ImageTower") -> int:
    """Patch tokens of a picture: towers do not tell, so one looks at a blank one."""
    import torch

    side = tower.image_size
    with torch.no_grad():
        return tower(torch.zeros(1, 3, side, side)).patches_BPD.shape[1]


def _num_weights(modules: "Iterable[torch.nn.Module]") -> int:
    total = 0
    for module in modules:
        total += sum(parameter.numel() for parameter in module.parameters())
    return total


def _places_of(groups: Sequence[Sequence[str]], places: Mapping[str, int]) -> list[list[int]]:
    """The row of each image in a batch, by question."""
    return [list(map(places.__getitem__, group)) for group in groups]


def _class_weights(config: TwoTowerConfig, positive_rate: float) -> tuple[float, float]:
    if config.class_balance == "none":
        return 1.0, 1.0
    if not 0.0 < positive_rate < 1.0:
        raise ValueError(
            f"class_balance is 'balanced', but {positive_rate:.0%} of the training steps are right (label policy "
            f"{config.label_policy!r}): there is one class only. Look at the labels, or take class_balance=none"
        )
    return class_weights(positive_rate)


def rerank_figures(questions: Sequence[tuple[Sequence[float], Sequence[bool]]]) -> dict[str, float]:
    """The shares of questions answered rightly by the solution of the highest reward, by one taken at random, and by
    the best that there is; empty without questions.

    Each question has its solutions' rewards and which of them are correct.
    """
    if not questions:
        return {}
    import numpy as np

    best_of_n: list[float] = []
    one_sample: list[float] = []
    oracle: list[float] = []
    for rewards, is_correct in questions:
        correct = np.array(is_correct, dtype=bool)
        best_of_n.append(expected_best(np.array(rewards), correct, len(correct)))
        one_sample.append(float(correct.mean()))
        oracle.append(expected_oracle(correct, len(correct)))
    return {
        "validation_best_of_n": mean(best_of_n),
        "validation_one_sample": mean(one_sample),
        "validation_oracle": mean(oracle),
    }
