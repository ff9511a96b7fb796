"""Engines that sleep, in the actors of their steps: they make sound rows, and their actors begin together; steps that
overlap hand every row over."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow.fs import LocalFileSystem

from jobs.benches import scale_actors
from jobs.benches.sampling import bench_questions, noted, span
from jobs.benches.scale_actors import Crew, SleepingEmbedder, SleepingEngine, SleepingScorer, solutions_of
from jobs.benches.scale_overlap import OverlapConfig, in_threads
from medmm_ray.data.handover import parts_of_ids, read_shards
from medmm_ray.data.records import Image, Question, Solutions, Vector, arrow_schema, to_arrow
from medmm_ray.data.tables import Table
from medmm_ray.steps.judge import JudgeActor, JudgeConfig, JudgeVllm
from medmm_ray.steps.sample import SampleConfig, SamplingActor
from medmm_ray.steps.score import ScoreConfig

QUESTIONS = bench_questions(2)
SOLUTIONS = to_arrow(Solutions, solutions_of(QUESTIONS))


@pytest.fixture
def crew(tmp_path: Path) -> Crew:
    return Crew(tmp_path, 1, pause_s=0.01)


async def _rows_of(batches: AsyncIterator[pa.Table]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    async for batch in batches:
        rows += batch.to_pylist()
    return rows


def test_a_sleeping_policy_solves_every_question(crew: Crew) -> None:
    config = SampleConfig(num_samples_train=2)
    actor = SamplingActor(config, "", "p", "", generator=lambda model, engine: SleepingEngine(model, engine, crew))
    rows = asyncio.run(_rows_of(actor(to_arrow(Question, QUESTIONS))))
    assert [(row["num_missing"], row["error"], len(row["solutions"])) for row in rows] == [(0, None, 2)] * 2
    assert rows[0]["solutions"][0]["steps"] == scale_actors.STEPS
    assert span(noted(crew.folder)) >= 0.01


def test_a_sleeping_judge_gives_a_verdict_for_each_step(crew: Crew) -> None:
    config = JudgeConfig(engine=JudgeVllm(model="sleeper"), reply="lines", num_documents=0)
    actor = JudgeActor(
        config,
        arrow_schema(Image).empty_table(),
        "sleeper",
        generator=lambda model, engine: SleepingEngine(model, engine, crew),
    )
    batch = SOLUTIONS
    questions = to_arrow(Question, QUESTIONS)
    for name in ("split", "question", "options", "answer", "image_ids"):
        batch = batch.append_column(name, questions[name])
    labels = [row["labels"] for row in asyncio.run(_rows_of(actor(batch)))]
    assert [[(label["error"], len(label["steps"])) for label in of_question] for of_question in labels] == [
        [(None, 3)]
    ] * 2


def test_a_sleeping_reward_model_scores_each_step(crew: Crew) -> None:
    rows = []
    for row, question in zip(SOLUTIONS.to_pylist(), QUESTIONS, strict=True):
        faults = {"question_error": None, "evidence_error": None}
        rows.append({**row, **faults, "question": question.question, "documents": []})
    actor = SleepingScorer(ScoreConfig(arms=("text_only",)), crew, "bench")
    scores = actor(pa.Table.from_pylist(rows)).to_pylist()
    assert [[(s["arm"], s["error"], len(s["text_log_odds"])) for s in row["scores"]] for row in scores] == [
        [("text_only", None, 3)]
    ] * 2


def test_a_sleeping_encoder_gives_a_vector_for_each_question(crew: Crew) -> None:
    rows = SleepingEmbedder(crew)(to_arrow(Question, QUESTIONS)).to_pylist()
    assert [(row["question_id"], len(row["vector"]), row["error"]) for row in rows] == [
        ("q0", 4, None),
        ("q1", 4, None),
    ]


def test_a_crew_begins_when_its_last_actor_is_there(tmp_path: Path) -> None:
    thread = threading.Thread(target=Crew(tmp_path, 2, 0).join, daemon=True)
    thread.start()
    time.sleep(0.5)
    assert thread.is_alive()
    (tmp_path / "another.started").touch()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_steps_in_threads_hand_every_row_over(tmp_path: Path) -> None:
    longer, both = in_threads(OverlapConfig(questions=16, pause_s=0.05), str(tmp_path))
    assert longer >= 16 / 4 * 0.05
    assert both >= longer
    assert Table(f"{tmp_path}/solutions", Vector).manifest().rows == 16
    shards = read_shards(LocalFileSystem(), f"{tmp_path}/solutions/.parts")
    assert len(parts_of_ids(shards)) == 16
