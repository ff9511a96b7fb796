"""Questions for images that have none, written by a model that sees them, checked, and left to a reader's review.

Enters: images. Leaves: `WrittenQuestion` rows, nested by image. One that is not good enough is to be expected; it keeps
its place, with the reason in `refused` (`REFUSALS`):

- question_options: not four different, plausible options; question_repeated: the image has such a question already;
- question_leak: the text gives the answer away (the stem names it, the options' lengths do, or it is answered without
  the image); question_ambiguous: the model, shown the image, does not find the answer that it gave itself.

`error` is for what went wrong: question_reply and check_reply (not of the asked form, twice), cut_off, an image that
cannot be opened, the API's own faults.

Models like to put the right option second or third: options are dealt anew by a hash of the question.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import pyarrow as pa
from pydantic import Field, model_validator

from medmm_ray.config import Config, Splits, digest, execution
from medmm_ray.data.records import Question, WrittenQuestion, to_arrow_lists
from medmm_ray.data.tables import RowError, error_kind
from medmm_ray.engines.generator import Generator, MakeGenerator
from medmm_ray.engines.images import open_image
from medmm_ray.engines.llm.access import Access, Apis
from medmm_ray.engines.llm.client import ApiConfig, ApiEngine, Client
from medmm_ray.engines.llm.endpoint import ChatImage, ChatRequest, Turn
from medmm_ray.engines.llm.local import LocalEndpoint
from medmm_ray.engines.llm.prices import FREE
from medmm_ray.engines.llm.served import joined_names
from medmm_ray.engines.llm.store import PricedAnswer
from medmm_ray.engines.llm.structured import AnswerForm, Retry, ask_until_accepted, json_schema
from medmm_ray.engines.vllm_engine import ActorPool, VllmEngine, actor_options
from medmm_ray.steps.write_questions.drafts import SCHEMA, Draft, draft, repeats
from medmm_ray.text import extract_answer, question_with_options

if TYPE_CHECKING:
    from ray.data import Dataset

VERSION = 4  # of what a step makes: raise it when the same config makes something else
__all__ = [
    "AGAIN",
    "OTHER",
    "REFUSALS",
    "RULE",
    "SCHEMA",
    "SOLVE_SCHEMA",
    "SYSTEM",
    "Draft",
    "QuestionWriter",
    "WriteQuestionsConfig",
    "WriterApi",
    "WriterVllm",
    "doubt",
    "draft",
    "figures",
    "letter",
    "repeats",
    "usable",
    "without_question",
    "write_questions",
]
Value = TypeVar("Value")
SOURCE = "written"
REFUSALS = ("question_options", "question_leak", "question_ambiguous", "question_repeated")

SYSTEM = (
    "You write examination questions for medical specialists. You are shown one {modality} image and write a "
    "multiple-choice question on it that can be answered only by looking at the image. Give a realistic clinical "
    "context (age, sex, complaint) that does not tell what the image shows. Ask for a finding, a diagnosis or the next "
    "step. Give four options of like length and kind: one that is right, three that a colleague might think of and "
    "that the image rules out. Never write 'all of the above' or 'none of the above'."
)
RULE = (
    'Answer with one JSON object and nothing else: {"question": the context and the question, "options": a list of '
    'four texts without letters, "correct_answer": "A", "B", "C" or "D", "difficulty": "easy", "medium" or "hard", '
    '"explanation": what in the image shows the answer, in one or two sentences}.'
)
AGAIN = "Your question cannot be used: {fault}. Write it again. {rule}"
OTHER = "These questions on the image are written already; ask about something else:\n{written}\n"


class SolveForm(AnswerForm):
    """The answer to a written question, as a letter."""

    answer: Literal["A", "B", "C", "D"]


SOLVE_SYSTEM = (
    "You sit an examination for medical specialists. Answer the question with the letter of one option. Where you "
    "cannot know, choose the option that you find most likely."
)
SOLVE_RULE = 'Answer with one JSON object and nothing else: {"answer": the letter}.'
SOLVE_AGAIN = "Your answer cannot be read: {fault}. {rule}"
SOLVE_SCHEMA = json_schema(SolveForm)


class WriterApi(ApiEngine, ActorPool):
    """A model behind an API that writes."""

    model: str | None = None
    """Name of the model; required where per_image > 0."""
    num_cpus: float = execution(0.5, ge=0)
    """Logical CPUs per actor."""


class WriterVllm(VllmEngine):
    """A vision-language model in the writer's actors."""

    model: str | None = None
    """Checkpoint that writes, as in models; required where per_image > 0."""
    max_model_len: int = Field(8192, ge=16)
    """Longest prompt and reply together, tokens."""
    num_images: int = Field(1, ge=1, le=1)
    """Images in a prompt; a question is written for one."""
    num_cpus: float = execution(0.5, ge=0)
    """Logical CPUs per actor."""


