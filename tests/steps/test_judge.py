"""judge/: prompts, the backends (a scripted engine; Gemini's real client against a local server)."""

import asyncio
import base64
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pytest

from jobs.benches.model_server import Answer
from medmm_ray.config import ConfigError, build
from medmm_ray.data.records import Labels, StepLabel, from_dict, to_arrow
from medmm_ray.data.sorted_rows import sort_rows
from medmm_ray.data.sources.phantom import PhantomCase
from medmm_ray.data.tables import RowError
from medmm_ray.engines.llm.access import Access
from medmm_ray.engines.llm.budget import ApiBudget
from medmm_ray.engines.llm.client import ApiConfig
from medmm_ray.engines.llm.endpoint import ChatReply, EndpointError
from medmm_ray.engines.llm.prices import Price
from medmm_ray.stats.targets import targets
from medmm_ray.steps.judge import (
    JudgeActor,
    JudgeApi,
    JudgeCase,
    JudgeConfig,
    JudgeImage,
    Judgement,
    JudgeVllm,
    PhantomEngine,
    TruthJudge,
    make_judge,
)
from medmm_ray.steps.judge.backends import CallContext
from medmm_ray.steps.judge.prompt import SYSTEM, JudgeCall, schema_of
from medmm_ray.steps.monte_carlo import by_question
from medmm_ray.steps.monte_carlo.search import uncertain_steps
from tests.doubles.api_server import CUT, Server, failed, gemini_said, serving
from tests.doubles.fake_generator import FakeGenerator

EFFUSION = PhantomCase(
    seed=1, kind="effusion", side="right", zone="lower", extent=0.8, contrast=1.0, difficulty="easy"
).annotation()
RIGHT, WRONG, NEUTRAL = "The right costophrenic angle is blunted.", "The heart is wide.", "Compare both lungs."


LOCAL = JudgeConfig(engine=JudgeVllm(), reply="lines")
GEMINI = JudgeApi(kind="gemini", model="gemini-2.0-flash")
FLAWLESS = PhantomEngine(error_rate=0)


def case(**changes: Any) -> JudgeCase:
    values = {
        "question_id": "q1",
        "question": "What is seen?",
        "options": ["effusion", "normal chest"],
        "answer": "A",
        "images": [JudgeImage("x.png", EFFUSION)],
        "documents": ["Fluid blunts the angle."],
        "references": [JudgeImage("r.png", "left pleural effusion")],
    }
    return JudgeCase(**{**values, **changes})


# The phantom judge


def judged(backend: Any, shared: JudgeCase, solutions: list[list[str]]) -> list[Judgement | RowError]:
    return asyncio.run(backend.judge(shared, solutions))


def test_a_phantom_judge_without_errors_tells_the_truth() -> None:
    steps = [NEUTRAL, RIGHT, WRONG, "So the answer is (A).", "So the answer is (B)."]
    [found] = judged(TruthJudge("phantom", error_rate=0.0), case(), [steps])
    assert isinstance(found, Judgement)
    assert [step.label for step in found.steps] == [None, 1, 0, 1, 0]
    assert found.steps[0] == StepLabel(confidence="high", reason="nothing to check")


def test_a_phantom_judge_errs_as_often_as_told_and_knows_when_it_is_unsure() -> None:
    backend = TruthJudge("phantom", error_rate=0.1)
    solutions = [[RIGHT, WRONG, f"It is number {i}."] for i in range(4000)]
    found = [f for f in judged(backend, case(), solutions) if isinstance(f, Judgement)]
    flips = [(step.label == 0, step.confidence) for f in found for step in f.steps[:1]]
    flips += [(step.label == 1, step.confidence) for f in found for step in f.steps[1:2]]
    assert len(flips) == 8000
    assert 0.09 < sum(wrong for wrong, _ in flips) / 8000 < 0.11
    low = [wrong for wrong, confidence in flips if confidence == "low"]
    high = [wrong for wrong, confidence in flips if confidence == "high"]
    assert 0.08 < len(low) / 8000 < 0.13
    assert sum(low) / len(low) > 0.45
    assert sum(high) / len(high) < 0.03
    assert judged(backend, case(), solutions[:50]) == found[:50]
    assert judged(TruthJudge("phantom", error_rate=0.1, seed=1), case(), solutions[:50]) != found[:50]


def test_a_phantom_judge_refuses_other_images() -> None:
    notes = ("", "free text", "{}", "null", "[]", '{"image_organ": "CHEST"}', EFFUSION.replace("}", ', "more": 5}'))
    for images in ([], *([JudgeImage("x.png", note)] for note in notes)):
        [fault] = judged(TruthJudge("phantom", 0.0), case(images=images), [[RIGHT]])
        assert str(fault).startswith("judge_source: question q1 has no phantom's annotation")


