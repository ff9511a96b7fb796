"""Monte Carlo's modes against 16 continuations of every step: tokens, and how well they find the truth, on phantoms.

What is simulated: the policy (and the judge, as everywhere on phantoms). A phantom's small policy sees no picture, so
it reaches the right answer from most prefixes by luck alone. In its place a scripted engine continues a phantom's
solution as a policy would that sees the picture: each next step is right, or with the question's own chance taken from
a solution of another case, and so wrong (`phantom.truth` decides which it is); after a wrong step all others are of
that other case, and the right answer is reached only with the chance `recovery`. The solutions are drawn from this
engine too. So the chances of a prefix are known from the truth of its steps, and Monte Carlo can be wrong in both of
its ways: 16 continuations of a right prefix that all slip, and one of a wrong prefix that recovers. With
``policy=FOLDER`` vLLM draws solutions and continuations from a real checkpoint instead: quickstart's, blind as it is,
has 13 % of the first errors in every mode, and as most of its prefixes are hopeless and cost all 16 continuations,
first_error takes 54 % of the baseline's tokens, 36 % from the judge, and verify 30 % (24 questions x 8).

The truth of a step is whether any step up to it is wrong; the first error is the first wrong step. Labels become
training targets as in training (collapse: 0 behind the first 0). First-error accuracy is the share of solutions with
the true first error (or none), balanced step accuracy the mean of the shares of right and of wrong steps with the true
target; a step without a target counts as wrong in both. Loss: points below the baseline, with a 95 % bootstrap interval
over questions. All modes have the same solutions, and the k-th continuation of a prefix is the same in all of them. The
baseline already continues no final step, and equal prefixes once.
"""

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field
from rich.console import Console

from jobs.benches import Measured
from medmm_ray.config import Config
from medmm_ray.data.records import Labels, StepLabel
from medmm_ray.data.sources.phantom import truth
from medmm_ray.data.sources.phantom.case import generator
from medmm_ray.data.sources.phantom.questions import PhantomQuestion, blind_solution, make_questions
from medmm_ray.engines.chat import ChatPrompt
from medmm_ray.engines.generator import (
    Completion,
    Generator,
    Sampling,
    Statistics,
    TextGenerator,
    policy_prompt,
    request_seed,
)
from medmm_ray.engines.vllm_engine import VllmEngine
from medmm_ray.stats.metrics import cluster_bootstrap
from medmm_ray.stats.targets import Target, targets
from medmm_ray.steps.judge import TruthJudge
from medmm_ray.steps.monte_carlo import MonteCarloConfig, RolloutActor
from medmm_ray.text import extract_answer, is_correct, numbered_steps, split_steps

NUM_WORKS = 8  # solutions of a case, and of other cases, whose steps the scripted policy takes
POLICY = "scripted"
Floats = npt.NDArray[np.float64]


class BenchConfig(Config):
    """How much is measured, and how well the simulated policy and judge do."""

    questions: int = 300
    """Questions."""
    solutions: int = 8
    """Solutions of a question."""
    rollouts: int = 16
    """Continuations of a prefix, in all modes."""
    slips: tuple[float, float] = (0.05, 0.45)
    """Least and greatest chance of a question that a step goes wrong."""
    recovery: tuple[float, ...] = (0.0, 0.02)
    """Chance to reach the right answer after a wrong step; the bench runs once for each."""
    policy: str | None = None
    """A checkpoint to draw from with vLLM in place of the script, e.g. quickstart's policy; slips, recovery and
    distinct then mean nothing."""
    distinct: bool = True
    """No two solutions begin alike; false: as the script writes them, with many equal prefixes."""
    judge_errors: float = Field(0.08, ge=0, le=0.5)
    """Share of checkable steps about which the judge errs, for the modes that ask it."""
    bootstrap_samples: int = 2000
    """Resamples of the questions, for the intervals."""
    seed: int = 0
    """Start of all random numbers."""


@dataclass(frozen=True)
class Mode:
    """One way to label, its settings, and the label policy that makes targets of its labels."""

    name: str
    settings: Mapping[str, Any]
    targets: str = "monte_carlo"
    is_target: bool = False


