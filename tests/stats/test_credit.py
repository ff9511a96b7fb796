"""Rewards of solutions in reinforcement learning, by numbers worked out by hand."""

import math

import pytest

from medmm_ray.stats.credit import min_form, overlong_penalty


def test_the_exact_minimum_gives_the_worst_step_all_of_the_reward() -> None:
    credit = min_form([0.9, 0.25, 0.8, 0.25], temperature=0)
    assert credit.reward == -0.5
    assert credit.steps == [0.0, -0.5, 0.0, 0.0]


def test_pures_form_by_hand() -> None:
    # r = .8 and -.2; softmax of -r/.5 = exp(-1.6) : exp(.4)
    credit = min_form([0.9, 0.4], temperature=0.5)
    first = math.exp(-1.6) / (math.exp(-1.6) + math.exp(0.4))
    assert credit.steps == pytest.approx([0.8 * first, -0.2 * (1 - first)])
    assert credit.reward == pytest.approx(0.8 * first - 0.2 * (1 - first))


def test_one_more_good_step_adds_next_to_nothing_and_a_bad_one_costs() -> None:
    base = min_form([0.9, 0.6]).reward
    assert min_form([0.9, 0.6, 0.99]).reward == pytest.approx(base, abs=0.01)
    assert min_form([0.9, 0.6] + [0.99] * 50).reward < base + 0.1
    assert min_form([0.9, 0.6, 0.1]).reward < -0.75


def test_what_has_no_steps_gets_the_least_reward_and_certain_steps_do_not_overflow() -> None:
    assert min_form([]).reward == -1.0
    assert min_form([0.0, 1.0], temperature=1e-4).reward == -1.0
    with pytest.raises(ValueError, match="temperature is -1"):
        min_form([0.5], temperature=-1)
    with pytest.raises(ValueError, match="1 of 2 step probabilities are not finite"):
        min_form([0.5, math.nan])


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0.0), (750, 0.0), (800, -0.2), (999, -0.996), (1000, -1.0), (5000, -1.0)]
)
def test_long_solutions_are_punished_by_degrees(length: int, penalty: float) -> None:
    assert overlong_penalty(length, 1000, 250) == pytest.approx(penalty)


def test_without_a_margin_the_punishment_is_a_step() -> None:
    assert [overlong_penalty(length, 1000, 0) for length in (1000, 1001)] == [0.0, -1.0]