class WriteQuestionsConfig(Config):
    """Who writes questions, how many, and how they are tried."""

    engine: Annotated[WriterVllm | WriterApi, Field(discriminator="kind")] = WriterApi(kind="gemini")
    """Who writes."""
    per_image: int = Field(0, ge=0)
    """Questions for each image that has none; 0 writes none."""
    splits: Splits = ("train", "test")
    """Splits of the images that get questions."""
    max_images: int | None = None
    """Images at most, chosen by a hash of their ids; null: all without a question."""
    num_checks: int = Field(2, ge=0)
    """Times that the model answers its question with the image, and as often without, at temperature 1 (null: as the
    model has it); 0 leaves both out. At least 2: one blind answer in four is right by chance."""
    tries: int = execution(2, ge=1)
    """Times that a reply is asked for, each but the first with the fault of the one before named. An API's replies are
    kept: to ask anew where they did not fit (question_reply, check_reply), run again with one more."""
    max_tokens: int = Field(4096, ge=1)
    """Longest reply, a question or an answer to one, tokens; thoughts count."""
    temperature: float | None = Field(0.0, ge=0)
    """Sampling temperature of the writing; null leaves it to the model (reasoning models take no other)."""

    @model_validator(mode="after")
    def _has_a_writer(self) -> "WriteQuestionsConfig":
        if self.per_image and not self.engine.model:
            raise ValueError(f"per_image is {self.per_image} and engine.model is not set; name who writes")
        return self

    @model_validator(mode="after")
    def _checks_can_tell(self) -> "WriteQuestionsConfig":
        if self.num_checks == 1:
            raise ValueError(
                "num_checks is 1, and one answer without the image is right by chance once in four: it cannot tell a "
                "leak; take 2 or more, or 0 for no checks"
            )
        return self


def write_questions(
    ds: "Dataset", config: WriteQuestionsConfig, *, apis: Apis, generator: MakeGenerator = Generator
) -> "Dataset":
    """Image rows (image_id, sha256, uri, split, modality) -> ``{image_id, questions, figures}``.

    `questions` is a list of `WrittenQuestion`, `figures` counts them by outcome. `apis` is how the run reaches
    models behind APIs.
    """
    # Opened once: all actors share the budget and the answers.
    access: Access | None = None
    engine = config.engine
    if isinstance(engine, WriterApi):
        access = apis.open(engine, str(engine.model))
    return ds.map_batches(
        QuestionWriter,
        fn_constructor_kwargs={
            "config": config,
            "access": access,
            "generator": generator,
        },
        **actor_options(engine),
    )


class QuestionWriter:
    """The actor: writes and tries the questions of each image of a batch."""

    def __init__(
        self, config: WriteQuestionsConfig, access: Access | None = None, generator: MakeGenerator = Generator
    ) -> None:
        self.config = config
        self.model = str(config.engine.model)
        self.author = f"{self.model}@{digest(SYSTEM, RULE, AGAIN, OTHER, SCHEMA, config.num_checks)}"
        if isinstance(config.engine, WriterVllm):
            endpoint = LocalEndpoint(generator(self.model, config.engine), self.model)
            # Only how often and how many at a time is taken of the config: there is nobody to pay.
            self.client = Client(endpoint, FREE, ApiConfig())
        else:
            assert access is not None, "an API is reached by an access"
            self.client = access.connect()

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        written = await asyncio.gather(*map(self.of_image, batch.to_pylist()))
        yield pa.table(
            {
                "image_id": batch["image_id"],
                "questions": to_arrow_lists(WrittenQuestion, written),
                "figures": pa.array(list(map(figures, written))),
            }
        )

    async def of_image(self, row: Mapping[str, Any]) -> list[WrittenQuestion]:
        """The questions of one image, one after the other, so that each knows those before it."""
        try:
            picture: ChatImage | RowError = await asyncio.to_thread(lambda: ChatImage(open_image(row["uri"])))
        except RowError as fault:
            picture = fault
        questions: list[WrittenQuestion] = []
        for index in range(self.config.per_image):
            # Ids by content and place: a rerun gives the same ones.
            empty = WrittenQuestion(
                written_id="w" + digest(row["sha256"], self.author, index),
                image_id=row["image_id"],
                author=self.author,
                split=row["split"],
                modality=row["modality"],
            )
            if isinstance(picture, RowError):
                question = replace(empty, error=str(picture))
            else:
                question = await QuestionAttempt(self, picture, empty, questions).run()
            questions.append(question)
        return questions


