"""Batches and learning rates: pure functions of the seed."""

import math

import pytest

from medmm_ray.train.schedule import epoch_batches, learning_rate_factor, micro_batches, validation_ids


def test_an_epoch_sees_every_unit_once_in_batches_of_samples() -> None:
    sizes = [4, 2, 0, 3, 5, 2]
    batches = epoch_batches(sizes, 5, seed=1, epoch=0)
    assert sorted(unit for batch in batches for unit in batch) == [0, 1, 3, 4, 5]
    assert all(sum(sizes[u] for u in batch) >= 5 for batch in batches[:-1])
    assert all(sum(sizes[u] for u in batch[:-1]) < 5 for batch in batches)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    assert epoch_batches([1] * 20, 4, 7, 2) == epoch_batches([1] * 20, 4, 7, 2)
    orders = {str(epoch_batches([1] * 20, 4, seed, epoch)) for seed in (7, 8) for epoch in (0, 1)}
    assert len(orders) == 4


def test_nothing_to_train_on_gives_no_batch() -> None:
    assert epoch_batches([0, 0], 4, 0, 0) == []


def test_micro_batches_fit_the_budget_in_the_order_given() -> None:
    assert micro_batches([3, 0, 2, 1], [10, 60, 30, 50], budget=60, padded=False) == [[3, 0], [2], [1]]


def test_padded_micro_batches_put_like_lengths_together_and_pay_for_the_longest() -> None:
    costs = [10, 90, 12, 40, 11]
    assert micro_batches([0, 1, 2, 3, 4], costs, budget=40, padded=True) == [[0, 4, 2], [3], [1]]


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
