"""sample.py: the filter, the rounds, ids and seeds; with a scripted engine."""

import asyncio
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from PIL import Image
from pydantic import ValidationError

from jobs.sample import summary
from medmm_ray.config import digest
from medmm_ray.data.records import Count, Question, Solutions, from_dict, to_arrow
from medmm_ray.data.tables import RowError
from medmm_ray.engines.chat import ChatPrompt
from medmm_ray.engines.generator import Completion, Sampling, request_seed
from medmm_ray.engines.grader import Grader, Grades
from medmm_ray.engines.llm.access import Apis
from medmm_ray.engines.llm.client import ApiConfig
from medmm_ray.engines.vllm_engine import VllmEngine, end_process
from medmm_ray.steps.sample import PolicyApi, SampleConfig, SamplingActor, figures_of, round_size, sample
from tests.doubles.api_server import chat_said, serving
from tests.doubles.fake_generator import FakeGenerator, Script, text_of

GOOD = "Step 1: Look.\nStep 2: See {}.\nStep 3: So the answer is (B)."
CONFIG = SampleConfig(num_samples_train=4, num_samples_test=6, max_rounds=3, oversample=2.0)


def question(question_id: str = "q1", **changes: Any) -> Question:
    values = {
        "question_id": question_id,
        "source": "phantom",
        "split": "train",
        "modality": "radiology",
        "difficulty": "easy",
        "question": f"What is {question_id}?",
        "options": ["air", "fluid"],
        "answer": "B",
        "answer_type": "choice",
        "image_ids": ["im1"],
    }
    return Question(**{**values, **changes})


def run(
    script: Script, questions: list[Question], config: SampleConfig = CONFIG, images: pa.Table | None = None
) -> tuple[list[Solutions], Any]:
    fake = FakeGenerator(script)
    actor = SamplingActor(config, "m", "tiny", "c0", images, generator=fake)

    async def work() -> list[pa.Table]:
        return [out async for out in actor(to_arrow(Question, questions))]

    [table] = asyncio.run(work())
    assert table.select(to_arrow(Solutions, []).column_names).schema == to_arrow(Solutions, []).schema
    fake.figures = table["figures"].to_pylist()
    return [from_dict(Solutions, row) for row in table.to_pylist()], fake


def test_how_many_samples_a_round_has() -> None:
    assert round_size(16, 0, 3.0, 4096) == 16
    assert round_size(5, 1, 1.5, 4096) == 8
    assert round_size(5, 1, 3.0, 7) == 7
    assert round_size(0, 1, 3.0, 100) == 0


def test_a_question_gets_what_its_split_asks() -> None:
    rows, fake = run(lambda prompt, seed: GOOD.format(seed), [question(), question("q2", split="test")])
    assert [(row.question_id, row.num_requested, len(row.solutions)) for row in rows] == [("q1", 4, 4), ("q2", 6, 6)]
    base = request_seed("q1", "c0", 0)
    assert fake.requests[0] == ("Question: What is q1? (A) air (B) fluid", 4, base)
    first = rows[0].solutions[1]
    assert first.steps == ["Look.", f"See {base + 1}.", "So the answer is (B)."]
    assert (first.seed, first.index, first.answer, first.correct) == (base + 1, 1, "B", True)
    assert first.solution_id == "s" + digest("q1", "tiny", "c0", 1)
    assert first.text_sha == digest(first.text)
    assert (rows[0].policy, rows[0].config_hash, rows[0].num_drawn, rows[0].rejected) == ("tiny", "c0", 4, [])


def test_refused_samples_are_drawn_again_with_further_seeds() -> None:
    """The first 4 samples have one good one; the second round has 3 x 2 more, of which 3 are good."""
    base = request_seed("q1", "c0", 0)
    good = {base + 1, base + 4, base + 6, base + 9, base + 10}
    script = lambda prompt, seed: GOOD.format(seed) if seed in good else "Step 1: Cut~"  # noqa: E731
    [row], fake = run(script, [question()])
    assert [(n, seed - base) for _, n, seed in fake.requests] == [(4, 0), (6, 4)]
    assert [s.index for s in row.solutions] == [1, 4, 6, 9]
    assert (row.num_drawn, row.num_missing, row.error) == (10, 0, None)
    assert row.rejected == [Count(kind="cut_off", count=6)]


def test_surplus_is_not_rejected() -> None:
    base = request_seed("q1", "c0", 0)
    [row], _ = run(lambda prompt, seed: GOOD.format(seed) if seed > base else "no", [question()])
    assert [s.index for s in row.solutions] == [1, 2, 3, 4]
    assert (row.num_drawn, row.rejected) == (6, [Count(kind="num_steps", count=1)])


