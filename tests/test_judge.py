"""judge.py and engines/gemini.py: replies, the three backends (Gemini's real client against a local server)."""

import asyncio
import base64
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pytest

from medmm_ray.engines.gemini import PRICES, Gemini, GeminiError, Price, Reply, pause
from medmm_ray.judge import (
    SYSTEM,
    GeminiJudge,
    JudgeActor,
    JudgeCase,
    JudgeConfig,
    Judgement,
    PhantomJudge,
    Picture,
    VllmJudge,
    estimate,
    make_judge,
    price_of,
    verdicts,
)
from medmm_ray.records import Labels, StepLabel, from_dict
from medmm_ray.sources.phantom import Case
from medmm_ray.tables import RowError
from tests.fake_generator import FakeGenerator

EFFUSION = Case(
    seed=1, kind="effusion", side="right", zone="lower", extent=0.8, contrast=1.0, difficulty="easy"
).annotation()
RIGHT, WRONG, NEUTRAL = "The right costophrenic angle is blunted.", "The heart is wide.", "Compare both lungs."


def case(**changes: Any) -> JudgeCase:
    values = {
        "question_id": "q1",
        "question": "What is seen?",
        "options": ["effusion", "normal chest"],
        "answer": "A",
        "images": [Picture("x.png", EFFUSION)],
        "documents": ["Fluid blunts the angle."],
        "references": [Picture("r.png", "left pleural effusion")],
    }
    return JudgeCase(**{**values, **changes})


# Replies


@pytest.mark.parametrize(
    ("reply", "labels", "confidences"),
    [
        ("1 0 1", [1, 0, 1], [None] * 3),
        ("+ - +", [1, 0, 1], [None] * 3),
        ("1 high\n0 low\n1 medium\n", [1, 0, 1], ["high", "low", "medium"]),
        ("Step 1: 1 High, Step 2: 0 low, Step 3: 1", [1, 0, 1], ["high", "low", None]),
        ("[1, 0, 1]", [1, 0, 1], [None] * 3),
        ('["+", "-", "+"]', [1, 0, 1], [None] * 3),
        (
            'Sure:\n```json\n[{"step": 1, "label": "+", "confidence": "high"}, {"label": "-", "confidence": "Low"},'
            ' {"label": 1, "confidence": "medium"}]\n```',
            [1, 0, 1],
            ["high", "low", "medium"],
        ),
    ],
)
def test_replies_that_fit(reply: str, labels: list[int], confidences: list[str | None]) -> None:
    found = verdicts(reply, 3)
    assert [step.label for step in found] == labels
    assert [step.confidence for step in found] == confidences


def test_reasons_are_kept() -> None:
    reply = '[{"step": 1, "label": "-", "confidence": "high", "reasoning": "The angle is sharp."}]'
    assert verdicts(reply, 1) == [StepLabel(label=0, confidence="high", reason="The angle is sharp.")]


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        ("1 0", "judge_reply: judge gave 2 verdicts for 3 steps: '1 0'"),
        ("1 0 1 1", "judge_reply: judge gave 4 verdicts for 3 steps: '1 0 1 1'"),
        ("", "judge_reply: judge gave no verdicts for 3 steps: ''"),
        ("Step 1 is right, 10 of 10", "judge_reply: judge gave no verdicts for 3 steps: 'Step 1 is right, 10 of 10'"),
        ("[1, 2, 3]", "judge_reply: judge gave no verdicts for 3 steps: '[1, 2, 3]'"),
        ("[1, 0", "judge_reply: judge gave no verdicts for 3 steps: '[1, 0'"),
        ("[broken]", "judge_reply: judge gave no verdicts for 3 steps: '[broken]'"),
        ('[{"label": "?", "confidence": "low"}]', "judge_reply: judge's verdict 1 has the label '?', not '+' or '-'"),
        ('[{"label": "+", "confidence": "sure"}]', "judge_reply: judge's verdict 1 has the confidence 'sure'"),
        (
            '[{"step": 2, "label": "+", "confidence": "low"}]',
            'judge_reply: judge\'s verdict 1 is about step 2: \'[{"step": 2, "label": "+", "confidence": "low"}]\'',
        ),
    ],
)
def test_replies_that_do_not_fit(reply: str, fault: str) -> None:
    with pytest.raises(RowError) as error:
        verdicts(reply, 3)
    assert str(error.value) == fault


