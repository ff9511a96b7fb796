"""Stage `two_tower`: the image part of a reward model, trained on the stored states of its frozen text tower.

Enters: states (text-tower states at the tags, step summaries, text log-odds), labels, the questions' images and their
reference images. Leaves: the whole `RewardModel` folder. The text tower never runs and is not loaded: it is constant,
and its part of the log-odds is in the states. A worker reads the states and pictures of its own passes, ahead of them;
a frozen image tower runs once an image while its tokens fit the worker's cache.

Legend: T tags, D text width, B images, W image width, P patches.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
from pydantic import Field

from medmm_ray.config import execution
from medmm_ray.data.tables import Table
from medmm_ray.engines.checkpoints import resolve
from medmm_ray.stats.decoders import aggregate
from medmm_ray.stats.targets import AfterFirstError, LabelPolicy, Target
from medmm_ray.train.config import QuestionTrainConfig
from medmm_ray.train.gathering import is_first, share_first
from medmm_ray.train.labelled_rows import TwoTowerRows, TwoTowerRules
from medmm_ray.train.launch import fit, read_input
from medmm_ray.train.reading import ReadAhead, TableRows
from medmm_ray.train.schedule import Part, Units, validation_ids
from medmm_ray.train.stage import Stage
from medmm_ray.train.text_prm import weighted_loss
from medmm_ray.train.throughput import GIB, FusionFlops, num_patches, num_weights, tokens_of_picture
from medmm_ray.train.two_tower_data import (
    StatesReader,
    TwoTowerExample,
    class_weights,
    concatenated,
    positive_rate,
    sampled_parts,
    states_files,
)
from medmm_ray.train.two_tower_figures import MeasuredQuestion, held_out_figures
from medmm_ray.train.two_tower_pictures import Pictures, Views

if TYPE_CHECKING:
    import torch


VERSION = 3  # of what a step makes: raise it when the same config makes something else


_INIT_BYTES = 64 << 20  # of text states that the fusion is fitted to; its inputs take some times as much
_INIT_BATCH = 256  # pictures whose tokens the fusion is fitted to at a time
_QUESTIONS_GIB = 0.125  # of rows of the table of questions, whose states and pictures are beside them


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
    cache_gib: float = execution(1.0, ge=0)
    """Memory of a worker for states and pictures that it will need again, half of it each, in GiB; what does not fit is
    read anew. Of a frozen image tower it holds the tokens of pictures in their place."""
    reading_threads: int = execution(2, ge=1)
    """Threads of a worker that read states and open pictures for the update to come."""


def train_two_tower(
    config: TwoTowerConfig,
    states: Sequence[Table],
    labels: Iterable[pa.Table],
    questions: Iterable[pa.Table],
    images: Iterable[pa.Table],
    evidence: Iterable[pa.Table],
    solutions: Iterable[pa.Table],
    text_prm: str,
    image_tower: str,
    folder: str,
    name: str,
) -> dict[str, float]:
    """Train the image part under Ray Train and leave the whole reward model in `folder`; gives `launch.figures`.

    Each table of `states` is read by the workers, not by the driver; the others come in parts, of `solutions` only
    which answers are right. A question may have rows of several sources in both. `text_prm` and `image_tower` are names
    for `checkpoints.resolve`.
    """
    files = states_files(states)
    rules = TwoTowerRules(
        config.label_policy,
        config.after_first_error,
        config.num_references,
    )
    rows = TwoTowerRows(rules, files, labels, questions, images, evidence, solutions)
    inputs = {"text_prm": text_prm, "image_tower": image_tower}
    num_documents = states[0].manifest().config.get("num_documents")
    if num_documents is not None:  # else the states were computed with as many as the text tower was trained on
        inputs["num_documents"] = str(num_documents)
    figures = fit(TwoTowerStage, config, {"questions": rows, "files": files}, inputs, folder, name)
    return figures | rows.consensus


@dataclass(frozen=True)
class _Loaded:
    """What a pass is run on: examples, the pictures that are shown with each and its references, and the pixels that
    are still to be encoded. `is_swapped`: the picture is another question's."""

    examples: list[TwoTowerExample]
    image_uris: list[list[str]]
    reference_uris: list[list[str]]
    is_swapped: list[bool]
    pixels: "dict[str, torch.Tensor]"