def test_a_question_that_cannot_be_filled_keeps_what_it_has() -> None:
    base = request_seed("q1", "c0", 0)
    [row], fake = run(lambda prompt, seed: GOOD.format(seed) if seed == base else "no", [question()])
    assert [n for _, n, _ in fake.requests] == [4, 6, 6]
    assert (row.num_requested, len(row.solutions), row.num_missing, row.num_drawn) == (4, 1, 3, 16)
    assert (row.rejected, row.error) == ([Count(kind="num_steps", count=15)], None)


def test_why_samples_were_refused_is_counted() -> None:
    base = request_seed("q1", "c0", 0)
    texts = ["", "cut~", GOOD.format("it").replace("Step 3", "Step 2"), GOOD.format("air " * 20), "Step 1: a", GOOD]
    [row], _ = run(lambda prompt, seed: texts[min(seed - base, 5)], [question()])
    kinds = ["cut_off", "empty", "num_steps", "repetition", "step_numbers"]
    assert row.rejected == [Count(kind=kind, count=1) for kind in kinds]
    assert (row.num_drawn, len(row.solutions)) == (12, 4)


def test_tokens_are_counted_and_what_the_cache_could_give() -> None:
    """The fake cache has blocks of 8; the second request of the question computes the prompt again."""
    base = request_seed("q1", "c0", 0)
    _, fake = run(lambda prompt, seed: GOOD.format(seed) if seed > base else "no", [question()])
    length = len("Question: What is q1? (A) air (B) fluid")
    [figures] = fake.figures
    assert (figures["samples_drawn"], figures["rejected_num_steps"], figures["rejected_cut_off"]) == (6, 1, 0)
    assert figures["prompt_tokens"] == 6 * length
    assert figures["cacheable_tokens"] == 5 * (length // 8 * 8)
    assert figures["cached_tokens"] == 4 * (length // 8 * 8)
    assert figures["output_tokens"] == 2 + 5 * len(GOOD.format(base + 1))


def test_a_question_can_be_filled_up_with_what_was_refused() -> None:
    base = request_seed("q1", "c0", 0)
    texts = {0: "", 1: GOOD.format("it"), 2: "no"}
    script = lambda prompt, seed: texts.get(seed - base, "cut~")  # noqa: E731
    [row], _ = run(script, [question()], SampleConfig(num_samples_train=4, max_rounds=2, fill_up=True))
    assert [(s.index, s.finish_reason, s.answer) for s in row.solutions] == [
        (1, "stop", "B"),
        (2, "stop", None),
        (3, "length", None),
        (4, "length", None),
    ]
    assert row.rejected == [Count(kind=kind, count=n) for kind, n in (("cut_off", 10), ("empty", 1), ("num_steps", 1))]
    assert (row.num_missing, row.solutions[1].correct) == (0, None)


def test_the_batch_does_not_matter() -> None:
    script = lambda prompt, seed: GOOD.format(f"{prompt[-5:]}{seed}") if seed % 3 else "no"  # noqa: E731
    questions = [question(f"q{i}") for i in range(3)]
    together, _ = run(script, questions)
    alone = [run(script, [q])[0][0] for q in reversed(questions)]
    assert together == alone[::-1]


def test_a_fault_upstream_is_passed_on() -> None:
    [row], fake = run(lambda prompt, seed: "", [question(error="image_corrupt: im1")])
    assert row.error == "upstream: image_corrupt: im1"
    assert (row.solutions, fake.requests) == ([], [])


def test_a_fault_of_the_engine_is_the_rows() -> None:
    def script(prompt: str, seed: int) -> str:
        raise RowError("prompt_too_long", "9 tokens")

    [row], _ = run(script, [question()])
    assert row.error == "prompt_too_long: 9 tokens"
    assert row.solutions == []


def test_the_policy_sees_the_first_images_of_a_question(tmp_path: Path) -> None:
    for name, colour in (("im1", "red"), ("im2", "blue")):
        Image.new("RGB", (4, 3), colour).save(tmp_path / f"{name}.png")
    seen: list[ChatPrompt] = []

    class Looking(FakeGenerator):
        async def generate(self, prompt: ChatPrompt, n: int, seed: int, sampling: Sampling) -> list[Completion]:
            seen.append(prompt)
            return await super().generate(prompt, n, seed, sampling)

    images = pa.table({"image_id": ["im2", "im1"], "uri": [str(tmp_path / f"{i}.png") for i in ("im2", "im1")]})
    asked = question(image_ids=["im1", "im2", "im3"])
    for number, colours in ((0, []), (2, [(255, 0, 0), (0, 0, 255)])):
        config = CONFIG.model_copy(update={"engine": VllmEngine(num_images=number)})
        actor = SamplingActor(config, "m", "tiny", "c0", images, generator=Looking(lambda prompt, seed: GOOD))
        asyncio.run(actor.solve(to_arrow(Question, [asked]).to_pylist()[0]))
        assert [image.getpixel((1, 1)) for image in seen[-1].images] == colours
        assert seen[-1].messages[-1]["content"] == "Question: What is q1? (A) air (B) fluid"


def test_an_image_that_cannot_be_read_is_the_rows_error(tmp_path: Path) -> None:
    (tmp_path / "im1.png").write_bytes(b"no picture")
    images = pa.table({"image_id": ["im1"], "uri": [str(tmp_path / "im1.png")]})
    config = CONFIG.model_copy(update={"engine": VllmEngine(num_images=1)})
    [row], fake = run(lambda prompt, seed: GOOD, [question()], config, images)
    assert row.error is not None
    assert row.error.startswith(f"image_corrupt: {tmp_path}/im1.png is not a readable image")
    assert (row.solutions, row.num_missing, fake.requests) == ([], 4, [])


@pytest.mark.parametrize("answer_type", ["open", "choice"])
def test_a_question_without_options_and_one_with_too_many(answer_type: str) -> None:
    options = [] if answer_type == "open" else [f"finding {i}" for i in range(8)]
    answer = "fluid" if answer_type == "open" else "G"
    text = f"Step 1: Look.\nStep 2: See.\nStep 3: So the answer is {answer}."
    [row], fake = run(lambda prompt, seed: text, [question(options=options, answer=answer, answer_type=answer_type)])
    assert [(s.answer, s.correct) for s in row.solutions] == [(answer, True)] * 4
    assert fake.requests[0][0].endswith("What is q1?" if answer_type == "open" else "(G) finding 6 (H) finding 7")


def test_a_solution_of_a_hundred_thousand_words_is_one_row_like_another() -> None:
    long = "Step 1: " + " ".join(f"w{i}" for i in range(100_000)) + "\nStep 2: b\nStep 3: the answer is (B)."
    [row], _ = run(lambda prompt, seed: long, [question()], SampleConfig(num_samples_train=1))
    assert (len(row.solutions[0].text), row.solutions[0].answer, row.num_drawn) == (len(long), "B", 1)


def test_the_figures_of_rows_become_the_tables() -> None:
    base = request_seed("q1", "c0", 0)
    _, fake = run(
        lambda prompt, seed: GOOD.format(seed) if seed == base or "q2" in prompt else "no",
        [question(), question("q2"), question("q3", error="image_corrupt: x")],
    )
    total: Counter[str] = Counter()
    for figures in fake.figures:
        total.update(figures)
    names = ("requested", "missing", "drawn")
    assert [total[f"samples_{name}"] for name in names] == [12, 7, 20]
    assert (total["unfilled_questions"], total["rejected_num_steps"]) == (1, 15)  # q3 is at fault otherwise
    assert summary(total) == (
        "20 samples for 12 solutions, 15 refused (num_steps 15), 7 missing, 1 questions not filled, 88.9% of cacheable "
        "tokens cached"  # q1 was asked three times: 16 of 18 samples found the prompt
    )


@pytest.mark.engine
@pytest.mark.usefixtures("ray_session")
def test_a_policy_behind_an_api_is_asked_and_paid_once(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"engine": PolicyApi(kind="openai"), "max_rounds": 1})
    questions = to_arrow(Question, [question("q1"), question("q2")])
    with serving() as server:
        server.script = [chat_said(GOOD.format("it")), chat_said(None, refusal="I cannot."), chat_said(GOOD)]
        api = ApiConfig(endpoint=f"{server.address}/v1", key_variable="PATH", input_price=1.0, output_price=10.0)
        apis = Apis(str(tmp_path), {"gpt-x": api})

        def rows(config_hash: str = "c0") -> list[dict[str, Any]]:
            ds = ray.data.from_arrow(questions)
            made = sample(ds, config, model="gpt-x", policy="gpt-x", config_hash=config_hash, apis=apis).take_all()
            return sorted(made, key=lambda row: str(row["question_id"]))

        first = rows()
        assert len(server.requests) == 8
        refused_too = 8 * (1000 * 1.0 + 100 * 10.0) / 1e6
        assert sum(row["cost"] for row in first) == pytest.approx(refused_too)
        assert {row["answered_by"] for row in first} == {"gpt-x"}
        assert [count for row in first for count in row["rejected"]] == [{"kind": "refused", "count": 1}]
        assert sum(len(row["solutions"]) for row in first) == 7
        assert rows() == first
        filtered = rows("c1")  # as where a filter was changed
        assert [s["text"] for row in filtered for s in row["solutions"]] == [
            s["text"] for row in first for s in row["solutions"]
        ]
        assert len(server.requests) == 8


class Failing(FakeGenerator):
    """Like an API: samples whose number is in `lost` could not be had."""

    def __init__(self, lost: set[int]) -> None:
        super().__init__(lambda prompt, seed: GOOD.format(seed))
        self.lost = lost

    async def generate(self, prompt: ChatPrompt, n: int, seed: int, sampling: Sampling) -> list[Completion]:
        base = request_seed("q1", "m", 0)
        made = await super().generate(prompt, n, seed, sampling)
        return [
            Completion("", "unavailable", c.seed, fault=RowError("unavailable", f"sample {c.seed - base}"))
            if c.seed - base in self.lost
            else replace(c, cost=0.5)
            for c in made
        ]


API = SampleConfig(engine=PolicyApi(kind="openai"), num_samples_train=4, max_rounds=2, oversample=1.0)


def solve(fake: FakeGenerator, config: SampleConfig, config_hash: str = "c0") -> Solutions:
    actor = SamplingActor(config, "m", "tiny", config_hash, generator=fake)
    row, drawn = asyncio.run(actor.solve(to_arrow(Question, [question()]).to_pylist()[0]))
    fake.figures = [figures_of(row, drawn)]
    return row


def test_samples_that_an_api_did_not_give_are_drawn_again_and_the_others_kept() -> None:
    fake = Failing({0, 2})
    row = solve(fake, API)
    assert [s.index for s in row.solutions] == [1, 3, 4, 5]
    assert (row.num_drawn, row.num_missing, row.cost, row.error) == (6, 0, 2.0, None)
    assert row.rejected == [Count(kind="unavailable", count=2)]
    assert fake.figures[0]["rejected_unavailable"] == 2
    row = solve(Failing({0, 1, 2, 4, 5, 6}), API)  # a round that brings nothing more
    assert ([s.index for s in row.solutions], row.num_missing, row.cost, row.error) == ([3], 3, 0.5, None)


def test_a_question_whose_first_round_brought_no_sample_has_their_fault() -> None:
    fake = Failing({0, 1, 2, 3})
    row = solve(fake, API)
    assert (row.error, row.num_drawn, row.num_missing) == ("unavailable: sample 0", 0, 4)
    assert len(fake.requests) == 1


def test_what_an_api_is_asked_depends_on_nothing_that_is_done_with_its_answers() -> None:
    def asked(config_hash: str, **changes: Any) -> list[tuple[str, int, int]]:
        fake = Failing(set())
        solve(fake, API.model_copy(update={"max_rounds": 1, **changes}), config_hash)
        return fake.requests

    [first] = asked("c0")
    assert first[1:] == (4, request_seed("q1", "m", 0))
    for changes in ({"min_steps": 4}, {"max_steps": 3}, {"oversample": 9.0}, {"fill_up": True}):
        assert asked("c1", **changes) == [first]
    assert asked("c1", num_samples_train=8) == [(first[0], 8, first[2])]
    assert asked("c0", seed=1) == [(*first[:2], request_seed("q1", "m", 1))]


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValidationError, match="min_steps is 5 and max_steps 4: no solution can be kept"):
        SampleConfig(min_steps=5, max_steps=4)
    behind_api = PolicyApi(kind="gemini")
    with pytest.raises(ValidationError, match="kind is 'gemini', and no API takes top_k=50; set top_k=0"):
        SampleConfig(engine=behind_api, top_k=50)
    assert SampleConfig(engine=behind_api).top_k == SampleConfig().top_k == 50  # the default asks for nothing
    assert SampleConfig(engine=behind_api, top_k=0, temperature=None).temperature is None
    with pytest.raises(ValidationError, match="temperature and top_p may be null for an API alone"):
        SampleConfig(top_p=None)
    for name in ("lora", "batch_invariant", "vllm", "num_gpus", "max_model_len"):
        assert name not in PolicyApi.model_fields


