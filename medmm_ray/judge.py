"""A verdict for each step of each solution, by a judge: a phantom's truth with errors, a local model, or Gemini.

Enters: solutions, their questions, images and evidence. Leaves: labels with source "judge" (`Labels`, nested by
question). A judge sees the question, its images, documents and reference cases, never the gold answer, and speaks about
each step by itself. Equal texts of a question are judged once; the cost stands with the first of them. A step in which
nothing can be checked has no label but a confidence. A call that fails becomes the row's error, never a label.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import pyarrow as pa
from pydantic import Field

from medmm_ray.config import digest, execution
from medmm_ray.engines.gemini import PRICES, TOKENS_AN_IMAGE, Gemini, Price
from medmm_ray.engines.generator import (
    Generator,
    GeneratorConfig,
    MakeGenerator,
    Prompt,
    Sampling,
    actor_options,
)
from medmm_ray.engines.images import open_image
from medmm_ray.prompts import Message, document_block
from medmm_ray.records import Labels, StepLabel, arrow_schema
from medmm_ray.sources.phantom import Case, truth
from medmm_ray.tables import RowError, attach
from medmm_ray.text import question_with_options

if TYPE_CHECKING:
    from ray.data import Dataset

SYSTEM = (
    "You are a senior physician who reviews a colleague's reasoning step by step. You get guideline texts, similar "
    "cases with their diagnoses, the question and, where there is one, the patient's image. Put three tests to each "
    "step. Logical: does it follow from the question and from the steps before it? Medical: does it agree with the "
    "guideline texts and with established knowledge? Image-grounded: does what it says about the image agree with "
    "what the image shows? A step that says nothing about the image passes this test. A step is right (+) if it "
    "passes all three and wrong (-) otherwise. Judge each step by itself: a right step stays right after a wrong one. "
    "State your confidence in each verdict: high, medium, or low where the image or the texts leave it open."
)
JSON_RULE = (
    'Answer with a JSON list and nothing else, one entry for each step in order: {"step": its number, "logical": true '
    'or false, "medical": true or false, "image_grounded": true or false, "label": "+" or "-", "confidence": "high", '
    '"medium" or "low", "reasoning": one or two sentences}.'
)
LINE_RULE = (
    "Answer with one line for each step in order and nothing else: 1 for a right step or 0 for a wrong one, a space, "
    "and your confidence: high, medium or low."
)
TOKENS_A_LINE = 16  # room for one line of LINE_RULE in any tokenizer
AGAIN = "Your answer does not fit: {fault}. Answer again. {rule}"
SCHEMA = {
    "type": "ARRAY",
    "items": {
        "type": "OBJECT",
        "properties": {
            "step": {"type": "INTEGER"},
            "logical": {"type": "BOOLEAN"},
            "medical": {"type": "BOOLEAN"},
            "image_grounded": {"type": "BOOLEAN"},
            "label": {"type": "STRING", "enum": ["+", "-"]},
            "confidence": {"type": "STRING", "enum": ["high", "medium", "low"]},
            "reasoning": {"type": "STRING"},
        },
        "required": ["step", "logical", "medical", "image_grounded", "label", "confidence", "reasoning"],
    },
}

# How a phantom judge's confidence falls: it is low, or medium, more often where its verdict is wrong.
_UNSURE = {True: (0.6, 0.3), False: (0.05, 0.15)}


class JudgeConfig(GeneratorConfig):
    """Who judges, and what the judge sees."""

    backend: Literal["phantom", "vllm", "gemini"] = "phantom"
    """phantom: the source's truth with errors; vllm: a local model (text only); gemini: the API, with images."""
    model: str | None = None
    """Gemini: the model's name. vllm: a checkpoint as in models, null takes the run's own policy."""
    splits: tuple[str, ...] = ("train", "validation", "test")
    """Splits whose solutions are judged."""
    num_documents: int = Field(8, ge=0)
    """Retrieved documents that the judge reads."""
    num_references: int = Field(3, ge=0)
    """Similar cases that the judge sees: image (gemini) and diagnosis."""
    max_tokens: int = Field(4096, ge=1)
    """Longest answer of the judge, tokens."""
    constrain: bool = True
    """vllm: let the engine write only answers of the asked form."""
    error_rate: float = Field(0.08, ge=0, le=0.5)
    """phantom: share of checkable steps whose verdict is flipped."""
    seed: int = 0
    """Start of the phantom judge's errors."""
    price_read: float | None = None
    """Gemini: US dollars per million prompt tokens; null takes the table's."""
    price_written: float | None = None
    """Gemini: US dollars per million generated tokens; null takes the table's."""
    endpoint: str | None = execution(None)
    """Gemini: another address of the API, e.g. a proxy."""
    in_flight: int = execution(16)
    """Gemini: most requests of one actor at a time."""
    timeout_s: float = execution(120.0)
    """Gemini: longest wait for one answer, seconds."""
    max_attempts: int = execution(6)
    """Gemini: tries of one request before its row fails."""
    pause_s: float = execution(1.0)
    """Gemini: pause before the second try, seconds; it doubles with each further one."""
    num_cpus: float = execution(0.5)
    """Logical CPUs an actor."""


