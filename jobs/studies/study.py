"""A phantom study in one process, without Ray and without sampling: what `arms` trains its arms on.

Enters: its size, how hard the pictures are, a seed. Leaves: tables, a text tower and an image tower that the real
stages have trained, and the text tower's states of every solution. Solutions are worked ones of made-up cases (a policy
that sees no picture, `phantom.blind_solution`); labels are the truth.

Legend: B images, W image width, P patches.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch._C._distributed_c10d import HashStore

from medmm_ray.config import Config
from medmm_ray.data import records
from medmm_ray.data.sources.phantom import HARD, Hardness, blind_solution, drawn_picture, generator, make_questions
from medmm_ray.data.tables import Provenance, Table, write_rows
from medmm_ray.steps.ingest import (
    IngestConfig,
    SourceConfig,
    demonstration_rows,
    drawings_of,
    image_table,
    inspect_batch,
    question_rows,
    read_sources,
)
from medmm_ray.steps.review import GoldAnswer, truth_labels
from medmm_ray.text import extract_answer, join_steps, question_with_options
from medmm_ray.train.config import TrainConfig
from medmm_ray.train.image_text import ClipShape, ImageTextConfig, ImageTextStage
from medmm_ray.train.loop import Worker, run
from medmm_ray.train.policy import LlamaShape, PolicyConfig, PolicyStage, vocabulary_texts, worked_questions
from medmm_ray.train.stage import Stage, StageFactory
from medmm_ray.train.text_prm import TextPrmConfig, TextPrmStage
from medmm_ray.train.text_prm_data import group_labels, labelled_questions

if TYPE_CHECKING:
    from medmm_ray.reward_model import SolutionStates

POLICY = "blind"
TOWER_SEED = 1 << 20  # no seed of a study


class StudyConfig(Config):
    """The study's size."""

    hardness: Hardness = HARD
    """How hard the pictures are to read."""
    questions: int = 600
    """Training questions."""
    test_questions: int = 250
    """Test questions."""
    solutions: int = 8
    """Solutions of a training question."""
    samples: int = 16
    """Solutions of a test question: the N of best-of-N."""
    slip: float = 0.25
    """Chance that one step of a solution comes from another one, so that right answers have wrong steps too."""
    library: int = 1000
    """Training images besides those of the questions, as references."""
    references: int = 3
    """Reference images of a question."""
    tower: ClipShape = ClipShape(context_length=48)
    """The image tower, one for all seeds."""
    tower_images: int = 6000
    """Captioned images that it is trained on; no question asks about them."""
    tower_epochs: int = 8
    """Epochs of its contrastive training."""
    text: LlamaShape = LlamaShape(hidden_size=192, num_layers=2, intermediate_size=384)
    """The text tower."""
    text_epochs: int = 2
    """Epochs of its training on worked solutions, before it learns to judge steps in one."""
    threads: int = 2
    """Torch threads."""


@dataclass(frozen=True)
class Study:
    """What the arms are trained and measured on; `test` holds, a question, what the text tower says of its samples."""

    folder: Path
    questions: pa.Table
    images: pa.Table
    solutions: pa.Table
    labels: pa.Table
    evidence: pa.Table
    states: Table
    test: "dict[str, list[SolutionStates]]"
    text_prm: str
    image_tower: str


def start_alone() -> None:
    """Make this process a training group of one. Once a process: DeepSpeed holds on to the first group that it sees."""
    os.environ.update(LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)


def train(make_stage: StageFactory, config: TrainConfig, inputs: dict[str, str], folder: Path) -> Stage:
    """The stage, trained by the one loop in this process; its model lies in `folder`."""
    stages: list[Stage] = []

    def make_and_keep(config: TrainConfig, inputs: dict[str, str], device: str) -> Stage:
        stages.append(make_stage(config, inputs, device))
        return stages[0]

    work = folder / ".checkpoints"
    worker = Worker(
        rank=0,
        size=1,
        name=folder.name,
        work=str(work),
        folder=str(folder),
        latest_checkpoint=lambda: None,
        save_checkpoint=lambda *_: None,
        preempted_nodes=list,
    )
    run(make_and_keep, config.model_copy(update={"trackers": ()}), inputs, worker)
    shutil.rmtree(work, ignore_errors=True)
    return stages[0]


