"""Cases -> accuracy over N, by decoder and by group, each figure ``{value, low, high}`` (95 %, over questions)."""

from collections.abc import Mapping, Sequence

import numpy as np

from medmm_ray.stats import metrics
from medmm_ray.stats.metrics import Floats
from medmm_ray.steps.evaluate.cases import Case, LogOdds, Row, rewards_of

Figures = dict[tuple[str, ...], Floats]
"""By path, e.g. ("best_of_n", "multimodal", "64"): one value a question, its chance to be answered rightly."""


def accuracy(
    cases: Sequence[Case], arms: Sequence[str], ns: Sequence[int], num_subsets: int, num_resamples: int, seed: int
) -> Row:
    """one_sample, oracle.N, majority.N, best_of_n.ARM.N, sc_rm.ARM.N and gain.{best_of_n, sc_rm}.N.

    A gain is the multimodal arm's accuracy minus the text-only arm's, its interval that of the paired differences.
    """
    return _nest(_figures(cases, arms, ns, num_subsets), num_resamples, seed)


def by_column(
    cases: Sequence[Case],
    arms: Sequence[str],
    n: int,
    column: str,
    num_subsets: int,
    num_resamples: int,
    seed: int,
) -> Row:
    """The same at one N for each value of a question's column, without the N in the path, and `questions`."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.row[column], []).append(case)
    table = {}
    for name in sorted(groups, key=_easy_first):
        figures = _figures(groups[name], arms, [n], num_subsets)
        short = {path[:-1] if len(path) > 1 else path: values for path, values in figures.items()}
        table[name] = {"questions": len(groups[name]), **_nest(short, num_resamples, seed)}
    return table


def by_decoder(
    cases: Sequence[Case], arms: Sequence[str], log_odds: Mapping[str, LogOdds], num_resamples: int, seed: int
) -> Row:
    """Every named decoder over all samples of each question: ARM.DECODER."""
    figures: dict[tuple[str, ...], list[float]] = {}
    for case in cases:
        everything = np.ones((1, len(case.solution_ids)), dtype=bool)
        for arm in arms:
            for name, decoder in metrics.DECODERS.items():
                rewards = decoder.aggregate and rewards_of(case.solution_ids, log_odds[arm], decoder.aggregate)
                if decoder.rule == "best":
                    assert isinstance(rewards, np.ndarray)
                    right = metrics.expected_best(rewards, case.correct, max(len(case.solution_ids), 1))
                else:
                    right = metrics.expected_vote(case.codes, case.correct, everything, rewards, decoder.rule)
                figures.setdefault((arm, name), []).append(right)
    return _nest({path: np.array(values) for path, values in figures.items()}, num_resamples, seed)


def _figures(cases: Sequence[Case], arms: Sequence[str], ns: Sequence[int], num_subsets: int) -> Figures:
    figures: dict[tuple[str, ...], list[float]] = {}

    def add(value: float, *path: str) -> None:
        figures.setdefault(path, []).append(value)

    for case in cases:
        add(float(case.correct.mean()) if case.correct.size else 0.0, "one_sample")
        for n in ns:
            at = str(n)
            drawn = metrics.subsets(max(case.codes.size, 1), n, num_subsets, case.seed)
            add(metrics.expected_oracle(case.correct, n), "oracle", at)
            add(metrics.expected_vote(case.codes, case.correct, drawn), "majority", at)
            for arm in arms:
                rewards = case.rewards[arm]
                add(metrics.expected_best(rewards, case.correct, n), "best_of_n", arm, at)
                add(metrics.expected_vote(case.codes, case.correct, drawn, rewards), "sc_rm", arm, at)
    columns = {path: np.array(values) for path, values in figures.items()}
    if {"multimodal", "text_only"} <= set(arms):
        for how in ("best_of_n", "sc_rm"):
            for at in map(str, ns):
                columns["gain", how, at] = columns[how, "multimodal", at] - columns[how, "text_only", at]
    return columns


def _nest(figures: Figures, num_resamples: int, seed: int) -> Row:
    """{value, low, high} of each figure, nested by its path. All share the resamples of the questions."""
    if not figures:
        return {}
    values_QK = np.stack(list(figures.values()), axis=1)
    low, high = metrics.bootstrap(values_QK, num_resamples, seed)
    nested: Row = {}
    for path, *triple in zip(figures, values_QK.mean(axis=0), low, high, strict=True):
        node = nested
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = {name: round(float(x), 6) for name, x in zip(("value", "low", "high"), triple, strict=True)}
    return nested


def _easy_first(name: str) -> tuple[int, str]:
    known = ("easy", "medium", "hard")
    return (known.index(name) if name in known else len(known), name)
