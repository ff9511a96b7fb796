"""Stage `text_prm`: a causal language model becomes the text tower of a reward model (Med-PRM's recipe).

Enters: labelled solutions, packed by question. Leaves: a `RewardModel` folder, text-only. Each solution weighs the same
(the mean over its labelled steps), whatever it is packed with; only the two logits at the step tags are computed.

Legend: T tags.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import Field

from medmm_ray.config import ConfigError, execution
from medmm_ray.engines.checkpoints import resolve
from medmm_ray.stats.targets import AfterFirstError, LabelPolicy
from medmm_ray.train.config import QuestionTrainConfig
from medmm_ray.train.labelled_rows import LabelledRows, LabelRules
from medmm_ray.train.launch import fit, read_input
from medmm_ray.train.lora import LoraAdapter, LoraConfig, Segment
from medmm_ray.train.schedule import Part, Units, validation_ids
from medmm_ray.train.stage import Stage
from medmm_ray.train.throughput import TrainingFlops

if TYPE_CHECKING:
    import torch

    from medmm_ray.reward_model import PackedQuestion, Packing, RewardModel

VERSION = 5  # of what a step makes: raise it when the same config makes something else


class TextPrmConfig(QuestionTrainConfig):
    """Training of the text tower."""

    base: str | None = None
    """The checkpoint to start from: a folder, a URI, a hub id or package:<name>. null: the policy."""
    label_policy: LabelPolicy = "hybrid"
    """How label rows become targets, see stats/targets.py."""
    after_first_error: AfterFirstError = "collapse"
    """What steps after the first wrong one train as: collapse (wrong), keep (their labels) or drop (nothing)."""
    max_solutions: int | None = None
    """Solutions of a question that are trained on, the first ones; null: all."""
    learning_rate: float = Field(2e-6, gt=0)
    """Highest learning rate; Med-PRM's for an 8B model. 5e-4 suits a small one."""
    epochs: int = Field(3, ge=1)
    """Times that every solution is seen."""
    num_documents: int = 32
    """Retrieved documents that are offered, best first; those within the length are read. Score with the same."""
    max_length: int = 4096
    """Tokens of documents, question and solution together; documents are chosen to fit."""
    reserve: int = 1024
    """Tokens of max_length that documents leave free."""
    validation_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the training questions held out, to measure the step AUROC and to keep the best epoch."""
    reference_prompt: bool = False
    """Train on Med-PRM's training prompt, which lacks the last space of its scoring prompt, not on the latter."""
    lora: LoraConfig | None = None
    """Train a low-rank adapter, all else frozen; null: all weights. An adapter wants a rate of about 1e-4."""
    micro_batch_tokens: int = execution(8192)
    """Most packed tokens of one forward pass of a worker; a question that has more is read in several, its prefix in
    each."""


def train_text_prm(
    config: TextPrmConfig,
    questions: Iterable[pa.Table],
    evidence: Iterable[pa.Table],
    solutions: Iterable[pa.Table],
    labels: Iterable[pa.Table],
    base: str,
    folder: str,
    name: str,
) -> dict[str, float]:
    """Train the text tower under Ray Train and leave a reward model in `folder`; gives `launch.figures`.

    The tables come in parts; `labels` are of all sources. `base` is the checkpoint to start from (the policy's folder,
    or any name that `checkpoints.resolve` knows).
    """
    rules = LabelRules(
        config.label_policy,
        config.after_first_error,
        config.max_solutions,
        config.num_documents,
    )
    rows = LabelledRows(rules, questions, evidence, solutions, labels)
    figures = fit(
        TextPrmStage,
        config,
        {"questions": rows},
        {"base": base},
        folder,
        name,
    )
    return figures | rows.consensus | {"right_steps": round(rows.right_steps.share, 4)}


