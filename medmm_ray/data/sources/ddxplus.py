"""DDXPlus: a simulated patient's symptoms, and which of the likely diseases it is (Fansi Tchango et al. 2022).

`path` is a folder with release_evidences.json and CSV files named by their split (release_test_patients.csv, or the
unpacked name without an ending does not count). Options are the patient's own differential diagnosis, in its order of
probability; the true disease is among them, or the row is an error.
"""

import ast
from collections.abc import Mapping
from typing import Any

from medmm_ray.data.columns import text_at
from medmm_ray.data.rows import list_tables, read_rows
from medmm_ray.data.source_files import read_json
from medmm_ray.data.sources import SourceData, SourceQuestion, SourceRequest
from medmm_ray.data.tables import RowError

MAX_OPTIONS = 10
_SPLITS = {"train": "train", "validate": "validation", "test": "test"}


def read(request: SourceRequest) -> SourceData:
    """The patients of all files in their order."""
    folder = request.path.rstrip("/")
    evidences = read_json(f"{folder}/release_evidences.json")
    limits = {"train": request.num_train, "test": request.num_test}
    questions: list[SourceQuestion] = []
    for uri in list_tables(folder):
        file = uri.rpartition("/")[2]
        if not file.endswith(".csv"):
            continue
        split = next((split for word, split in _SPLITS.items() if word in file), "train")
        for number, row in enumerate(read_rows(uri)):
            if number == limits.get(split):
                break
            questions.append(
                _question(
                    f"{file}-{number}",
                    split,
                    row,
                    evidences,
                    f"{uri} row {number}",
                )
            )
    return SourceData(questions=questions)


def _question(
    name: str,
    split: str,
    row: Mapping[str, Any],
    evidences: Mapping[str, Any],
    where: str,
) -> SourceQuestion:
    sex = {"M": "man", "F": "woman"}.get(text_at(row, "SEX", where), "person")
    lines = [f"The patient is a {sex} of {text_at(row, 'AGE', where)} years, who says:"]
    error = None
    options: list[str] = []
    try:
        for code in _list(row, "EVIDENCES", where):
            lines.append(_line(code, evidences))
        # Of some patients it names forty: a choice has at most ten.
        options = [disease for disease, _ in _list(row, "DIFFERENTIAL_DIAGNOSIS", where)[:MAX_OPTIONS]]
    except RowError as fault:
        error = str(fault)
    return SourceQuestion(
        name=name,
        split=split,
        modality="clinical",
        question="\n".join([*lines, "What is the diagnosis?"]),
        options=options,
        answer=text_at(row, "PATHOLOGY", where),
        answer_type="choice",
        error=error,
    )


def _list(
    row: Mapping[str, Any],
    column: str,
    where: str,
) -> list[Any]:
    """A list that the file has as a Python literal."""
    try:
        value = ast.literal_eval(text_at(row, column, where))
    except (ValueError, SyntaxError):
        raise RowError("list_unreadable", f"{where}: {column} is no list") from None
    return list(value)


def _line(code: str, evidences: Mapping[str, Any]) -> str:
    """An evidence in words: ``E_55_@_V_89`` is a question, and the value with which it was answered."""
    name, _, value = code.partition("_@_")
    # What the file of evidences does not name keeps its code.
    evidence = evidences.get(name, {})
    question = evidence.get("question_en", name)
    if not value:
        return f"- {question} Yes."
    meaning = evidence.get("value_meaning", {}).get(value, {})
    return f"- {question} {meaning.get('en', value)}."