@pytest.mark.parametrize(
    ("engine", "shown"),
    [
        (VllmEngine(max_model_len=1200), 2),
        (VllmEngine(max_model_len=1150), 1),
        (VllmEngine(max_model_len=1100), 0),
        (PolicyApi(kind="openai", max_prompt_tokens=150), 1),
        (PolicyApi(kind="openai"), 2),
    ],
)
def test_documents_that_have_no_room_are_counted_and_said(engine: Any, shown: int) -> None:
    """A token of the fake is a character; an API has a room of its own."""
    fake = FakeGenerator(lambda prompt, seed: GOOD)
    actor = SamplingActor(
        SampleConfig(num_documents=2, max_tokens=1000, engine=engine), "m", "tiny", "c0", generator=fake
    )
    [asked] = to_arrow(Question, [question()]).to_pylist()
    documents = [{"text": letter * 50} for letter in "xyz"]
    figures = figures_of(*asyncio.run(actor.solve({**asked, "documents": documents})))
    assert (figures["documents_shown"], figures["documents_left_out"]) == (shown, 2 - shown)
    assert fake.requests[0][0].count("Document ") == shown
    told = f", {2 - shown} of 2 documents left out for want of room"
    assert (told in summary(figures)) is (shown < 2)


def test_answers_that_nobody_graded_are_counted_and_said() -> None:
    class Silent(Grader):
        async def grade(self, question: Mapping[str, Any], answers: Sequence[str | None]) -> Grades:
            return Grades([None] * len(answers), asked=1, unanswered=1)

    actor = SamplingActor(CONFIG, "m", "tiny", "c0", generator=FakeGenerator(lambda prompt, seed: GOOD))
    actor.grader = Silent()
    row, drawn = asyncio.run(actor.solve(to_arrow(Question, [question()]).to_pylist()[0]))
    figures = figures_of(row, drawn)
    assert ([s.correct for s in row.solutions], row.error) == ([None] * 4, None)
    assert (figures["answers_asked"], figures["answers_unanswered"]) == (1, 1)
    assert summary(figures).endswith(" cached, 1 answers put to a model, 1 of them without a verdict")