# The phantom judge


def judged(backend: Any, shared: JudgeCase, solutions: list[list[str]]) -> list[Judgement | RowError]:
    return asyncio.run(backend.judge(shared, solutions))


def test_a_phantom_judge_without_errors_tells_the_truth() -> None:
    steps = [NEUTRAL, RIGHT, WRONG, "So the answer is (A).", "So the answer is (B)."]
    [found] = judged(PhantomJudge(error_rate=0.0), case(), [steps])
    assert isinstance(found, Judgement)
    assert [step.label for step in found.steps] == [None, 1, 0, 1, 0]
    assert found.steps[0] == StepLabel(confidence="high", reason="nothing to check")


def test_a_phantom_judge_errs_as_often_as_told_and_knows_when_it_is_unsure() -> None:
    backend = PhantomJudge(error_rate=0.1)
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
    assert judged(PhantomJudge(error_rate=0.1, seed=1), case(), solutions[:50]) != found[:50]


def test_a_phantom_judge_refuses_other_images() -> None:
    for images in ([], [Picture("x.png", "")]):
        [fault] = judged(PhantomJudge(0.0), case(images=images), [[RIGHT]])
        assert str(fault).startswith("judge_source: question q1 has no phantom's annotation")


# A local model


def test_a_local_judge_reads_all_steps_in_one_call() -> None:
    fake = FakeGenerator(lambda prompt, seed: "1 high\n0 low")
    backend = make_judge(JudgeConfig(backend="vllm"), "some/model", fake)
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
    backend = VllmJudge(JudgeConfig(), "m", FakeGenerator(lambda prompt, seed: "1 0" if "again" in prompt else "1"))
    [found] = judged(backend, case(), [[RIGHT, WRONG]])
    assert isinstance(found, Judgement)
    assert [step.label for step in found.steps] == [1, 0]

    stubborn = FakeGenerator(lambda prompt, seed: "1 0")
    [fault] = judged(VllmJudge(JudgeConfig(), "m", stubborn), case(), [[RIGHT, WRONG, NEUTRAL]])
    assert str(fault) == "judge_reply: judge gave 2 verdicts for 3 steps: '1 0'"
    assert len(stubborn.requests) == 2
    assert "does not fit: judge gave 2 verdicts for 3 steps: '1 0'. Answer again." in stubborn.requests[1][0]


def test_documents_that_do_not_fit_are_left_out() -> None:
    fake = FakeGenerator(lambda prompt, seed: "1 high")
    backend = VllmJudge(JudgeConfig(max_model_len=600), "m", fake)  # the fake counts characters
    judged(backend, case(documents=["First." * 5, "x" * 500, "Last."]), [[RIGHT]])
    prompt = fake.requests[0][0]
    assert ("First." in prompt, "xxx" in prompt) == (True, False)
    assert len(prompt) <= 600 - 16


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


def test_equal_texts_are_judged_once() -> None:
    fake = FakeGenerator(lambda prompt, seed: "1 high" if RIGHT in prompt else "0 low")
    solutions = [solution("s1", RIGHT), solution("s2", WRONG), solution("s3", RIGHT)]
    labels = act(JudgeConfig(backend="vllm"), solutions, fake)
    assert [(label.solution_id, label.steps[0].label) for label in labels] == [("s1", 1), ("s2", 0), ("s3", 1)]
    assert {(label.source, label.error) for label in labels} == {("judge", None)}
    assert len(fake.requests) == 2


