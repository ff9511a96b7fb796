"""tree_search/beam.py: which solutions are kept, with a fake scorer; and with a real reward model."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from medmm_ray.engines.reward_model import RewardModel
from medmm_ray.tables import RowError
from medmm_ray.text import question_with_options
from medmm_ray.tree_search.beam import Beam, BeamSearchConfig, RewardModelScorer, beam_search, best
from tests import tiny_reward_model as tiny
from tests.test_tree_search import Scripted, question

ASKED = question("q1").__dict__
CONFIG = BeamSearchConfig(num_beams=2, num_expansions=4)


def script(prompt: str, seed: int) -> str:
    """Two ways to begin, two to go on, and the answer that they mean."""
    number = prompt.count("Step ")
    if number == 1:
        return f" See {('air', 'fluid')[seed % 2]}.\nStep 2: x"
    if number == 2:
        return f" Way {seed % 2}.\nStep 3: x"
    return f" So the answer is ({'B' if 'fluid.' in prompt else 'A'})."


class Likes:
    """Likes solutions that hold a word, and remembers what it was asked."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.asked: list[Sequence[Sequence[str]]] = []

    async def __call__(self, question: Mapping[str, Any], solutions: Sequence[Sequence[str]]) -> list[list[float]]:
        self.asked.append(solutions)
        return [
            [2.0 if self.word in " ".join(steps[: i + 1]) else -1.0 for i in range(len(steps))] for steps in solutions
        ]


def run(scorer: Any, config: BeamSearchConfig = CONFIG) -> list[Beam]:
    return asyncio.run(beam_search(config, Scripted(script), ASKED, scorer, "c0"))


def test_the_scorer_decides_which_beginnings_go_on() -> None:
    found = run(likes := Likes("fluid"))
    assert [beam.steps for beam in found] == [
        ("See fluid.", "Way 0.", "So the answer is (B)."),
        ("See fluid.", "Way 1.", "So the answer is (B)."),
    ]
    assert [(beam.answer, beam.correct, beam.reward) for beam in found] == [("B", True, 2.0)] * 2
    assert found[0].log_odds == (2.0, 2.0, 2.0)
    assert [len(asked) for asked in likes.asked] == [2, 4, 2]  # equal steps are scored once
    assert {beam.answer for beam in run(Likes("air"))} == {"A"}


def test_one_beam_one_expansion_is_one_sample() -> None:
    [only] = run(Likes("fluid"), BeamSearchConfig(num_beams=1, num_expansions=1))
    assert len(only.steps) == 3


def test_the_last_step_that_is_allowed_ends_the_solution_or_it_is_dropped() -> None:
    config = BeamSearchConfig(num_beams=2, num_expansions=4, max_steps=2)
    assert run(Likes("fluid"), config) == []
    assert len(run(Likes("fluid"), BeamSearchConfig(num_beams=2, num_expansions=4, max_steps=3))) == 2


def test_the_best_come_first_and_ties_keep_their_order() -> None:
    beams = [Beam(("a",), reward=0.0), Beam(("b",), reward=1.0), Beam(("c",), reward=0.0)]
    assert [beam.steps for beam in best(beams, 2)] == [("b",), ("a",)]


def test_a_solution_that_cannot_be_scored_is_the_questions_fault(tmp_path: Path) -> None:
    model = RewardModel.from_pretrained(tiny.save(tmp_path, context=64))
    with pytest.raises(RowError, match="not_scored"):
        asyncio.run(RewardModelScorer(model)(ASKED, [["long " * 200]]))


def test_a_real_reward_model_guides(tmp_path: Path) -> None:
    model = RewardModel.from_pretrained(tiny.save(tmp_path))
    found = run(RewardModelScorer(model))
    assert len(found) == 2
    asked = question_with_options(ASKED["question"], ASKED["options"])
    for beam, scores in zip(found, model.score(asked, [beam.steps for beam in found]), strict=True):
        assert list(beam.log_odds) == pytest.approx(scores.text_log_odds, abs=1e-4)
        assert beam.reward == pytest.approx(min(beam.log_odds))
    assert found[0].reward >= found[1].reward
