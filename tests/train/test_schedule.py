"""Updates and how they are dealt: pure functions of the seed and the costs."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from random import Random

import pytest

from medmm_ray.train.schedule import (
    Part,
    Rounds,
    Units,
    deal,
    deal_held_out,
    deal_jointly,
    epoch_updates,
    learning_rate_factor,
    rounds_flops,
    validation_ids,
)


def units_of(samples: Sequence[Sequence[int]], prefix: int = 0, length: int = 1) -> Units:
    """Units whose solutions have `length` tokens behind a prefix of `prefix`; a token is a FLOP."""
    lengths = [[length] * len(of_unit) for of_unit in samples]
    prefixes = [prefix] * len(samples)
    return Units.of([f"q{i}" for i in range(len(samples))], samples, lengths, lengths, prefixes, prefixes)


def solutions(parts: Sequence[Part]) -> list[tuple[int, int]]:
    """Each solution of parts, as (unit, place)."""
    return [(part.unit, place) for part in parts for place in part.solutions]


def whole(units: Units) -> list[Part]:
    return [units.whole(unit) for unit in range(len(units))]


# Updates


def test_an_epoch_sees_every_solution_once_in_updates_of_samples() -> None:
    units = units_of([[1, 3], [2], [0], [1, 1, 1], [5], [1, 1]])
    updates = epoch_updates(units, 5, 1, seed=1, epoch=0)
    assert sorted(solutions(list(chain.from_iterable(updates)))) == [
        (0, 0), (0, 1), (1, 0), (3, 0), (3, 1), (3, 2), (4, 0), (5, 0), (5, 1),
    ]  # fmt: skip
    assert all(units.num_samples(update) >= 5 for update in updates[:-1])
    assert all(units.num_samples(update[:-1]) < 5 for update in updates)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    units = Units.singles([f"q{i}" for i in range(20)])
    assert epoch_updates(units, 4, 1, 7, 2) == epoch_updates(units, 4, 1, 7, 2)
    orders = {str(epoch_updates(units, 4, 1, seed, epoch)) for seed in (7, 8) for epoch in (0, 1)}
    assert len(orders) == 4


def test_nothing_to_train_on_gives_no_update() -> None:
    assert epoch_updates(units_of([[0, 0], [0]]), 4, 1, 0, 0) == []


def test_an_update_has_solutions_of_as_many_questions_as_it_is_told() -> None:
    units = units_of([[1] * 64] * 10)
    updates = epoch_updates(units, 64, 8, seed=0, epoch=0)
    assert [units.num_samples(update) for update in updates] == [64] * 10
    # A question comes again only after all others: at the end of a turn of ten two of its parts may meet.
    assert all(len({part.unit for part in update}) >= 6 for update in updates)
    assert Counter(len(part.solutions) for update in updates for part in update) == {8: 80}
    assert sorted(solutions(list(chain.from_iterable(updates)))) == [(u, s) for u in range(10) for s in range(64)]
    # Med-PRM's: 64 solutions, each of another question, as long as there are so many.
    apart = epoch_updates(units_of([[1] * 64] * 80), 64, 64, seed=0, epoch=0)
    assert len(apart) == 80
    assert len({part.unit for part in apart[0]}) == 64


def test_questions_with_few_solutions_stay_whole_and_in_the_order_of_before() -> None:
    units = units_of([[1] * 8] * 20)
    assert epoch_updates(units, 64, 8, 3, 1) == epoch_updates(units, 64, 1, 3, 1)


def test_equal_solutions_that_count_many_times_are_never_cut() -> None:
    first, second = epoch_updates(units_of([[9, 1, 1, 1]]), 8, 4, 0, 0)
    assert [part.solutions for part in (*first, *second)] == [(0,), (1,), (2, 3)]


# Passes


def assert_dealt(rounds: Rounds, parts: Sequence[Part], units: Units, workers: int, budget: int) -> None:
    """Every solution is in exactly one pass, of each worker one a round, none above the budget but a lone solution."""
    passes = list(chain.from_iterable(rounds))
    assert all(len(row) == workers for row in rounds)
    assert sorted(solutions(list(chain.from_iterable(passes)))) == sorted(solutions(parts))
    assert all(units.num_tokens(each) <= budget or len(solutions(each)) == 1 for each in passes)


def test_one_worker_has_few_passes_and_splits_no_question_that_fits() -> None:
    units = units_of([[1] * 4] * 6, prefix=10, length=10)  # 50 tokens each
    rounds = deal(whole(units), units, 1, budget=100)
    assert_dealt(rounds, whole(units), units, 1, 100)
    assert [len(passes[0]) for passes in rounds] == [2, 2, 2]
    assert rounds_flops(rounds, units) == 300


def test_a_question_above_the_budget_is_read_in_several_passes_its_prefix_in_each() -> None:
    units = units_of([[1] * 10], prefix=30, length=10)
    rounds = deal(whole(units), units, 1, budget=70)
    assert [len(passes[0][0].solutions) for passes in rounds] == [4, 4, 2]
    assert rounds_flops(rounds, units) == 10 * 10 + 3 * 30


def test_a_solution_above_the_budget_goes_alone() -> None:
    units = units_of([[1, 1, 1]], prefix=5, length=100)
    rounds = deal(whole(units), units, 1, budget=50)
    assert [solutions(passes[0]) for passes in rounds] == [[(0, 0)], [(0, 1)], [(0, 2)]]


def test_a_long_prefix_is_not_read_twice_to_even_out_a_little() -> None:
    """Three questions for two workers: halving one costs its prefix; only a short one is worth it."""
    long = units_of([[1] * 2] * 3, prefix=100, length=10)
    # Whole: 240 against 120. One in halves: 120 + 110 = 230. The prefix is read four times for that, and it is quicker.
    assert rounds_flops(deal(whole(long), long, 2, 10**6), long) == 230
    alone = units_of([[1] * 2], prefix=100, length=10)
    assert rounds_flops(deal(whole(alone), alone, 2, 10**6), alone) == 110
    short = units_of([[1] * 2] * 3, prefix=0, length=10)
    assert rounds_flops(deal(whole(short), short, 2, 10**6), short) == 30
    four = units_of([[1] * 2] * 4, prefix=100, length=10)
    assert all(len(part.solutions) == 2 for passes in deal(whole(four), four, 2, 10**6) for g in passes for part in g)


def test_workers_without_a_solution_have_none() -> None:
    units = units_of([[1, 1]], length=5)
    (passes,) = deal(whole(units), units, 4, budget=100)
    assert sorted(map(solutions, passes)) == [[], [], [(0, 0)], [(0, 1)]]


@pytest.mark.parametrize("workers", [2, 3, 4, 8, 64])
@pytest.mark.parametrize(("questions", "each"), [(1, 64), (4, 16), (16, 16), (64, 4)])
def test_any_update_is_dealt_whole_and_within_a_bound_that_is_known_beforehand(
    workers: int, questions: int, each: int
) -> None:
    random = Random(f"{workers}/{questions}")
    lengths = [[random.randint(200, 500) for _ in range(each)] for _ in range(questions)]
    prefixes = [random.randint(2800, 3300) for _ in range(questions)]
    names = [f"q{i}" for i in range(questions)]
    units = Units.of(names, [[1] * each] * questions, lengths, lengths, prefixes, prefixes)
    parts = whole(units)
    rounds = deal(parts, units, workers, budget=10**9)
    assert_dealt(rounds, parts, units, workers, 10**9)
    assert len(rounds) == 1
    # Filling worker after worker up to the mean share, the question at each border read on both sides, ends at most one
    # solution and one prefix above the mean; and none can be quicker than the mean.
    total = sum(map(sum, lengths)) + sum(prefixes)
    found = rounds_flops(rounds, units)
    assert total / workers <= found <= total / workers + 2 * max(prefixes) + max(map(max, lengths))


def test_two_workers_with_work_for_many_rounds_wait_little_for_each_other() -> None:
    random = Random(0)
    lengths = [[random.randint(100, 900)] * 3 for _ in range(50)]
    names = [f"q{i}" for i in range(50)]
    units = Units.of(names, [[1] * 3] * 50, lengths, lengths, [500] * 50, [500] * 50)
    parts = whole(units)
    rounds = deal(parts, units, 2, budget=8192)
    assert_dealt(rounds, parts, units, 2, 8192)
    total = sum(map(sum, lengths)) + 50 * 500
    assert total / 2 <= rounds_flops(rounds, units) <= 1.1 * total / 2


def test_samples_that_are_compared_are_divided_evenly_over_all_workers() -> None:
    units = Units.singles([f"i{i}" for i in range(10)])
    parts = whole(units)
    first, second = deal_jointly(parts, 3, 8)
    assert [len(share) for share in first] == [3, 3, 2]
    assert sorted(chain.from_iterable(first)) == parts[:8]
    assert [solutions(share) for share in second] == [[(8, 0)], [(9, 0)], []]


def test_held_out_units_are_measured_once_each_like_costs_together() -> None:
    units = Units.of(
        list("abcde"),
        [[0]] * 5,
        [[1], [9], [5], [2], [8]],
        [[1], [9], [5], [2], [8]],
        [0] * 5,
        [0] * 5,
    )
    assert deal_held_out([0, 1, 2, 4], units, 3) == [[1, 4, 2], [0]]
    assert deal_held_out([], units, 3) == []


# The size of a step


def test_learning_rate_rises_then_falls_as_a_cosine() -> None:
    factors = [learning_rate_factor(update, 100, 0.05) for update in range(101)]
    assert factors[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert factors[5 + 19] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.2)))
    assert factors[100] == pytest.approx(0.0)


def test_one_update_is_trained_at_the_full_rate() -> None:
    assert learning_rate_factor(0, 1, 0.05) == 1.0


def test_validation_ids_are_a_fixed_share() -> None:
    ids = [f"q{i}" for i in range(50)] * 2
    chosen = validation_ids(ids, 0.1, seed=3)
    assert len(chosen) == 5
    assert chosen == validation_ids(list(reversed(ids)), 0.1, seed=3)
    assert validation_ids(ids, 0.0, 3) == set()
    assert validation_ids(["only"], 0.5, 3) == set()
