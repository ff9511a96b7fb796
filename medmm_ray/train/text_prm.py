"""Stage `text_prm`: a causal language model becomes the text tower of a reward model (Med-PRM's recipe).

Enters: labelled solutions, packed by question. Leaves: a `RewardModel` folder, text-only. Each solution weighs the same
(the mean over its labelled steps), whatever it is packed with; only the two logits at the step tags are computed.

Legend: T tags.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import Field

from medmm_ray.config import ConfigError, execution
from medmm_ray.engines.checkpoints import resolve
from medmm_ray.stats.targets import AfterFirstError, LabelPolicy, checked_consensus_counts
from medmm_ray.train.launch import fit, read_input
from medmm_ray.train.loop import Stage, TrainConfig
from medmm_ray.train.lora import LoraAdapter, LoraConfig
from medmm_ray.train.schedule import held_out
from medmm_ray.train.text_prm_data import group_labels, labelled_questions, labels_of_solutions, positive_rate
from medmm_ray.train.throughput import TrainingFlops

if TYPE_CHECKING:
    import torch

    from medmm_ray.reward_model import PackedQuestion, Packing

VERSION = 4  # of what a step makes: raise it when the same config makes something else


class TextPrmConfig(TrainConfig):
    """Training of the text tower."""

    base: str | None = None
    """The checkpoint to start from: a folder, a URI, a hub id or package:<name>. null: the policy."""
    label_policy: LabelPolicy = "hybrid"
    """How label rows become targets, see targets.py."""
    after_first_error: AfterFirstError = "collapse"
    """What a step behind the first wrong one trains as: wrong, as labelled, or not at all."""
    max_solutions: int | None = None
    """Solutions of a question that are trained on, the first ones; null: all."""
    learning_rate: float = Field(2e-6, gt=0)
    """Highest learning rate; Med-PRM's for an 8B model. 5e-4 suits a small one."""
    epochs: int = Field(3, ge=1)
    """Times that every solution is seen."""
    batch_size: int = Field(64, ge=1)
    """Solutions of one update, over all workers; a question's solutions stay together."""
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
    """Packed tokens of one forward pass of a worker; one question at least."""


def train_text_prm(
    config: TextPrmConfig,
    questions: pa.Table,
    evidence: pa.Table,
    solutions: pa.Table,
    labels: Sequence[pa.Table],
    base: str,
    folder: str,
    name: str,
) -> dict[str, float]:
    """Train the text tower under Ray Train and leave a reward model in `folder`; gives `launch.figures`.

    `labels` are the labels tables of all sources; `base` is the checkpoint to start from (the policy's folder, or any
    name that `checkpoints.resolve` knows).
    """
    grouped = group_labels(labels)
    settled: dict[str, float] = {}
    if config.label_policy == "consensus":
        settled = checked_consensus_counts(labels_of_solutions(questions, solutions, grouped, config.max_solutions))
    rows = labelled_questions(
        questions, evidence, solutions, grouped, config.label_policy, config.after_first_error,
        config.max_solutions, config.num_documents,
    )  # fmt: skip
    if rows.num_rows == 0:
        raise ValueError(
            f"train_text_prm: label policy {config.label_policy!r} gives no target for any training solution "
            f"({solutions.num_rows} questions sampled, {len(grouped)} solutions labelled). Look at the labels tables."
        )
    trained = fit(TextPrmStage, config, {"questions": rows}, {"base": base}, folder, name)
    return trained | settled | {"right_steps": round(positive_rate(rows), 4)}