class TextPrmStage(Stage):
    """Packed questions and the reward model's text tower. A unit is a question, or what of it reads fewer documents."""

    def __init__(
        self,
        config: TextPrmConfig,
        inputs: dict[str, str],
        device: str,
    ) -> None:
        self.config = config
        self.device = device
        self.micro_batch_budget = config.micro_batch_tokens
        self.model = self._load_model(inputs["base"])
        self.adapter = LoraAdapter(self.model.text_model, config.lora) if config.lora else None
        self.module = self.model
        self.groups: list[PackedQuestion] = []
        self.solutions: list[list[dict[str, Any]]] = []
        """Of each unit the solutions of its question."""
        self.num_not_packed = 0
        names: list[str] = []
        # A solution that is too long for all documents reads fewer: it shares another prefix, and is a unit of its own.
        for row in read_input(inputs["questions"]).to_pylist():
            packing = self._pack(row)
            self.num_not_packed += sum(error is not None for error in packing.errors)
            self.groups += packing.groups
            self.solutions += [row["solutions"]] * len(packing.groups)
            names += [row["question_id"]] * len(packing.groups)
        self.validation_ids = validation_ids(
            names,
            config.validation_fraction,
            config.seed,
        )
        self.held_out = [unit for unit, name in enumerate(names) if name in self.validation_ids]
        self.units = self._units(names)

    def _load_model(self, base: str) -> "RewardModel":
        """The reward model of a checkpoint, with the length that it is to be trained at."""
        from medmm_ray.reward_model import RewardModel, TrainedInputs

        config = self.config
        model = RewardModel.from_pretrained(resolve(base))
        if model.vision is not None:
            raise ConfigError(
                f"{base} is a vision-language model, and train_text_prm trains on text alone; name a text-only base"
            )
        # Saved with the model, which packs by them; a small base may have a shorter context.
        model.max_length = min(config.max_length, model.context)
        model.reserve = min(config.reserve, model.max_length)
        model.trained_inputs = TrainedInputs(num_documents=config.num_documents)
        if config.activation_checkpointing:
            model.text_model.gradient_checkpointing_enable()
        return model

    def _pack(self, row: dict[str, Any]) -> "Packing":
        steps = [solution["steps"] for solution in row["solutions"]]
        return self.model.pack(
            row["question"],
            steps,
            row["documents"],
            training=self.config.reference_prompt,
        )

    def _units(self, names: Sequence[str]) -> Units:
        """What each solution costs, and how many equal ones it stands for: none where its question is held out."""
        count_flops = TrainingFlops(self.model.text_model)
        samples: list[list[int]] = []
        tokens: list[list[int]] = []
        flops: list[list[float]] = []
        for name, group, solutions in zip(names, self.groups, self.solutions, strict=True):
            prefix = len(group.prefix_ids)
            lengths = [len(branch.ids) for branch in group.branches]
            is_held_out = name in self.validation_ids
            samples.append([0 if is_held_out else solutions[branch.solution]["weight"] for branch in group.branches])
            tokens.append(lengths)
            flops.append([count_flops.branch(prefix, length) for length in lengths])
        prefixes = [len(group.prefix_ids) for group in self.groups]
        return Units.of(
            names,
            samples,
            tokens,
            flops,
            prefixes,
            list(map(count_flops.prefix, prefixes)),
        )

    def loss(self, parts: Sequence[Part], epoch: int) -> "torch.Tensor":
        """Sum over solutions of the mean two-class loss of their labelled steps."""
        import torch

        groups: list[PackedQuestion] = []
        targets: list[torch.Tensor] = []
        weights: list[torch.Tensor] = []
        segments: list[Segment] = []
        for part in parts:
            group = self._group_of(part)
            targets_T, weights_T = step_targets(group, self.solutions[part.unit])
            groups.append(group)
            targets.append(targets_T)
            weights.append(weights_T)
            segments += self._segments(part.unit, group, epoch)
        if self.adapter:
            self.adapter.segments = segments
        log_odds_T = self.model(*groups)  # all groups as one packed row
        return weighted_loss(
            log_odds_T,
            torch.cat(targets).to(self.device),
            torch.cat(weights).to(self.device),
        )

    def _group_of(self, part: Part) -> "PackedQuestion":
        group = self.groups[part.unit]
        return replace(group, branches=[group.branches[place] for place in part.solutions])

    def _segments(
        self,
        unit: int,
        group: "PackedQuestion",
        epoch: int,
    ) -> list[Segment]:
        """A question's part of a row, in the row's order."""
        name = f"{self.config.seed}/{epoch}/{self.units.names[unit]}/{group.num_documents}"
        segments = [Segment(len(group.prefix_ids), name)]
        segments += [Segment(len(branch.ids), f"{name}/{branch.solution}") for branch in group.branches]
        return segments

    def measure(self, unit: int) -> tuple[list[float], list[bool]]:
        """The scores of a held-out question's labelled steps, and which are right: soft targets from one half on."""
        group = self.groups[unit]
        targets_T, weights_T = step_targets(group, self.solutions[unit])
        labelled_T = weights_T > 0
        scores: list[float] = self.model(group).cpu()[labelled_T].tolist()
        return scores, (targets_T[labelled_T] >= 0.5).tolist()

    def figures(self, measured: Sequence[tuple[list[float], list[bool]]]) -> dict[str, float]:
        """Step AUROC on the held-out questions."""
        scores: list[float] = []
        is_right: list[bool] = []
        for scores_of_unit, right_of_unit in measured:
            scores += scores_of_unit
            is_right += right_of_unit
        return validation_figures(scores, is_right) | {"not_packed": float(self.num_not_packed)}

    def save(self, folder: Path, figures: Mapping[str, float]) -> None:
        """Write the reward model's folder, an adapter merged in and beside it."""
        if self.adapter:
            self.adapter.save_and_merge(folder)
        self.model.save_pretrained(folder, figures)


def step_targets(
    packed: "PackedQuestion", solutions: Sequence[dict[str, Any]]
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """targets_T, weights_T of a packed question's tags: a solution's weight, shared by its labelled steps; 0 where a
    step has no target."""
    import torch

    targets: list[float] = []
    weights: list[float] = []
    for number, step in zip(packed.tag_solutions, packed.tag_steps, strict=True):
        solution_targets = solutions[number]["targets"]
        target = solution_targets[step]
        num_labelled = sum(value is not None for value in solution_targets)
        targets.append(0.0 if target is None else target)
        weights.append(0.0 if target is None else solutions[number]["weight"] / num_labelled)
    return torch.tensor(targets), torch.tensor(weights)


def weighted_loss(
    log_odds_T: "torch.Tensor",
    targets_T: "torch.Tensor",
    weights_T: "torch.Tensor",
) -> "torch.Tensor":
    """Weighted sum of the two-class cross-entropy: with two logits, the logistic loss of their difference."""
    import torch

    losses_T = torch.nn.functional.binary_cross_entropy_with_logits(
        log_odds_T.float(),
        targets_T,
        reduction="none",
    )
    return (losses_T * weights_T).sum()


def validation_figures(scores: Sequence[float], is_right: Sequence[bool]) -> dict[str, float]:
    """Step AUROC, which also selects the epoch; empty where one of the two classes is missing."""
    import numpy as np

    from medmm_ray.stats.metrics import auroc

    # An auroc of one class does not exist: such a validation set selects no epoch.
    value = auroc(np.array(is_right, dtype=bool), np.array(scores, dtype=np.float64))
    if value is None:
        return {}
    return {"selection": value, "validation_auroc": value, "validation_steps": float(len(is_right))}