class QuestionAttempt:
    """One question in the making; `earlier` are the attempts before it on the same image."""

    def __init__(
        self,
        writer: QuestionWriter,
        picture: ChatImage,
        empty: WrittenQuestion,
        earlier: Sequence[WrittenQuestion],
    ) -> None:
        self.client = writer.client
        self.config = writer.config
        self.picture = picture
        self.empty = empty
        self.number = len(earlier)
        self.cost = 0.0
        self.models: set[str | None] = set()  # that answered
        # The refused ones too: they need no second attempt.
        self.written = [attempt.question for attempt in earlier if attempt.question]

    async def run(self) -> WrittenQuestion:
        """The question with its checks, or why there is none; `cost` counts what failed too."""
        try:
            question = await self.tried()
        except RowError as fault:
            if fault.kind in REFUSALS:
                question = replace(self.empty, refused=str(fault))
            else:
                question = replace(self.empty, error=str(fault))
        return replace(question, cost=self.cost, answered_by=joined_names(self.models))

    async def tried(self) -> WrittenQuestion:
        """The question with its checks; `RowError` where there is none."""
        drafted = await self.drafted()
        question = replace(self.empty, **asdict(drafted))
        # Without the image too: what can be answered blind does not test whether the image is read.
        num_solved = await self.solved(question, [self.picture])
        num_solved_blind = await self.solved(question, [])
        question = replace(
            question,
            num_checks=self.config.num_checks,
            num_solved=num_solved,
            num_solved_blind=num_solved_blind,
        )
        return replace(question, refused=doubt(question))

    async def drafted(self) -> Draft:
        """What the model writes."""
        task = RULE
        if self.written:
            earlier = "\n".join(self.written)
            task = OTHER.format(written=earlier) + RULE
        request = ChatRequest(
            SYSTEM.format(modality=self.empty.modality or "medical"),
            (Turn("user", ("The image:", self.picture, task)),),
            schema=SCHEMA,
            max_tokens=self.config.max_tokens,
            temperature=self.config.temperature,
            seed=self.number,
        )
        return await self.ask_for(request, self.checked, AGAIN, RULE)

    def checked(self, reply: str) -> Draft:
        """A reply as a draft that the image does not have yet; `RowError` where it is of no use."""
        new = draft(reply)
        if repeats(new.question, self.written):
            beginning = new.question[:60]
            raise RowError("question_repeated", f"the image has a question like {beginning!r} already")
        return new

    async def solved(self, question: WrittenQuestion, pictures: Sequence[ChatImage]) -> int:
        """How often the model gives the written answer, shown `pictures`."""
        text = f"{question_with_options(question.question, question.options)}\n{SOLVE_RULE}"
        request = ChatRequest(
            SOLVE_SYSTEM,
            (Turn("user", (*pictures, text)),),
            schema=SOLVE_SCHEMA,
            max_tokens=self.config.max_tokens,
            temperature=None if self.config.temperature is None else 1.0,
        )
        # Seeds of their own, or all would be one stored answer.
        requests = [replace(request, seed=seed) for seed in range(self.config.num_checks)]

        def read(reply: str) -> str:
            """The letter that a reply chooses."""
            return letter(reply, question.options)

        checks = [self.ask_for(each, read, SOLVE_AGAIN, SOLVE_RULE) for each in requests]
        # Faults are raised when all of them are paid, so that the row has the whole cost.
        letters = await asyncio.gather(*checks, return_exceptions=True)
        for fault in letters:
            if isinstance(fault, BaseException):
                raise fault
        return letters.count(question.answer)

    async def ask_for(self, request: ChatRequest, read: Callable[[str], Value], again: str, rule: str) -> Value:
        """What `read` makes of the reply; one that it refuses is asked for again, with the fault named."""

        def instruction(fault: RowError) -> str:
            """What the model is told of its reply."""
            return again.format(fault=fault.message, rule=rule)

        def read_text(answer: PricedAnswer) -> Value:
            """What is made of the text of an answer."""
            return read(answer.reply.text)

        retry = Retry(self.config.tries, instruction)
        answer = await ask_until_accepted(
            self,
            request,
            self.empty.image_id,
            read_text,
            retry,
        )
        return answer.value

    async def ask(self, request: ChatRequest, group: str) -> PricedAnswer:
        """The answer to one request; its cost, and who gave it, are noted also where it is of no use."""
        try:
            answer = await self.client.ask(request, group)
        except RowError as fault:
            self.cost += fault.cost
            raise
        self.cost += answer.cost
        self.models.add(answer.reply.model)
        if answer.reply.cut_off:
            raise RowError(
                "cut_off",
                f"the model's reply was cut off at max_tokens={request.max_tokens}, thoughts included; raise "
                "write_questions.max_tokens, or lower write_questions.engine.reasoning_effort",
            )
        return answer


