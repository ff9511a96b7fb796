"""BioMRC: which entity of an abstract stands in the place of XXXX in its title (Pappas et al. 2020).

`path` is a folder with dataset_train.json, dataset_val.json and dataset_test.json, each an object of lists: abstracts,
titles, entities_list and answers. Options are an abstract's entities; more than 26 are no choice, and left out.
"""

from medmm_ray.data.source_files import Entry, checked, list_files, read_json
from medmm_ray.data.sources import SourceData, SourceQuestion, SourceRequest
from medmm_ray.text import LETTERS

_SPLITS = {"train": "train", "val": "validation", "test": "test"}


class _Columns(Entry):
    abstracts: list[str]
    titles: list[str]
    entities_list: list[list[str]]
    answers: list[str]


def read(request: SourceRequest) -> SourceData:
    """The questions of all splits whose files are there."""
    limits = {"train": request.num_train, "test": request.num_test}
    questions: list[SourceQuestion] = []
    for uri in list_files(request.path, ".json"):
        file = uri.rpartition("/")[2].removesuffix(".json")
        split = _SPLITS.get(file.rpartition("_")[2], "train")
        columns = checked(_Columns, read_json(uri), uri)
        # The limit counts questions that can be asked.
        of_file = []
        for number in range(len(columns.titles)):
            question = _question(
                f"{file}-{number}",
                split,
                columns,
                number,
            )
            if len(question.options) <= len(LETTERS):
                of_file.append(question)
        questions += of_file[: limits.get(split)]
    return SourceData(questions=questions)


def _question(
    name: str,
    split: str,
    columns: _Columns,
    number: int,
) -> SourceQuestion:
    # An entity is "@entity12 :: ['aspirin']": the mark stands in the texts too.
    return SourceQuestion(
        name=name,
        split=split,
        modality="clinical",
        question=f"{columns.abstracts[number].strip()}\n\n{columns.titles[number].strip()}",
        options=columns.entities_list[number],
        answer=columns.answers[number],
        answer_type="choice",
    )
