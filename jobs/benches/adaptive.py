"""How many samples a question needs: best-of-N in rounds that stop early, against all N, on a finished run.

A run's stored solutions and scores are drawn again in their order, so that no model runs: after each round the rule of
`POST /v1/best_of_n` (`medmm_ray.stats.stopping`) says whether to stop. Baseline is all N samples; ours has two rows a
rule: tokens that the policy generates, which are those that the scorer reads of solutions, and points of accuracy that
are lost. Beside them the accuracy of always as many samples as the rounds took in the mean: what adapting adds.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Console

from jobs.benches import Measured
from medmm_ray.config import Config, ConfigError
from medmm_ray.data.records import Question, Scores, Solution, Solutions, from_dict
from medmm_ray.data.tables import Table, follow
from medmm_ray.stats import decoders
from medmm_ray.stats.metrics import Floats
from medmm_ray.stats.stopping import RULES, Rule, standing

SCORE_COLUMNS = ["solution_id", "arm", "text_log_odds", "image_log_odds", "error"]


class BenchConfig(Config):
    """Which run, and how it is sampled again."""

    run: str = ""
    """A finished run, such as runs/quickstart. Required."""
    split: str = "test"
    """Its questions."""
    arm: str = "multimodal"
    """Its scores."""
    num_samples: int = 64
    """N: the most samples of a question."""
    round_size: int = 8
    """Samples of a round."""
    reliability: float = 0.85
    """Chance that the answer stays, at which sampling stops."""
    num_orders: int = 8
    """Random orders in which each question's samples come, besides their own."""
    seed: int = 0
    """Of these orders."""


@dataclass(frozen=True)
class Replay:
    """The samples of one question: what each answers, whether that is right, its reward (NaN: none) and its tokens."""

    answers: Sequence[str | None]
    right: Sequence[bool]
    rewards: Sequence[float]
    num_tokens: Sequence[int]

    def ordered(self, order: Sequence[int]) -> "Replay":
        """The same samples in another order; at least two."""
        pick = itemgetter(*order)
        return Replay(pick(self.answers), pick(self.right), pick(self.rewards), pick(self.num_tokens))


@dataclass(frozen=True)
class Outcome:
    """What came of one question: whether the chosen sample is right, how many samples and tokens were taken."""

    is_right: bool
    num_samples: int
    num_tokens: int


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    """Two rows a rule."""
    replays = read_replays(config)
    console.print(f"[dim]{len(replays)} questions x {1 + config.num_orders} orders[/dim]")
    orders = list(_orders(replays, config))
    for rule in RULES:
        fixed = [outcome(replay, rule, len(replay.answers)) for replay in orders]
        adaptive = [in_rounds(replay, rule, config.round_size, config.reliability) for replay in orders]
        mean_samples = round(mean_of(adaptive, "num_samples"))
        same_cost = mean_of([outcome(replay, rule, mean_samples) for replay in orders], "is_right")
        note = f"{mean_samples} samples in the mean; always {mean_samples}: {100 * same_cost:.1f} %"
        all_tokens, tokens = mean_of(fixed, "num_tokens"), mean_of(adaptive, "num_tokens")
        yield Measured(f"{rule}: tokens a question", all_tokens, tokens, tokens / all_tokens, "≤ 0.5", "tokens")
        before, after = 100 * mean_of(fixed, "is_right"), 100 * mean_of(adaptive, "is_right")
        yield Measured(f"{rule}: points of accuracy lost", before, after, before - after, "≤ 1", f"%; {note}")


def outcome(replay: Replay, rule: Rule, num_samples: int) -> Outcome:
    """What the first `num_samples` choose."""
    chosen = standing(rule, replay.answers[:num_samples], replay.rewards[:num_samples], num_samples).chosen
    is_right = chosen is not None and replay.right[chosen]
    return Outcome(is_right, num_samples, sum(replay.num_tokens[:num_samples]))


def in_rounds(replay: Replay, rule: Rule, round_size: int, reliability: float) -> Outcome:
    """What rounds choose that stop where the rule says so."""
    num_samples = len(replay.answers)
    num_drawn = 0
    while num_drawn < num_samples:
        num_drawn = min(num_samples, num_drawn + round_size)
        now = standing(rule, replay.answers[:num_drawn], replay.rewards[:num_drawn], num_samples)
        if now.suffices(reliability):
            break
    return outcome(replay, rule, num_drawn)


def mean_of(outcomes: Sequence[Outcome], name: str) -> float:
    """The mean of a field over the questions."""
    return fmean(map(attrgetter(name), outcomes))


def _orders(replays: Sequence[Replay], config: BenchConfig) -> Iterator[Replay]:
    """Each question in its own order, then in random ones."""
    rng = np.random.default_rng(config.seed)
    for replay in replays:
        yield replay
        for _ in range(config.num_orders):
            yield replay.ordered(rng.permutation(len(replay.answers)).tolist())


# Reading a run


def read_replays(config: BenchConfig) -> list[Replay]:
    """The split's questions with at least two solutions, at most `num_samples` of each.

    Raises `ConfigError` where no run is named, or it has no such scores.
    """
    if not config.run:
        raise ConfigError("'run' is required: a finished run, such as run=runs/quickstart")
    count_tokens = _token_counter(config.run)
    questions = _table(config.run, "questions", Question, ["question_id", "split"])
    split_of = dict(map(itemgetter("question_id", "split"), questions))
    rewards = _rewards(config)
    replays: list[Replay] = []
    for row in _table(config.run, "solutions", Solutions, ["question_id", "solutions"]):
        solutions: list[Solution] = [from_dict(Solution, entry) for entry in row["solutions"][: config.num_samples]]
        if split_of.get(row["question_id"]) == config.split and len(solutions) > 1:
            replays.append(_replay(solutions, rewards, count_tokens))
    if not replays or not rewards:
        raise ConfigError(
            f"{config.run} has no scored questions of split={config.split} arm={config.arm}; run evaluate"
        )
    return replays


def _replay(solutions: Sequence[Solution], rewards: Mapping[str, float], count_tokens: Callable[[str], int]) -> Replay:
    answers: list[str | None] = []
    right: list[bool] = []
    rewards_in_order: list[float] = []
    num_tokens: list[int] = []
    for solution in solutions:
        answers.append(solution.answer)
        right.append(bool(solution.correct))
        # A sample without a score keeps its place among the N.
        rewards_in_order.append(rewards.get(solution.solution_id, math.nan))
        num_tokens.append(count_tokens(solution.text))
    return Replay(answers, right, rewards_in_order, num_tokens)


def _rewards(config: BenchConfig) -> dict[str, float]:
    """By solution the smallest of its steps' log-odds."""
    rewards: dict[str, float] = {}
    for row in _table(config.run, "scores", Scores, SCORE_COLUMNS):
        if row["arm"] == config.arm and row["error"] is None:
            log_odds: Floats = np.add(row["text_log_odds"], row["image_log_odds"])
            rewards[row["solution_id"]] = decoders.aggregate(log_odds, "min")
    return rewards


def _table(run: str, name: str, record: type, columns: list[str]) -> list[dict[str, Any]]:
    """Rows of these columns alone, so that a run of an earlier version can be read too."""
    rows: list[dict[str, Any]] = Table(follow(f"{run.rstrip('/')}/{name}"), record).to_arrow(columns).to_pylist()
    return rows


def _token_counter(run: str) -> Callable[[str], int]:
    """How many tokens the run's policy writes a text in."""
    from tokenizers import Tokenizer

    folder = Path(follow(f"{run.rstrip('/')}/policy"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
