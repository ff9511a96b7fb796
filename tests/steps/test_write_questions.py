"""steps/write_questions: what is refused, what is asked again, and the real client against a local server."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pytest

from jobs.graph import BY_NAME
from jobs.step import Run, load_recipe, run_step
from medmm_ray.data.records import Image, Question, QuestionReview, WrittenQuestion, to_arrow
from medmm_ray.data.tables import RowError
from medmm_ray.engines.chat import ChatPrompt
from medmm_ray.engines.generator import Completion, Sampling
from medmm_ray.engines.llm.access import Access
from medmm_ray.engines.llm.budget import ApiBudget
from medmm_ray.engines.llm.client import ApiConfig
from medmm_ray.engines.vllm_engine import engine_arguments
from medmm_ray.steps.curate import CurateConfig, reviewed
from medmm_ray.steps.write_questions import (
    QuestionWriter,
    WriteQuestionsConfig,
    WriterApi,
    WriterVllm,
    doubt,
    draft,
    figures,
    repeats,
    usable,
    without_question,
)
from tests.doubles.api_server import Server, chat_said, serving
from tests.doubles.fake_generator import FakeGenerator, text_of

GOOD: dict[str, Any] = {
    "question": "A 60-year-old woman is short of breath. What does the film show?",
    "options": ["Pleural effusion", "Pneumothorax", "Consolidation", "Lung nodule"],
    "correct_answer": "B",
    "difficulty": "medium",
    "explanation": "No lung markings at the left apex.",
}


def reply(**changes: Any) -> str:
    return json.dumps(GOOD | changes)


def test_options_are_dealt_anew_and_the_answer_goes_with_its_text() -> None:
    made = draft(f"Here it is:\n```json\n{reply()}\n```")
    assert sorted(made.options) == sorted(GOOD["options"])
    assert made.options["ABCD".index(made.answer)] == "Pneumothorax"
    assert draft(reply()) == made
    answers = {draft(reply(question=f"A {age}-year-old man coughs. What is seen here?")).answer for age in range(30)}
    assert answers == set("ABCD")


def test_letters_before_options_are_taken_off() -> None:
    lettered = [f"({letter}) {option}" for letter, option in zip("ABCD", GOOD["options"], strict=True)]
    assert sorted(draft(reply(options=lettered)).options) == sorted(GOOD["options"])


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        ("no", "question_reply", "no JSON object: 'no'"),
        ("[1, 2]", "question_reply", "no JSON object"),
        ('{"question": ' + "9" * 5000 + "}", "question_reply", "no JSON object"),
        (reply(question="  "), "question_reply", "'question' is '  ', not a text"),
        (reply(question="What?"), "question_reply", "too short"),
        (reply(correct_answer="E"), "question_reply", "'correct_answer' is 'E', not one of A, B, C, D"),
        (reply(difficulty="trivial"), "question_reply", "'difficulty' is 'trivial'"),
        (reply(options="A, B, C, D"), "question_reply", "not a list of texts"),
        (reply(options=["a", "b", "c"]), "question_options", "3 options, not 4"),
        (reply(options=["a lung", "the lung", "c", "d"]), "question_options", "say the same"),
        (reply(options=["x", "y", "z", "None of the above"]), "question_options", "'None of the above' is no finding"),
        (reply(options=["x", "...", "z", "y"]), "question_options", "option B is empty"),
        (reply(options=["x", "y" * 90, "z", "w"]), "question_leak", "far longer"),
        (reply(question="She has a pneumothorax. What does the film show?"), "question_leak", "names its answer"),
    ],
)
def test_what_cannot_be_used_is_named(said: str, kind: str, words: str) -> None:
    with pytest.raises(RowError, match=words) as caught:
        draft(said)
    assert caught.value.kind == kind


def test_half_of_a_surrogate_pair_is_replaced() -> None:
    made = draft(reply(explanation="\ud800 seen", options=["Pleural effusion", "Pneumothorax", "\udc00 x", "Nodule"]))
    assert (made.explanation, "\ufffd x" in made.options) == ("\ufffd seen", True)


def test_a_stem_may_name_all_options() -> None:
    stem = "Effusion, nodule, clear or wide: which of these does the film show?"
    assert draft(reply(question=stem, options=["Effusion", "Nodule", "Clear", "Wide"])).question == stem


def test_the_same_question_in_other_words_repeats() -> None:
    question = "A 60-year-old woman is short of breath. What does this film show?"
    assert repeats(question, ["nothing alike", GOOD["question"]])
    assert not repeats("Which side is affected in this man of 40?", [GOOD["question"]])


def tried(solved: int, blind: int, num: int = 3) -> WrittenQuestion:
    return WrittenQuestion(
        written_id="w1", image_id="im1", author="m", split="train", modality="radiology",
        num_checks=num, num_solved=solved, num_solved_blind=blind,
    )  # fmt: skip


def test_doubts() -> None:
    assert doubt(tried(1, 2)) is None
    assert doubt(tried(0, 0, num=0)) is None
    assert str(doubt(tried(0, 0))).startswith("question_ambiguous: with the image the model answered otherwise 3")
    assert str(doubt(tried(3, 3))).startswith("question_leak: answered 3 times of 3 without")


def image(name: str, split: str = "train", uri: str = "", error: str | None = None) -> Image:
    return Image(
        image_id=name, uri=uri, sha256=f"sha-{name}", perceptual_hash="0" * 16, width=8, height=8, split=split,
        modality="radiology", diagnosis="", annotation="", error=error,
    )  # fmt: skip


def question(name: str, images: list[str], error: str | None = None) -> Question:
    return Question(
        question_id=name, source="s", split="train", modality="radiology", difficulty="easy", question=name,
        options=["a", "b"], answer="A", answer_type="choice", image_ids=images, error=error,
    )  # fmt: skip


def test_images_without_a_question() -> None:
    images = to_arrow(Image, [image("a"), image("b"), image("c", "test"), image("d", error="image_empty: x")])
    asked = to_arrow(Question, [question("q1", ["a"]), question("q2", ["b"], error="options_missing: x")])

    def chosen(**settings: Any) -> list[str]:
        config = WriteQuestionsConfig(per_image=1, engine=WriterApi(kind="gemini", model="m"), **settings)
        return [str(name) for name in without_question(images, asked, config)["image_id"].to_pylist()]

    assert sorted(chosen()) == ["b", "c"]
    assert chosen(splits=("test",)) == ["c"]
    assert len(chosen(max_images=1)) == 1
    assert without_question(images, asked, WriteQuestionsConfig()).num_rows == 0
    with pytest.raises(ValueError, match="per_image is 2 and engine.model is not set"):
        WriteQuestionsConfig(per_image=2)
    with pytest.raises(
        ValueError, match="num_checks is 1, .* it cannot tell a leak; take 2 or more, or 0 for no checks"
    ):
        WriteQuestionsConfig(num_checks=1)


def writer(server: Server, folder: Path, in_flight: int = 16, **settings: Any) -> QuestionWriter:
    engine = WriterApi(kind="openai", model="gpt-4o")
    config = WriteQuestionsConfig(engine=engine, **{"per_image": 1, "num_checks": 2, **settings})
    api = ApiConfig(endpoint=server.address, pause_s=0.001, in_flight=in_flight)
    return QuestionWriter(config, Access(engine, "gpt-4o", api, ApiBudget(str(folder), api.limits), str(folder)))


def chosen(answer: str) -> str:
    return json.dumps({"answer": answer})


def row(folder: Path) -> dict[str, Any]:
    PIL.Image.new("RGB", (8, 8), (99, 99, 99)).save(folder / "a.png")
    return {"image_id": "im1", "sha256": "abc", "uri": str(folder / "a.png"), "split": "train", "modality": "radiology"}


def test_a_question_is_written_tried_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first reply does not fit and is asked again with the fault named; the blind answers do not see the image."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    right = draft(reply()).answer
    wrong = "ABCD"[("ABCD".index(right) + 1) % 4]
    with serving() as server:
        server.script = [
            chat_said(reply(options=["x", "x", "y", "z"])), chat_said(reply(), model="gpt-4o-2024-08-06"),
            chat_said(json.dumps({"answer": right})), chat_said(json.dumps({"answer": right})),
            chat_said(json.dumps({"answer": wrong})), chat_said(json.dumps({"answer": wrong})),
        ]  # fmt: skip
        [made] = asyncio.run(writer(server, tmp_path, in_flight=1).of_image(row(tmp_path)))
        sent = [json.dumps(request) for request in server.requests]
        [again] = asyncio.run(writer(server, tmp_path).of_image(row(tmp_path)))
        assert len(server.requests) == 6  # what was answered is not asked again
    assert (made.error, made.refused, made.num_solved, made.num_solved_blind, made.num_checks) == (None, None, 2, 0, 2)
    assert made.options["ABCD".index(made.answer)] == "Pneumothorax"
    assert made.cost == pytest.approx(6 * (1000 * 2.5 + 100 * 10) / 1e6)
    assert made.answered_by == "gpt-4o, gpt-4o-2024-08-06"
    assert again == made
    assert "two options say the same" in sent[1]
    assert ["image_url" in text for text in sent] == [True, True, True, True, False, False]
    assert [request["temperature"] for request in server.requests] == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]


def test_a_model_that_thinks_keeps_its_room_and_its_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with serving() as server:
        server.script = [chat_said(reply()), chat_said(chosen("A"))]
        asyncio.run(writer(server, tmp_path, temperature=None, max_tokens=2000).of_image(row(tmp_path)))
    assert len(server.requests) == 5
    assert not any("temperature" in request for request in server.requests)
    assert {request["max_completion_tokens"] for request in server.requests} == {2000}


def test_an_answer_that_cannot_be_read_is_a_fault_and_no_doubt_about_the_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut-off answer is not asked for again with as little room; another form is, once."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    right = draft(reply()).answer
    with serving() as server:
        server.script = [chat_said(reply()), chat_said("", "length")]
        [cut] = asyncio.run(writer(server, tmp_path / "1").of_image(row(tmp_path)))
        assert len(server.requests) == 3
        server.script = [chat_said(reply()), chat_said("I see nothing.")]
        [unread] = asyncio.run(writer(server, tmp_path / "2").of_image(row(tmp_path)))
        server.script = [
            chat_said(reply()), chat_said("Hm."), chat_said(f"It is ({right})."), chat_said(f"**{right}**"),
            chat_said("Who knows?"), chat_said(chosen("A" if right != "A" else "B")),
        ]  # fmt: skip
        [read] = asyncio.run(writer(server, tmp_path / "3", in_flight=1).of_image(row(tmp_path)))
    assert cut.cost == pytest.approx(3 * 0.0035), "both answers, whichever is read first"
    assert cut.refused is unread.refused is read.refused is read.error is None
    assert cut.error == (
        "cut_off: the model's reply was cut off at max_tokens=4096, thoughts included; raise "
        "write_questions.max_tokens, or lower write_questions.engine.reasoning_effort"
    )
    assert unread.error == "check_reply: no option can be read in 'I see nothing.'"
    assert (read.num_solved, read.num_solved_blind) == (2, 0)
    assert "Your answer cannot be read: no option can be read in 'Hm.'. Answer with" in json.dumps(server.requests)


def test_what_is_not_good_enough_is_refused_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused question is told to the model for the image's next one; nothing of it is asked twice."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    right = draft(reply()).answer
    wrong = "ABCD"[("ABCD".index(right) + 1) % 4]
    other = reply(question="Which of these findings does the film of this patient show?")
    with serving() as server:
        server.script = [
            chat_said(reply()), *[chat_said(chosen(wrong))] * 4, chat_said(reply(options=["x", "x", "y", "z"])),
            chat_said(reply()), chat_said(other), *[chat_said(chosen(draft(other).answer))] * 4,
        ]  # fmt: skip
        made = asyncio.run(writer(server, tmp_path, in_flight=1, per_image=3).of_image(row(tmp_path)))
        sent = [json.dumps(request) for request in server.requests]
    assert [asked.error for asked in made] == [None] * 3
    assert [asked.refused for asked in made] == [
        "question_ambiguous: with the image the model answered otherwise 2 times of 2",
        f"question_repeated: the image has a question like {GOOD['question'][:60]!r} already",
        "question_leak: answered 2 times of 2 without the image",
    ]
    assert ["are written already" in text for text in sent] == [False] * 5 + [True] * 3 + [False] * 4
    assert figures(made) == {
        "written": 0, "refused_question_options": 0, "refused_question_leak": 1, "refused_question_ambiguous": 1,
        "refused_question_repeated": 1, "failed": 0,
    }  # fmt: skip


def test_a_model_in_this_process_writes_and_is_tried(tmp_path: Path) -> None:
    """The same requests, the image in the prompt where it is shown; nothing is paid."""
    right = draft(reply()).answer
    shown: list[tuple[int, str, int, Sampling]] = []

    class Seeing(FakeGenerator):
        async def generate(self, prompt: ChatPrompt, n: int, seed: int, sampling: Sampling) -> list[Completion]:
            shown.append((len(prompt.images), text_of(prompt).split(" (A)")[0].splitlines()[0], seed, sampling))
            return await super().generate(prompt, n, seed, sampling)

    def said(prompt: str, seed: int) -> str:
        if not prompt.startswith(GOOD["question"]):
            return reply()
        return chosen(right if seed else "ABCD"[("ABCD".index(right) + 1) % 4])

    config = WriteQuestionsConfig(per_image=1, engine=WriterVllm(model="a-model"), max_tokens=500)
    actor = QuestionWriter(config, None, Seeing(said))
    batch = pa.Table.from_pylist([row(tmp_path)])

    async def written() -> list[pa.Table]:
        return [made async for made in actor(batch)]

    [table] = asyncio.run(written())
    [[made]] = table["questions"].to_pylist()
    assert (made["error"], made["refused"], made["cost"]) == (None, None, 0.0)
    assert (made["num_solved"], made["num_solved_blind"], made["num_checks"]) == (1, 1, 2)
    assert made["options"]["ABCD".index(made["answer"])] == "Pneumothorax"
    assert made["author"].startswith("a-model@")
    assert table["figures"].to_pylist()[0]["written"] == 1
    asked = GOOD["question"]
    assert [(images, first, seed) for images, first, seed, _ in shown] == [
        (1, "The image:", 0), (1, asked, 0), (1, asked, 1), (0, asked, 0), (0, asked, 1),
    ]  # fmt: skip
    assert [(sampling.temperature, sampling.max_tokens) for *_, sampling in shown] == [(0.0, 500)] + [(1.0, 500)] * 4
    assert [list((sampling.schema or {})["properties"])[-1] for *_, sampling in shown] == ["explanation"] + [
        "answer"
    ] * 4
    assert isinstance(config.engine, WriterVllm)
    assert engine_arguments("a-model", config.engine)["limit_mm_per_prompt"] == {"image": 1}


def test_faults_are_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with serving() as server:
        server.script = [chat_said("I cannot.")]
        [twice] = asyncio.run(writer(server, tmp_path).of_image(row(tmp_path)))
        [gone] = asyncio.run(writer(server, tmp_path).of_image(row(tmp_path) | {"uri": str(tmp_path / "b.png")}))
    assert str(twice.error).startswith("question_reply: the reply is no JSON object: 'I cannot.'")
    assert twice.cost > 0
    assert str(gone.error).startswith("image_missing")


def test_a_refusal_is_paid_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with serving() as server:
        server.script = [chat_said("Hm."), chat_said(None, refusal="I cannot")]
        [made] = asyncio.run(writer(server, tmp_path).of_image(row(tmp_path)))
    assert (made.error, made.cost) == ("refused: gpt-4o refused: I cannot", 2 * 0.0035)


def test_one_more_try_asks_anew_only_where_kept_replies_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with serving() as server:
        server.script = [chat_said("Hm."), chat_said("Ah.")]
        [failed] = asyncio.run(writer(server, tmp_path, num_checks=0).of_image(row(tmp_path)))
        server.script = [chat_said(reply())]
        [made] = asyncio.run(writer(server, tmp_path, num_checks=0, tries=3).of_image(row(tmp_path)))
    assert failed.error == "question_reply: the reply is no JSON object: 'Ah.'"
    assert (made.error, made.written_id, len(server.requests)) == (None, failed.written_id, 3)
    assert [m["content"] for m in server.requests[2]["messages"] if m["role"] == "assistant"] == ["Hm.", "Ah."]


def test_what_is_usable_becomes_questions_once() -> None:
    made = draft(reply())
    good = [
        WrittenQuestion(
            written_id=f"w{i}", image_id="im1", author="m", split="test", modality="radiology", question=made.question,
            options=made.options, answer=made.answer, difficulty="hard",
        )
        for i in range(2)
    ]  # fmt: skip
    bad = WrittenQuestion(written_id="w8", image_id="im1", author="m", split="test", modality="r", error="refused: x")
    leaky = replace(good[0], written_id="w9", question="Another one?", refused="question_leak: x")
    images = pa.table({"image_id": ["im1"], "sha256": ["abc"]})
    [found] = usable(to_arrow(WrittenQuestion, [*good, bad, leaky]), images)
    assert (found.source, found.split, found.answer, found.image_ids) == ("written", "test", made.answer, ["im1"])


def review(name: str, keep: bool | None, annotator: str = "anna", **more: Any) -> QuestionReview:
    said = {"answer_right": None, "difficulty": None, "comment": "", **more}
    return QuestionReview(question_id=name, annotator=annotator, keep=keep, **said)


def test_readers_decide_what_is_curated() -> None:
    raw = to_arrow(Question, [question("q1", []), question("q2", []), question("q3", [])])
    written = to_arrow(Question, [question(f"w{i}", ["im1"]) for i in range(4)])
    said = [
        review("q1", keep=False), review("q2", keep=None), review("q3", keep=True, difficulty="hard"),
        review("w0", keep=True), review("w1", keep=True), review("w1", keep=False, annotator="ben"),
        review("w2", keep=True, annotator="anna", answer_right=False),
        review("w1", keep=True, annotator="adjudicator"),
    ]  # fmt: skip
    table = to_arrow(QuestionReview, said)

    def kept(config: CurateConfig, reviews: pa.Table | None = table) -> list[str]:
        rows = reviewed(raw, written, reviews, config).to_pylist()
        return [row["question_id"] for row in rows if row["error"] is None]

    assert kept(CurateConfig(), None) == ["q1", "q2", "q3"]
    assert kept(CurateConfig(written="checked"), None) == ["q1", "q2", "q3", "w0", "w1", "w2", "w3"]
    assert kept(CurateConfig(written="reviewed", reviews="x")) == ["q2", "q3", "w0", "w1"]
    assert kept(CurateConfig(written="checked", reviews="x")) == ["q2", "q3", "w0", "w1", "w3"]
    rows = reviewed(raw, written, table, CurateConfig()).to_pylist()
    assert [row["difficulty"] for row in rows] == ["easy", "easy", "hard"]
    assert rows[0]["error"] == "question_review: readers reject it"
    with pytest.raises(ValueError, match="written is 'reviewed' and reviews is empty"):
        CurateConfig(written="reviewed")


@pytest.mark.engine
def test_written_questions_are_curated_with_the_others(ray_session: None, tmp_path: Path) -> None:
    """Images without a question get one through Ray Data and a real server; curate takes those asked for."""
    with serving() as server:
        server.script = [chat_said(reply())]
        settings = [
            "per_image=1", "engine.kind=openai", "engine.model=gpt-4o", "num_checks=0", "max_images=3",
        ]  # fmt: skip
        words = [f"write_questions.{setting}" for setting in settings]
        # A key that is any text which Ray's workers have too.
        words += [f"apis.gpt-4o.endpoint={server.address}", "apis.gpt-4o.key_variable=PATH"]
        run = Run(load_recipe(["jobs/recipes/tiny.yaml", f"run={tmp_path}", "curate.written=checked", *words]))
        for name in ("ingest", "write_questions", "curate"):
            run_step(run, BY_NAME[name])
        assert len(server.requests) == 3
    written = run.table("written_questions").to_arrow().to_pylist()
    assert [row["error"] for row in written] == [None] * 3
    assert len({row["image_id"] for row in written}) == 3
    curated = run.table("questions").to_arrow()
    assert curated["source"].to_pylist().count("written") == 3
    assert curated["source"].to_pylist().count("phantom") == 12


@pytest.mark.engine
def test_refusals_are_counted_and_do_not_end_the_job(
    ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of the questions are repeats; a failed row in a hundred is allowed, and none has failed."""
    caplog.set_level("INFO", "medmm_ray")
    with serving() as server:
        server.script = [chat_said(reply())]
        settings = [
            "per_image=2", "engine.kind=openai", "engine.model=gpt-4o", "num_checks=0", "max_images=3",
        ]  # fmt: skip
        words = [f"write_questions.{setting}" for setting in settings]
        # A key that is any text which Ray's workers have too.
        words += [f"apis.gpt-4o.endpoint={server.address}", "apis.gpt-4o.key_variable=PATH"]
        run = Run(load_recipe(["jobs/recipes/tiny.yaml", f"run={tmp_path}", "max_error_rate=0.01", *words]))
        for name in ("ingest", "write_questions"):
            run_step(run, BY_NAME[name])
    table = run.table("written_questions")
    refused = [row["refused"] for row in table.to_arrow().to_pylist()]
    assert sum(reason is None for reason in refused) == 3
    assert sum(str(reason).startswith("question_repeated: ") for reason in refused) == 3
    assert (table.manifest().errors, table.manifest().figures["refused_question_repeated"]) == ({}, 3)
    assert run.table("new_questions").manifest().rows == 3
    assert "write_questions: 3 written, 3 refused (question_repeated 3), 0 failed" in caplog.messages