def test_what_the_judge_sees_is_bounded() -> None:
    fake = FakeGenerator(lambda prompt, seed: "1 high")
    documents = [{"text": f"Text {i}."} for i in range(3)]
    images = [{"uri": "r", "diagnosis": f"finding {i}"} for i in range(3)]
    config = JudgeConfig(backend="vllm", num_documents=1, num_references=2)
    act(config, [solution("s1", RIGHT)], fake, documents=documents, images=images)
    prompt = fake.requests[0][0]
    assert ("Text 0." in prompt, "Text 1." in prompt) == (True, False)
    assert ("finding 1" in prompt, "finding 2" in prompt) == (True, False)


def test_a_failed_call_is_an_error_and_no_label() -> None:
    fake = FakeGenerator(lambda prompt, seed: "1 high" if RIGHT in prompt else "hm")
    labels = act(JudgeConfig(backend="vllm"), [solution("s1", WRONG), solution("s2", RIGHT)], fake)
    assert [(label.steps, label.error) for label in labels] == [
        ([], "judge_reply: judge gave no verdicts for 1 steps: 'hm'"),
        ([StepLabel(label=1, confidence="high")], None),
    ]


def test_questions_without_solutions_and_other_splits_are_not_judged() -> None:
    assert act(JudgeConfig(), []) == []
    assert act(JudgeConfig(splits=("test",)), [solution("s1", RIGHT)]) == []
    assert len(act(JudgeConfig(error_rate=0), [solution("s1", RIGHT, WRONG)])[0].steps) == 2


# Gemini


