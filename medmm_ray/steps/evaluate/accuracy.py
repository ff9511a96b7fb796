"""Scored questions -> accuracy over N, by decoder and by group, each figure ``{value, low, high}``.

The interval is the 95 % one of resampled questions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from medmm_ray.config import JsonObject
from medmm_ray.stats import decoders, metrics
from medmm_ray.stats.decoders import Decoder
from medmm_ray.stats.grouped_stats import Resampling, easy_first
from medmm_ray.stats.metrics import Floats
from medmm_ray.steps.evaluate.scored_questions import LogOdds, ScoredQuestion, rewards_of

FigurePath = tuple[str, ...]


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
) -> JsonObject:
    """one_sample, oracle.N, majority.N, best_of_n.ARM.N, sc_rm.ARM.N and gain.{best_of_n, sc_rm}.N.

    A gain is the multimodal arm's accuracy minus the text-only arm's, its interval that of the paired differences.
    """
    return _nested_figures(_chances(questions, arms, ns, num_subsets), resampling)


def accuracy_by_column(
    questions: Sequence[ScoredQuestion],
    arms: Sequence[str],
    n: int,
    column: str,
    num_subsets: int,
    resampling: Resampling,
) -> JsonObject:
    """The accuracy at one N for each value of a question's column, without the N in the path, and `questions`."""
    groups: dict[str, list[ScoredQuestion]] = {}
    for scored in questions:
        groups.setdefault(getattr(scored.question, column), []).append(scored)
    table = {}
    for name in sorted(groups, key=easy_first):
        chances = _chances(groups[name], arms, [n], num_subsets)
        without_n: dict[FigurePath, Floats] = {}
        for path, values in chances.items():
            # The last word of a path is the N, but of the one that has a single word.
            short_path = path[:-1] if len(path) > 1 else path
            without_n[short_path] = values
        figures = _nested_figures(without_n, resampling)
        table[name] = {"questions": len(groups[name]), **figures}
    return table


def accuracy_by_decoder(
    questions: Sequence[ScoredQuestion],
    arms: Sequence[str],
    log_odds: Mapping[str, LogOdds],
    resampling: Resampling,
) -> JsonObject:
    """The accuracy of every named decoder over all samples of each question: ARM.DECODER."""
    chances = _Chances()
    for scored in questions:
        for arm in arms:
            for name, decoder in decoders.DECODERS.items():
                chance = _decoded(scored, decoder, log_odds[arm])
                chances.add(chance, arm, name)
    return _nested_figures(chances.arrays(), resampling)


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
    if {"multimodal", "text_only"} <= set(arms):
        for decoder in ("best_of_n", "sc_rm"):
            for n in ns:
                multimodal = arrays[decoder, "multimodal", str(n)]
                text_only = arrays[decoder, "text_only", str(n)]
                arrays["gain", decoder, str(n)] = multimodal - text_only
    return arrays


def _nested_figures(chances: Mapping[FigurePath, Floats], resampling: Resampling) -> JsonObject:
    """{value, low, high} of each figure, nested by its path. All share the resamples of the questions."""
    if not chances:
        return {}
    # All figures at once: resamples of the questions are shared, and a gain's interval is that of paired differences.
    values_QK = np.stack(list(chances.values()), axis=1)
    lows, highs = metrics.bootstrap(values_QK, resampling.num, resampling.seed)
    means = values_QK.mean(axis=0)
    nested: JsonObject = {}
    for path, value, low, high in zip(chances, means, lows, highs, strict=True):
        node = nested
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = {
            "value": _rounded(value),
            "low": _rounded(low),
            "high": _rounded(high),
        }
    return nested


def _rounded(number: float) -> float:
    return round(float(number), 6)
