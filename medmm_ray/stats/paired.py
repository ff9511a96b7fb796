"""Two ways to answer the same questions: their difference, its interval, and how likely chance alone makes it.

Legend: Q questions, C clusters of questions, K figures, B sets of signs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from medmm_ray.stats.metrics import Floats, Ints, bootstrap, finite, sums_by_cluster
from medmm_ray.stats.resampling import Resampling

SIGN_SETS = 10_000
"""Random sets of signs of a permutation test; all 2^C where these are no more."""
BLOCK = 256
SAME = 1e-9
"""Difference of two sums up to which they are the same, in questions: rounding, and no more."""


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Second minus first, over questions that both have; `better` and `worse` count those where they differ.

    `p_value` is of the sign-flip test by cluster: how often the difference is as large in size if both are equal.
    `adjusted_p` holds for all figures that were tested together and differ for any question. Both are None with a
    single cluster.
    """

    first: float
    second: float
    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    adjusted_p: float | None
    better: int
    worse: int
    questions: int
    clusters: int


def paired_differences(
    first_QK: Floats, second_QK: Floats, clusters_Q: Ints, resampling: Resampling
) -> list[PairedDifference]:
    """The difference of each column, all tested together. Raises ValueError for values that are not finite."""
    differences_QK = finite("values", second_QK) - finite("values", first_QK)
    # The questions of a cluster lean one way together: their sum is what may have either sign.
    sums_CK = sums_by_cluster(differences_QK, clusters_Q)
    num_clusters = len(sums_CK)
    p_values: list[float | None] = [None] * differences_QK.shape[1]
    adjusted = list(p_values)
    if num_clusters > 1:
        p_K = sign_flip_test(sums_CK, resampling.seed)
        adjusted_K = np.ones_like(p_K)
        # What is the same for every question was not put to a test, and raises no other p-value.
        differs_K = (np.abs(differences_QK) > SAME).any(axis=0)
        adjusted_K[differs_K] = holm(p_K[differs_K])
        p_values, adjusted = [*p_K.tolist()], [*adjusted_K.tolist()]
    # Resampled as pairs: what makes a question hard for both is in neither interval.
    low_K, high_K = bootstrap(
        differences_QK,
        resampling.num,
        resampling.seed,
        clusters_Q,
    )
    figures = []
    for column, difference_Q in enumerate(differences_QK.T):
        ends = (float(low_K[column]), float(high_K[column])) if num_clusters > 1 else (None, None)
        figure = PairedDifference(
            first=float(first_QK[:, column].mean()),
            second=float(second_QK[:, column].mean()),
            difference=float(difference_Q.mean()),
            low=ends[0],
            high=ends[1],
            p_value=p_values[column],
            adjusted_p=adjusted[column],
            better=int((difference_Q > SAME).sum()),
            worse=int((difference_Q < -SAME).sum()),
            questions=len(difference_Q),
            clusters=num_clusters,
        )
        figures.append(figure)
    return figures


def sign_flip_test(sums_CK: Floats, seed: int) -> Floats:
    """The two-sided p-value of each column: of paired sums by cluster whose signs are as likely one way as the other.

    Over all sets of signs where they are few, exactly; else over `SIGN_SETS` random ones, the observed one counted in
    (Phipson and Smyth, 2010), so that none is 0. Of single questions answered rightly or wrongly it is McNemar's exact
    test.
    """
    # A set of signs whose sum differs by rounding alone is as large.
    observed_K = np.abs(sums_CK.sum(axis=0)) - SAME
    num_clusters = len(sums_CK)
    if 2**num_clusters <= SIGN_SETS:
        signs_BC = np.array(list(product((1.0, -1.0), repeat=num_clusters)))
        as_large_BK = np.abs(signs_BC @ sums_CK) >= observed_K
        return np.asarray(as_large_BK.mean(axis=0))
    rng = np.random.default_rng(seed)
    # The observed signs are one of the sets.
    counts_K = np.ones(len(observed_K))
    for start in range(
        0,
        SIGN_SETS,
        BLOCK,
    ):
        size = min(BLOCK, SIGN_SETS - start)
        signs_BC = (
            2.0
            * rng.integers(
                0,
                2,
                (size, num_clusters),
            )
            - 1.0
        )
        counts_K += (np.abs(signs_BC @ sums_CK) >= observed_K).sum(axis=0)
    return np.asarray(counts_K / (SIGN_SETS + 1))


def holm(p_values: Sequence[float] | Floats) -> Floats:
    """Holm's step-down adjustment of p-values that were looked at together; each stays at its place."""
    p_K = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_K, kind="stable")
    num_left = np.arange(
        len(p_K),
        0,
        -1,
    )
    raised = np.minimum(p_K[order] * num_left, 1.0)
    adjusted = np.empty_like(p_K)
    # A later p-value is never below an earlier one.
    adjusted[order] = np.maximum.accumulate(raised)
    return adjusted
