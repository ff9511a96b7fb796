"""A toy study as the training stages' inputs, and small untrained models of it."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medmm_ray.data import records
from medmm_ray.data.tables import Provenance, Table, write_rows
from medmm_ray.train.image_text import ClipShape, ImageTextConfig, ImageTextStage
from medmm_ray.train.loop import Worker
from medmm_ray.train.policy import LlamaShape, PolicyConfig, PolicyStage, vocabulary_texts, worked_questions
from medmm_ray.train.text_prm_data import group_labels, labelled_questions
from medmm_ray.train.two_tower import TwoTowerConfig
from medmm_ray.train.two_tower_data import located_states, questions_with_images, states_files
from tests.train import toy

SHAPE = LlamaShape(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=32, vocab_size=512)
CLIP = ClipShape(
    image_size=32, width=32, num_layers=2, num_text_layers=1, num_heads=2, embed_dim=16, context_length=12,
    vocab_size=512,
)  # fmt: skip


class KilledError(Exception):
    """Stands for a kill after so many checkpoints."""


class Keeper:
    """A worker's ways to keep things: folders beside the artifact's; ends itself after `limit` checkpoints.

    `taken` are the machines that are about to be taken away.
    """

    def __init__(self, folder: Path, limit: int | None = None, rank: int = 0, size: int = 1) -> None:
        self.folder, self.limit, self.rank, self.size = folder, limit, rank, size
        self.kept: list[Path] = sorted(folder.parent.glob(f"{folder.name}-kept-*"))
        self.taken: list[str] = []

    def worker(self) -> Worker:
        work = f"{self.folder}/.checkpoints"
        return Worker(self.rank, self.size, "toy", work, str(self.folder), self.latest, self.keep, self.notice)

    def latest(self) -> str | None:
        return str(self.kept[-1]) if self.kept else None

    def keep(self, scratch: str, metrics: dict[str, float]) -> None:
        target = Path(f"{self.folder}-kept-{len(self.kept):03}")
        shutil.copytree(scratch, target, dirs_exist_ok=True)  # every worker adds its files
        self.kept.append(target)
        assert metrics["updates"] > 0
        if self.limit is not None and len(self.kept) >= self.limit:
            raise KilledError

    def notice(self) -> list[str]:
        return self.taken


def history(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "history.json").read_text())
    return read


def curve(folder: Path) -> list[float]:
    """The loss of each update."""
    return [row["loss"] for row in history(folder)["updates"]]


@pytest.fixture(scope="session")
def group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for the whole test run: DeepSpeed keeps what it has found of the first."""
    import torch

    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def lone_group(group_of_one: None) -> Iterator[None]:
    """This process as a process group of one."""
    before = dict(os.environ)
    os.environ.update(LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    yield
    os.environ.clear()
    os.environ.update(before)


def written(folder: Path, **tables: pa.Table) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet")
    return {name: str(folder / f"{name}.parquet") for name in tables}


def text_column(texts: list[str]) -> pa.Table:
    return pa.table({"text": pa.array(texts, pa.string())})


@pytest.fixture(scope="session")
def policy_inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    worked = worked_questions(
        toy.table(records.Question, toy.questions()), toy.table(records.Solutions, toy.solutions())
    )
    texts = vocabulary_texts(worked, ["Bright pictures have much light."])
    return written(tmp_path_factory.mktemp("policy"), worked=worked, texts=text_column(texts))


@pytest.fixture(scope="session")
def policy(policy_inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained policy's checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    PolicyStage(PolicyConfig(shape=SHAPE), policy_inputs, "cpu").save(folder, {})
    return folder


def labelled(each: int = 4) -> pa.Table:
    solutions = toy.solutions(each=each)
    labels = group_labels([toy.table(records.Labels, toy.judge_labels(solutions))])
    return labelled_questions(
        toy.table(records.Question, toy.questions()), toy.table(records.Evidence, toy.evidence()),
        toy.table(records.Solutions, solutions), labels, "judge",
    )  # fmt: skip


@pytest.fixture(scope="session")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained image tower's folder."""
    folder = tmp_path_factory.mktemp("tower")
    stage = image_text_stage(folder)
    stage.save(folder / "tower", {})
    return folder / "tower"


def image_text_stage(folder: Path, **settings: Any) -> ImageTextStage:
    rows = [
        {"image_uri": image.uri, "captions": [f"The picture is {image.diagnosis}.", image.diagnosis]}
        for image in toy.images(folder)
    ]
    inputs = written(folder, captions=pa.Table.from_pylist(rows))
    return ImageTextStage(ImageTextConfig(shape=CLIP, contrast_size=6, **settings), inputs, "cpu")


def states_table(folder: Path, prm: Path) -> Table:
    """States of the toy's solutions by the text tower in `prm`."""
    from medmm_ray.reward_model import RewardModel

    model = RewardModel.from_pretrained(prm)
    rows = []
    for row in labelled(each=4).to_pylist():
        steps = [solution["steps"] for solution in row["solutions"]]
        for solution, state in zip(
            row["solutions"], model.text_states(row["question"], steps, row["documents"]), strict=True
        ):
            rows.append(
                records.States(
                    question_id=row["question_id"], solution_id=solution["solution_id"], model="m", evidence_hash="e",
                    num_steps=3, hidden_size=model.hidden_size, dtype="float32",
                    states=state.states_TD.numpy().tobytes(), summaries=state.summaries_TD.numpy().tobytes(),
                    text_log_odds=state.log_odds_T.tolist(),
                )
            )  # fmt: skip
    table = Table(str(folder / "states"), records.States)
    write_rows(table, rows, Provenance(name="states", fingerprint="f", config={}, upstream={}), "solution_id")
    return table


@pytest.fixture(scope="session")
def two_tower_inputs(tower: Path, policy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("two_tower")
    table = states_table(folder, policy)
    return {
        **written(
            folder, questions=illustrated(folder, table, TwoTowerConfig(label_policy="judge")),
            files=states_files([table]),
        ),
        "states": table.uri, "text_prm": str(policy), "image_tower": str(tower),
    }  # fmt: skip


def illustrated(folder: Path, states: Table, config: TwoTowerConfig) -> pa.Table:
    images = toy.images(folder)
    references = [
        records.RetrievedImage(image_id=i.image_id, uri=i.uri, diagnosis=i.diagnosis, similarity=0.5) for i in images
    ]
    evidence = [
        records.Evidence(**{**row.__dict__, "images": references[n - 5 : n]}) for n, row in enumerate(toy.evidence(), 1)
    ]
    return questions_with_images(
        pa.concat_tables(located_states(states_files([states]))),
        group_labels([toy.table(records.Labels, toy.judge_labels(toy.solutions(each=4)))]),
        toy.table(records.Question, toy.questions()), toy.table(records.Image, images),
        toy.table(records.Evidence, evidence), toy.table(records.Solutions, toy.solutions(each=4)),
        config.label_policy, config.after_first_error, config.num_references,
    )  # fmt: skip
