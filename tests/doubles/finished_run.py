"""A run that is finished, made without its engines: drawn pictures, scores and labels of `synthetic`, a tiny model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.evaluate import OUTCOMES
from jobs.graph import MAKER
from jobs.step import Job, Run, load_recipe
from medmm_ray.data.datasets import data_sets
from medmm_ray.data.json_documents import to_json
from medmm_ray.data.records import (
    Evidence,
    Image,
    Labels,
    Question,
    RetrievedDocument,
    RetrievedImage,
    Scores,
    Solutions,
    from_dict,
)
from medmm_ray.steps.audit import AuditConfig, audit
from medmm_ray.steps.evaluate import EvaluateConfig, evaluate
from tests.doubles import synthetic, tiny_reward_model

TINY = "jobs/recipes/tiny.yaml"
KEYS = {"questions": "question_id", "images": "image_id", "evidence": "question_id", "solutions": "question_id",
        "scores": "solution_id", "judge_labels": "solution_id", "expert_labels": "solution_id"}  # fmt: skip
RECORDS: Mapping[str, type] = {"questions": Question, "images": Image, "solutions": Solutions, "scores": Scores}


@dataclass(frozen=True)
class FinishedRun:
    """The recipe and settings of the run, and the run."""

    words: list[str]
    run: Run


def make(folder: Path, sources: Mapping[str, int]) -> FinishedRun:
    """A run of as many questions of each source, in the order of their ids, each source with a folder of pictures.

    The first question's evidence has a text of the corpus ``textbooks`` and the last question's picture.
    """
    (folder / "pictures").mkdir(parents=True)
    tables = synthetic.run(folder / "pictures", num_questions=sum(sources.values()), num_samples=4)
    rows = {name: [from_dict(RECORDS[name], row) for row in tables[name].to_pylist()] for name in RECORDS}
    names = [name for name, number in sources.items() for _ in range(number)]
    for place, name in enumerate(names):
        target = folder / name / f"{rows['images'][place].image_id}.png"
        target.parent.mkdir(exist_ok=True)
        Path(rows["images"][place].uri).rename(target)
        rows["images"][place] = replace(rows["images"][place], uri=str(target))
        text = f"{rows['questions'][place].question} ({name} {place})"
        rows["questions"][place] = replace(rows["questions"][place], source=name, dataset=name, question=text)
    rows["evidence"] = [_evidence(rows["questions"][0].question_id, rows["images"][-1])]
    judged, others = tables["labels"]
    rows["judge_labels"] = [from_dict(Labels, row) for row in judged.to_pylist()]
    rows["expert_labels"] = [from_dict(Labels, row) for row in others.to_pylist() if row["source"] == "expert"]
    entries = []
    for name in sources:
        reader = "" if name in data_sets() else ", reader: table"
        entries.append(f"{{name: {name}, path: {folder / name}{reader}}}")
    words = [TINY, f"run={folder / 'run'}", "max_error_rate=1.0", f"ingest.sources=[{', '.join(entries)}]"]
    run = Run(load_recipe(words))
    for name, key in KEYS.items():
        Job(run, MAKER[name]).make_rows(name, rows[name], key)
    Job(run, MAKER["two_tower"]).make_artifact("two_tower", lambda uri: _write_model(folder / "base", uri))
    shown = {**tables, "questions": run.table("questions").to_arrow(), "images": run.table("images").to_arrow()}
    Job(run, MAKER["report"]).make_artifact("report", lambda uri: _write_report(shown, uri))
    Job(run, MAKER["dataset_report"]).make_artifact("dataset_report", lambda uri: _write_audit(shown, uri))
    return FinishedRun(words, run)


def _evidence(question_id: str, image: Image) -> Evidence:
    document = RetrievedDocument(document_id="d1", text="A page of a textbook.", score=1.0, corpus="textbooks")
    reference = RetrievedImage(image_id=image.image_id, uri=image.uri, diagnosis=image.diagnosis, similarity=0.9)
    return Evidence(question_id=question_id, config_hash="e", documents=[document], images=[reference])


def _write_model(base: Path, uri: str) -> dict[str, float]:
    from medmm_ray.reward_model import RewardModel

    RewardModel.from_pretrained(tiny_reward_model.save(base)).save_pretrained(uri, figures={"loss": 0.25})
    file = Path(uri) / "reward_model.json"
    described = json.loads(file.read_text())
    described["text_tower"] |= {"source": "org/base", "revision": "c0ffee"}  # as of a model from the hub
    file.write_text(json.dumps(described))
    return {}


def _write_report(tables: Mapping[str, Any], uri: str) -> dict[str, float]:
    evaluation = evaluate(EvaluateConfig(bootstrap_samples=50), **tables, settings={"sample": {"lora": "/home/a/lora"}})
    (Path(uri) / "report.json").write_bytes(to_json(evaluation.report))
    pq.write_table(evaluation.outcomes, Path(uri) / OUTCOMES)
    return {}


def _write_audit(tables: Mapping[str, pa.Table], uri: str) -> dict[str, float]:
    report = audit(
        AuditConfig(bootstrap_samples=50),
        questions=[tables["questions"]],
        images=[tables["images"]],
        solutions=[tables["solutions"]],
        labels={"judge_labels": tables["labels"][:1], "expert_labels": tables["labels"][1:]},
    )
    (Path(uri) / "dataset_report.json").write_bytes(to_json(report))
    return {}
