"""Scored questions -> accuracy over N, by decoder and by group. Intervals resample clusters of questions.

Legend: Q questions, K figures.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from medmm_ray.stats import decoders, metrics
from medmm_ray.stats.decoders import Decoder
from medmm_ray.stats.grouped_stats import Figure, easy_first
from medmm_ray.stats.metrics import Floats, Ints
from medmm_ray.stats.resampling import Resampling
from medmm_ray.steps.evaluate.scored_questions import ArmScores, ScoredQuestion

FigurePath = tuple[str, ...]
DECODERS = ("best_of_n", "sc_rm")
VOTES = ("majority", "sc_rm")


@dataclass(frozen=True)
class Accuracy(Figure):
    """A share of questions answered rightly, or a difference of two, with its interval.

    The interval is that of resampled clusters of questions; of a single cluster there is none.
    """

    value: float


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
    subset_error: Mapping[str, float] = field(default_factory=dict)
    """By N: the largest standard error that a vote has from random subsets in place of all; 0 where all were counted.
    It is no part of the intervals."""

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
    clusters: int
    """Independent groups of questions, as those about one image are one: what the intervals resample."""
    one_sample: Accuracy
    oracle: Accuracy
    majority: Accuracy
    best_of_n: Mapping[str, Accuracy] = field(default_factory=dict)
    sc_rm: Mapping[str, Accuracy] = field(default_factory=dict)
    gain: Gain | None = None


@dataclass(frozen=True)
class Chances:
    """The chance of each question to be answered rightly, by the path of each figure, as (best_of_n, text_only, 64).

    `clusters_Q` numbers the cluster that each question is of.
    """

    paths: Sequence[FigurePath]
    values_QK: Floats
    clusters_Q: Ints

    def of(self, rows_Q: Ints) -> "Chances":
        """Those of some questions."""
        return Chances(
            self.paths,
            self.values_QK[rows_Q],
            self.clusters_Q[rows_Q],
        )

    def at(self, n: int) -> "Chances":
        """Those at one N, and of one sample."""
        columns = [column for column, path in enumerate(self.paths) if path[-1] in (str(n), "one_sample")]
        paths = [self.paths[column] for column in columns]
        return Chances(
            paths,
            self.values_QK[:, columns],
            self.clusters_Q,
        )

    @property
    def num_clusters(self) -> int:
        """Independent groups of questions."""
        return len(np.unique(self.clusters_Q))

    def figures(self, resampling: Resampling) -> dict[FigurePath, Accuracy]:
        """The mean of each path, with its interval. All share the resamples of the clusters."""
        if not self.paths or not len(self.values_QK):
            return {}
        lows, highs = metrics.bootstrap(
            self.values_QK,
            resampling.num,
            resampling.seed,
            self.clusters_Q,
        )
        means = self.values_QK.mean(axis=0)
        # The resamples of a single cluster are all alike.
        # A degenerate interval would look like certainty.
        has_interval = self.num_clusters > 1
        figures = {}
        for path, value, low, high in zip(
            self.paths,
            means,
            lows,
            highs,
            strict=True,
        ):
            ends = (_rounded(low), _rounded(high)) if has_interval else (None, None)
            figures[path] = Accuracy(_rounded(value), *ends)
        return figures


def chances(
    questions: Sequence[ScoredQuestion],
    arms: Sequence[str],
    ns: Sequence[int],
    num_subsets: int,
    clusters_Q: Ints,
) -> Chances:
    """The chances by one sample, oracle, majority, best-of-N and SC+RM of each arm at each of `ns`, and the gains."""
    columns: dict[FigurePath, list[float]] = {}
    for scored in questions:
        for path, chance in _chances_of(
            scored,
            arms,
            ns,
            num_subsets,
        ).items():
            columns.setdefault(path, []).append(chance)
    arrays = {path: np.array(column) for path, column in columns.items()}
    if _has_gain(arms):
        for decoder in DECODERS:
            for n in ns:
                multimodal = arrays[decoder, "multimodal", str(n)]
                text_only = arrays[decoder, "text_only", str(n)]
                arrays["gain", decoder, str(n)] = multimodal - text_only
    return _stacked(arrays, clusters_Q)


def subset_errors(
    chances_: Chances, questions: Sequence[ScoredQuestion], ns: Sequence[int], num_subsets: int
) -> dict[str, float]:
    """By N, as text: the largest standard error of a vote's mean that drawing subsets adds, of all voting rules."""
    errors = {}
    for n in ns:
        is_drawn_Q = np.array([_is_drawn(scored.num_samples, n, num_subsets) for scored in questions])
        largest = 0.0
        for path, chance_Q in zip(chances_.paths, chances_.values_QK.T, strict=True):
            if path[0] in VOTES and path[-1] == str(n):
                # Each subset is a draw of right or wrong; the questions' subsets are drawn apart.
                variance_Q = chance_Q * (1 - chance_Q) / num_subsets * is_drawn_Q
                largest = max(largest, float(np.sqrt(variance_Q.sum())) / len(questions))
        errors[str(n)] = _rounded(largest)
    return errors


def _is_drawn(num_samples: int, n: int, num_subsets: int) -> bool:
    return n < num_samples and math.comb(num_samples, n) > num_subsets


