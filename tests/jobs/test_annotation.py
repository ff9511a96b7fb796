"""sample -> judge -> monte_carlo -> review through Ray Data and the tables, with a scripted engine."""

from pathlib import Path

import pyarrow as pa
import pytest

from jobs.monte_carlo import JUDGE_COLUMNS
from medmm_ray.data.records import Evidence, Image, Labels, Question, RetrievedDocument, Solutions, to_arrow
from medmm_ray.data.sorted_rows import SortedRows, sort_rows
from medmm_ray.data.sources.phantom import PhantomCase
from medmm_ray.data.tables import Provenance, Table
from medmm_ray.steps.judge import JudgeConfig, PhantomEngine, judge
from medmm_ray.steps.monte_carlo import MonteCarloConfig, judged_rows, monte_carlo
from medmm_ray.steps.review import ReviewConfig, queue, review
from medmm_ray.steps.sample import SampleConfig, sample
from tests.doubles.fake_generator import FakeGenerator

STEPS = (
    "Step 1: The right costophrenic angle is blunted.\nStep 2: The heart is wide ({}).\nStep 3: So the answer is ({})."
)


def write(prompt: str, seed: int) -> str:
    """A whole solution, or its last step where two are there; letters alternate with the seed."""
    if prompt.endswith("Step 2:"):
        return f" Hm.\nStep 3: So the answer is ({'AB'[seed % 2]})."
    if prompt.endswith("Step 3:"):
        return f" So the answer is ({'AB'[seed % 2]})."
    return STEPS.format(seed % 5, "AB"[seed % 2])


@pytest.mark.engine
def test_the_chain(ray_session: None, tmp_path: Path) -> None:
    case = PhantomCase(seed=1, kind="effusion", side="right", zone="lower", extent=0.8, contrast=1.0, difficulty="easy")
    questions = to_arrow(
        Question,
        [
            Question(
                question_id=f"q{i}", source="phantom", split="test" if i % 3 == 0 else "train", modality="radiology",
                difficulty="easy", question=f"What is {i}?", options=["pleural effusion", "nodule"], answer="A",
                answer_type="choice", image_ids=["im1"], error="image_corrupt: im2" if i == 5 else None,
            )
            for i in range(9)
        ],
    )  # fmt: skip
    images = to_arrow(
        Image,
        [
            Image(
                image_id="im1", uri="x.png", sha256="", perceptual_hash="", width=1, height=1, split="train",
                modality="radiology", diagnosis=case.diagnosis, annotation=case.annotation(),
            )
        ],
    )  # fmt: skip
    document = RetrievedDocument(document_id="d1", text="Fluid blunts the angle.", score=1.0)
    evidence = to_arrow(
        Evidence,
        [Evidence(question_id=f"q{i}", config_hash="e", documents=[document], images=[]) for i in range(9)],
    )
    fake, ids = FakeGenerator(write), questions["question_id"].to_pylist()

    def table(name: str, record: type) -> Table:
        made = Table(str(tmp_path / name), record)
        made.prepare()
        return made

    def by_id(name: str, rows: pa.Table, key: str = "question_id") -> SortedRows:
        return sort_rows([rows], key, rows.schema, str(tmp_path / f"{name}.arrow"))

    def origin(name: str) -> Provenance:
        return Provenance(name=name, fingerprint=name, config={}, upstream={})

    import ray

    source = ray.data.from_arrow(questions)
    config = SampleConfig(num_samples_train=4, num_samples_test=8, num_documents=1)
    solutions = table("solutions", Solutions)
    made = sample(source, config, model="m", policy="p", config_hash="c", evidence=evidence, generator=fake)
    solutions.write(made, "question_id")
    manifest = solutions.finish(origin("solutions"), "question_id", ids, 0.0)
    rows = {row["question_id"]: row for row in solutions.to_arrow().to_pylist()}
    assert [len(rows[i]["solutions"]) for i in ids] == [8, 4, 4, 8, 4, 0, 8, 4, 4]
    assert rows["q5"]["error"] == "upstream: image_corrupt: im2"
    assert manifest.errors == {}

    whole = solutions.to_arrow()
    judged = table("judge_labels", Labels)
    made = judge(
        solutions.dataset(),
        JudgeConfig(engine=PhantomEngine(error_rate=0.5)),
        questions=questions,
        images=images,
        evidence=evidence,
    )
    judged.write(made, "question_id", "labels")
    judged.finish(origin("judge_labels"), "question_id", ids, 0.0)
    judge_labels = judged.to_arrow()
    assert judge_labels.num_rows == 44

    rolled = table("monte_carlo_labels", Labels)
    made = monte_carlo(
        solutions.dataset(),
        MonteCarloConfig(splits=("train", "test"), max_share=0.5, stop_early=False),
        questions=by_id("questions", questions),
        judged=judged_rows([judge_labels.select(JUDGE_COLUMNS)], str(tmp_path)),
        model="m",
        policy="p",
        generator=fake,
    )
    rolled.write(made, "question_id", "labels")
    manifest = rolled.finish(origin("monte_carlo_labels"), "question_id", ids, 0.0)
    monte_carlo_labels = rolled.to_arrow()
    ran = [step for row in monte_carlo_labels.to_pylist() for step in row["steps"] if step["num_rollouts"]]
    assert {(step["value"], step["num_rollouts"], step["stopped_early"]) for step in ran} == {(0.5, 4, False)}
    assert manifest.figures["rollouts"] >= 4 * len({row["question_id"] for row in monte_carlo_labels.to_pylist()}) / 2
    assert manifest.figures["rollout_tokens"] > manifest.figures["rollouts"]

    items = queue([whole], [questions], [judge_labels], [monte_carlo_labels], ReviewConfig(review_steps=12))
    assert 8 <= len(items) <= 12
    experts = table("expert_labels", Labels)
    made = review(
        solutions.dataset(),
        ReviewConfig(),
        items=items,
        questions=by_id("questions", questions),
        annotations=by_id("images", images, "image_id"),
    )
    experts.write(made, "question_id", "labels")
    experts.finish(origin("expert_labels"), "question_id", ids, 0.0)
    labels = experts.to_arrow().to_pylist()
    assert sum(row["source"] == "phantom" for row in labels) == 24
    looked_at = sum(s["confidence"] is not None for row in labels if row["source"] == "expert" for s in row["steps"])
    assert looked_at == len(items)
    truth = next(row for row in labels if row["source"] == "phantom")
    assert [step["label"] for step in truth["steps"]][:2] == [1, 0]
