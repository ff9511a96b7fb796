"""tree_search/beam.py: which solutions are kept, with a fake scorer and a real reward model; jobs/beam_search.py."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pictures

from jobs import beam_search as job
from jobs.graph import MAKER
from jobs.step import Job, Run, load_recipe
from medmm_ray.config import ConfigError
from medmm_ray.data.records import Evidence, Image, RetrievedDocument, RetrievedImage, Solution, Solutions
from medmm_ray.data.tables import RowError, write_rows
from medmm_ray.engines.grader import Grader
from medmm_ray.reward_model import RewardModel, StepScores, TrainedInputs
from medmm_ray.steps.tree_search.beam import Beam, BeamSearchConfig, RewardModelScorer, beam_search, best
from medmm_ray.steps.tree_search.writer import StepWriter
from medmm_ray.text import question_with_options
from tests.doubles import tiny_reward_model as tiny
from tests.steps.test_tree_search import Scripted, question

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
    return asyncio.run(beam_search(config, StepWriter(config, Scripted(script), ASKED, "c0", Grader()), scorer))


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


# The job


def sampled(*ends: tuple[str | None, bool | None]) -> list[dict[str, Any]]:
    return [{"answer": answer, "correct": correct, "steps": ["x"], "text": "xx"} for answer, correct in ends]


def test_a_search_beside_as_many_samples_as_its_tokens_pay_for_by_hand() -> None:
    solutions = sampled(("A", False), ("B", True), ("A", False), (None, None))
    samples = job.Samples(solutions, [0.0, 1.0, math.nan, -1.0], [10, 10, 10, 10])
    found = job.compare(job.Beams(True, 25), samples, num_subsets=99, seed=0)
    assert found.samples == {
        "beam search": 0, "one sample": 1, "majority, equal tokens": 2, "best of N, equal tokens": 2,
        "majority, all samples": 4, "best of N, all samples": 4,
    }  # fmt: skip
    assert found.tokens["beam search"] == 25.0
    assert found.tokens["best of N, equal tokens"] == 20.0
    assert found.tokens["majority, all samples"] == 40.0
    assert found.right == {
        "beam search": 1.0,
        "one sample": 0.25,
        "majority, equal tokens": pytest.approx(2 / 6),  # of 6 pairs B with no answer, and B before A
        "best of N, equal tokens": 0.5,  # the 3 pairs with B, of 6
        "majority, all samples": 0.0,
        "best of N, all samples": 1.0,
    }
    few = job.compare(job.Beams(False, 3), job.Samples(solutions, [0.0] * 4, [10] * 4), num_subsets=99, seed=0)
    assert few.samples["best of N, equal tokens"] == 1
    none = job.compare(job.Beams(False, 0), job.Samples([], [], []), num_subsets=99, seed=0)
    assert set(none.right.values()) == {0.0}


def test_the_samples_of_an_open_question_vote_as_they_are_graded() -> None:
    solutions = sampled(("pneumonia", False), ("pleural fluid", True), ("pneumonia", False), ("hydrothorax", True),
                        ("Pleural fluids", True))  # fmt: skip
    samples = job.Samples(solutions, [0.0] * 5, [1] * 5, answer_type="open")
    open_ = job.compare(job.Beams(False, 0), samples, num_subsets=9, seed=0)
    choice = job.compare(job.Beams(False, 0), replace(samples, answer_type="choice"), num_subsets=9, seed=0)
    assert open_.right["majority, all samples"] == 1.0
    assert choice.right["majority, all samples"] == 0.0  # a tie of two and two: the first


def test_figures_have_intervals_over_questions_and_a_paired_gain() -> None:
    found = [
        job.compare(job.Beams(right, 10), job.Samples(sampled(("A", False)), [0.0], [10]), num_subsets=9, seed=0)
        for right in (True, True, False, False)
    ]
    table = job.figures(found, 200, 0)
    assert table["beam search"]["value"] == table[job.GAIN]["value"] == 0.5
    assert 0.0 <= table["beam search"]["low"] < 0.5 < table["beam search"]["high"] <= 1.0
    assert (table["one sample"]["value"], table["one sample"]["high"], table["beam search"]["tokens"]) == (0, 0, 10)
    # The right ones are about one image, the wrong ones about another: a resample has all, half or nothing of them.
    by_image = job.figures(found, 200, 0, [["im1"], ["im1"], ["im2"], ["im2"]])["beam search"]
    assert (by_image["value"], by_image["low"], by_image["high"]) == (0.5, 0.0, 1.0)


class Looking:
    """A reward model's stand-in that likes steps with a word, and remembers what it was shown."""

    trained_inputs = TrainedInputs(num_documents=2)

    reads_images, vision = True, None

    def __init__(self) -> None:
        self.shown: list[tuple[Sequence[str], int, int]] = []

    def score(
        self, question: str, solutions: Sequence[Sequence[str]], documents: Sequence[str], images: Sequence[Any],
        references: Sequence[Any],
    ) -> list[StepScores]:  # fmt: skip
        self.shown.append((documents, len(images), len(references)))
        return [StepScores([1.0 if "fluid" in " ".join(s) else -1.0] * len(s), [0.5] * len(s)) for s in solutions]


