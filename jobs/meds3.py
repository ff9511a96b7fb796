"""MedS3's rounds: ``python -m jobs.meds3 recipe.yaml [--dry-run] [name=value]``, in one Ray session, resumable.

A round is the recipe's pipeline with the round's policy: it grows trees, trains a reward model on their labels, and
samples the test questions. The next round's policy is this one, trained further on the right solutions of its own
trees. All rounds lie in one run folder: what a policy made has a fingerprint of its own, and what does not depend on it
is made once. Leaves ``meds3.json``: for each round what one sample, the majority and the reward model's choice reach.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.table import Table as Grid

from jobs.entry import launch, parser, read_arguments
from jobs.graph import BY_NAME, STEPS
from jobs.pipeline import run_pipeline
from jobs.plan import estimate
from jobs.recipe import Recipe
from jobs.step import Run
from medmm_ray.config import digest, identity
from medmm_ray.data import tries
from medmm_ray.data.tables import Artifact, Provenance, filesystem, write_file
from medmm_ray.estimate import Estimate, Line, rendered
from medmm_ray.stats import decoders
from medmm_ray.text import question_with_options
from medmm_ray.train.policy import train_policy

FIGURES = ("one sample", "majority", "prm-max", "prm-vote-sum")


def rounds(recipe: Recipe, console: Console) -> list[dict[str, float]]:
    """The figures of the first policy and of each round's, once all rounds have run."""
    figures: list[dict[str, float]] = []
    policy, reward_model = recipe.models.policy, ""
    for number in range(recipe.meds3.rounds + 1):
        console.print(f"\n[bold]Round {number}[/bold]")
        is_last = number == recipe.meds3.rounds
        run = run_pipeline(of_round(recipe, policy, is_last), STEPS, console)
        reward_model = reward_model if is_last else run.uri("text_prm")
        figures.append(measure(run, reward_model))
        printed = [f"{name} {value:.3f}" for name, value in figures[-1].items()]
        console.print("  ".join(printed))
        if not is_last:
            policy = next_policy(run)
    return figures


def planned(recipe: Recipe) -> Estimate:
    """What the rounds cost, a line each; what a round makes that an earlier one has made is free."""
    lines: list[Line] = []
    notes: list[str] = []
    earlier_fingerprints: set[str] = set()
    policy = recipe.models.policy
    for number in range(recipe.meds3.rounds + 1):
        is_last = number == recipe.meds3.rounds
        round_recipe = of_round(recipe, policy, is_last)
        run = Run(round_recipe)
        left_out = set(round_recipe.without)
        fingerprints: set[str] = set()
        for step in STEPS:
            fingerprint = run.fingerprint(step)
            fingerprints.add(fingerprint)
            # What an earlier round makes under the same fingerprint is made once.
            if fingerprint in earlier_fingerprints:
                left_out.add(step.name)
        epochs = 0 if is_last else recipe.meds3.fine_tuning.epochs
        if epochs:  # the next policy is trained as the first one was
            left_out.discard("train_policy")
        costs = estimate(round_recipe, run, left_out, next_policy_epochs=epochs)
        lines.append(round_line(number, costs))
        for note in costs.notes:
            if note not in notes:
                notes.append(note)
        earlier_fingerprints |= fingerprints
        policy = f"the policy of round {number + 1}"
    return Estimate(costs.sizes, tuple(lines), tuple(notes))


def round_line(number: int, costs: Estimate) -> Line:
    """A round's costs in one line."""
    total = Line(step=f"round {number}", work="", stored=costs.stored)
    steps: list[str] = []
    for line in costs.lines:
        if line.tokens or line.calls:
            steps.append(line.step)
        total = replace(
            total,
            calls=total.calls + line.calls,
            tokens=total.tokens + line.tokens,
            dollars=total.dollars + line.dollars,
            gpu_hours=total.gpu_hours + line.gpu_hours,
        )
    return replace(total, work=", ".join(steps))


def of_round(recipe: Recipe, policy: str | None, is_last: bool) -> Recipe:
    """The recipe with the round's policy; the last round only samples."""
    models = recipe.models.model_copy(update={"policy": policy})
    without = list(recipe.without)
    if is_last:
        without += ["tree_search", "train_text_prm"]
    return recipe.model_copy(update={"models": models, "without": without})