def train_tower(config: StudyConfig, folder: Path) -> None:
    """The image tower of all seeds, by the real stage, on pictures of its own."""
    phantoms = SourceConfig(
        num_train=0,
        num_test=0,
        num_extra_images=config.tower_images,
        hardness=config.hardness,
        image_size=config.tower.image_size,
    )
    sources = read_sources(IngestConfig(sources=(phantoms,), seed=TOWER_SEED))
    images = inspect_batch(image_table(sources, str(folder.with_name("tower-images"))), drawings_of(sources))
    rows: list[dict[str, Any]] = []
    for row in images.to_pylist():
        captions = drawn_picture(row["annotation"]).captions()
        rows.append({"image_uri": row["uri"], "captions": list(captions)})
    inputs = _written(folder, captions=pa.Table.from_pylist(rows))
    settings = ImageTextConfig(
        epochs=config.tower_epochs,
        batch_size=32,
        contrast_size=32,
        learning_rate=7e-4,
        shape=config.tower,
        threads=config.threads,
    )
    train(ImageTextStage, settings, inputs, folder)


def prepare(config: StudyConfig, seed: int, folder: Path, tower: Path, say: Callable[[str], None]) -> Study:
    """Make the study of a seed in `folder`, around an image tower."""
    started = time.perf_counter()

    def report(what: str) -> None:
        say(f"seed {seed}: {what} after {time.perf_counter() - started:.0f} s")

    phantoms = SourceConfig(
        num_train=config.questions,
        num_test=config.test_questions,
        num_extra_images=config.library,
        num_worked=2,
        hardness=config.hardness,
        image_size=config.tower.image_size,
    )
    ingest = IngestConfig(sources=(phantoms,), seed=seed)
    sources = read_sources(ingest)
    images = inspect_batch(image_table(sources, str(folder / "images")), drawings_of(sources))
    question_records = question_rows(sources, images, str(folder / "images"))
    demonstrations = records.to_arrow(records.Solutions, demonstration_rows(sources, question_records, ingest))
    solutions, labels = _solutions(config, seed, question_records, images)
    questions = records.to_arrow(records.Question, question_records)
    report(f"{images.num_rows:,} pictures drawn")

    evidence = _references(config, question_records, images, tower)
    text_prm = folder / "text_prm"
    figures = _train_text(config, seed, questions, demonstrations, solutions, labels, text_prm)
    report(f"text tower trained (step AUROC {figures.get('validation_auroc', 0.5):.3f})")
    states, test = _read(question_records, solutions, text_prm, folder)
    report("states read")
    return Study(folder, questions, images, solutions, labels, evidence, states, test, str(text_prm), str(tower))


def _solutions(
    config: StudyConfig, seed: int, question_records: Sequence[records.Question], images: pa.Table
) -> tuple[pa.Table, pa.Table]:
    """The solutions of all questions and the truth of their steps."""
    pictures = {row["image_id"]: drawn_picture(row["annotation"]) for row in images.to_pylist()}
    items = [
        *make_questions(seed, "train", config.questions, 0, config.hardness),
        *make_questions(seed, "test", config.test_questions, 0, config.hardness),
    ]
    rows: list[records.Solutions] = []
    labels: list[records.Labels] = []
    for question, item in zip(question_records, items, strict=True):
        samples: list[records.Solution] = []
        for index in range(config.solutions if question.split == "train" else config.samples):
            steps, letter = blind_solution(item, generator("blind", seed, question.question_id, index), config.slip)
            text = join_steps(steps)
            assert extract_answer(text, item.options) == letter
            samples.append(
                records.Solution(
                    solution_id=f"{question.question_id}-{index}",
                    index=index,
                    text=text,
                    steps=steps,
                    answer=letter,
                    correct=letter == question.answer,
                    finish_reason="stop",
                    seed=index,
                    text_sha="",
                )
            )
            labels.append(
                truth_labels(
                    question.question_id,
                    {"solution_id": samples[-1].solution_id, "steps": steps},
                    pictures[question.image_ids[0]],
                    GoldAnswer(question.options, question.answer),
                    "judge",
                    "truth",
                    range(len(steps)),
                )
            )
        rows.append(
            records.Solutions(
                question_id=question.question_id,
                policy=POLICY,
                config_hash="",
                num_requested=len(samples),
                solutions=samples,
            )
        )
    return records.to_arrow(records.Solutions, rows), records.to_arrow(records.Labels, labels)


def _train_text(
    config: StudyConfig,
    seed: int,
    questions: pa.Table,
    demonstrations: pa.Table,
    solutions: pa.Table,
    labels: pa.Table,
    folder: Path,
) -> dict[str, float]:
    """A small policy on worked solutions, then the reward model's text tower from it; gives its last figures."""
    worked = worked_questions(questions, demonstrations)
    base = folder.with_name("policy")
    inputs = _written(base, worked=worked, texts=_texts(vocabulary_texts(worked, [])))
    policy = PolicyConfig(
        seed=seed,
        epochs=config.text_epochs,
        batch_size=16,
        learning_rate=2e-3,
        shape=config.text,
        threads=config.threads,
    )
    train(PolicyStage, policy, inputs, base)
    nothing = records.to_arrow(records.Evidence, [])
    rows = labelled_questions(questions, nothing, solutions, group_labels([labels]), "judge", "keep")
    settings = TextPrmConfig(
        seed=seed,
        label_policy="judge",
        after_first_error="keep",
        learning_rate=5e-4,
        epochs=1,
        max_length=1024,
        reserve=512,
        threads=config.threads,
    )
    stage = train(TextPrmStage, settings, {**_written(folder, questions=rows), "base": str(base)}, folder)
    with torch.no_grad():
        return stage.validate()