def letter(reply: str, options: Sequence[str]) -> str:
    """The letter of the option that a reply chooses; `RowError` check_reply where it chooses none."""
    answer = extract_answer(reply, options)
    if answer is None:
        beginning = reply.strip()[:80]
        raise RowError("check_reply", f"no option can be read in {beginning!r}")
    return answer


def doubt(question: WrittenQuestion) -> str | None:
    """Why a tried question is not used: never solved with the image, or always without."""
    # One answer as written is enough with the image, one other answer without: models err now and then.
    num = question.num_checks
    if num and question.num_solved == 0:
        return f"question_ambiguous: with the image the model answered otherwise {num} times of {num}"
    if num and question.num_solved_blind == num:
        return f"question_leak: answered {num} times of {num} without the image"
    return None


def figures(written: Sequence[WrittenQuestion]) -> dict[str, int]:
    """What became of the attempts: how many are usable, refused by reason, and failed."""
    counts = {"written": 0}
    for kind in REFUSALS:
        counts[f"refused_{kind}"] = 0
    counts["failed"] = 0
    for question in written:
        if question.refused:
            kind = error_kind(question.refused)
            counts[f"refused_{kind}"] += 1
        elif question.error is not None:
            counts["failed"] += 1
        else:
            counts["written"] += 1
    return counts


def without_question(images: pa.Table, questions: pa.Table, config: WriteQuestionsConfig) -> pa.Table:
    """The rows of raw_images of the asked splits that no question shows: at most `max_images`, none if none is due."""
    has_question: set[str] = set()
    for row in questions.select(["image_ids", "error"]).to_pylist():
        if not row["error"]:
            has_question.update(row["image_ids"])
    images = images.select(
        [
            "image_id",
            "sha256",
            "uri",
            "split",
            "modality",
            "error",
        ]
    )
    rows: list[dict[str, Any]] = []
    for row in images.to_pylist():
        if row["image_id"] in has_question or row["error"]:
            continue
        if row["split"] in config.splits:
            rows.append(row)
    # A hash's order is as good as a random one, and stays the same when images are added.
    rows.sort(key=lambda row: digest(row["image_id"]))
    max_images = config.max_images if config.per_image else 0
    return pa.Table.from_pylist(rows[:max_images], schema=images.schema)


def usable(written: pa.Table, images: pa.Table) -> list[Question]:
    """The written questions that are neither refused nor failed, each once, their ids made from their content."""
    # Ids are made of what is asked and shown, so that the same question of two runs is one.
    image_ids = images["image_id"].to_pylist()
    sha256 = dict(zip(image_ids, images["sha256"].to_pylist(), strict=True))
    questions: dict[str, Question] = {}
    for row in sorted(written.to_pylist(), key=lambda row: str(row["written_id"])):
        if row["refused"] is not None or row["error"] is not None:
            continue
        image_id = row["image_id"]
        content = digest(SOURCE, row["question"], row["options"], [sha256[image_id]])
        question_id = f"q{content}"
        questions[question_id] = Question(
            question_id=question_id,
            source=SOURCE,
            split=row["split"],
            modality=row["modality"],
            difficulty=row["difficulty"],
            question=row["question"],
            options=row["options"],
            answer=row["answer"],
            answer_type="choice",
            image_ids=[image_id],
            dataset=SOURCE,
            group=image_id,
        )
    return list(questions.values())
