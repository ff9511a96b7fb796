"""A verdict for each step of each solution, by a judge: a source's own truth with errors, a local model, or an API.

Enters: solutions, their questions, images and evidence. Leaves: labels with source "judge" (`Labels`, nested by
question). A judge sees the question, its images, documents and reference cases, the gold answer only by explicit
config, and speaks about each step by itself: three tests, a verdict, a confidence, a reason. Right-answer solutions are
judged like the others, equal steps of a question once; the cost stands with the first of them. A step in which nothing
can be checked has no label but a confidence. A call that fails becomes the row's error, never a label; what was paid
for it is the row's cost.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from medmm_ray.data.records import Labels, to_arrow_lists
from medmm_ray.data.sorted_rows import SortedRows, rows_among
from medmm_ray.data.tables import RowError, attach
from medmm_ray.engines.generator import Generator, MakeGenerator
from medmm_ray.engines.llm.access import Access, Apis, connect
from medmm_ray.engines.llm.client import ApiConfig, ApiEngine, estimated_prompt_tokens
from medmm_ray.engines.llm.endpoint import ChatRequest
from medmm_ray.engines.llm.local import LocalEndpoint, prompt_of
from medmm_ray.engines.vllm_engine import actor_options
from medmm_ray.steps.judge.backends import Judge, Judgement, JudgeResult, ModelJudge, TruthJudge, with_cost
from medmm_ray.steps.judge.config import JudgeApi, JudgeConfig, JudgeVllm, PhantomEngine
from medmm_ray.steps.judge.prompt import JudgeCase, JudgeImage
from medmm_ray.steps.judge.verdicts import verdicts

if TYPE_CHECKING:
    from ray.data import Dataset

VERSION = 2  # of what a step makes: raise it when the same config makes something else
QUESTION_COLUMNS = ["split", "question", "options", "answer", "image_ids"]
EVIDENCE_COLUMNS = ["documents", "images"]
IMAGE_COLUMNS = ["uri", "annotation"]
"""What a judge needs of the run's tables, beside their ids."""
__all__ = [
    "EVIDENCE_COLUMNS",
    "IMAGE_COLUMNS",
    "QUESTION_COLUMNS",
    "Judge",
    "JudgeActor",
    "JudgeApi",
    "JudgeCase",
    "JudgeConfig",
    "JudgeImage",
    "JudgeVllm",
    "Judgement",
    "ModelJudge",
    "PhantomEngine",
    "TruthJudge",
    "judge",
    "make_judge",
    "verdicts",
]


def judge(
    ds: "Dataset",
    config: JudgeConfig,
    *,
    questions: pa.Table | SortedRows,
    images: pa.Table | SortedRows,
    evidence: pa.Table | SortedRows | None = None,
    model: str | None = None,
    apis: Apis | None = None,
    generator: MakeGenerator = Generator,
    second: tuple[JudgeConfig, str | None] | None = None,
) -> "Dataset":
    """`Solutions` rows -> ``{question_id, labels}``, labels a list of `Labels`.

    `questions` and `images` are the run's tables, `evidence` its documents and similar images; they may be
    `SortedRows`, of which each task reads what it needs. `model` is the checkpoint of a vllm judge or the name of an
    API's model; `apis` is how the run reaches models behind APIs. A `second` judge (its config and model) reads the
    same and adds its labels to each list.
    """
    ds = attach(ds, questions, "question_id", QUESTION_COLUMNS)
    if evidence is not None:
        ds = attach(ds, evidence, "question_id", EVIDENCE_COLUMNS)
    image_notes = images
    if isinstance(images, pa.Table):
        image_notes = images.select(["image_id", *IMAGE_COLUMNS])
    judges = [(config, model)]
    if second is not None:
        judges.append(second)
    # One pool of actors a judge, in a row: the second reads what the first passes on.
    for number, (judge_config, judge_model) in enumerate(judges, 1):
        arguments = {
            "config": judge_config,
            "images": image_notes,
            "model": judge_model,
            "generator": generator,
            "access": _access(judge_config, judge_model, apis),
            "is_last": number == len(judges),
        }
        ds = ds.map_batches(
            JudgeActor,
            fn_constructor_kwargs=arguments,
            **actor_options(judge_config.engine),
        )
    return ds


def _access(config: JudgeConfig, model: str | None, apis: Apis | None) -> Access | None:
    """How actors reach the judge's API; None where it has none."""
    engine = config.engine
    if not isinstance(engine, ApiEngine):
        return None
    if apis is None:
        raise ValueError(f"judge.engine.model={engine.model} needs a folder for its answers")
    return apis.open(engine, model or engine.model)