class TextPrmStage(Stage):
    """Packed questions and the reward model's text tower."""

    padded = False

    def __init__(self, config: TextPrmConfig, inputs: dict[str, str], device: str) -> None:
        from medmm_ray.reward_model import RewardModel

        self.config, self.device, self.budget = config, device, config.micro_batch_tokens
        self.model = RewardModel.from_pretrained(resolve(inputs["base"]))
        if self.model.vision is not None:
            raise ConfigError(
                f"{inputs['base']} is a vision-language model, and train_text_prm trains on text alone; "
                "name a text-only base"
            )
        self.model.max_length = min(config.max_length, self.model.context)
        self.model.reserve = min(config.reserve, self.model.max_length)
        if config.activation_checkpointing:
            self.model.text_model.gradient_checkpointing_enable()
        self.adapter = LoraAdapter(self.model.text_model, config.lora) if config.lora else None
        self.count_flops = TrainingFlops(self.model.text_model)
        self.module = self.model
        rows = read_input(inputs["questions"]).to_pylist()
        self.names = [row["question_id"] for row in rows]
        self.solutions: list[list[dict[str, Any]]] = [row["solutions"] for row in rows]
        self.packed = [self._pack(row) for row in rows]
        self.held_out = held_out(self.names, config.validation_fraction, config.seed)
        self.num_not_packed = sum(error is not None for packing in self.packed for error in packing.errors)
        self.costs = [packing.num_tokens for packing in self.packed]
        self.sizes = [
            0 if name in self.held_out else sum(own[b.solution]["weight"] for g in packing.groups for b in g.branches)
            for name, own, packing in zip(self.names, self.solutions, self.packed, strict=True)
        ]

    def _pack(self, row: dict[str, Any]) -> "Packing":
        steps = [solution["steps"] for solution in row["solutions"]]
        return self.model.pack(row["question"], steps, row["documents"], training=self.config.reference_prompt)

    def loss(self, units: Sequence[int], epoch: int) -> "torch.Tensor":  # noqa: ARG002
        """Sum over solutions of the mean two-class loss of their labelled steps."""
        import torch

        packed = [(group, self.solutions[unit]) for unit in units for group in self.packed[unit].groups]
        targets, weights = zip(*(step_targets(group, own) for group, own in packed), strict=True)
        log_odds_T = self.model(*(group for group, _ in packed))
        return weighted_loss(log_odds_T, torch.cat(targets).to(self.device), torch.cat(weights).to(self.device))

    def validate(self) -> dict[str, float]:
        """Step AUROC on the held-out questions, soft targets counted as right from one half on."""
        scores: list[float] = []
        right: list[bool] = []
        for unit, name in enumerate(self.names):
            for group in self.packed[unit].groups if name in self.held_out else ():
                targets_T, weights_T = step_targets(group, self.solutions[unit])
                labelled_T = weights_T > 0
                scores += self.model(group).cpu()[labelled_T].tolist()
                right += (targets_T[labelled_T] >= 0.5).tolist()
        return validation_figures(scores, right) | {"not_packed": float(self.num_not_packed)}

    def flops(self, units: Sequence[int]) -> float:
        from medmm_ray.reward_model.attention import Block

        groups = [group for unit in units for group in self.packed[unit].groups]
        return self.count_flops(Block(len(g.prefix_ids), tuple(len(b.ids) for b in g.branches)) for g in groups)

    def save(self, folder: Path, figures: Mapping[str, float]) -> None:
        if self.adapter:
            self.adapter.leave(folder)
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
        aims = solutions[number]["targets"]
        labelled = sum(aim is not None for aim in aims)
        targets.append(0.0 if aims[step] is None else aims[step])
        weights.append(0.0 if aims[step] is None else solutions[number]["weight"] / labelled)
    return torch.tensor(targets), torch.tensor(weights)


def weighted_loss(log_odds_T: "torch.Tensor", targets_T: "torch.Tensor", weights_T: "torch.Tensor") -> "torch.Tensor":
    """Weighted sum of the two-class cross-entropy: with two logits, the logistic loss of their difference."""
    import torch

    losses_T = torch.nn.functional.binary_cross_entropy_with_logits(log_odds_T.float(), targets_T, reduction="none")
    return (losses_T * weights_T).sum()


def validation_figures(scores: Sequence[float], right: Sequence[bool]) -> dict[str, float]:
    """Step AUROC, which also selects the epoch; nothing where one of the two classes is missing."""
    import numpy as np

    from medmm_ray.stats.metrics import auroc

    value = auroc(np.array(right, dtype=bool), np.array(scores, dtype=np.float64))
    if value is None:
        return {}
    return {"selection": value, "validation_auroc": value, "validation_steps": float(len(right))}