# A local model


def test_a_local_judge_reads_all_steps_in_one_call() -> None:
    fake = FakeGenerator(lambda prompt, seed: "1 high\n0 low")
    backend = make_judge(LOCAL, "some/model", fake)
    [found] = judged(backend, case(), [[RIGHT, WRONG]])
    assert found == Judgement([StepLabel(label=1, confidence="high"), StepLabel(label=0, confidence="low")])
    [(prompt, n, _)] = fake.requests
    assert n == 1
    assert prompt.startswith(
        "Document 1: Fluid blunts the angle.\n\nSimilar case 1: left pleural effusion\n"
        "Question: What is seen? (A) effusion (B) normal chest\n"
        f"Reasoning to review, 2 steps:\nStep 1: {RIGHT}\nStep 2: {WRONG}\n"
    )
    assert backend.annotator.startswith("model@")


def test_a_reply_that_does_not_fit_is_asked_once_again() -> None:
    backend = make_judge(LOCAL, "m", FakeGenerator(lambda prompt, seed: "1 0" if "again" in prompt else "1"))
    [found] = judged(backend, case(), [[RIGHT, WRONG]])
    assert isinstance(found, Judgement)
    assert [step.label for step in found.steps] == [1, 0]

    stubborn = FakeGenerator(lambda prompt, seed: "1 0")
    [fault] = judged(make_judge(LOCAL, "m", stubborn), case(), [[RIGHT, WRONG, NEUTRAL]])
    assert str(fault) == "judge_reply: judge gave 2 verdicts for 3 steps: '1 0'"
    assert len(stubborn.requests) == 2
    assert "does not fit: judge gave 2 verdicts for 3 steps: '1 0'. Answer again." in stubborn.requests[1][0]


def test_a_local_judges_schema_holds_each_verdict_to_its_tests() -> None:
    entries = schema_of(JudgeCall((("a", "b"),)), exact=True)["properties"]["steps"]["items"]["anyOf"]
    forms = [entry["properties"] for entry in entries]
    held = [
        (*(form[name].get("const") for name in ("logical", "medical", "image_grounded")), *form["verdict"]["enum"])
        for form in forms
    ]
    assert held == [
        (True, True, True, "+"), (False, None, None, "-"), (True, False, None, "-"), (True, True, False, "-"),
    ]  # fmt: skip


def test_documents_that_do_not_fit_are_left_out() -> None:
    fake = FakeGenerator(lambda prompt, seed: "1 high")
    config = JudgeConfig(engine=JudgeVllm(max_model_len=600), reply="lines", solution_reserve=50)
    backend = make_judge(config, "m", fake)  # the fake counts characters
    judged(backend, case(documents=["First." * 5, "x" * 500, "Last."]), [[RIGHT]])
    prompt = fake.requests[0][0]
    assert ("First." in prompt, "xxx" in prompt) == (True, False)
    assert len(prompt) <= 600 - 16


@pytest.mark.engine
def test_a_local_judge_on_a_real_engine(tmp_path: Path) -> None:
    """Random weights: what it writes has the asked form all the same."""
    from medmm_ray.engines.generator import Generator
    from tests.doubles.fake_generator import make_tiny_policy

    folder = make_tiny_policy(tmp_path / "policy")
    shape = json.loads((tmp_path / "policy" / "config.json").read_text())
    (tmp_path / "policy" / "config.json").write_text(json.dumps({**shape, "max_position_embeddings": 8192}))
    settings = JudgeVllm(dtype="float32", max_model_len=8192)
    in_json = JudgeConfig(engine=settings, max_tokens=2048, reply="json")
    in_lines = JudgeConfig(engine=settings, max_tokens=2048, reply="lines")
    engine = Generator(folder, settings)
    backends = [make_judge(config, folder, lambda *_: engine) for config in (in_json, in_lines)]

    async def work() -> list[list[Judgement | RowError]]:
        return [await backend.judge(case(), [[RIGHT, WRONG], [NEUTRAL]]) for backend in backends]

    try:
        found = asyncio.run(work())
    finally:
        engine.shutdown()
    judgements = [[j for j in judged_ if isinstance(j, Judgement)] for judged_ in found]
    assert [[len(j.steps) for j in part] for part in judgements] == [[2, 1], [2, 1]], found
    assert {type(step.medical) for j in judgements[0] for step in j.steps} == {bool}
    assert {step.confidence for part in judgements for j in part for step in j.steps} <= {"high", "medium", "low"}


# The actor