class JudgeActor:
    """The actor: judges the distinct solutions of each question of a batch; its labels come behind another judge's.

    What another judge needs goes on with the labels, unless this one `is_last`.
    """

    def __init__(
        self,
        config: JudgeConfig,
        images: pa.Table | SortedRows,
        model: str | None = None,
        generator: MakeGenerator = Generator,
        access: Access | None = None,
        is_last: bool = True,
    ) -> None:
        self.config = config
        self.is_last = is_last
        self.backend = make_judge(config, model, generator, access)
        self.images = images

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        rows = batch.to_pylist()
        labels_of_rows = await asyncio.gather(*map(self.label, rows))
        labels: list[list[Labels]] = []
        for row, new_labels in zip(rows, labels_of_rows, strict=True):
            first_labels = row.get("labels", ())
            labels.append([*first_labels, *new_labels])
        # A second judge behind this one needs the whole row again.
        columns = batch.select(["question_id"]) if self.is_last else batch
        yield columns.append_column("labels", to_arrow_lists(Labels, labels))

    async def label(self, row: Mapping[str, Any]) -> list[Labels]:
        """The labels of one question's solutions; none where it has none or its split is not judged."""
        if row["split"] not in self.config.splits or not row["solutions"]:
            return []
        texts = [tuple(solution["steps"]) for solution in row["solutions"]]  # all of a solution that a judge reads
        distinct = list(dict.fromkeys(texts))
        distinct = distinct[: self.config.max_solutions]
        case = self.case(row)
        judged = await self.backend.judge(case, distinct)
        results = dict(zip(distinct, judged, strict=True))
        labels: list[Labels] = []
        for solution, steps in zip(row["solutions"], texts, strict=True):
            result = results.get(steps)
            if result is None:  # beyond max_solutions
                continue
            solution_id = solution["solution_id"]
            labels.append(self.labels_row(row, solution_id, result))
            results[steps] = with_cost(result, 0.0)  # an equal solution is paid for once
        return labels

    def labels_row(self, row: Mapping[str, Any], solution_id: str, result: JudgeResult) -> Labels:
        """One solution's row: its verdicts, or the fault as its error."""
        labels = Labels(
            question_id=row["question_id"],
            solution_id=solution_id,
            source="judge",
            annotator=self.backend.annotator,
            steps=[],
            cost=result.cost,
            saw_answer=self.config.show_answer,
        )
        if isinstance(result, RowError):
            return replace(labels, error=str(result))
        return replace(labels, steps=result.steps, answered_by=result.answered_by)

    def case(self, row: Mapping[str, Any]) -> JudgeCase:
        """What the solutions of a question row share, as the judge may see it."""
        config = self.config
        documents = (row.get("documents") or [])[: config.num_documents]
        references: list[JudgeImage] = []
        for image in (row.get("images") or [])[: config.num_references]:
            references.append(JudgeImage(image["uri"], image["diagnosis"]))
        notes = rows_among(self.images, "image_id", row["image_ids"])
        images = [notes[image_id] for image_id in row["image_ids"]]
        return JudgeCase(
            question_id=row["question_id"],
            question=row["question"],
            options=row["options"],
            answer=row["answer"],
            images=[JudgeImage(image["uri"], image["annotation"]) for image in images],
            documents=[document["text"] for document in documents],
            references=references,
        )


def make_judge(
    config: JudgeConfig,
    model: str | None,
    generator: MakeGenerator = Generator,
    access: Access | None = None,
) -> Judge:
    """The judge that `config` names; an API without `access` has no budget, and its answers are not stored."""
    engine = config.engine
    if isinstance(engine, PhantomEngine):
        return TruthJudge(engine.kind, engine.error_rate, config.seed)
    # The driver names the run's own policy where the recipe names no judge.
    model = model or engine.model
    if model is None:
        raise ValueError("judge.engine.kind is 'vllm' and no model is given; name one: judge.engine.model")
    if isinstance(engine, JudgeVllm):
        return _local(config, engine, model, generator)
    client = access.connect() if access else connect(engine, model, ApiConfig())

    def count(request: ChatRequest) -> int:
        """Prompt tokens, estimated: an API tells them only afterwards."""
        return estimated_prompt_tokens(request, client.price)

    # Behind an API the schema is a part of the prompt that calls share: it must not depend on the solution.
    return ModelJudge(
        config,
        model,
        client,
        count,
        engine.max_prompt_tokens,
        exact=False,
    )


def _local(config: JudgeConfig, settings: JudgeVllm, model: str, generator: MakeGenerator) -> ModelJudge:
    """A judge whose model runs in this process."""
    engine = generator(model, settings)

    def count(request: ChatRequest) -> int:
        """Tokens of the prompt and its answer, which share the model's context."""
        return engine.count(prompt_of(request)) + request.max_tokens

    name = Path(model).name
    endpoint = LocalEndpoint(engine, name)
    return ModelJudge(
        config,
        name,
        endpoint,
        count,
        settings.max_model_len,
        exact=True,
    )