def _stacked(arrays: Mapping[FigurePath, Floats], clusters_Q: Ints) -> Chances:
    values_QK = np.stack(list(arrays.values()), axis=1) if arrays else np.zeros((0, 0))
    return Chances(
        list(arrays),
        values_QK,
        clusters_Q,
    )


def _chances_of(
    scored: ScoredQuestion, arms: Sequence[str], ns: Sequence[int], num_subsets: int
) -> dict[FigurePath, float]:
    correct, codes = scored.correct, scored.codes
    # A question without a sample counts as wrong.
    chances: dict[FigurePath, float] = {("one_sample",): float(correct.mean()) if correct.size else 0.0}
    # The same subsets for all arms, so that their difference is not one of luck.
    num_samples = max(codes.size, 1)
    subsets = [decoders.subsets(num_samples, n, num_subsets, scored.seed) for n in ns]
    for n, majority in zip(ns, decoders.expected_votes(codes, correct, subsets), strict=True):
        chances["oracle", str(n)] = decoders.expected_oracle(correct, n)
        chances["majority", str(n)] = majority
    for arm in arms:
        rewards = scored.rewards[arm]
        weighted = decoders.expected_votes(codes, correct, subsets, rewards)
        for n, sc_rm in zip(ns, weighted, strict=True):
            chances["best_of_n", arm, str(n)] = decoders.expected_best(rewards, correct, n)
            chances["sc_rm", arm, str(n)] = sc_rm
    return chances


def accuracy(
    chances_: Chances,
    arms: Sequence[str],
    ns: Sequence[int],
    resampling: Resampling,
    subset_error: Mapping[str, float],
) -> AccuracyOverN:
    """The accuracy at each of `ns`; a gain only where both of its arms are there."""
    figures = chances_.figures(resampling)

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
        subset_error=subset_error,
    )


def accuracy_by_column(
    questions: Sequence[ScoredQuestion],
    chances_: Chances,
    arms: Sequence[str],
    n: int,
    column: str,
    resampling: Resampling,
    max_groups: int | None = None,
) -> dict[str, GroupAccuracy]:
    """The accuracy at one N for each value of a question's column; questions without one form no group.

    Nothing where there are more than `max_groups` values: a table of them would be a list of the questions.
    """
    rows_by_name: dict[str, list[int]] = {}
    for row, scored in enumerate(questions):
        # Empty: the data set has no word for it.
        name = getattr(scored.question, column)
        if name:
            rows_by_name.setdefault(name, []).append(row)
    if max_groups is not None and len(rows_by_name) > max_groups:
        return {}
    table = {}
    # The other N are no part of the table, and would take most of its resampling.
    chances_ = chances_.at(n)
    for name in sorted(rows_by_name, key=easy_first):
        of_group = chances_.of(np.array(rows_by_name[name]))
        table[name] = _group_accuracy(
            of_group,
            arms,
            str(n),
            resampling,
        )
    return table


def _group_accuracy(of_group: Chances, arms: Sequence[str], n: str, resampling: Resampling) -> GroupAccuracy:
    figures = of_group.figures(resampling)
    gain = None
    if _has_gain(arms):
        gain = Gain(best_of_n=figures["gain", "best_of_n", n], sc_rm=figures["gain", "sc_rm", n])
    return GroupAccuracy(
        questions=len(of_group.values_QK),
        clusters=of_group.num_clusters,
        one_sample=figures["one_sample",],
        oracle=figures["oracle", n],
        majority=figures["majority", n],
        best_of_n={arm: figures["best_of_n", arm, n] for arm in arms},
        sc_rm={arm: figures["sc_rm", arm, n] for arm in arms},
        gain=gain,
    )


def accuracy_by_decoder(
    questions: Sequence[ScoredQuestion],
    log_odds: Mapping[str, ArmScores],
    arms: Sequence[str],
    clusters_Q: Ints,
    resampling: Resampling,
) -> dict[str, dict[str, Accuracy]]:
    """The accuracy of every named decoder over all samples of each question, by arm and decoder."""
    arrays: dict[FigurePath, Floats] = {}
    for arm in arms:
        for name, decoder in decoders.DECODERS.items():
            column = [
                _decoded(
                    scored,
                    decoder,
                    log_odds[arm],
                    arm,
                )
                for scored in questions
            ]
            arrays[arm, name] = np.array(column)
    by_arm: dict[str, dict[str, Accuracy]] = {}
    for (arm, name), figure in _stacked(arrays, clusters_Q).figures(resampling).items():
        by_arm.setdefault(arm, {})[name] = figure
    return by_arm


def _decoded(scored: ScoredQuestion, decoder: Decoder, scores: ArmScores, arm: str) -> float:
    """The chance that a decoder over all samples of a question picks a right one: below 1 where several lead."""
    # A plain vote has no use for rewards.
    rewards = None
    if decoder.aggregate:
        rewards = scores.rewards(decoder.aggregate)[scored.places[arm]]
    if decoder.rule == "best":
        assert rewards is not None
        return decoders.expected_best(
            rewards,
            scored.correct,
            max(scored.num_samples, 1),
        )
    all_samples = np.ones((1, scored.num_samples), dtype=bool)
    return decoders.expected_vote(
        scored.codes,
        scored.correct,
        all_samples,
        rewards,
        decoder.rule,
    )


def _has_gain(arms: Sequence[str]) -> bool:
    return {"multimodal", "text_only"} <= set(arms)


def _rounded(number: float) -> float:
    return round(float(number), 6)
