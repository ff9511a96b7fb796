"""Published data sets: what there is, how to get one, whether a copy is whole, hashes of its test set.

python -m jobs.datasets                               # all data sets that are declared
python -m jobs.datasets slake                         # one: licence, access, how to get it, expected counts
python -m jobs.datasets slake --check FOLDER          # read a copy, and compare its counts with those declared
python -m jobs.datasets slake --download FOLDER       # from the hub, where its terms allow that
python -m jobs.datasets slake --hash FOLDER --to FILE # hashes of its test set, for curate.guard
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from rich.console import Console
from rich.table import Table

from jobs.entry import guarded
from medmm_ray.config import ConfigError
from medmm_ray.data import hub_files
from medmm_ray.data.benchmark_hashes import hash_questions, save
from medmm_ray.data.datasets import DataSet, data_sets
from medmm_ray.data.sources import SourceData
from medmm_ray.data.tables import RowError
from medmm_ray.steps.ingest import SourceConfig, checked_answer, read_source


def main(words: Sequence[str] | None = None) -> int:
    """``python -m jobs.datasets``."""
    parser = argparse.ArgumentParser(
        "python -m jobs.datasets", description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="a data set; none: list all")
    parser.add_argument("--check", metavar="FOLDER", help="a copy that is read, its counts compared")
    parser.add_argument("--download", metavar="FOLDER", help="where the hub's files are put")
    parser.add_argument("--hash", metavar="FOLDER", help="a copy whose test set is hashed")
    parser.add_argument("--to", metavar="FILE", default="", help="where the hashes are written (.parquet)")
    arguments = parser.parse_args(words)
    return guarded(lambda: _main(arguments, Console()))


def _main(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.name is None:
        console.print(listing())
        return 0
    data_set = declared(arguments.name)
    if arguments.check:
        return _check(arguments.name, data_set, arguments.check, console)
    if arguments.download:
        download(data_set, arguments.download)
        console.print(f"{data_set.title} lies in {arguments.download}")
        return 0
    if arguments.hash:
        return _hash(arguments.name, arguments.hash, arguments.to, console)
    for line in description(data_set):
        console.print(line, highlight=False, soft_wrap=True)
    return 0


def declared(name: str) -> DataSet:
    """The declaration of a data set; a `ConfigError` names those that there are."""
    if name not in data_sets():
        raise ConfigError(f"{name!r} is no declared data set; those are {', '.join(data_sets())}")
    return data_sets()[name]


def listing() -> Table:
    """All declared data sets, one a line."""
    table = Table(title=f"{len(data_sets())} data sets", title_justify="left")
    for column in ("name", "brings", "modality", "train", "test", "access", "licence", "benchmark"):
        justify: Literal["left", "right"] = "right" if column in ("train", "test") else "left"
        table.add_column(column, justify=justify, no_wrap=column == "name", min_width=20 if column == "name" else None)
    for name, data_set in data_sets().items():
        table.add_row(
            name,
            data_set.brings,
            data_set.modality,
            _number(data_set, "train"),
            _number(data_set, "test"),
            data_set.access,
            data_set.licence,
            "yes" if data_set.benchmark else "",
        )
    return table


def _number(data_set: DataSet, split: str) -> str:
    return f"{data_set.counts[split]:,}" if split in data_set.counts else ""


def description(data_set: DataSet) -> list[str]:
    """What is declared of a data set, in lines."""
    counts = ", ".join(f"{split} {count:,}" for split, count in data_set.counts.items()) or "not stated"
    what = "pictures" if data_set.brings == "pictures" else "questions"
    hub = f"hub: {data_set.hub} at {data_set.revision}" if data_set.hub else "hub: not there"
    return [
        f"{data_set.title}: {data_set.about}",
        f"licence: {data_set.licence}; access: {data_set.access}",
        f"get: {data_set.get}",
        hub,
        f"{what}: {counts}",
    ]


def _check(name: str, data_set: DataSet, folder: str, console: Console) -> int:
    data = read_source(SourceConfig(name=name, path=folder))
    lines, is_whole = compared(name, data_set, data)
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    return 0 if is_whole else 1


def compared(name: str, data_set: DataSet, data: SourceData) -> tuple[list[str], bool]:
    """What a copy has beside what is declared, in lines; and whether every split that it has is whole."""
    rows = data.images if data_set.brings == "pictures" else data.questions
    counts = Counter(row.split for row in rows)
    is_whole = True
    lines = []
    for split in sorted({*counts, *data_set.counts}):
        expected = data_set.counts.get(split)
        verdict = "not declared"
        if expected is not None and split not in counts:
            verdict = f"missing; {expected:,} are declared"
        elif expected is not None:
            verdict = "as declared" if counts[split] == expected else f"WRONG: {expected:,} are declared"
            is_whole &= counts[split] == expected
        lines.append(f"{name} {split}: {counts[split]:,} ({verdict})")
    faults: Counter[str] = Counter()
    for question in data.questions:
        try:
            checked_answer(question)
        except RowError as fault:
            faults[fault.kind] += 1
    for kind, count in faults.most_common():
        lines.append(f"{name}: {count:,} questions with the error {kind}")
    return lines, is_whole


def download(data_set: DataSet, folder: str) -> None:
    """The hub's files of a data set in `folder`; a `ConfigError` where its terms forbid that, or it is not there."""
    if not data_set.hub or data_set.access == "credentialed":
        raise ConfigError(f"{data_set.title} cannot be downloaded from here ({data_set.access}). {data_set.get}")
    try:
        hub_files.download(data_set.hub, data_set.revision, folder)
    except ConfigError as error:
        raise ConfigError(f"{error}, or: {data_set.get}") from None


def _hash(name: str, folder: str, to: str, console: Console) -> int:
    if not to.endswith(".parquet"):
        raise ConfigError(f"--to names the file of the hashes, {name}.parquet in a folder of yours; it is {to!r}")
    questions = [q for q in read_source(SourceConfig(name=name, path=folder)).questions if q.split == "test"]
    if not questions:
        raise ConfigError(f"{folder} has no test question of {name}")
    save(hash_questions(name, questions, [bool(question.images) for question in questions]), to)
    console.print(f"{to}: hashes of {len(questions):,} test questions; name it in curate.guard")
    return 0


if __name__ == "__main__":
    sys.exit(main())