def act(config: JudgeConfig, solutions: list[dict[str, Any]], fake: Any = None, **row: Any) -> list[Labels]:
    images = pa.table({"image_id": ["im1"], "uri": ["x.png"], "annotation": [EFFUSION]})
    values = {
        "question_id": "q1",
        "split": "train",
        "question": "What is seen?",
        "options": ["effusion", "normal chest"],
        "answer": "A",
        "image_ids": ["im1"],
        "solutions": solutions,
    }
    actor = JudgeActor(config, images, "m", fake)

    async def work() -> list[pa.Table]:
        return [out async for out in actor(pa.Table.from_pylist([{**values, **row}]))]

    [table] = asyncio.run(work())
    [out] = table.to_pylist()
    return [from_dict(Labels, label) for label in out["labels"]]


def solution(solution_id: str, *steps: str) -> dict[str, Any]:
    return {"solution_id": solution_id, "steps": list(steps), "text_sha": " ".join(steps)}


def test_a_question_is_judged_by_its_images_in_a_file_of_many(tmp_path: Path) -> None:
    rows = [{"image_id": f"im{i}", "uri": f"{i}.png", "annotation": EFFUSION} for i in range(3000)]
    table = pa.Table.from_pylist(rows)
    images = sort_rows([table], "image_id", table.schema, str(tmp_path / "images"))
    row = {"question_id": "q1", "question": "?", "options": [], "answer": "A", "image_ids": ["im2999", "im0"]}
    for lookup in (table, images):
        seen = JudgeActor(JudgeConfig(engine=FLAWLESS), lookup).case(row).images
        assert seen == [JudgeImage("2999.png", EFFUSION), JudgeImage("0.png", EFFUSION)]


def test_equal_texts_are_judged_once() -> None:
    fake = FakeGenerator(lambda prompt, seed: "1 high" if RIGHT in prompt else "0 low")
    solutions = [solution("s1", RIGHT), solution("s2", WRONG), solution("s3", RIGHT)]
    labels = act(LOCAL, solutions, fake)
    assert [(label.solution_id, label.steps[0].label) for label in labels] == [("s1", 1), ("s2", 0), ("s3", 1)]
    assert {(label.source, label.error) for label in labels} == {("judge", None)}
    assert len(fake.requests) == 2


def test_texts_with_the_same_steps_are_judged_once() -> None:
    """They differ in their markdown, which no request shows."""
    fake = FakeGenerator(lambda prompt, seed: "1 high")
    solutions = [{**solution("s1", RIGHT), "text_sha": "plain"}, {**solution("s2", RIGHT), "text_sha": "bold"}]
    labels = act(LOCAL, solutions, fake)
    assert [(label.solution_id, label.steps[0].label) for label in labels] == [("s1", 1), ("s2", 1)]
    assert len(fake.requests) == 1


def test_a_second_judge_adds_its_labels_to_the_first_ones() -> None:
    images = pa.table({"image_id": ["im1"], "uri": ["x.png"], "annotation": [EFFUSION]})
    row = {"question_id": "q1", "split": "train", "question": "What is seen?", "options": ["effusion", "normal chest"],
           "answer": "A", "image_ids": ["im1"], "solutions": [solution("s1", RIGHT, WRONG)]}  # fmt: skip
    judges = [JudgeActor(JudgeConfig(engine=FLAWLESS), images, is_last=False),
              JudgeActor(LOCAL, images, "other",
                         FakeGenerator(lambda prompt, seed: "0 low\n1 high"))]  # fmt: skip

    async def work(actor: JudgeActor, batch: pa.Table) -> list[pa.Table]:
        return [out async for out in actor(batch)]

    table = pa.Table.from_pylist([row, {**row, "question_id": "q2", "solutions": []}])
    for actor in judges:
        [table] = asyncio.run(work(actor, table))
    assert table.column_names == ["question_id", "labels"]
    first, second = table.to_pylist()
    found = [from_dict(Labels, label) for label in first["labels"]]
    assert [(row.solution_id, row.source, [step.label for step in row.steps]) for row in found] == [
        ("s1", "judge", [1, 0]), ("s1", "judge", [0, 1]),
    ]  # fmt: skip
    assert [row.annotator.partition("@")[0] for row in found] == ["phantom", "other"]
    assert second["labels"] == []
    [disputed] = by_question(to_arrow(Labels, found)).to_pylist()
    assert uncertain_steps(disputed["judged"]) == (0, 1)  # what Monte Carlo continues
    assert targets("judge", found, 2, "keep") == [None, None]


def test_the_first_solutions_of_a_question_may_be_enough() -> None:
    config = JudgeConfig(engine=FLAWLESS, max_solutions=2)
    labels = act(config, [solution("s1", RIGHT), solution("s2", RIGHT), solution("s3", WRONG), solution("s4", NEUTRAL)])
    assert [label.solution_id for label in labels] == ["s1", "s2", "s3"]