def made(root: Path) -> Run:
    """A run with two test questions, each with a picture, two documents and two samples; the second's is gone."""
    run = Run(load_recipe(["jobs/recipes/tiny.yaml", f"run={root}", "num_beams=2"], "beam_search"))
    Pictures.new("RGB", (8, 8)).save(root / "a.png")
    asked_ = [question(f"q{i}", split="test", image_ids=[f"i{i}"]) for i in (1, 2)]
    pictures = [
        Image(image_id=f"i{i}", uri=str(root / file), sha256="s", perceptual_hash="p", width=8, height=8, split="test",
              modality="radiology", diagnosis="", annotation="")
        for i, file in ((1, "a.png"), (2, "gone.png"))
    ]  # fmt: skip
    near = RetrievedImage(image_id="r", uri=str(root / "a.png"), diagnosis="", similarity=1.0)
    documents = [RetrievedDocument(document_id=d, text=d, score=1.0) for d in ("d1", "d2", "d3")]
    evidence = [Evidence(question_id=q.question_id, config_hash="c", documents=documents, images=[near])
                for q in asked_]  # fmt: skip
    own = [
        Solution(solution_id=f"s{i}", index=i, text="See air. So the answer is (A).", steps=["See air."], answer=a,
                 correct=a == "B", finish_reason="stop", seed=0, text_sha="x")
        for i, a in enumerate("AB")
    ]  # fmt: skip
    solved = [Solutions(question_id=q.question_id, policy="p", config_hash="c", num_requested=2, solutions=own)
              for q in asked_]  # fmt: skip
    tables: dict[str, list[Any]] = {"questions": asked_, "images": pictures, "evidence": evidence, "solutions": solved}
    for name, rows in tables.items():
        key = "image_id" if name == "images" else "question_id"
        write_rows(run.table(name), rows, Job(run, MAKER[name]).origin(name), key)
    return run


def test_the_run_is_searched_with_what_score_reads_and_a_fault_is_one_questions(tmp_path: Path) -> None:
    run, model = made(tmp_path), Looking()
    rows = job.question_rows(run)
    assert [row["question_id"] for row in rows] == ["q1", "q2"]
    searching = job.GuidedSearch(run, Scripted(script), model, Grader())  # type: ignore[arg-type]
    first, second = asyncio.run(searching.all(rows))
    assert (first.right["beam search"], first.error) == (1.0, None)
    assert first.tokens["beam search"] > 0
    assert set(map(str, model.shown)) == {str((["d1", "d2"], 1, 1))}  # what the model was trained on
    assert first.right["best of N, all samples"] == 0.0  # equal rewards: the first, which is wrong
    assert (second.right["beam search"], second.right["one sample"]) == (0.0, 0.5)
    assert str(second.error).startswith("image_")
    again = asyncio.run(job.GuidedSearch(run, Scripted(script), model, Grader()).all(rows[:1]))  # type: ignore[arg-type]
    assert again == [first]


def test_a_split_without_questions_is_refused(tmp_path: Path) -> None:
    run = made(tmp_path)
    other = run.recipe.beam_search.model_copy(update={"split": "validation"})
    with pytest.raises(ConfigError, match="beam_search.split is 'validation', and no question of it"):
        job.question_rows(Run(run.recipe.model_copy(update={"beam_search": other})))


def test_the_job_has_help_and_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["--help"]) == 0
    assert "beam_search.num_beams" in capsys.readouterr().out
    assert job.main(["jobs/recipes/tiny.yaml", f"run={tmp_path}"]) == 1
    assert "is not complete" in capsys.readouterr().err
