"""The replay of a run's samples: by hand on a few samples, and read from tables."""

import math
from pathlib import Path

import pytest

from jobs.benches.adaptive import BenchConfig, Replay, in_rounds, outcome, read_replays
from medmm_ray.config import ConfigError
from medmm_ray.data.artifacts import Artifact, Provenance
from medmm_ray.data.records import Question, Scores, Solution, Solutions
from medmm_ray.data.tables import Table, write_rows
from tests.doubles import tiny_reward_model

REPLAY = Replay(
    answers=["B", "B", "C", "C", "C", "C"],
    right=[False, False, True, True, True, True],
    rewards=[0.0, -1.0, 2.0, math.nan, 0.5, 0.1],
    num_tokens=[10, 20, 30, 40, 50, 60],
)


def test_all_samples_and_some() -> None:
    assert outcome(REPLAY, "best_of_n", 6).is_right
    assert not outcome(REPLAY, "best_of_n", 2).is_right
    assert outcome(REPLAY, "majority", 6).num_tokens == 210
    assert outcome(REPLAY, "majority", 3).num_tokens == 60


def test_rounds_stop_where_the_rule_says_so() -> None:
    # Two of two for B: P(x > 1/2) of Beta(3, 1) is 7/8.
    early = in_rounds(REPLAY, "majority", 2, 0.87)
    assert (early.num_samples, early.num_tokens, early.is_right) == (2, 30, False)
    late = in_rounds(REPLAY, "majority", 2, 0.88)
    assert (late.num_samples, late.is_right) == (6, True)


def test_a_run_is_read(tmp_path: Path) -> None:
    def origin(name: str) -> Provenance:
        return Provenance(name=name, fingerprint="f", config={}, upstream={})

    run = str(tmp_path)
    tiny_reward_model.tokenizer().save_pretrained(f"{run}/policy/f")
    for name in ("policy", "solutions", "scores", "questions"):
        (tmp_path / name).mkdir(exist_ok=True)
        Artifact(f"{run}/{name}/f").point("f")
    solutions = []
    for index in range(3):
        solutions.append(
            Solution(
                solution_id=f"s{index}", index=index, text="the left lung", steps=["the left lung"], answer="B",
                correct=index == 1, finish_reason="stop", seed=index, text_sha="",
            )
        )  # fmt: skip
    rows = [
        Solutions(question_id=name, policy="p", config_hash="c", num_requested=3, solutions=solutions)
        for name in ("q0", "q1")
    ]
    write_rows(Table(f"{run}/solutions/f", Solutions), rows, origin("solutions"), "question_id")
    scores = [
        Scores(question_id="q0", solution_id="s0", model="m", arm="multimodal", text_log_odds=[1.0, 3.0],
               image_log_odds=[0.5, -4.0]),
        Scores(question_id="q0", solution_id="s1", model="m", arm="text_only", text_log_odds=[1.0],
               image_log_odds=[0.0]),
        Scores(question_id="q0", solution_id="s2", model="m", arm="multimodal", text_log_odds=[], image_log_odds=[],
               error="too_long: x"),
    ]  # fmt: skip
    write_rows(Table(f"{run}/scores/f", Scores), scores, origin("scores"), "solution_id")
    questions = [_question("q0", "test"), _question("q1", "validation")]
    write_rows(Table(f"{run}/questions/f", Question), questions, origin("questions"), "question_id")
    (replay,) = read_replays(BenchConfig(run=run))
    assert replay.answers == ["B"] * 3
    assert replay.right == [False, True, False]
    assert replay.rewards[0] == -1.0
    assert all(map(math.isnan, replay.rewards[1:]))
    assert replay.num_tokens == [3, 3, 3]
    with pytest.raises(ConfigError, match="no scored questions of split=train"):
        read_replays(BenchConfig(run=run, split="train"))


def _question(question_id: str, split: str) -> Question:
    return Question(
        question_id=question_id, source="x", split=split, modality="radiology", difficulty="easy", question="Which?",
        options=["a", "b"], answer="B", answer_type="choice", image_ids=[],
    )  # fmt: skip


def test_a_run_is_required() -> None:
    with pytest.raises(ConfigError, match="'run' is required"):
        read_replays(BenchConfig())