BASELINE = Mode("16 of every step", {"mode": "all", "stop_early": False, "count_solutions": False})
MODES = (
    Mode("all, whole ratios", {"mode": "all", "stop_early": False}),
    Mode("all, stopped early", {"mode": "all"}, is_target=True),
    Mode("first_error", {"mode": "first_error"}, is_target=True),
    Mode("first_error from the judge", {"mode": "first_error", "search_from": "judge"}, is_target=True),
    Mode("verify", {"mode": "verify"}),
    Mode("verify, where the judge agrees", {"mode": "verify"}, targets="consensus"),
    Mode("uncertain, else the judge", {"mode": "uncertain", "max_share": 1.0}, targets="hybrid"),
    Mode("the judge alone", {"mode": "uncertain", "max_share": 0.0}, targets="judge"),
)
SHAPE: Mapping[str, Any] = {
    "temperature": 1.0,
    "max_tokens": 96,
    "engine": VllmEngine(max_model_len=512, dtype="float32", num_threads=1),
}


class ScriptedPolicy:
    """An engine that continues phantoms' solutions by a script; a token is a word or a mark of punctuation.

    It knows which case a prompt is about by the number in its question ("Case 12: ...").
    """

    def __init__(
        self, items: Sequence[PhantomQuestion], slips: tuple[float, float], recovery: float, seed: int
    ) -> None:
        self.items, self.recovery, self.seed = items, recovery, seed
        self.statistics = Statistics()
        self.slips: list[float] = []
        self.wrong_solutions: list[list[list[str]]] = []
        for number, item in enumerate(items):
            self.slips.append(float(generator("slips", seed, number).uniform(*slips)))
            self.wrong_solutions.append(wrong_solutions(item, generator("others", seed, number)))

    def count(self, prompt: ChatPrompt) -> int:
        """Words and marks of a prompt."""
        return num_tokens(prompt.messages[-1]["content"] + prompt.prefix)

    async def generate(self, prompt: ChatPrompt, n: int, seed: int, sampling: Sampling) -> list[Completion]:  # noqa: ARG002
        """Scripted continuations of the case that the prompt's question names."""
        case = re.search(r"Case (\d+):", prompt.messages[-1]["content"])
        assert case is not None
        return [self.complete(int(case[1]), prompt.prefix, seed + i) for i in range(n)]

    def complete(self, number: int, prefix: str, seed: int) -> Completion:
        """The rest of a solution that begins with `prefix`."""
        item, rng = self.items[number], np.random.default_rng([self.seed, number, seed])
        _, steps = split_steps(prefix)
        right = item.worked[rng.integers(NUM_WORKS)]
        wrong = self.wrong_solutions[number][rng.integers(NUM_WORKS)]
        failed = any(truth(step, item.case, item) is False for step in steps)
        new_steps: list[str] = []
        for place in range(len(steps), len(right) - 1):
            step = right[place]
            if failed or rng.random() < self.slips[number]:
                step = wrong[min(place, len(wrong) - 2)]
                failed = failed or truth(step, item.case, item) is False
            new_steps.append(step)
        reached = rng.random() < (self.recovery if failed else 1 - self.slips[number])
        new_steps.append((right if reached else wrong)[-1])
        text = "\n".join(numbered_steps(new_steps, len(steps) + 1))
        if prefix:  # it ends with the first step's mark
            text = text.partition(":")[2]
        return Completion(text, "stop", seed, num_tokens(text))


def wrong_solutions(item: PhantomQuestion, rng: np.random.Generator) -> list[list[str]]:
    """Solutions of other cases, with another answer."""
    solutions: list[list[str]] = []
    while len(solutions) < NUM_WORKS:
        steps, letter = blind_solution(item, rng)
        if letter != item.answer:
            solutions.append(steps)
    return solutions


def num_tokens(text: str) -> int:
    """Words, marks and the end."""
    return len(re.findall(r"\w+|[^\w\s]", text)) + 1