@dataclass(frozen=True)
class Picture:
    """An image as the tables know it; `note` is its diagnosis (references) or its source's annotation (the query)."""

    uri: str
    note: str


@dataclass(frozen=True)
class JudgeCase:
    """What the solutions of a question share."""

    question_id: str
    question: str
    options: Sequence[str]
    answer: str
    """The gold one: no judge but the phantom's own truth reads it."""
    images: Sequence[Picture]
    documents: Sequence[str]
    references: Sequence[Picture]


@dataclass(frozen=True)
class Judgement:
    """One solution's verdicts and what they cost, US dollars."""

    steps: list[StepLabel]
    cost: float = 0.0


class Judge(Protocol):
    """A backend: verdicts on the solutions (lists of steps) of one case, each a `Judgement` or a fault."""

    annotator: str

    async def judge(self, case: JudgeCase, solutions: Sequence[Sequence[str]]) -> "list[Judgement | RowError]": ...


def judge(
    ds: "Dataset",
    config: JudgeConfig,
    *,
    questions: pa.Table,
    images: pa.Table,
    evidence: pa.Table | None = None,
    model: str | None = None,
    generator: MakeGenerator = Generator,
) -> "Dataset":
    """`Solutions` rows -> ``{question_id, labels}``, labels a list of `Labels`.

    `questions` and `images` are the run's tables, `evidence` its documents and similar images; `model` is the
    checkpoint of a vllm judge or the name of a Gemini model.
    """
    ds = attach(ds, questions, "question_id", ["split", "question", "options", "answer", "image_ids"])
    if evidence is not None:
        ds = attach(ds, evidence, "question_id", ["documents", "images"])
    return ds.map_batches(
        JudgeActor,
        fn_constructor_kwargs={
            "config": config,
            "images": images.select(["image_id", "uri", "annotation"]),
            "model": model,
            "generator": generator,
        },
        **actor_options(config),
    )


class JudgeActor:
    """The actor: judges the distinct texts of each question of a batch."""

    def __init__(
        self, config: JudgeConfig, images: pa.Table, model: str | None = None, generator: MakeGenerator = Generator
    ) -> None:
        self.config = config
        self.backend = make_judge(config, model, generator)
        rows = images.to_pylist()
        self.pictures = {row["image_id"]: Picture(row["uri"], row["annotation"]) for row in rows}

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        labels = await asyncio.gather(*(self.label(row) for row in batch.to_pylist()))
        nested = [[asdict(label) for label in row] for row in labels]
        kind = pa.list_(pa.struct(list(arrow_schema(Labels))))
        yield pa.table({"question_id": batch["question_id"], "labels": pa.array(nested, kind)})

    async def label(self, row: Mapping[str, Any]) -> list[Labels]:
        """The labels of one question's solutions; none where it has none or its split is not judged."""
        if row["split"] not in self.config.splits or not row["solutions"]:
            return []
        texts = {s["text_sha"]: s["steps"] for s in row["solutions"]}
        judged = await self.backend.judge(self.case(row), list(texts.values()))
        by_text: dict[str, Judgement | RowError] = dict(zip(texts, judged, strict=True))
        labels = []
        for solution in row["solutions"]:
            found = by_text[solution["text_sha"]]
            failed = isinstance(found, RowError)
            labels.append(
                Labels(
                    question_id=row["question_id"],
                    solution_id=solution["solution_id"],
                    source="judge",
                    annotator=self.backend.annotator,
                    steps=[] if isinstance(found, RowError) else found.steps,
                    cost=0.0 if isinstance(found, RowError) else found.cost,
                    error=str(found) if failed else None,
                )
            )
            if isinstance(found, Judgement):
                by_text[solution["text_sha"]] = Judgement(found.steps)  # paid for once
        return labels

    def case(self, row: Mapping[str, Any]) -> JudgeCase:
        config = self.config
        references = (row.get("images") or [])[: config.num_references]
        return JudgeCase(
            question_id=row["question_id"],
            question=row["question"],
            options=row["options"],
            answer=row["answer"],
            images=[self.pictures[i] for i in row["image_ids"]],
            documents=[d["text"] for d in (row.get("documents") or [])[: config.num_documents]],
            references=[Picture(r["uri"], r["diagnosis"]) for r in references],
        )