def next_policy(run: Run) -> str:
    """The run's policy, trained further on the right solutions of its own trees: the folder of its checkpoint."""
    config = run.recipe.meds3.fine_tuning.model_copy(update={"base": run.model("policy")})
    upstream = {"tree_solutions": run.fingerprint(BY_NAME["tree_search"])}
    fingerprint = digest("next_policy", identity(config), upstream)
    provenance = Provenance(name="next_policy", fingerprint=fingerprint, config=identity(config), upstream=upstream)
    artifact = Artifact(f"{run.root}/next_policy/{fingerprint}")
    if not artifact.is_complete:
        started = time.monotonic()
        questions = run.table("questions").to_arrow()
        documents = run.table("documents").to_arrow()
        right = right_solutions(run.table("tree_solutions").to_arrow())
        name = f"next_policy-{fingerprint}"
        tries.make(
            artifact,
            provenance,
            lambda uri: train_policy(config, questions, right, documents, uri, name),
            lambda: time.monotonic() - started,
            resumes=True,
        )
    return artifact.uri


def right_solutions(solutions: pa.Table) -> pa.Table:
    """`Solutions` rows with their right solutions alone."""
    rows = solutions.to_pylist()
    for row in rows:
        row["solutions"] = [solution for solution in row["solutions"] if solution["correct"]]
    return pa.Table.from_pylist(rows, schema=solutions.schema)


def measure(run: Run, reward_model: str) -> dict[str, float]:
    """The accuracy, over test questions, of one sample and of each decoder with this reward model."""
    from medmm_ray.reward_model import RewardModel

    model = RewardModel.from_pretrained(reward_model)
    questions: dict[str, Mapping[str, Any]] = {}
    for question in run.table("questions").to_arrow().to_pylist():
        if question["split"] == "test":
            questions[question["question_id"]] = question
    figures: list[dict[str, float]] = []  # of each question
    for row in run.table("solutions").to_arrow().to_pylist():
        if row["question_id"] in questions:
            scores = log_odds(model, questions[row["question_id"]], row["solutions"])
            figures.append(accuracies(row["solutions"], scores))
    means: dict[str, float] = {}
    for name in FIGURES:
        values = [of_question[name] for of_question in figures]
        means[name] = sum(values) / len(values)
    return means


def log_odds(model: Any, question: Mapping[str, Any], solutions: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """The reward model's log-odds of each step of each solution."""
    text = question_with_options(question["question"], question["options"])
    scores = model.score(text, [solution["steps"] for solution in solutions])
    return [list(score.text_log_odds) for score in scores]


def accuracies(solutions: Sequence[Mapping[str, Any]], scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """One question's figures: the share of right samples, and whether each decoder picks a right one."""
    right: list[bool] = []
    answers: list[str | None] = []
    for solution in solutions:
        right.append(solution["correct"] is True)
        answers.append(solution["answer"])
    figures = {"one sample": sum(right) / max(len(right), 1)}
    for name in FIGURES[1:]:
        place = decoders.decode(name, answers, scores)
        figures[name] = float(place is not None and right[place])
    return figures


def main(words: Sequence[str] | None = None) -> int:
    """The exit status of the command with the arguments `words`."""
    arguments = parser("meds3", "Rounds of tree search, reward model and policy, resumable.")
    arguments.add_argument("--dry-run", action="store_true", help="estimate cost and GPU-hours, a line a round")
    return launch(arguments, words, _main, Recipe, "meds3")


def _main(arguments: argparse.Namespace) -> int:
    from medmm_ray.session import session

    recipe = read_arguments(arguments, section=None)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    if arguments.dry_run:
        console.print(rendered(planned(recipe)))
        return 0
    with session():
        figures = rounds(recipe, console)
    grid = Grid("round", *FIGURES, box=None)
    for number, row in enumerate(figures):
        cells = [f"{row[name]:.3f}" for name in FIGURES]
        grid.add_row(str(number), *cells)
    console.print(grid)
    fs, path = filesystem(f"{recipe.run}/meds3.json")
    write_file(fs, path, json.dumps(figures, indent=2).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
