"""What a recipe would take at 10⁴ … 10⁹ questions: ``python -m jobs.simulate recipe.yaml [name=value] [--to FILE]``.

Nothing runs: the costs are those of ``--dry-run`` (`medmm_ray.estimate`), spread over clusters of several sizes, and
the limits are what was measured of one process, each with its source beside it.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.entry import launch, parser, read_arguments
from jobs.plan import estimate
from jobs.recipe import Recipe, asking
from jobs.step import Run
from medmm_ray.config import ConfigError
from medmm_ray.estimate import Estimate, Line, size

QUESTIONS = tuple(10**power for power in range(4, 10))
TEST_QUESTIONS = 1000  # of them: a test set does not grow with the training data
GPUS = (4, 16, 64, 256, 1024, 4096)
EFFICIENCY = 0.9
"""Share of its GPUs that a pool keeps busy: the target of ``python -m jobs.bench scale`` at 16 actors."""
TRAINING_GPUS = 64
"""Most workers of a training that were simulated with the flagship's batch (``python -m jobs.bench scale``)."""
START_HOURS = 0.1
"""Of a step: machines and models come up, the table is finished."""
ANSWER_S = 4.0
"""Seconds of an API's answer, assumed."""
IN_FLIGHT = (64, 1024, 16384)
"""Calls at a time: those of the shipped recipe (4 actors with 16 each), and more."""
COST_COLUMNS = ("questions", "tokens", "GPU-hours", "GPU $", "API and readers, $", "stored", "most GPU-hours")
API_COLUMNS = ("questions", "calls", *(f"{number:,} at a time" for number in IN_FLIGHT), "to keep pace with 64 GPUs")
STEP_COLUMNS = ("step", "GPU-hours", "hours on 64 GPUs", "$", "stored")
LIMIT_COLUMNS = ("limit", "used up at", "of", "what helps then")
INTRODUCTION = f"""`{{command}}` writes this page. Nothing was run for it:
the costs are those of `--dry-run`, expect a factor of two either way. {{samples}} solutions a training question,
{TEST_QUESTIONS:,} of the questions are the test set; {{gpu}} at ${{price:.2f}} an hour, {EFFICIENCY:.0%} of them busy,
{START_HOURS:g} h for each step to start and finish, no training on more than {TRAINING_GPUS}; an API's answer takes
{ANSWER_S:g} s. Pools of more than 64 actors were not measured."""
WORDS = {
    "Hours by cluster": """\
Steps one after the other, but sampling and judging at a time, with an API that keeps pace. No step is faster than its
start, so that small runs gain nothing from large clusters.""",
    "What the API must keep up with": """\
The judge's hours by its calls at a time (`judge.engine.num_actors` x `apis.<model>.in_flight`, and what the provider
grants), and the calls at a time with which it is done when 64 GPUs have sampled.""",
    "Where the design bends next": """\
What one process holds or does for all questions, and shared storage. The recipe's own limits come before: its
`max_cost_usd`, which ends the judge, and `curate.max_train`.""",
}


@dataclass(frozen=True)
class Limit:
    """Something that one process holds or does for all questions, and how much of it there is."""

    what: str
    per_question: float
    capacity: float
    unit: Callable[[float], str]
    then: str

    @property
    def questions(self) -> float:
        """Questions at which it is used up."""
        return self.capacity / self.per_question


def hours_text(hours: float) -> str:
    """A duration in hours or days."""
    return f"{hours:,.1f} h" if hours < 48 else f"{hours / 24:,.1f} days"


def limits(result: Estimate) -> list[Limit]:
    """Where the design bends, the first first; sizes of ids were measured with `tracemalloc`."""
    return sorted(
        [
            Limit(
                "driver memory while sampling: ids and 22 figures of each question, 2.0 kB",
                2.0e3,
                64e9,
                size,
                "sums of figures by part, which leaves 0.45 kB",
            ),
            Limit(
                "driver memory of other steps: a question's id in sets and lists, 0.45 kB",
                0.45e3,
                64e9,
                size,
                "runs by ranges of questions, each with a driver of its own",
            ),
            Limit(
                "near duplicates in one process: 96 s for 10⁶ hashes (bench near_duplicates)",
                96e-6 / 3600,
                24,
                hours_text,
                "its bands as tasks over the cluster",
            ),
            Limit(
                "text states on shared storage",
                result.line("states").stored / result.sizes.questions,
                100e12,
                size,
                "`states.max_solutions`, which stores fewer of each question",
            ),
        ],
        key=lambda limit: limit.questions,
    )


def _calls(result: Estimate) -> float:
    return result.line("judge").calls


def result_of(recipe: Recipe, questions: int) -> Estimate:
    """The estimate of a recipe with so many questions in all."""
    changes = {"train_questions": questions - TEST_QUESTIONS, "test_questions": TEST_QUESTIONS}
    scaled = recipe.model_copy(update={"plan": recipe.plan.model_copy(update=changes)})
    return estimate(scaled, Run(scaled, asks_stores=False), scaled.without)