class TwoTowerStage(Stage):
    """Questions with their stored states and images, and the part of the reward model that looks at them.

    Of the states and pictures a worker holds what its passes need, what the next ones will, and a cache.
    """

    def __init__(self, config: TwoTowerConfig, inputs: dict[str, str], device: str) -> None:
        self.config = config
        self.device = device
        self.text_prm = resolve(inputs["text_prm"])
        self.num_documents = int(inputs["num_documents"]) if "num_documents" in inputs else None
        self.micro_batch_budget = config.micro_batch_tokens
        self.questions = TableRows(inputs["questions"], _QUESTIONS_GIB * GIB)
        self.states = StatesReader(read_input(inputs["files"]), config.cache_gib / 2 * GIB)
        self.ahead: ReadAhead[_Loaded] = ReadAhead(config.reading_threads)
        self.names = [row["question_id"] for row in self.questions.scan(["question_id"])]
        self.validation_ids = validation_ids(self.names, config.validation_fraction, config.seed)
        self.held_out = [unit for unit, name in enumerate(self.names) if name in self.validation_ids]
        self.positive_rate = positive_rate(self._training_targets())
        self.class_weights = _class_weights(config, self.positive_rate)
        self._load_model(resolve(inputs["image_tower"]))
        self._describe_questions()
        self._initialize_fusion()

    def _load_model(self, tower_path: str) -> None:
        """Make `module`, what is trained: the fusion, and the image tower if asked for. Of the text tower nothing is
        read but its head."""
        import torch

        from medmm_ray.engines.image_tower import ImageTower
        from medmm_ray.reward_model import Fusion, FusionConfig, TextHead
        from medmm_ray.reward_model.states import dtype_name

        config = self.config
        # All states have the same format (`located_states`), so that any solution tells it.
        stored = self.states.read(self.questions[0], [0])
        self.text_dtype = dtype_name(stored.states_TD)
        self.head = TextHead.from_pretrained(self.text_prm, self.text_dtype)
        self.head_D = self.head.direction_D.to(self.device)
        torch.manual_seed(config.seed)  # for the fusion's first weights
        self.tower = ImageTower.from_pretrained(tower_path)
        fusion_config = FusionConfig(
            tokens=config.tokens, summary=config.summary, width=config.width, num_heads=config.num_heads
        )
        self.fusion: Fusion = Fusion(fusion_config, self.head.hidden_size, self.tower.width)
        self.tower.requires_grad_(not config.freeze_image_tower)
        trained = {"fusion": self.fusion} if config.freeze_image_tower else {}
        # A frozen tower is none of DeepSpeed's: it runs when a worker meets a new picture, in its own number format.
        self.module = torch.nn.ModuleDict(trained or {"image_tower": self.tower, "fusion": self.fusion})
        self.num_patches = num_patches(self.tower)

    def _training_targets(self) -> Iterator[list[list[Target]]]:
        for row in self.questions.scan(["question_id", "targets"]):
            if row["question_id"] not in self.validation_ids:
                yield row["targets"]

    def _describe_questions(self) -> None:
        """What each solution costs: the fusion of its tags; what all of a question share: its pictures' tokens; and the
        diagnoses and pictures that there are."""
        import numpy as np

        config = self.config
        count_flops = FusionFlops(self.fusion, num_weights([self.tower]), self.num_patches, config.freeze_image_tower)
        uris: set[str] = set()
        samples: list[list[int]] = []
        tokens: list[list[int]] = []
        flops: list[list[float]] = []
        pictures: list[float] = []
        diagnoses: list[str] = []
        for row in self.questions.scan(["question_id", "diagnosis", "image_uris", "reference_uris", "targets"]):
            tags_per_solution = list(map(len, row["targets"]))
            samples.append([int(row["question_id"] not in self.validation_ids)] * len(tags_per_solution))
            tokens.append(tags_per_solution)
            flops.append([count_flops.per_tag * num_tags for num_tags in tags_per_solution])
            pictures.append(count_flops.per_picture * (len(row["image_uris"]) + len(row["reference_uris"])))
            diagnoses.append(row["diagnosis"])
            uris.update(row["image_uris"], row["reference_uris"])
        self.units = Units.of(self.names, samples, tokens, flops, [0] * len(self.names), pictures)
        _, self.diagnoses = np.unique(np.array(diagnoses, dtype=object).astype(str), return_inverse=True)
        held_out = set(self.held_out)
        self.training_units = np.array([unit for unit in range(len(self.names)) if unit not in held_out])
        num_views = config.augmented_views if config.augment else 1
        self.pictures = Pictures(
            self.tower,
            sorted(uris),
            Views(config.seed, config.augment, num_views, config.max_shift, config.max_brightness),
            config.freeze_image_tower,
            self.fusion.reads_patches,
            self.device,
            config.cache_gib / 2 * GIB,
        )

    def _initialize_fusion(self, max_tags: int = 20_000, max_tokens: int = 100_000) -> None:
        """Fit the fusion's first weights to the training data: to about `max_tags` tags (fewer of a wide text tower)
        and `max_tokens` image tokens, or all that there are. Rank 0 does it for all workers."""
        import torch

        from medmm_ray.train.fusion_init import initialize_fusion

        self.fusion.to(self.device)
        if len(self.training_units) and is_first():
            max_tags = min(max_tags, _INIT_BYTES // (2 * 4 * self.head.hidden_size))  # states and summaries, in float32
            parts = sampled_parts(self.units, self.training_units.tolist(), max_tags, self.config.seed)
            examples = [self._example(part) for part in parts]
            states_TD, summaries_TD, _ = concatenated(examples)
            initialize_fusion(
                self.fusion,
                states_TD.to(self.device, torch.float32),
                summaries_TD.to(self.device, torch.float32),
                self._sample_tokens(max_tokens),
            )
        share_first(self.fusion.parameters())

    def _sample_tokens(self, max_tokens: int) -> "torch.Tensor":
        """The tokens that the fusion attends to, of all pictures or of as many as have `max_tokens`."""
        import torch

        uris = self.pictures.uris
        num_pictures = max(1, max_tokens // tokens_of_picture(self.config.tokens, self.num_patches))
        if num_pictures < len(uris):
            uris = sorted(random.Random(self.config.seed).sample(uris, num_pictures))
        pooled: list[torch.Tensor] = []
        patches: list[torch.Tensor] = []
        for start in range(0, len(uris), _INIT_BATCH):
            batch = uris[start : start + _INIT_BATCH]
            with torch.no_grad():
                tokens = self.pictures.tokens(batch, 0, self.pictures.load(batch, 0))
            pooled.append(tokens.pooled_BW)
            if tokens.patches_BPW is not None:
                patches.append(tokens.patches_BPW.flatten(0, 1))
        return torch.cat([*([] if self.config.tokens == "patches" else pooled), *patches])

    def learning_rates(self) -> dict[str, float]:
        """The image tower's rate; the fusion takes the config's."""
        return {"image_tower.": self.config.image_learning_rate}

    # Reading

    def prepare(self, parts: Sequence[Part], epoch: int | None) -> None:
        """Have the states and pictures of a pass to come read by threads."""
        self.ahead.begin((epoch, tuple(parts)), lambda: self._load(parts, epoch))

    def _loaded(self, parts: Sequence[Part], epoch: int | None) -> _Loaded:
        return self.ahead.result((epoch, tuple(parts)), lambda: self._load(parts, epoch))

    def _load(self, parts: Sequence[Part], epoch: int | None) -> _Loaded:
        image_uris: list[list[str]] = []
        reference_uris: list[list[str]] = []
        is_swapped: list[bool] = []
        for part in parts:
            swapped = None if epoch is None else self._swapped_question(part.unit, epoch)
            # The references stay the question's own: they are what retrieval found for it.
            image_unit = part.unit if swapped is None else swapped
            image_uris.append(self.questions[image_unit]["image_uris"])
            reference_uris.append(self.questions[part.unit]["reference_uris"])
            is_swapped.append(swapped is not None)
        uris = list(chain.from_iterable([*image_uris, *reference_uris]))
        return _Loaded(
            [self._example(part) for part in parts],
            image_uris,
            reference_uris,
            is_swapped,
            self.pictures.load(uris, epoch or 0),
        )

    def _example(self, part: Part) -> TwoTowerExample:
        return self.states.read(self.questions[part.unit], part.solutions)

    # Loss

    def _log_odds(self, loaded: _Loaded, epoch: int) -> "torch.Tensor":
        """Log-odds of all tags [T]: the text's, which is stored, and the image's."""
        import torch

        from medmm_ray.reward_model import ImageFeatures

        num_tags = torch.tensor([len(example.targets_T) for example in loaded.examples])
        question_T = torch.repeat_interleave(torch.arange(len(num_tags)), num_tags).to(self.device)
        states_TD, summaries_TD, log_odds_T = concatenated(loaded.examples)
        # Each distinct picture once, whichever questions show it.
        uris = sorted(set(chain.from_iterable([*loaded.image_uris, *loaded.reference_uris])))
        places = {uri: place for place, uri in enumerate(uris)}
        tokens = self.pictures.tokens(uris, epoch, loaded.pixels)
        features = ImageFeatures.gather(
            tokens.pooled_BW,
            tokens.patches_BPW,
            _places_of(loaded.image_uris, places),
            _places_of(loaded.reference_uris, places),
        )
        delta_TD = self.fusion(states_TD.to(self.device), summaries_TD.to(self.device), features, question_T)
        return log_odds_T.to(self.device).add(delta_TD.float() @ self.head_D)

    def loss(self, parts: Sequence[Part], epoch: int) -> "torch.Tensor":
        """Sum over solutions of the mean two-class loss of their labelled steps, each times its class's weight."""
        import torch

        loaded = self._loaded(parts, epoch)
        targets: list[torch.Tensor] = []
        weights: list[torch.Tensor] = []
        for example, is_swapped in zip(loaded.examples, loaded.is_swapped, strict=True):
            if is_swapped:
                # What is right of the own picture is wrong of this one; a wrong step may be right of it by chance.
                targets.append(torch.zeros_like(example.targets_T))
                weights.append(example.weights_T * (example.targets_T >= 0.5))
            else:
                targets.append(example.targets_T)
                weights.append(example.weights_T)
        log_odds_T = self._log_odds(loaded, epoch)
        positive_weight, negative_weight = self.class_weights
        targets_T = torch.cat(targets)
        weights_T = torch.cat(weights) * (positive_weight * targets_T + negative_weight * (1 - targets_T))
        return weighted_loss(log_odds_T, targets_T.to(self.device), weights_T.to(self.device))

    def _swapped_question(self, unit: int, epoch: int) -> int | None:
        """The question whose image is shown instead, one of another diagnosis; None: its own is shown."""
        rng = random.Random(f"{self.config.seed}/{epoch}/{self.names[unit]}")
        if rng.random() >= self.config.swapped_share:
            return None
        # As numbers, not as objects: every question of a swapped share looks through all of them.
        units = self.training_units
        candidates = units[self.diagnoses[units] != self.diagnoses[unit]]
        return int(rng.choice(candidates)) if len(candidates) else None

    # Validation

    def measure(self, unit: int) -> MeasuredQuestion:
        """A held-out question's steps and solutions as the model scores them, with its image and by the text alone."""
        import torch

        loaded = self._loaded([self.units.whole(unit)], None)
        (example,) = loaded.examples
        labelled_T = example.weights_T > 0
        log_odds_T = self._log_odds(loaded, epoch=0).cpu()
        by_solution = torch.split(log_odds_T, example.tags_per_solution)
        return MeasuredQuestion(
            scores=log_odds_T[labelled_T].tolist(),
            text_scores=example.log_odds_T[labelled_T].tolist(),
            is_right=(example.targets_T[labelled_T] >= 0.5).tolist(),
            rewards=[aggregate(solution_T.tolist()) for solution_T in by_solution],
            correct=example.correct,
        )

    def figures(self, measured: Sequence[MeasuredQuestion]) -> dict[str, float]:
        """On the held-out questions: step AUROC, with the images and by the text alone, and best-of-N."""
        figures = held_out_figures(measured)
        figures["right_steps"] = self.positive_rate
        if self.config.select_by == "best_of_n" and measured:
            figures["selection"] = figures["validation_best_of_n"]
        return figures

    def save(self, folder: Path, figures: Mapping[str, float]) -> None:
        """Write the whole reward model's folder. The text tower is read here, for its files."""
        from medmm_ray.reward_model import RewardModel

        model = RewardModel.from_pretrained(self.text_prm, dtype=self.text_dtype)
        model.image_tower, model.fusion = self.tower, self.fusion
        trained_inputs = replace(model.trained_inputs, num_references=self.config.num_references)
        if self.num_documents is not None:
            trained_inputs = replace(trained_inputs, num_documents=self.num_documents)
        model.trained_inputs = trained_inputs
        model.save_pretrained(folder, figures)


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