def make_judge(config: JudgeConfig, model: str | None, generator: MakeGenerator = Generator) -> Judge:
    """The backend that `config` names."""
    if config.backend == "phantom":
        return PhantomJudge(config.error_rate, config.seed)
    if model is None:
        raise ValueError(f"judge.backend={config.backend} needs judge.model")
    return GeminiJudge(config, model) if config.backend == "gemini" else VllmJudge(config, model, generator)


class PhantomJudge:
    """The truth of a phantom, with a share of the verdicts flipped; it tends to know where it is unsure."""

    def __init__(self, error_rate: float, seed: int = 0) -> None:
        self.error_rate, self.seed = error_rate, seed
        self.annotator = f"phantom@{digest('phantom', error_rate, seed)}"

    async def judge(self, case: JudgeCase, solutions: Sequence[Sequence[str]]) -> "list[Judgement | RowError]":
        if not case.images or not case.images[0].note:
            fault = RowError(
                "judge_source",
                f"question {case.question_id} has no phantom's annotation; set judge.backend to vllm or gemini",
            )
            return [fault for _ in solutions]
        phantom = Case.from_annotation(case.images[0].note)
        return [
            Judgement([self.verdict(truth(s, phantom, case), case.question_id, steps, i) for i, s in enumerate(steps)])
            for steps in solutions
        ]

    def verdict(self, right: bool | None, question_id: str, steps: Sequence[str], index: int) -> StepLabel:
        """What the judge says of step `index`, whose truth is `right`; None says nothing that can be checked."""
        if right is None:
            return StepLabel(confidence="high", reason="nothing to check")
        bits = int(digest(self.seed, question_id, list(steps), index), 16)
        wrong = (bits >> 32) / 2**32 < self.error_rate
        low, medium = _UNSURE[wrong]
        doubt = (bits & 0xFFFFFFFF) / 2**32
        confidence = "low" if doubt < low else "medium" if doubt < low + medium else "high"
        return StepLabel(label=int(right != wrong), confidence=confidence)


class VllmJudge:
    """A local model that reads texts, all steps of a solution in one call."""

    def __init__(self, config: JudgeConfig, model: str, generator: MakeGenerator = Generator) -> None:
        self.config = config
        self.generator = generator(model, config)
        self.annotator = f"{Path(model).name}@{digest(SYSTEM, LINE_RULE, AGAIN, config.constrain)}"

    async def judge(self, case: JudgeCase, solutions: Sequence[Sequence[str]]) -> "list[Judgement | RowError]":
        return await asyncio.gather(*(self._judge(case, steps) for steps in solutions))

    async def _judge(self, case: JudgeCase, steps: Sequence[str]) -> "Judgement | RowError":
        messages = self._messages(case, steps)
        try:
            reply = await self._ask(messages, len(steps))
            try:
                return Judgement(verdicts(reply, len(steps)))
            except RowError as fault:
                messages += again(reply, fault, LINE_RULE)
            return Judgement(verdicts(await self._ask(messages, len(steps)), len(steps)))
        except RowError as fault:
            return fault

    def _messages(self, case: JudgeCase, steps: Sequence[str]) -> list[Message]:
        """The chat, without the last documents where the model's length does not hold all of them."""
        room = self.config.max_model_len - self._max_tokens(len(steps))
        documents = list(case.documents)
        while True:
            asked = f"{shared_text(replace(case, documents=documents))}\n{solution_text(steps)}\n\n{LINE_RULE}"
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]
            if not documents or self.generator.count(Prompt(messages)) <= room:
                return messages
            documents.pop()

    def _max_tokens(self, num_steps: int) -> int:
        return min(self.config.max_tokens, TOKENS_A_LINE * num_steps)

    async def _ask(self, messages: Sequence[Message], num_steps: int) -> str:
        line = "[01] (high|medium|low)"
        pattern = "\n".join([line] * num_steps) if self.config.constrain else None
        how = Sampling(temperature=0.0, top_k=0, max_tokens=self._max_tokens(num_steps), pattern=pattern)
        found = await self.generator.generate(Prompt(messages), 1, self.config.seed, how)
        return found[0].text


