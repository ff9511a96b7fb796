"""Scored questions -> accuracy over N, by decoder and by group. Intervals are those of resampled questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from medmm_ray.stats import decoders, metrics
from medmm_ray.stats.decoders import Decoder
from medmm_ray.stats.grouped_stats import Figure, easy_first
from medmm_ray.stats.metrics import Floats
from medmm_ray.stats.resampling import Resampling
from medmm_ray.steps.evaluate.scored_questions import LogOdds, ScoredQuestion, rewards_of

FigurePath = tuple[str, ...]
DECODERS = ("best_of_n", "sc_rm")


@dataclass(frozen=True)
class Accuracy(Figure):
    """A share of questions answered rightly, or a difference of two, with its interval."""

    value: float
    low: float
    high: float


AccuracyByN = Mapping[str, Accuracy]
"""By N, as text."""


@dataclass(frozen=True, kw_only=True)
class GainOverN:
    """The multimodal arm's accuracy minus the text-only arm's; the interval is that of the paired differences."""

    best_of_n: AccuracyByN
    sc_rm: AccuracyByN


@dataclass(frozen=True, kw_only=True)
class AccuracyOverN:
    """The accuracy at each N, of one sample at none; best-of-N and the reward-weighted vote (SC+RM) by arm."""

    one_sample: Accuracy
    oracle: AccuracyByN
    majority: AccuracyByN
    best_of_n: Mapping[str, AccuracyByN] = field(default_factory=dict)
    sc_rm: Mapping[str, AccuracyByN] = field(default_factory=dict)
    gain: GainOverN | None = None

    def of(self, decoder: str) -> Mapping[str, AccuracyByN]:
        """The accuracy by arm of one of `DECODERS`."""
        return {"best_of_n": self.best_of_n, "sc_rm": self.sc_rm}[decoder]


@dataclass(frozen=True, kw_only=True)
class Gain:
    """The gain of `GainOverN` at one N."""

    best_of_n: Accuracy
    sc_rm: Accuracy


@dataclass(frozen=True, kw_only=True)
class GroupAccuracy:
    """The accuracy at one N of a group of questions, as `AccuracyOverN` has it."""

    questions: int
    one_sample: Accuracy
    oracle: Accuracy
    majority: Accuracy
    best_of_n: Mapping[str, Accuracy] = field(default_factory=dict)
    sc_rm: Mapping[str, Accuracy] = field(default_factory=dict)
    gain: Gain | None = None


@dataclass
class _Chances:
    """Chances of the questions to be answered rightly, by the figure's path, e.g. ("best_of_n", "multimodal", "64")."""

    by_path: dict[FigurePath, list[float]] = field(default_factory=dict)

    def add(self, chance: float, *path: str) -> None:
        """Append the next question's chance."""
        self.by_path.setdefault(path, []).append(chance)

    def arrays(self) -> dict[FigurePath, Floats]:
        """One value a question."""
        return {path: np.array(chances) for path, chances in self.by_path.items()}


def accuracy(
    questions: Sequence[ScoredQuestion],
    arms: Sequence[str],
    ns: Sequence[int],
    num_subsets: int,
    resampling: Resampling,
) -> AccuracyOverN:
    """The accuracy at each of `ns`; a gain only where both of its arms are there."""
    figures = _figures(_chances(questions, arms, ns, num_subsets), resampling)

    def by_n(*path: str) -> dict[str, Accuracy]:
        return {str(n): figures[*path, str(n)] for n in ns}

    gain = None
    if _has_gain(arms):
        gain = GainOverN(best_of_n=by_n("gain", "best_of_n"), sc_rm=by_n("gain", "sc_rm"))
    return AccuracyOverN(
        one_sample=figures["one_sample",],
        oracle=by_n("oracle"),
        majority=by_n("majority"),
        best_of_n={arm: by_n("best_of_n", arm) for arm in arms},
        sc_rm={arm: by_n("sc_rm", arm) for arm in arms},
        gain=gain,
    )


def accuracy_by_column(
    questions: Sequence[ScoredQuestion],
    arms: Sequence[str],
    n: int,
    column: str,
    num_subsets: int,
    resampling: Resampling,
) -> dict[str, GroupAccuracy]:
    """The accuracy at one N for each value of a question's column."""
    groups: dict[str, list[ScoredQuestion]] = {}
    for scored in questions:
        groups.setdefault(getattr(scored.question, column), []).append(scored)
    table = {}
    for name in sorted(groups, key=easy_first):
        figures = _figures(_chances(groups[name], arms, [n], num_subsets), resampling)
        table[name] = _group_accuracy(len(groups[name]), figures, arms, str(n))
    return table


