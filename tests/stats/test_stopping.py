"""When sampling may stop: figures worked out by hand, and by counting all ways in which the rest may come."""

import itertools
import math

import pytest

from medmm_ray.stats import decoders
from medmm_ray.stats.stopping import standing

NONE = [0.0] * 10


def test_a_vote_is_settled_when_the_rest_cannot_turn_it() -> None:
    assert not standing("majority", ["B"] * 4, NONE[:4], 8).is_settled
    assert standing("majority", ["B"] * 5, NONE[:5], 8).is_settled
    assert not standing("majority", ["B"] * 5 + ["C"], NONE[:6], 10).is_settled
    assert standing("majority", ["B"] * 6 + ["C"], NONE[:7], 9).is_settled


@pytest.mark.parametrize("answers", ["BBB", "BBC", "BCBBB", "BBCBBB", "CBBBB"])
def test_nothing_that_is_settled_changes_whatever_comes(answers: str) -> None:
    num_samples = 7
    now = standing("majority", list(answers), NONE[: len(answers)], num_samples)
    assert now.chosen is not None
    rests = itertools.product("BCD", repeat=num_samples - len(answers))
    finals = {answers[0] if not rest else _winner([*answers, *rest]) for rest in rests}
    assert now.is_settled == (finals == {answers[now.chosen]})


def _winner(answers: list[str]) -> str:
    """The answer of most; of a tie the one that came first."""
    return max(dict.fromkeys(answers), key=answers.count)


def test_a_vote_by_rewards_is_settled_by_probabilities() -> None:
    three_quarters = math.log(3)
    four = standing("sc_rm", ["B"] * 4, [three_quarters] * 4, 7)
    five = standing("sc_rm", ["B"] * 5, [three_quarters] * 5, 9)
    six = standing("sc_rm", ["B"] * 6, [three_quarters] * 6, 10)
    assert (four.is_settled, five.is_settled, six.is_settled) == (False, False, True)


def test_the_reliability_of_a_vote_is_the_beta_criterion() -> None:
    # x ~ Beta(4, 2): P(x > 1/2) = 1 - P(at most ... ) = 26/32, by the binomial sum of 5 tosses with at least 4 - 2.
    at_least_two = sum(math.comb(5, k) for k in range(2, 6)) / 2**5
    assert at_least_two == 26 / 32
    now = standing("majority", ["B", "B", "C", "B"], NONE[:4], 64)
    assert now.reliability == pytest.approx(26 / 32)
    assert (now.chosen, now.is_settled) == (0, False)


def test_by_rewards_it_counts_how_much_is_drawn_and_whether_the_answer_is_right() -> None:
    # Two of three samples for the leader's answer, each right with 1/2: one of them is with 3/4.
    now = standing("best_of_n", ["B", "C", "B"], [0.0, 0.0, 0.0], 12)
    assert now.chosen == 0
    assert now.reliability == pytest.approx(3 / 12 + 9 / 12 * 3 / 4)
    assert not now.is_settled
    alone = standing("best_of_n", ["C", "B"], [math.log(4), math.nan], 4)
    assert alone.chosen == 0
    assert alone.reliability == pytest.approx(1 / 2 + 1 / 2 * 4 / 5)
    vote = standing("sc_rm", ["B", "B", "C", "B"], [math.log(3)] * 4, 64)
    assert vote.reliability == pytest.approx(4 / 64 + 60 / 64 * (1 - 1 / 4**3))


def test_the_chance_that_the_best_is_drawn_is_exact() -> None:
    """Of all orders of N distinct rewards, the share that has the highest among the first n is n/N."""
    orders = list(itertools.permutations(range(5)))
    early = [max(order[:2]) == 4 for order in orders]
    assert sum(early) / len(orders) == pytest.approx(2 / 5)
    # No answer is never right.
    assert standing("best_of_n", [None, None], [1.0, 2.0], 5).reliability == pytest.approx(2 / 5)


def test_at_the_end_and_without_an_answer() -> None:
    end = standing("best_of_n", ["B", "C"], [0.0, 1.0], 2)
    assert (end.chosen, end.reliability, end.is_settled) == (1, 1.0, True)
    nobody = standing("sc_rm", [None, "B"], [3.0, math.nan], 4)
    assert (nobody.chosen, nobody.reliability, nobody.is_settled) == (None, 0.0, False)
    assert standing("majority", [], [], 3).chosen is None


def test_suffices() -> None:
    likely = standing("majority", ["B"] * 5, NONE[:5], 64)
    assert likely.reliability == pytest.approx(1 - 1 / 2**6)
    assert likely.suffices(0.98)
    assert not likely.suffices(0.99)
    assert not likely.suffices(None)
    assert standing("majority", ["B"] * 5, NONE[:5], 8).suffices(None)


def test_what_is_chosen_is_what_the_decoder_picks() -> None:
    answers = ["B", "C", "C", None]
    scores = [[1.0, 2.0], [0.5, 0.1], [0.9, 3.0], [4.0, 4.0]]
    rewards = [1.0, 0.1, 0.9, 4.0]  # the smallest of each
    for rule in ("best_of_n", "sc_rm", "majority"):
        assert standing(rule, answers, rewards, 9).chosen == decoders.decode(rule, answers, scores)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="3 answers and 2 rewards of 4 samples"):
        standing("majority", ["B"] * 3, [0.0] * 2, 4)
    with pytest.raises(ValueError, match="3 answers and 3 rewards of 2 samples"):
        standing("majority", ["B"] * 3, [0.0] * 3, 2)