def test_what_the_judge_sees_is_bounded() -> None:
    fake = FakeGenerator(lambda prompt, seed: "1 high")
    documents = [{"text": f"Text {i}."} for i in range(3)]
    images = [{"uri": "r", "diagnosis": f"finding {i}"} for i in range(3)]
    config = LOCAL.model_copy(update={"num_documents": 1, "num_references": 2})
    act(config, [solution("s1", RIGHT)], fake, documents=documents, images=images)
    prompt = fake.requests[0][0]
    assert ("Text 0." in prompt, "Text 1." in prompt) == (True, False)
    assert ("finding 1" in prompt, "finding 2" in prompt) == (True, False)


def test_a_failed_call_is_an_error_and_no_label() -> None:
    fake = FakeGenerator(lambda prompt, seed: "1 high" if RIGHT in prompt else "hm")
    labels = act(LOCAL, [solution("s1", WRONG), solution("s2", RIGHT)], fake)
    assert [(label.steps, label.error) for label in labels] == [
        ([], "judge_reply: judge gave no verdicts for 1 steps: 'hm'"),
        ([StepLabel(label=1, confidence="high")], None),
    ]


def test_questions_without_solutions_and_other_splits_are_not_judged() -> None:
    assert act(JudgeConfig(), []) == []
    assert act(JudgeConfig(splits=("test",)), [solution("s1", RIGHT)]) == []
    assert len(act(JudgeConfig(engine=FLAWLESS), [solution("s1", RIGHT, WRONG)])[0].steps) == 2


# Gemini