@pytest.mark.engine
@pytest.mark.usefixtures("ray_session")
def test_an_engine_that_dies_is_started_again_and_samples_the_same(tmp_path: Path) -> None:
    questions = to_arrow(Question, [question(f"q{i}") for i in range(12)])

    def rows(generator: Any) -> list[dict[str, Any]]:
        config = CONFIG.model_copy(update={"engine": VllmEngine(num_actors=1, batch_size=2, max_concurrency=2)})
        ds = ray.data.from_arrow(questions)
        made = sample(ds, config, model="m", policy="tiny", config_hash="c0", generator=generator).take_all()
        return sorted(made, key=lambda row: str(row["question_id"]))

    whole = rows(functools.partial(Dying, died=None))
    assert [row["question_id"] for row in whole] == sorted(f"q{i}" for i in range(12))
    assert rows(functools.partial(Dying, died=tmp_path / "died")) == whole
    assert (tmp_path / "died").read_text() == "q5"


class Dying(FakeGenerator):
    """Ends its process at question q5, once."""

    def __init__(self, model: str, config: VllmEngine, died: Path | None) -> None:
        super().__init__(lambda prompt, seed: GOOD.format(f"{prompt[-5:]}{seed}") if seed % 3 else "no")
        self.died = died

    async def generate(self, prompt: ChatPrompt, n: int, seed: int, sampling: Sampling) -> list[Completion]:
        if self.died and "q5" in text_of(prompt) and not self.died.exists():
            self.died.write_text("q5")
            end_process()
        return await super().generate(prompt, n, seed, sampling)


def test_a_fault_in_a_later_round_keeps_what_was_drawn_before() -> None:
    base = request_seed("q1", "c0", 0)

    def script(prompt: str, seed: int) -> str:
        if seed - base > 3:
            raise RowError("unavailable", "gone")
        return GOOD if seed == base else "no"

    [row], fake = run(script, [question()])
    assert (row.error, row.num_drawn, row.num_missing, len(row.solutions)) == ("unavailable: gone", 4, 3, 1)
    assert fake.figures[0]["unfilled_questions"] == 0  # an error is counted as such


def test_documents_need_evidence() -> None:
    with pytest.raises(ValueError, match="num_documents=2 needs the table evidence"):
        sample(None, SampleConfig(num_documents=2), model="m", policy="p", config_hash="c")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_images=2 needs the table images"):
        sample(None, SampleConfig(engine=VllmEngine(num_images=2)), model="m", policy="p", config_hash="c")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sample.engine.kind=openai needs a folder for its answers"):
        sample(None, SampleConfig(engine=PolicyApi(kind="openai")), model="m", policy="p", config_hash="c")  # type: ignore[arg-type]