def _group_accuracy(
    num_questions: int, figures: Mapping[FigurePath, Accuracy], arms: Sequence[str], n: str
) -> GroupAccuracy:
    gain = None
    if _has_gain(arms):
        gain = Gain(best_of_n=figures["gain", "best_of_n", n], sc_rm=figures["gain", "sc_rm", n])
    return GroupAccuracy(
        questions=num_questions,
        one_sample=figures["one_sample",],
        oracle=figures["oracle", n],
        majority=figures["majority", n],
        best_of_n={arm: figures["best_of_n", arm, n] for arm in arms},
        sc_rm={arm: figures["sc_rm", arm, n] for arm in arms},
        gain=gain,
    )


def accuracy_by_decoder(
    questions: Sequence[ScoredQuestion],
    arms: Sequence[str],
    log_odds: Mapping[str, LogOdds],
    resampling: Resampling,
) -> dict[str, dict[str, Accuracy]]:
    """The accuracy of every named decoder over all samples of each question, by arm and decoder."""
    chances = _Chances()
    for scored in questions:
        for arm in arms:
            for name, decoder in decoders.DECODERS.items():
                chance = _decoded(scored, decoder, log_odds[arm])
                chances.add(chance, arm, name)
    by_arm: dict[str, dict[str, Accuracy]] = {}
    for (arm, name), figure in _figures(chances.arrays(), resampling).items():
        by_arm.setdefault(arm, {})[name] = figure
    return by_arm


def _decoded(scored: ScoredQuestion, decoder: Decoder, log_odds: LogOdds) -> float:
    """The chance that a decoder over all samples of a question picks a right one: below 1 where several lead."""
    # A plain vote has no use for rewards.
    rewards = None
    if decoder.aggregate:
        rewards = rewards_of(scored.solution_ids, log_odds, decoder.aggregate)
    if decoder.rule == "best":
        assert rewards is not None
        return decoders.expected_best(rewards, scored.correct, max(scored.num_samples, 1))
    all_samples = np.ones((1, scored.num_samples), dtype=bool)
    return decoders.expected_vote(
        scored.codes,
        scored.correct,
        all_samples,
        rewards,
        decoder.rule,
    )


def _chances(
    questions: Sequence[ScoredQuestion],
    arms: Sequence[str],
    ns: Sequence[int],
    num_subsets: int,
) -> dict[FigurePath, Floats]:
    chances = _Chances()
    for scored in questions:
        correct, codes = scored.correct, scored.codes
        # A question without a sample counts as wrong.
        one_sample = float(correct.mean()) if correct.size else 0.0
        chances.add(one_sample, "one_sample")
        for n in ns:
            # The same subsets for all arms, so that their difference is not one of luck.
            subsets = decoders.subsets(max(codes.size, 1), n, num_subsets, scored.seed)
            oracle = decoders.expected_oracle(correct, n)
            majority = decoders.expected_vote(codes, correct, subsets)
            chances.add(oracle, "oracle", str(n))
            chances.add(majority, "majority", str(n))
            for arm in arms:
                rewards = scored.rewards[arm]
                best_of_n = decoders.expected_best(rewards, correct, n)
                weighted_vote = decoders.expected_vote(codes, correct, subsets, rewards)
                chances.add(best_of_n, "best_of_n", arm, str(n))
                chances.add(weighted_vote, "sc_rm", arm, str(n))
    arrays = chances.arrays()
    if _has_gain(arms):
        for decoder in DECODERS:
            for n in ns:
                multimodal = arrays[decoder, "multimodal", str(n)]
                text_only = arrays[decoder, "text_only", str(n)]
                arrays["gain", decoder, str(n)] = multimodal - text_only
    return arrays


def _has_gain(arms: Sequence[str]) -> bool:
    return {"multimodal", "text_only"} <= set(arms)


def _figures(chances: Mapping[FigurePath, Floats], resampling: Resampling) -> dict[FigurePath, Accuracy]:
    """The figure of each path. All share the resamples of the questions."""
    if not chances:
        return {}
    # All figures at once: resamples of the questions are shared, and a gain's interval is that of paired differences.
    values_QK = np.stack(list(chances.values()), axis=1)
    lows, highs = metrics.bootstrap(values_QK, resampling.num, resampling.seed)
    means = values_QK.mean(axis=0)
    figures = {}
    for path, value, low, high in zip(chances, means, lows, highs, strict=True):
        figures[path] = Accuracy(_rounded(value), _rounded(low), _rounded(high))
    return figures


def _rounded(number: float) -> float:
    return round(float(number), 6)