def _references(
    config: StudyConfig, question_records: Sequence[records.Question], images: pa.Table, tower: Path
) -> pa.Table:
    """The training images nearest to each question's own in the tower's embedding, never the own one."""
    from medmm_ray.engines.image_tower import ImageTower
    from medmm_ray.engines.images import open_image

    model = ImageTower.from_pretrained(tower)
    rows = images.to_pylist()
    place: dict[str, int] = {}
    is_train: list[bool] = []
    for i, row in enumerate(rows):
        place[row["image_id"]] = i
        is_train.append(row["split"] == "train")
    eligible_B = torch.tensor(is_train)
    vectors: list[torch.Tensor] = []
    for start in range(0, len(rows), 64):
        pixels: list[torch.Tensor] = []
        for row in rows[start : start + 64]:
            pixels.append(model.preprocess(open_image(row["uri"])))
        vectors.append(model.embed(torch.stack(pixels)))
    vectors_BE = torch.cat(vectors).detach()
    evidence: list[records.Evidence] = []
    for question in question_records:
        own_row = place[question.image_ids[0]]
        similarity_B = vectors_BE @ vectors_BE[own_row]
        # Below any cosine: a test picture, or the question's own, is no similar case.
        similarity_B = similarity_B.masked_fill(~eligible_B, -2.0)
        similarity_B[own_row] = -2.0
        nearest = similarity_B.topk(config.references)
        references: list[records.RetrievedImage] = []
        for similarity, i in zip(nearest.values.tolist(), nearest.indices.tolist(), strict=True):
            row = rows[i]
            references.append(
                records.RetrievedImage(
                    image_id=row["image_id"], uri=row["uri"], diagnosis=row["diagnosis"], similarity=similarity
                )
            )
        evidence.append(
            records.Evidence(question_id=question.question_id, config_hash="", documents=[], images=references)
        )
    return records.to_arrow(records.Evidence, evidence)


def _read(
    question_records: Sequence[records.Question], solutions: pa.Table, text_prm: Path, folder: Path
) -> "tuple[Table, dict[str, list[SolutionStates]]]":
    """The table states of the training questions, and the states of the test questions."""
    from medmm_ray.reward_model import RewardModel, ScoreRequest
    from medmm_ray.reward_model.states import to_bytes

    model = RewardModel.from_pretrained(text_prm)
    solutions_by_question = {row["question_id"]: row["solutions"] for row in solutions.to_pylist()}
    requests: list[ScoreRequest] = []
    for question in question_records:
        steps = [solution["steps"] for solution in solutions_by_question[question.question_id]]
        requests.append(ScoreRequest(question_with_options(question.question, question.options), steps))
    rows: list[records.States] = []
    test: dict[str, list[SolutionStates]] = {}
    for question, (_, states) in zip(question_records, model.iter_states(requests), strict=True):
        if question.split == "test":
            test[question.question_id] = states
            continue
        for solution, state in zip(solutions_by_question[question.question_id], states, strict=True):
            rows.append(
                records.States(
                    question_id=question.question_id,
                    solution_id=solution["solution_id"],
                    model="text_prm",
                    evidence_hash="",
                    num_steps=len(state.log_odds_T),
                    hidden_size=model.hidden_size,
                    dtype="float32",
                    states=to_bytes(state.states_TD),
                    summaries=to_bytes(state.summaries_TD),
                    text_log_odds=state.log_odds_T.tolist(),
                )
            )
    table = Table(str(folder / "states"), records.States)
    write_rows(table, rows, Provenance(name="states", fingerprint="study", config={}, upstream={}), "solution_id")
    return table, test


def _texts(texts: Sequence[Any]) -> pa.Table:
    return pa.table({"text": pa.array(sorted(texts), pa.string())})


def _written(folder: Path, **tables: pa.Table) -> dict[str, str]:
    """Tables as files beside `folder`, where a stage reads them."""
    inputs = folder.with_name(f"{folder.name}-inputs")
    inputs.mkdir(parents=True)
    for name, table in tables.items():
        pq.write_table(table, inputs / f"{name}.parquet")
    return {name: str(inputs / f"{name}.parquet") for name in tables}