class CachedEngine:
    """An engine whose samples are kept: the modes use the same continuations, which need not be generated again."""

    def __init__(self, engine: TextGenerator) -> None:
        self.engine, self.statistics = engine, engine.statistics
        self.samples: dict[tuple[str, str, int], Completion] = {}

    def __call__(self, model: str, config: VllmEngine) -> "CachedEngine":  # noqa: ARG002
        return self

    def count(self, prompt: ChatPrompt) -> int:
        """As the engine counts."""
        return self.engine.count(prompt)

    async def generate(self, prompt: ChatPrompt, n: int, seed: int, sampling: Sampling) -> list[Completion]:
        """The engine's samples, of which each is generated once."""
        keys = [(prompt.messages[-1]["content"], prompt.prefix, seed + i) for i in range(n)]
        if any(key not in self.samples for key in keys):
            self.samples |= zip(keys, await self.engine.generate(prompt, n, seed, sampling), strict=True)
        return [self.samples[key] for key in keys]


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    """Tokens and accuracies of each mode, for each chance of recovery or for vLLM."""
    items = make_questions(config.seed, "train", config.questions, num_worked=NUM_WORKS)
    if config.policy is None:
        for recovery in config.recovery:
            engine = ScriptedPolicy(items, config.slips, recovery, config.seed)
            name = f"recovery {recovery:g}"
            yield from rows(name, asyncio.run(figures(engine, items, config)), config, console)
    else:
        vllm = Generator(config.policy, SHAPE["engine"])
        yield from rows("vLLM", asyncio.run(figures(vllm, items, config)), config, console)
        vllm.shutdown()


@dataclass(frozen=True)
class Figures:
    """What a mode took, and of each question the counts that `shares` reads."""

    tokens: int
    counts_QK: Floats


async def figures(engine: TextGenerator, items: Sequence[PhantomQuestion], config: BenchConfig) -> dict[str, Figures]:
    """All modes on the same solutions, the baseline first."""
    scripted = config.policy is None
    question_rows = [await question_row(engine, i, item, config, scripted) for i, item in enumerate(items)]
    cached = CachedEngine(engine)
    by_mode: dict[str, Figures] = {}
    for mode in (BASELINE, *MODES):
        settings = {"num_rollouts": config.rollouts, "seed": config.seed, **SHAPE, **mode.settings}
        actor = RolloutActor(MonteCarloConfig(**settings), POLICY, POLICY, generator=cached)
        results = await asyncio.gather(*map(actor.label, question_rows))
        mode_tokens = 0
        mode_counts: list[Floats] = []
        for item, row, (labels, spent) in zip(items, question_rows, results, strict=True):
            mode_tokens += spent["rollout_tokens"]
            mode_counts.append(question_counts(mode, item, row, labels))
        by_mode[mode.name] = Figures(mode_tokens, np.array(mode_counts))
    return by_mode


def rows(name: str, by_mode: Mapping[str, Figures], config: BenchConfig, console: Console) -> Iterator[Measured]:
    """What each mode takes and how well it does, beside the baseline."""
    base = by_mode[BASELINE.name]
    num_questions, num_solutions = len(base.counts_QK), base.counts_QK[:, 1].sum()
    console.print(f"{name}: {num_questions} questions, {num_solutions:.0f} solutions")
    for mode in MODES:
        figures_of_mode = by_mode[mode.name]
        yield Measured(
            f"{name}, {mode.name}: tokens",
            base.tokens / num_solutions,
            figures_of_mode.tokens / num_solutions,
            figures_of_mode.tokens / base.tokens,
            "≤ 0.333" if mode.is_target else "",
            "tokens a solution",
        )
        if mode.targets == "consensus":
            share = figures_of_mode.counts_QK[:, 1].sum() / num_solutions
            yield Measured(f"{name}, {mode.name}: solutions kept", 1.0, share, share, "", "share")
        before, after = shares(base.counts_QK.sum(axis=0)), shares(figures_of_mode.counts_QK.sum(axis=0))
        low, high = cluster_bootstrap(
            np.concatenate([base.counts_QK, figures_of_mode.counts_QK], axis=1),
            lambda sums_BK: shares(sums_BK[:, :6]) - shares(sums_BK[:, 6:]),
            config.bootstrap_samples,
            config.seed,
        )
        for i, figure in enumerate(("first-error accuracy", "balanced step accuracy")):
            yield Measured(
                f"{name}, {mode.name}: {figure}, loss [{low[i]:+.2f}, {high[i]:+.2f}]",
                before[i],
                after[i],
                before[i] - after[i],
                "≤ 1" if mode.is_target else "",
                "%, points",
            )