def step_hours(line: Line, num_gpus: int) -> float:
    """Wall-clock hours of a step on GPUs, of which a training takes no more than its batch has use for."""
    if not line.gpu_hours:
        return 0.0
    if line.step.startswith("train_"):
        num_gpus = min(num_gpus, TRAINING_GPUS)
    return line.gpu_hours / (num_gpus * EFFICIENCY) + START_HOURS


def wall_hours(result: Estimate, num_gpus: int) -> float:
    """Wall-clock hours of a run whose API keeps pace: the judge works beside the sampler."""
    return sum(step_hours(line, num_gpus) for line in result.lines)


def api_hours(result: Estimate, in_flight: int) -> float:
    """Wall-clock hours of the judge's calls, so many at a time."""
    return _calls(result) * ANSWER_S / in_flight / 3600


def bottleneck(result: Estimate) -> str:
    """The step with most GPU-hours, and its share of them."""
    line = max(result.lines, key=lambda line: line.gpu_hours)
    return f"{line.step}, {line.gpu_hours / result.gpu_hours:.0%}"


def document(recipe: Recipe, command: str) -> str:
    """The tables, as a page of Markdown."""
    results = {questions: result_of(recipe, questions) for questions in QUESTIONS}
    base = results[QUESTIONS[0]]
    hardware = base.sizes.hardware
    introduction = INTRODUCTION.format(
        command=command, samples=base.sizes.train_samples, gpu=hardware.gpu, price=hardware.price
    )
    tables = {
        "Cost": _table(COST_COLUMNS, map(_cost_row, results.values())),
        "Hours by cluster": _table(
            ["questions", *(f"{num_gpus:,} GPUs" for num_gpus in GPUS)], map(_wall_row, results.values())
        ),
        "What the API must keep up with": _table(API_COLUMNS, map(_api_row, results.values())),
        f"Steps, at {QUESTIONS[2]:,} questions": _table(STEP_COLUMNS, _step_rows(results[QUESTIONS[2]])),
        "Where the design bends next": _table(LIMIT_COLUMNS, map(_limit_row, limits(base))),
    }
    sections = []
    for title, table in tables.items():
        words = WORDS.get(title)
        sections.append("\n\n".join([f"## {title}", *([words] if words else []), table]))
    return "\n\n".join(["# How large a run can be", introduction, *sections]) + "\n"


def _cost_row(result: Estimate) -> list[str]:
    tokens = sum(line.tokens for line in result.lines)
    others = result.dollars - result.gpu_dollars
    stored = size(result.stored)
    return [
        f"{result.sizes.questions:,}",
        f"{tokens:.1e}",
        f"{result.gpu_hours:,.0f}",
        f"{result.gpu_dollars:,.0f}",
        f"{others:,.0f}",
        stored,
        bottleneck(result),
    ]


def _wall_row(result: Estimate) -> list[str]:
    hours = [wall_hours(result, num_gpus) for num_gpus in GPUS]
    return [f"{result.sizes.questions:,}", *map(hours_text, hours)]


def _api_row(result: Estimate) -> list[str]:
    sampling_s = 3600 * step_hours(result.line("sample"), 64)
    pace = _calls(result) * ANSWER_S / sampling_s
    hours = [hours_text(api_hours(result, in_flight)) for in_flight in IN_FLIGHT]
    return [f"{result.sizes.questions:,}", f"{_calls(result):,.0f}", *hours, f"{pace:,.0f}"]


def _step_rows(result: Estimate) -> list[list[str]]:
    rows = []
    for line in result.lines:
        dollars = line.dollars + line.gpu_hours * result.sizes.hardware.price
        hours = step_hours(line, 64)
        rows.append(
            [
                line.step,
                f"{line.gpu_hours:,.1f}" if line.gpu_hours else "",
                hours_text(hours) if hours else "",
                f"{dollars:,.0f}" if dollars else "",
                size(line.stored) if line.stored else "",
            ]
        )
    return rows


def _limit_row(limit: Limit) -> list[str]:
    return [limit.what, f"{limit.questions:.0e} questions", limit.unit(limit.capacity), limit.then]


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; numbers to the right."""
    lines = [f"| {' | '.join(names)} |", "|---" + "|---:" * (len(names) - 1) + "|"]
    for row in rows:
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """``python -m jobs.simulate``."""
    arguments = parser("simulate", "What a recipe would take at 10^4 to 10^9 questions; nothing is run.")
    arguments.add_argument("--to", metavar="FILE", help="write the page there, not to the screen")
    return launch(arguments, words, _main, Recipe)


def _main(parsed: argparse.Namespace) -> int:
    recipe = read_arguments(parsed, section=None)
    if "judge" not in asking(recipe):
        raise ConfigError(
            f"judge.engine.kind is {recipe.judge.engine.kind!r}; what is simulated is an API that judges: name a "
            "recipe with one, as jobs/recipes/medmm.yaml"
        )
    words = [parsed.recipe, *parsed.overrides, *(["--to", parsed.to] if parsed.to else [])]
    page = document(recipe, f"python -m jobs.simulate {' '.join(words)}")
    if parsed.to:
        Path(parsed.to).write_text(page)
    else:
        print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