class Server(ThreadingHTTPServer):
    """Answers each request by the next entry of `script`: (status, headers, body)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[tuple[int, dict[str, str], Any]] = []
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.delay_s = 0.0
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(asked)
            self.server.times.append(time.monotonic())
            status, headers, body = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
        time.sleep(self.server.delay_s)
        if status == 0:  # a cut connection
            self.connection.close()
            return
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # the client gave up waiting
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def said(text: str, **usage: int) -> tuple[int, dict[str, str], Any]:
    counts = {"promptTokenCount": 1000, "candidatesTokenCount": 100, "totalTokenCount": 1100, **usage}
    candidate = {"content": {"role": "model", "parts": [{"text": text}]}, "finishReason": "STOP"}
    return 200, {}, {"candidates": [candidate], "usageMetadata": counts}


def failed(status: int, message: str = "no", **headers: str) -> tuple[int, dict[str, str], Any]:
    return status, headers, {"error": {"code": status, "message": message}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    running = Server()
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Any]:
    for name, colour in (("x.png", 10), ("r.png", 200)):
        PIL.Image.new("L", (8, 8), colour).save(tmp_path / name)
    return {
        "images": [Picture(str(tmp_path / "x.png"), "")],
        "references": [Picture(str(tmp_path / "r.png"), "left pleural effusion")],
    }


def config(server: Server, **changes: Any) -> JudgeConfig:
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    return JudgeConfig(backend="gemini", endpoint=endpoint, pause_s=0.001, **changes)


def entry(step: int, label: str, confidence: str = "high") -> dict[str, Any]:
    return {"step": step, "label": label, "confidence": confidence, "reasoning": "Because."}


GOOD = json.dumps([entry(1, "+"), entry(2, "-", "low")])


def test_gemini_is_asked_with_images_and_its_verdicts_are_priced(server: Server, pictures: dict[str, Any]) -> None:
    server.script = [said(GOOD, cachedContentTokenCount=400)]
    backend = GeminiJudge(config(server), "gemini-2.0-flash")
    [found] = judged(backend, case(**pictures), [[RIGHT, WRONG]])
    assert isinstance(found, Judgement)
    assert [(step.label, step.confidence) for step in found.steps] == [(1, "high"), (0, "low")]
    assert found.cost == pytest.approx((600 * 0.10 + 400 * 0.025 + 100 * 0.40) / 1e6)
    [asked] = server.requests
    assert asked["systemInstruction"]["parts"][0]["text"] == SYSTEM
    assert asked["generationConfig"]["responseMimeType"] == "application/json"
    assert asked["generationConfig"]["temperature"] == 0.0
    parts = asked["contents"][0]["parts"]
    assert [next(iter(part)) for part in parts] == ["text", "text", "inlineData", "text", "inlineData", "text"]
    assert parts[0]["text"].startswith("Document 1: Fluid blunts the angle.")
    assert parts[-1]["text"].startswith(f"Reasoning to review, 2 steps:\nStep 1: {RIGHT}")
    assert base64.b64decode(parts[2]["inlineData"]["data"]) != base64.b64decode(parts[4]["inlineData"]["data"])
    assert "(A) effusion" in parts[0]["text"]
    assert backend.annotator.startswith("gemini-2.0-flash@")


def test_gemini_is_told_what_does_not_fit_and_both_answers_are_paid(server: Server, pictures: dict[str, Any]) -> None:
    server.script = [said(json.dumps([entry(1, "+")])), said(GOOD)]
    backend = GeminiJudge(config(server), "gemini-2.0-flash")
    [found] = judged(backend, case(**pictures), [[RIGHT, WRONG]])
    assert isinstance(found, Judgement)
    assert found.cost == pytest.approx(2 * (1000 * 0.10 + 100 * 0.40) / 1e6)
    roles = [content["role"] for content in server.requests[1]["contents"]]
    assert roles == ["user", "model", "user"]
    assert "judge gave 1 verdicts for 2 steps" in server.requests[1]["contents"][2]["parts"][0]["text"]


def test_faults_of_the_moment_are_tried_again(server: Server, pictures: dict[str, Any]) -> None:
    server.script = [failed(429), failed(500), (0, {}, ""), (200, {}, "{broken"), said(GOOD)]
    [found] = judged(GeminiJudge(config(server), "gemini-2.0-flash"), case(**pictures), [[RIGHT, WRONG]])
    assert isinstance(found, Judgement)
    assert len(server.requests) == 5


def test_retry_after_is_honoured(server: Server) -> None:
    server.script = [failed(429, **{"Retry-After": "1"}), said("1")]
    client = Gemini("gemini-2.0-flash", "s", endpoint=config(server).endpoint, pause_s=0.0)
    reply = asyncio.run(client.ask([("user", ["hello"])]))
    assert (reply.text, reply.attempts) == ("1", 2)
    assert server.times[1] - server.times[0] >= 1.0


def test_too_many_faults_are_the_rows_error(server: Server, pictures: dict[str, Any]) -> None:
    server.script = [failed(503, "overloaded")]
    [fault] = judged(GeminiJudge(config(server, max_attempts=3), "gemini-2.0-flash"), case(**pictures), [[RIGHT]])
    assert str(fault) == "judge_unavailable: gemini-2.0-flash failed 3 times, last: 503: overloaded"
    assert len(server.requests) == 3


def test_a_hanging_server_is_a_fault_of_the_moment(server: Server, pictures: dict[str, Any]) -> None:
    server.script, server.delay_s = [said(GOOD)], 1.0
    slow = config(server, max_attempts=2, timeout_s=0.2)
    [fault] = judged(GeminiJudge(slow, "gemini-2.0-flash"), case(**pictures), [[RIGHT]])
    assert str(fault).startswith("judge_unavailable: gemini-2.0-flash failed 2 times, last: ReadTimeout")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (failed(400, "image too odd"), "judge_request: gemini-2.0-flash answered 400: image too odd"),
        (
            (200, {}, {"promptFeedback": {"blockReason": "SAFETY"}}),
            "judge_refused: gemini-2.0-flash blocked the prompt (SAFETY)",
        ),
        (
            (200, {}, {"candidates": [{"finishReason": "SAFETY"}]}),
            "judge_refused: gemini-2.0-flash did not answer (SAFETY)",
        ),
    ],
)
def test_a_refused_request_is_not_sent_again(
    server: Server, pictures: dict[str, Any], answer: Any, message: str
) -> None:
    server.script = [answer]
    [fault] = judged(GeminiJudge(config(server), "gemini-2.0-flash"), case(**pictures), [[RIGHT]])
    assert str(fault) == message
    assert len(server.requests) == 1


@pytest.mark.parametrize(("status", "message"), [(403, "denied"), (404, "no model"), (400, "API key not valid.")])
def test_a_refused_key_or_model_ends_the_job(
    server: Server, pictures: dict[str, Any], status: int, message: str
) -> None:
    server.script = [failed(status, message)]
    with pytest.raises(GeminiError, match=rf"answered {status}: {message}.*check GEMINI_API_KEY and judge.model"):
        judged(GeminiJudge(config(server), "gemini-2.0-flash"), case(**pictures), [[RIGHT]])
    assert len(server.requests) == 1


def test_requests_run_side_by_side_up_to_the_limit(server: Server, pictures: dict[str, Any]) -> None:
    server.script, server.delay_s = [said(GOOD)], 0.3
    started = time.monotonic()
    judged(GeminiJudge(config(server, in_flight=8), "gemini-2.0-flash"), case(**pictures), [[RIGHT, WRONG]] * 16)
    seconds = time.monotonic() - started
    assert 0.6 <= seconds < 2.0
    assert len(server.requests) == 16


def test_an_unreadable_image_fails_its_question(server: Server, tmp_path: Path) -> None:
    server.script = [said(GOOD)]
    gone = [Picture(str(tmp_path / "gone.png"), "")]
    found = judged(GeminiJudge(config(server), "gemini-2.0-flash"), case(images=gone), [[RIGHT], [WRONG]])
    assert [str(fault).partition(":")[0] for fault in found] == ["image_missing", "image_missing"]
    assert server.requests == []


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEMINI_API_KEY", raising=False)
    with pytest.raises(GeminiError, match="GEMINI_API_KEY; it is not set"):
        make_judge(JudgeConfig(backend="gemini"), "gemini-2.0-flash")


def test_a_missing_model_is_named() -> None:
    with pytest.raises(ValueError, match=r"judge.backend=gemini needs judge.model"):
        make_judge(JudgeConfig(backend="gemini"), None)


# Money


def test_prices() -> None:
    assert price_of("gemini-2.0-flash") == PRICES["gemini-2.0-flash"]
    assert price_of("gemini-2.0-flash", written=1.0) == Price(0.10, 0.025, 1.0)
    assert price_of("new-model", 1.0, 2.0) == Price(1.0, 1.0, 2.0)
    with pytest.raises(ValueError, match="no price is known for 'new-model'"):
        price_of("new-model", read=1.0)


def test_thoughts_are_paid_as_output() -> None:
    assert Reply("", read=1000, cached=0, written=500, attempts=1).cost(Price(1.0, 0.5, 2.0)) == 0.002


def test_the_estimate() -> None:
    found = estimate(1000, steps=8, prefix_tokens=3000, solution_tokens=350, images=4, price=Price(0.1, 0.025, 0.4))
    assert (found.calls, found.read, found.written) == (1000, 4_382_000, 480_000)
    assert found.dollars == pytest.approx(0.4382 + 0.192)


def test_pauses_grow_and_are_spread() -> None:
    grown: Callable[[int], float] = lambda attempt: pause(attempt, 1.0, 0.5, None)  # noqa: E731
    assert [grown(n) for n in (1, 2, 3, 10)] == [1.0, 2.0, 4.0, 60.0]
    assert pause(1, 1.0, 0.0, None) == 0.5
    assert pause(1, 1.0, 0.0, 7.0) == 7.0
