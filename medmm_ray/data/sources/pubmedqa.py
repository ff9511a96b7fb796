"""PubMedQA's labelled questions, from ori_pqal.json and test_ground_truth.json (Jin et al. 2019).

The questions that test_ground_truth.json names are the test set, the other 500 training. Each question's own abstract
comes as documents of the corpus ``pubmedqa``, a passage a section.
"""

from typing import Annotated

from pydantic import Field

from medmm_ray.data.source_files import Entry, checked, read_json
from medmm_ray.data.sources import SourceData, SourceDocument, SourceQuestion, SourceRequest
from medmm_ray.data.sources.mirage import JUDGED, Judged
from medmm_ray.text import LETTERS


class _Row(Entry):
    question: Annotated[str, Field(alias="QUESTION")]
    contexts: Annotated[list[str], Field(alias="CONTEXTS")]
    final_decision: Judged


def read(request: SourceRequest) -> SourceData:
    """The questions of both splits, and their abstracts."""
    folder = request.path.rstrip("/")
    test_names = set(read_json(f"{folder}/test_ground_truth.json"))
    limits = {"train": request.num_train, "test": request.num_test}
    num_read = {"train": 0, "test": 0}
    questions: list[SourceQuestion] = []
    documents: list[SourceDocument] = []
    uri = f"{folder}/ori_pqal.json"
    for name, entry in read_json(uri).items():
        row = checked(_Row, entry, f"{uri} entry {name}")
        split = "test" if name in test_names else "train"
        limit = limits[split]
        if limit is not None and num_read[split] >= limit:
            continue
        num_read[split] += 1
        questions.append(_question(name, split, row))
        for text in row.contexts:
            documents.append(SourceDocument(corpus="pubmedqa", title="", text=text))
    return SourceData(questions=questions, documents=documents)


def _question(
    name: str,
    split: str,
    row: _Row,
) -> SourceQuestion:
    return SourceQuestion(
        name=name,
        split=split,
        modality="clinical",
        question=row.question.strip(),
        options=JUDGED,
        answer=LETTERS[JUDGED.index(row.final_decision)],
        answer_type="choice",
    )
