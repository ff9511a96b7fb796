"""MIRAGE: 7,663 medical questions of five sets, in the numbering of its leaderboard (Xiong et al. 2024).

`path` is the folder with ``rawdata/``: MMLU's six medical sets, MedQA-US (4 options), MedMCQA's development set,
PubMedQA's test set without its abstracts, BioASQ's yes/no questions of 2019 to 2023. All are test questions and
choices; a name is ``<set>/<id>``, as in the leaderboard's files of predictions.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

from medmm_ray.sources import (
    Request,
    SourceData,
    SourceQuestion,
    list_files,
    read_documents,
    read_json,
    read_lines,
    read_text,
    require,
)
from medmm_ray.text import LETTERS

MMLU = (
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "medical_genetics",
    "professional_medicine",
)
JUDGED = ("yes", "no", "maybe")
BIOASQ = ("Task7BGoldenEnriched", "Task8BGoldenEnriched", "Task9BGoldenEnriched", "Task10BGoldenEnriched",
          "Task11BGoldenEnriched")  # fmt: skip


def read(request: Request) -> SourceData:
    """The questions of all five sets; `num_test` limits each of them."""
    folder = f"{request.path.rstrip('/')}/rawdata"
    questions = [q for rows in SETS.values() for q in list(rows(folder))[: request.num_test]]
    return SourceData(questions=questions, documents=read_documents(request.documents_path))


def _mmlu(folder: str) -> Iterator[SourceQuestion]:
    for subject in MMLU:
        uri = f"{folder}/mmlu/data/test/{subject}_test.csv"
        for number, row in enumerate(csv.reader(io.StringIO(read_text(uri)))):
            yield _question(f"mmlu/{subject}-{number:03d}", row[0], row[1:-1], row[-1])


def _medqa(folder: str) -> Iterator[SourceQuestion]:
    uri = f"{folder}/medqa/data_clean/questions/US/4_options/phrases_no_exclude_test.jsonl"
    for number, row in enumerate(_rows(uri, ("question", "options", "answer_idx"))):
        yield _question(f"medqa/{number:04d}", row["question"], list(row["options"].values()), row["answer_idx"])


def _medmcqa(folder: str) -> Iterator[SourceQuestion]:
    for row in _rows(f"{folder}/medmcqa/data/dev.json", ("id", "question", "opa", "opb", "opc", "opd", "cop")):
        options = [row[f"op{letter}"] for letter in "abcd"]
        yield _question(f"medmcqa/dev_{row['id']}", row["question"], options, LETTERS[row["cop"] - 1])


def _pubmedqa(folder: str) -> Iterator[SourceQuestion]:
    uri = f"{folder}/pubmedqa/data/test_set.json"
    for name, row in read_json(uri).items():
        require(row, ("QUESTION", "final_decision"), f"{uri} entry {name}")
        yield _question(f"pubmedqa/{name}", row["QUESTION"], JUDGED, _letter(row["final_decision"]))


def _bioasq(folder: str) -> Iterator[SourceQuestion]:
    for task in BIOASQ:
        for uri in list_files(f"{folder}/bioasq/{task}", ".json"):
            for row in read_json(uri)["questions"]:
                if row["type"] == "yesno":
                    yield _question(f"bioasq/{row['id']}", row["body"], JUDGED[:2], _letter(row["exact_answer"]))


SETS: dict[str, Callable[[str], Iterator[SourceQuestion]]] = {
    "mmlu": _mmlu,
    "medqa": _medqa,
    "medmcqa": _medmcqa,
    "pubmedqa": _pubmedqa,
    "bioasq": _bioasq,
}


def _rows(uri: str, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(read_lines(uri), 1):
        row = json.loads(line)
        require(row, columns, f"{uri} line {number}")
        yield row


def _letter(judged: str) -> str:
    return LETTERS[JUDGED.index(judged.strip().lower())]


def _question(name: str, question: str, options: Any, answer: str) -> SourceQuestion:
    return SourceQuestion(
        name=name,
        split="test",
        modality="clinical",
        question=question.strip(),
        options=list(options),
        answer=answer,
        answer_type="choice",
    )
