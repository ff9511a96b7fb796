"""MIRAGE: 7,663 medical questions of five sets, in the numbering of its leaderboard (Xiong et al. 2024).

`path` is the folder with ``rawdata/``: MMLU's six medical sets, MedQA-US (4 options), MedMCQA's development set,
PubMedQA's test set without its abstracts, BioASQ's yes/no questions of 2019 to 2023. All are test questions and
choices; a name is ``<set>/<id>``, as in the leaderboard's files of predictions.
"""

import csv
import io
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from medmm_ray.data.source_files import Entry, Options, Words, checked, list_files, read_json, read_jsonl, read_text
from medmm_ray.data.sources import SourceData, SourceQuestion, SourceRequest
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
BIOASQ = (
    "Task7BGoldenEnriched",
    "Task8BGoldenEnriched",
    "Task9BGoldenEnriched",
    "Task10BGoldenEnriched",
    "Task11BGoldenEnriched",
)


def _plain(judged: Any) -> Any:
    return judged.strip().lower() if isinstance(judged, str) else judged


Judged = Annotated[Literal["yes", "no", "maybe"], BeforeValidator(_plain)]


class _MedQA(Entry):
    question: str
    options: Options
    answer_idx: str
    meta_info: Words = ""


class _MedMCQA(Entry):
    id: str
    question: str
    opa: str
    opb: str
    opc: str
    opd: str
    subject_name: Words = ""
    cop: Annotated[int, Field(ge=1, le=4)]


class _PubMedQA(Entry):
    question: Annotated[str, Field(alias="QUESTION")]
    final_decision: Judged


class _BioASQType(Entry):
    type: str


class _BioASQ(Entry):
    id: str
    body: str
    exact_answer: Judged


def read(request: SourceRequest) -> SourceData:
    """The questions of all five sets; `num_test` limits each of them."""
    folder = f"{request.path.rstrip('/')}/rawdata"
    questions = []
    for read_set in SETS.values():
        # The whole set, so that a fault behind the limit is found too.
        questions += list(read_set(folder))[: request.num_test]
    return SourceData(questions=questions)


def _mmlu(folder: str) -> Iterator[SourceQuestion]:
    for subject in MMLU:
        uri = f"{folder}/mmlu/data/test/{subject}_test.csv"
        # A row is the question, its options and the answer's letter; there is no header.
        for number, row in enumerate(csv.reader(io.StringIO(read_text(uri)))):
            yield _question(
                f"mmlu/{subject}-{number:03d}",
                row[0],
                row[1:-1],
                row[-1],
                subject,
            )


def _medqa(folder: str) -> Iterator[SourceQuestion]:
    uri = f"{folder}/medqa/data_clean/questions/US/4_options/phrases_no_exclude_test.jsonl"
    for number, row in enumerate(read_jsonl(_MedQA, uri)):
        yield _question(
            f"medqa/{number:04d}",
            row.question,
            row.options,
            row.answer_idx,
            row.meta_info,
        )


def _medmcqa(folder: str) -> Iterator[SourceQuestion]:
    for row in read_jsonl(_MedMCQA, f"{folder}/medmcqa/data/dev.json"):
        options = [row.opa, row.opb, row.opc, row.opd]
        yield _question(
            f"medmcqa/dev_{row.id}",
            row.question,
            options,
            LETTERS[row.cop - 1],
            row.subject_name,
        )


def _pubmedqa(folder: str) -> Iterator[SourceQuestion]:
    uri = f"{folder}/pubmedqa/data/test_set.json"
    for name, entry in read_json(uri).items():
        row = checked(
            _PubMedQA,
            entry,
            f"{uri} entry {name}",
        )
        yield _question(
            f"pubmedqa/{name}",
            row.question,
            JUDGED,
            LETTERS[JUDGED.index(row.final_decision)],
        )


def _bioasq(folder: str) -> Iterator[SourceQuestion]:
    for task in BIOASQ:
        for uri in list_files(f"{folder}/bioasq/{task}", ".json"):
            for number, entry in enumerate(read_json(uri)["questions"]):
                where = f"{uri} entry {number}"
                # Questions of other types have answers of another form: only the type of all is checked.
                if checked(_BioASQType, entry, where).type == "yesno":
                    row = checked(_BioASQ, entry, where)
                    letter = LETTERS[JUDGED.index(row.exact_answer)]
                    yield _question(
                        f"bioasq/{row.id}",
                        row.body,
                        JUDGED[:2],
                        letter,
                    )


SETS: dict[str, Callable[[str], Iterator[SourceQuestion]]] = {
    "mmlu": _mmlu,
    "medqa": _medqa,
    "medmcqa": _medmcqa,
    "pubmedqa": _pubmedqa,
    "bioasq": _bioasq,
}


def _question(name: str, question: str, options: Any, answer: str, topic: str = "") -> SourceQuestion:
    return SourceQuestion(
        name=name,
        dataset=name.partition("/")[0],
        topic=topic,
        split="test",
        modality="clinical",
        question=question.strip(),
        options=list(options),
        answer=answer,
        answer_type="choice",
    )