class GeminiJudge:
    """Gemini, with the images; what a question's solutions share comes first, so that the provider can cache it."""

    def __init__(self, config: JudgeConfig, model: str) -> None:
        self.config = config
        self.price = price_of(model, config.price_read, config.price_written)
        self.annotator = f"{model}@{digest(SYSTEM, JSON_RULE, AGAIN, SCHEMA)}"
        self.client = Gemini(
            model,
            SYSTEM,
            endpoint=config.endpoint,
            in_flight=config.in_flight,
            timeout_s=config.timeout_s,
            max_attempts=config.max_attempts,
            pause_s=config.pause_s,
        )

    async def judge(self, case: JudgeCase, solutions: Sequence[Sequence[str]]) -> "list[Judgement | RowError]":
        try:
            shared = await asyncio.to_thread(shared_parts, case)
        except RowError as fault:
            return [fault for _ in solutions]
        return await asyncio.gather(*(self._judge(shared, steps) for steps in solutions))

    async def _judge(self, shared: Sequence[Any], steps: Sequence[str]) -> "Judgement | RowError":
        first = ("user", [*shared, f"{solution_text(steps)}\n\n{JSON_RULE}"])
        try:
            reply = await self.client.ask([first], schema=SCHEMA, max_tokens=self.config.max_tokens)
            cost = reply.cost(self.price)
            try:
                return Judgement(verdicts(reply.text, len(steps)), cost)
            except RowError as fault:
                said, corrected = again(reply.text, fault, JSON_RULE)
            turns = [first, ("model", [said["content"]]), ("user", [corrected["content"]])]
            reply = await self.client.ask(turns, schema=SCHEMA, max_tokens=self.config.max_tokens)
            return Judgement(verdicts(reply.text, len(steps)), cost + reply.cost(self.price))
        except RowError as fault:
            return fault


def shared_text(case: JudgeCase) -> str:
    """Documents, the reference cases' diagnoses and the question."""
    references = "".join(f"Similar case {i}: {r.note}\n" for i, r in enumerate(case.references, 1))
    return f"{document_block(case.documents)}{references}Question: {question_with_options(case.question, case.options)}"


def shared_parts(case: JudgeCase) -> list[Any]:
    """The same with pictures: texts, then the query's images, then each similar case's image after its number."""
    parts: list[Any] = [shared_text(case)]
    for picture in case.images:
        parts += ["The patient's image:", open_image(picture.uri)]
    for i, picture in enumerate(case.references, 1):
        parts += [f"The image of similar case {i}:", open_image(picture.uri)]
    return parts


def solution_text(steps: Sequence[str]) -> str:
    lines = "\n".join(f"Step {i}: {step}" for i, step in enumerate(steps, 1))
    return f"Reasoning to review, {len(steps)} steps:\n{lines}"


def again(reply: str, fault: RowError, rule: str) -> list[Message]:
    """The turns that show a judge its answer and what is wrong with it."""
    corrected = AGAIN.format(fault=str(fault).partition(": ")[2], rule=rule)
    return [{"role": "assistant", "content": reply}, {"role": "user", "content": corrected}]