async def question_row(
    engine: TextGenerator, number: int, item: PhantomQuestion, config: BenchConfig, scripted: bool
) -> dict[str, Any]:
    """A question with its solutions and the judge's word on them, as `RolloutActor` reads it."""
    row: dict[str, Any] = {
        "question_id": str(number),
        "policy": POLICY,
        "split": "train",
        "options": item.options,
        "answer": item.answer,
        "question": f"Case {number}: {item.question}" if scripted else item.question,
        "answer_type": "choice",
    }
    prompt, sampling = policy_prompt(engine, row, 0, 0), MonteCarloConfig(**SHAPE).sampling
    solutions: list[dict[str, Any]] = []
    judged: list[dict[str, Any]] = []
    judge = TruthJudge("phantom", config.judge_errors, config.seed)
    seed = request_seed("bench", number, config.seed)
    for index, sample in enumerate(await engine.generate(prompt, config.solutions, seed, sampling)):
        _, steps = split_steps(sample.text)
        if config.distinct and scripted:  # texts of a large model seldom begin alike
            steps[0] = f"{steps[0]} Attempt {index}."
        correct = is_correct(extract_answer(sample.text, item.options), item.answer, "choice")
        name = f"{number}-{index}"
        verdicts: list[dict[str, Any]] = []
        for i, step in enumerate(steps):
            verdicts.append(asdict(judge.verdict(truth(step, item.case, item), row["question_id"], steps, i)))
        judged.append({"solution_id": name, "steps": verdicts})
        solutions.append(
            {
                "solution_id": name,
                "index": index,
                "steps": steps,
                "correct": correct,
                "finish_reason": sample.finish_reason,
            }
        )
    return {**row, "solutions": solutions, "judged": judged}


def question_counts(mode: Mode, item: PhantomQuestion, row: Mapping[str, Any], labels: Sequence[Labels]) -> Floats:
    """A question's sums of `counts`; of a consensus those of the solutions that it keeps."""
    labels_of = {row_labels.solution_id: row_labels for row_labels in labels}
    sums_K = np.zeros(6)
    for solution, verdicts in zip(row["solutions"], row["judged"], strict=True):
        name, steps = solution["solution_id"], solution["steps"]
        sources = [judge_labels(verdicts)]
        if name in labels_of:
            sources.append(labels_of[name])
        aims = targets(mode.targets, sources, len(steps), "collapse", solution["correct"])
        if mode.targets != "consensus" or None not in aims:
            sums_K += counts(aims, first_error(item, steps))
    return sums_K


def first_error(item: PhantomQuestion, steps: Sequence[str]) -> int | None:
    """The place of the first wrong step; None where there is none."""
    return next((i for i, step in enumerate(steps) if truth(step, item.case, item) is False), None)


def judge_labels(verdicts: Mapping[str, Any]) -> Labels:
    """The judge's row of one solution."""
    return Labels(
        question_id="",
        solution_id=verdicts["solution_id"],
        source="judge",
        annotator="phantom",
        cost=0.0,
        steps=[StepLabel(**step) for step in verdicts["steps"]],
    )


def counts(aims: Sequence[Target], first: int | None) -> list[int]:
    """First errors hit and in all; right steps hit and in all; wrong steps hit and in all."""
    num_right = len(aims) if first is None else first
    hits = [aim == (1.0 if place < num_right else 0.0) for place, aim in enumerate(aims)]
    return [
        all(hits[: num_right + 1]),
        1,
        sum(hits[:num_right]),
        num_right,
        sum(hits[num_right:]),
        len(aims) - num_right,
    ]


def shares(sums_K: Floats) -> Floats:
    """First-error accuracy and balanced step accuracy, %, of the counts in the last axis."""
    hit, right, wrong = (sums_K[..., i] / np.maximum(sums_K[..., i + 1], 1) for i in (0, 2, 4))
    return 100 * np.stack([hit, (right + wrong) / 2], axis=-1)