@pytest.fixture(params=["rest", "sdk"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Asked by plain REST, and by google-generativeai where it is installed."""
    if request.param == "sdk":
        pytest.importorskip("google.generativeai")
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    with serving() as running:
        running.gemini_client = request.param
        yield running


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Any]:
    for name, colour in (("x.png", 10), ("r.png", 200)):
        PIL.Image.new("L", (8, 8), colour).save(tmp_path / name)
    return {
        "images": [JudgeImage(str(tmp_path / "x.png"), "")],
        "references": [JudgeImage(str(tmp_path / "r.png"), "left pleural effusion")],
    }


def gemini(server: Server, **changes: Any) -> Any:
    config, api = judging(server, **{"gemini_client": server.gemini_client, **changes})
    return make_judge(config, None, access=Access(GEMINI, GEMINI.model, api))


def judging(server: Server, **settings: Any) -> tuple[JudgeConfig, ApiConfig]:
    """A judge behind the server, and how it is reached: each setting where it belongs."""
    of_judge = {name: value for name, value in settings.items() if name in JudgeConfig.model_fields}
    of_api = {name: value for name, value in settings.items() if name not in of_judge}
    api = ApiConfig(**{"endpoint": server.address, "pause_s": 0.001, **of_api})
    return JudgeConfig(engine=GEMINI, **of_judge), api


def entry(step: int, label: str, confidence: str = "high") -> dict[str, Any]:
    criteria = {"logical": True, "medical": label == "+", "image_grounded": True}
    return {"step": step, "reason": "Because.", **criteria, "verdict": label, "confidence": confidence}


def steps(*entries: dict[str, Any]) -> str:
    return json.dumps({"steps": entries})


GOOD = steps(entry(1, "+"), entry(2, "-", "low"))


def test_gemini_is_asked_with_images_and_its_verdicts_are_priced(server: Server, pictures: dict[str, Any]) -> None:
    server.script = [gemini_said(GOOD, cachedContentTokenCount=400)]
    backend = gemini(server)
    [found] = judged(backend, case(**pictures), [[RIGHT, WRONG]])
    assert isinstance(found, Judgement)
    assert found.steps[1] == StepLabel(
        label=0, confidence="low", logical=True, medical=False, image_grounded=True, reason="Because."
    )
    assert found.cost == pytest.approx((600 * 0.10 + 400 * 0.025 + 100 * 0.40) / 1e6)
    [asked] = server.requests
    assert asked["systemInstruction"]["parts"][0]["text"] == SYSTEM
    assert asked["generationConfig"]["responseMimeType"] == "application/json"
    assert asked["generationConfig"]["temperature"] == 0.0
    item = asked["generationConfig"]["responseSchema"]["properties"]["steps"]["items"]
    assert item["properties"]["verdict"] in ({"type": "STRING", "enum": ["+", "-"]}, {"type": 1, "enum": ["+", "-"]})
    parts = asked["contents"][0]["parts"]
    assert [next(iter(part)) for part in parts] == ["text", "text", "inlineData", "text", "inlineData", "text"]
    assert parts[0]["text"].startswith("Document 1: Fluid blunts the angle.")
    assert parts[-1]["text"].startswith(f"Reasoning to review, 2 steps:\nStep 1: {RIGHT}")
    assert base64.b64decode(parts[2]["inlineData"]["data"]) != base64.b64decode(parts[4]["inlineData"]["data"])
    assert "(A) effusion" in parts[0]["text"]
    assert "right answer" not in parts[0]["text"]
    assert backend.annotator.startswith("gemini-2.0-flash@")


def test_each_label_names_the_model_that_answered(server: Server, tmp_path: Path) -> None:
    PIL.Image.new("L", (8, 8)).save(tmp_path / "x.png")
    images = pa.table({"image_id": ["im1"], "uri": [str(tmp_path / "x.png")], "annotation": [""]})
    config, api = judging(server, granularity="step", tries=1, in_flight=1, on_other_model="warn", pause_s=1.0)
    one, other = (gemini_said(steps(entry(i, "+")), model=f"gemini-2.0-flash-00{i}") for i in (1, 2))
    successor = gemini_said(steps(entry(1, "+")), model="gemini-3.5-flash-lite")
    server.script = [one, other, successor, gemini_said("hm", model="gemini-2.0-flash")]
    row = {"question_id": "q1", "split": "train", "question": "?", "options": [], "answer": "A", "image_ids": ["im1"]}
    solutions = [solution("s1", RIGHT, WRONG), solution("s2", NEUTRAL), solution("s3", "Odd.")]
    labels = asyncio.run(
        JudgeActor(config, images, access=Access(GEMINI, GEMINI.model, api)).label({**row, "solutions": solutions})
    )
    answered_by = {label.solution_id: label.answered_by for label in labels}
    assert answered_by == {
        "s1": "gemini-2.0-flash-001, gemini-2.0-flash-002", "s2": "gemini-3.5-flash-lite", "s3": None
    }  # fmt: skip
    assert {label.annotator.partition("@")[0] for label in labels} == {"gemini-2.0-flash"}


def test_the_answer_is_shown_only_where_that_is_said(server: Server, pictures: dict[str, Any]) -> None:
    server.script = [gemini_said(GOOD)]
    knowing = gemini(server, show_answer=True)
    judged(knowing, case(**pictures), [[RIGHT, WRONG]])
    assert server.requests[0]["contents"][0]["parts"][0]["text"].endswith("\nThe right answer: A")
    assert knowing.annotator != gemini(server).annotator
    assert act(JudgeConfig(engine=FLAWLESS), [solution("s1", RIGHT)])[0].saw_answer is False
    assert act(JudgeConfig(engine=FLAWLESS, show_answer=True), [solution("s1", RIGHT)])[0].saw_answer is True


def test_gemini_is_told_what_does_not_fit_and_both_answers_are_paid(server: Server, pictures: dict[str, Any]) -> None:
    server.script = [gemini_said(steps(entry(1, "+"))), gemini_said(GOOD)]
    [found] = judged(gemini(server), case(**pictures), [[RIGHT, WRONG]])
    assert isinstance(found, Judgement)
    assert found.cost == pytest.approx(2 * (1000 * 0.10 + 100 * 0.40) / 1e6)
    roles = [content["role"] for content in server.requests[1]["contents"]]
    assert roles == ["user", "model", "user"]
    assert "judge gave 1 verdicts for 2 steps" in server.requests[1]["contents"][2]["parts"][0]["text"]


def test_an_answer_that_is_cut_off_does_not_fit(server: Server, pictures: dict[str, Any]) -> None:
    server.script = [gemini_said(GOOD[:40], "MAX_TOKENS")]
    [fault] = judged(gemini(server), case(**pictures), [[RIGHT, WRONG]])
    assert str(fault).startswith("judge_reply: judge's answer was cut off at max_tokens=4096 (40 characters)")
    assert len(server.requests) == 2


def test_a_step_at_a_time(server: Server, pictures: dict[str, Any]) -> None:
    server.script = [gemini_said(steps(entry(1, "+"))), gemini_said(steps(entry(2, "-")))]
    [found] = judged(gemini(server, granularity="step", in_flight=1), case(**pictures), [[RIGHT, WRONG]])
    assert isinstance(found, Judgement)
    assert [step.label for step in found.steps] == [1, 0]
    first, second = (asked["contents"][0]["parts"][-1]["text"] for asked in server.requests)
    assert (WRONG in first, WRONG in second) == (False, True), "a step is judged without those after it"
    assert "Review step 2 only" in second


def test_several_solutions_share_a_call_and_its_cost(server: Server, pictures: dict[str, Any]) -> None:
    parts = [{"solution": 1, "steps": [entry(1, "+")]}, {"solution": 2, "steps": [entry(1, "-"), entry(2, "+")]}]
    server.script = [gemini_said(json.dumps({"solutions": parts})), gemini_said(steps(entry(1, "-")))]
    found = judged(gemini(server, solutions_per_call=2), case(**pictures), [[RIGHT], [WRONG, NEUTRAL], [WRONG]])
    judgements = [f for f in found if isinstance(f, Judgement)]
    assert [[step.label for step in j.steps] for j in judgements] == [[1], [0, 1], [0]]
    price = (1000 * 0.10 + 100 * 0.40) / 1e6
    assert [j.cost for j in judgements] == pytest.approx([price / 2, price / 2, price])
    assert len(server.requests) == 2


PRICE = (1000 * 0.10 + 100 * 0.40) / 1e6


def labels_and_costs(found: list[Judgement | RowError]) -> list[tuple[Any, float]]:
    """Of each solution its labels, or the kind of its fault, and its cost in calls."""
    said = [f.kind if isinstance(f, RowError) else [step.label for step in f.steps] for f in found]
    return list(zip(said, [round(f.cost / PRICE, 6) for f in found], strict=True))


def test_solutions_that_do_not_fit_together_go_in_smaller_calls(server: Server, pictures: dict[str, Any]) -> None:
    """One of 950 tokens has no room for a second one of 100 beside it; one of 2,000 has no room at all."""
    two = json.dumps({"solutions": [{"solution": i, "steps": [entry(1, "-")]} for i in (1, 2)]})
    alone = gemini_said(steps(entry(1, "+")))
    server.script = [alone, alone, gemini_said(two)]
    backend = gemini(server, solutions_per_call=2, in_flight=1, solution_reserve=0)
    context = CallContext(case(**pictures), case().documents, backend._images(case(**pictures)))
    blank = backend._request(context, JudgeCall((("",), ("",))))
    backend._max_prompt_tokens = backend._count(blank) + 1000
    solutions = [["long " * 760], ["a " * 200], ["word " * 1600], ["b " * 200], ["c " * 200]]
    found = judged(backend, case(**pictures), solutions)
    assert labels_and_costs(found) == [([1], 1.0), ([1], 1.0), ("prompt_too_long", 0.0), ([0], 0.5), ([0], 0.5)]
    shown = [asked["contents"][0]["parts"][-1]["text"] for asked in server.requests]
    assert [text.partition(":")[0] for text in shown] == [
        "Reasoning to review, 1 steps", "Reasoning to review, 1 steps", "2 solutions to review",
    ]  # fmt: skip
    assert all(asked["contents"][0]["parts"][0]["text"].startswith("Document 1:") for asked in server.requests)


def test_solutions_whose_shared_replies_do_not_fit_are_asked_about_alone(
    server: Server, pictures: dict[str, Any]
) -> None:
    misfit, one, other = gemini_said("hm"), gemini_said(steps(entry(1, "+"))), gemini_said(steps(entry(1, "-")))
    server.script = [misfit, misfit, one, other]
    found = judged(gemini(server, solutions_per_call=2, in_flight=1), case(**pictures), [[RIGHT], [WRONG]])
    assert labels_and_costs(found) == [([1], 2.0), ([0], 2.0)], "each bears half of the shared two and its own"
    last = [asked["contents"][0]["parts"][-1]["text"] for asked in server.requests[2:]]
    assert [text.startswith("Reasoning to review, 1 steps:") for text in last] == [True, True]

    server.script = [misfit, misfit, one, misfit]
    found = judged(gemini(server, solutions_per_call=2, in_flight=1), case(**pictures), [[RIGHT], [WRONG]])
    assert labels_and_costs(found) == [([1], 2.0), ("judge_reply", 3.0)]


def test_a_server_that_finds_a_shared_call_too_long_is_asked_about_each_alone(
    server: Server, pictures: dict[str, Any]
) -> None:
    too_long = failed(400, "The input token count exceeds the maximum number of tokens allowed (9).")
    server.script = [too_long, gemini_said(steps(entry(1, "+")))]
    found = judged(gemini(server, solutions_per_call=2), case(**pictures), [[RIGHT], [WRONG]])
    assert labels_and_costs(found) == [([1], 1.0), ([1], 1.0)]


def test_a_shared_call_that_is_refused_is_a_fault_of_each_and_its_cost_too(
    server: Server, pictures: dict[str, Any]
) -> None:
    blocked = {"candidates": [{"finishReason": "SAFETY"}], "usageMetadata": gemini_said("").body["usageMetadata"]}
    server.script = [Answer(blocked)]
    found = judged(gemini(server, solutions_per_call=2), case(**pictures), [[RIGHT], [WRONG]])
    assert labels_and_costs(found) == [("refused", 0.5), ("refused", 0.5)]
    assert len(server.requests) == 1


def test_what_was_paid_for_an_error_is_in_its_row(server: Server, pictures: dict[str, Any]) -> None:
    server.script = [gemini_said("hm")]
    assert labels_and_costs(judged(gemini(server), case(**pictures), [[RIGHT]])) == [("judge_reply", 2.0)]
    server.script = [failed(400, "odd")]
    assert labels_and_costs(judged(gemini(server), case(**pictures), [[RIGHT]])) == [("request", 0.0)]
    server.script = [gemini_said(steps(entry(1, "+"))), gemini_said("hm"), gemini_said("hm")]
    found = judged(gemini(server, granularity="step", in_flight=1), case(**pictures), [[RIGHT, WRONG]])
    assert labels_and_costs(found) == [("judge_reply", 3.0)]


def test_one_more_try_asks_anew_only_where_kept_replies_do_not_fit(
    server: Server, pictures: dict[str, Any], tmp_path: Path
) -> None:
    def judge(**changes: Any) -> list[Judgement | RowError]:
        config, api = judging(server, in_flight=1, gemini_client=server.gemini_client, **changes)
        folder = str(tmp_path / "api")
        access = Access(GEMINI, GEMINI.model, api, ApiBudget(folder, api.limits), folder)
        backend = make_judge(config, GEMINI.model, access=access)
        return asyncio.run(backend.judge(case(**pictures), [[RIGHT], [WRONG]]))

    server.script = [gemini_said(steps(entry(1, "-"))), gemini_said("hm"), gemini_said("ah")]
    for _ in range(2):
        assert labels_and_costs(judge()) == [([0], 1.0), ("judge_reply", 2.0)]
        assert len(server.requests) == 3
    server.script = [gemini_said(steps(entry(1, "+")))]
    assert labels_and_costs(judge(tries=3)) == [([0], 1.0), ([1], 3.0)]
    assert len(server.requests) == 4
    said = [content["parts"][-1]["text"] for content in server.requests[3]["contents"]]
    assert [said[1], said[3]] == ["hm", "ah"]


def test_steps_that_solutions_share_are_judged_and_paid_once(server: Server, pictures: dict[str, Any]) -> None:
    server.script = [gemini_said(steps(entry(1, "+"))), gemini_said(steps(entry(2, "-"))),
                     gemini_said(steps(entry(2, "+")))]  # fmt: skip
    solutions = [[RIGHT, WRONG], [RIGHT, NEUTRAL], [RIGHT]]
    found = judged(gemini(server, granularity="step", in_flight=1), case(**pictures), solutions)
    assert labels_and_costs(found) == [([1, 0], 2.0), ([1, 1], 1.0), ([1], 0.0)]
    assert len(server.requests) == 3


def test_solutions_per_call_goes_with_whole_solutions_in_json() -> None:
    with pytest.raises(ConfigError, match="solutions_per_call > 1 needs granularity=solution and reply=json"):
        build(JudgeConfig, {"solutions_per_call": 2, "granularity": "step"}, "test")


def test_the_first_call_of_a_question_goes_ahead_of_its_others(server: Server, pictures: dict[str, Any]) -> None:
    server.script, server.delay_s = [gemini_said(GOOD)], 0.5
    judged(gemini(server), case(**pictures), [[RIGHT, f"{i}"] for i in range(5)])
    gaps = [at - server.times[0] for at in server.times]
    assert gaps[1] >= 0.5
    assert gaps[4] - gaps[1] < 1.4, "the others go together: one after the other they would take 1.5 s"


def test_faults_of_the_moment_are_tried_again(server: Server, pictures: dict[str, Any]) -> None:
    server.script = [failed(429), failed(500), CUT, Answer("{broken"), gemini_said(GOOD)]
    [found] = judged(gemini(server), case(**pictures), [[RIGHT, WRONG]])
    assert isinstance(found, Judgement)
    assert len(server.requests) == 5


def test_gemini_is_asked_again_no_sooner_than_it_says(server: Server, pictures: dict[str, Any]) -> None:
    info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "0.75s"}
    limited = Answer({"error": {"code": 429, "message": "slow", "details": [info]}}, 429)
    began, then = time.monotonic(), datetime.now(UTC) + timedelta(seconds=3)
    dated = failed(503, **{"Retry-After": format_datetime(then, usegmt=True)})
    server.script = [limited, dated, gemini_said(GOOD)]
    [found] = judged(gemini(server), case(**pictures), [[RIGHT, WRONG]])
    assert isinstance(found, Judgement)
    assert server.times[1] - server.times[0] >= 0.75
    assert server.times[2] - began >= 2  # the header has whole seconds


def test_too_many_faults_are_the_rows_error(server: Server, pictures: dict[str, Any]) -> None:
    server.script = [failed(503, "overloaded")]
    [fault] = judged(gemini(server, max_attempts=3), case(**pictures), [[RIGHT]])
    assert str(fault) == "unavailable: gemini:gemini-2.0-flash failed 3 times, last: 503: overloaded"
    assert len(server.requests) == 3


def test_a_hanging_server_is_a_fault_of_the_moment(server: Server, pictures: dict[str, Any]) -> None:
    server.script, server.delay_s = [gemini_said(GOOD)], 1.0
    [fault] = judged(gemini(server, max_attempts=2, timeout_s=0.2), case(**pictures), [[RIGHT]])
    assert str(fault) == "unavailable: gemini:gemini-2.0-flash failed 2 times, last: no answer within 0.2 s"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (failed(400, "image too odd"), "request: gemini-2.0-flash answered 400: image too odd"),
        (
            failed(400, "The input token count (200000) exceeds the maximum number of tokens allowed (131072)."),
            "prompt_too_long: gemini-2.0-flash answered 400: The input token count (200000) exceeds the maximum number "
            "of tokens allowed (131072).",
        ),
        (
            Answer({"promptFeedback": {"blockReason": "SAFETY"}}),
            "refused: gemini-2.0-flash blocked the prompt (SAFETY)",
        ),
        (
            Answer({"candidates": [{"finishReason": "SAFETY"}]}),
            "refused: gemini-2.0-flash did not answer (SAFETY)",
        ),
    ],
)
def test_a_refused_request_is_not_sent_again(
    server: Server, pictures: dict[str, Any], answer: Any, message: str
) -> None:
    server.script = [answer]
    [fault] = judged(gemini(server), case(**pictures), [[RIGHT]])
    assert str(fault) == message
    assert len(server.requests) == 1


@pytest.mark.parametrize(("status", "message"), [(403, "denied"), (404, "no model"), (400, "API key expired.")])
def test_a_refused_key_or_model_ends_the_job(
    server: Server, pictures: dict[str, Any], status: int, message: str
) -> None:
    server.script = [failed(status, message)]
    with pytest.raises(EndpointError, match=rf"answered {status}: {message}.*check GEMINI_API_KEY and the model's"):
        judged(gemini(server), case(**pictures), [[RIGHT]])
    assert len(server.requests) == 1


def test_an_unreadable_image_fails_its_question(server: Server, tmp_path: Path) -> None:
    server.script = [gemini_said(GOOD)]
    (tmp_path / "text.png").write_text("this is no picture")
    for name, kind in (("gone.png", "image_missing"), ("text.png", "image_corrupt")):
        found = judged(gemini(server), case(images=[JudgeImage(str(tmp_path / name), "")]), [[RIGHT], [WRONG]])
        assert [fault.kind for fault in found if isinstance(fault, RowError)] == [kind, kind]
    assert server.requests == []


def test_solutions_that_are_empty_or_endless_fail_by_name(server: Server, pictures: dict[str, Any]) -> None:
    server.script = [gemini_said(steps(entry(1, "+")))]
    found = judged(gemini(server), case(**pictures), [[], [RIGHT], ["word " * 100_000]])
    assert [f.kind if isinstance(f, RowError) else f.steps[0].label for f in found] == [
        "empty_solution", 1, "prompt_too_long",
    ]  # fmt: skip
    assert "raise judge.engine.max_prompt_tokens" in str(found[2])
    assert len(server.requests) == 1


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEMINI_API_KEY", raising=False)
    with pytest.raises(EndpointError, match="GEMINI_API_KEY; it is not set"):
        make_judge(JudgeConfig(engine=GEMINI), "gemini-2.0-flash")


def test_a_missing_model_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"test: 'engine\.model' is required; set it in the recipe or as engine\.model="
    ):
        build(JudgeConfig, {"engine": {"kind": "openai"}}, "test")
    with pytest.raises(ValueError, match=r"judge\.engine\.kind is 'vllm' and no model is given"):
        make_judge(JudgeConfig(engine=JudgeVllm()), None)


@pytest.mark.parametrize("usage", [{}, {"usageMetadata": {"promptTokenCount": -5, "candidatesTokenCount": -3}}])
def test_tokens_that_are_not_counted_are_all_that_are_possible(
    server: Server, pictures: dict[str, Any], usage: dict[str, Any]
) -> None:
    server.script = [Answer({"candidates": [{"content": {"parts": [{"text": GOOD}]}, "finishReason": 77}], **usage})]
    [found] = judged(gemini(server, input_price=0.0, output_price=1e6), case(**pictures), [[RIGHT, WRONG]])
    assert isinstance(found, Judgement)
    assert found.cost == 4096


def test_thoughts_are_paid_as_output(server: Server, pictures: dict[str, Any]) -> None:
    server.script = [gemini_said(GOOD, totalTokenCount=1600)]
    [found] = judged(gemini(server, input_price=1.0, output_price=2.0), case(**pictures), [[RIGHT, WRONG]])
    assert isinstance(found, Judgement)
    assert found.cost == Price(1.0, 1.0, 2.0).cost(
        ChatReply((), prompt_tokens=1000, cached_tokens=0, completion_tokens=600)
    )