_LABELS = {"+": 1, "-": 0, "1": 1, "0": 0, "correct": 1, "incorrect": 0, "right": 1, "wrong": 0}
_LINE = re.compile(
    r"(?:step\s*\d+\s*[:.)]?\s*)?([01+-])(?:\s*[,:]?\s*(high|medium|low))?(?=[\s,;]|$)[\s,;]*", re.IGNORECASE
)


def verdicts(reply: str, num_steps: int) -> list[StepLabel]:
    """A judge's reply as one label a step: a JSON list (prose around it is left out), or bare verdicts ``1 high``.

    Raises `RowError` judge_reply: ``judge gave 2 verdicts for 3 steps: '1 0'``.
    """
    found = _from_json(reply)
    if found is None:
        found = _from_lines(reply)
    if found is None:
        raise RowError("judge_reply", f"judge gave no verdicts for {num_steps} steps: {_quote(reply)}")
    if len(found) != num_steps:
        raise RowError("judge_reply", f"judge gave {len(found)} verdicts for {num_steps} steps: {_quote(reply)}")
    return found


def _from_json(reply: str) -> list[StepLabel] | None:
    start, end = reply.find("["), reply.rfind("]")
    if not 0 <= start < end:
        return None
    try:
        entries = json.loads(reply[start : end + 1])
    except json.JSONDecodeError:
        return None
    if all(isinstance(entry, dict) for entry in entries):
        return [_entry(entry, number, reply) for number, entry in enumerate(entries, 1)]
    if all(isinstance(entry, int | str) and str(entry) in _LABELS for entry in entries):
        return [StepLabel(label=_LABELS[str(entry)]) for entry in entries]
    return None


def _entry(entry: Mapping[str, Any], number: int, reply: str) -> StepLabel:
    label, confidence = str(entry.get("label")).lower(), str(entry.get("confidence")).lower()
    if entry.get("step", number) != number:
        raise RowError("judge_reply", f"judge's verdict {number} is about step {entry['step']}: {_quote(reply)}")
    if label not in _LABELS:
        raise RowError("judge_reply", f"judge's verdict {number} has the label {label[:20]!r}, not '+' or '-'")
    if confidence not in ("high", "medium", "low"):
        raise RowError("judge_reply", f"judge's verdict {number} has the confidence {confidence[:20]!r}")
    reason = entry.get("reasoning")
    return StepLabel(label=_LABELS[label], confidence=confidence, reason=str(reason) if reason else None)


def _from_lines(reply: str) -> list[StepLabel] | None:
    """Bare verdicts and nothing else; None where other words stand between them."""
    text = reply.strip()
    found, at = [], 0
    while at < len(text):
        match = _LINE.match(text, at)
        if match is None:
            return None
        confidence = match.group(2)
        found.append(StepLabel(label=_LABELS[match.group(1)], confidence=confidence.lower() if confidence else None))
        at = match.end()
    return found or None


def _quote(reply: str) -> str:
    return repr(reply.strip()[:80])


def price_of(model: str, read: float | None = None, written: float | None = None) -> Price:
    """A model's price: the table's, with what is given in its place; ValueError where neither knows it."""
    known = PRICES.get(model)
    if known is None and (read is None or written is None):
        raise ValueError(
            f"no price is known for {model!r} (known: {', '.join(PRICES)}); set judge.price_read and price_written"
        )
    known = known or Price(0.0, 0.0, 0.0)
    if read is None:
        return Price(known.read, known.cached, known.written if written is None else written)
    return Price(read, read, known.written if written is None else written)


@dataclass(frozen=True)
class Estimate:
    """Calls, tokens and US dollars of judging."""

    calls: int
    read: int
    written: int
    dollars: float


def estimate(
    solutions: int, steps: float, prefix_tokens: float, solution_tokens: float, images: int, price: Price,
    verdict_tokens: float = 60.0,
) -> Estimate:  # fmt: skip
    """What judging `solutions` distinct texts costs, uncached: a call each, `steps` verdicts an answer.

    `prefix_tokens` counts system prompt, documents and question, `images` the query's and the references'.
    """
    read = solutions * (prefix_tokens + solution_tokens + images * TOKENS_AN_IMAGE)
    written = solutions * steps * verdict_tokens
    return Estimate(solutions, round(read), round(written), (read * price.read + written * price.written) / 1e6)
