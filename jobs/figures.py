"""Figures in documents, written from runs: ``python -m jobs.figures take RUN NAME``, ``write`` and ``check``.

``take`` keeps what documents say of a run (a folder with report.json, or the rows that ``jobs.bench json=PATH`` wrote)
as ``docs/figures/NAME.json``. ``write`` puts the figures into README.md and docs/*.md; ``check`` fails where a document
says otherwise. A document names its figures in comments that do not show:

    <!-- table NAME KIND -->            accuracy (of a report) or bench (rows of a benchmark)
    …
    <!-- /table -->
    AUROC is <!-- figure NAME step.multimodal.auroc .2f -->.96<!-- /figure --> with the image
"""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.entry import guarded
from medmm_ray.config import ConfigError, JsonObject
from medmm_ray.data.tables import read_json

FOLDER = Path("docs/figures")
DOCUMENTS = (Path("README.md"), *sorted(Path("docs").glob("*.md")))
_TABLE = re.compile(r"(<!-- table (\S+) (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)
_FIGURE = re.compile(r"(<!-- figure (\S+) (\S+) (\S+) -->).*?(<!-- /figure -->)", re.DOTALL)
_STEP_FIGURES = ("auroc", "macro_f1", "ece", "kappa")
EN_DASH = "–"


def main(words: Sequence[str] | None = None) -> int:
    """``python -m jobs.figures``."""
    arguments = list(sys.argv[1:] if words is None else words)
    return guarded(lambda: _main(arguments))


def _main(words: list[str]) -> int:
    match words:
        case ["take", source, name]:
            path = FOLDER / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(taken(source), indent=1) + "\n")
            print(path)
        case ["write"]:
            for document in DOCUMENTS:
                document.write_text(written(document.read_text()))
        case ["check"]:
            check(DOCUMENTS)
        case _:
            print(__doc__)
            return 0 if not words or words[0] in ("-h", "--help") else 2
    return 0


def check(documents: Sequence[Path]) -> None:
    """Raise `ConfigError` where a document's figures are not those of the runs."""
    for document in documents:
        text = document.read_text()
        if written(text) != text:
            raise ConfigError(
                f"{document} has other figures than docs/figures; write them: python -m jobs.figures write"
            )


def taken(source: str) -> JsonObject:
    """What documents may say of a run's folder, or of a benchmark's file of rows."""
    if source.endswith(".json"):
        rows: Any = json.loads(Path(source).read_text())
        if not isinstance(rows, list):
            raise ConfigError(f"{source} has no rows of a benchmark; expected the file that jobs.bench json=PATH wrote")
        return {"rows": rows}
    report = read_json(f"{source.rstrip('/')}/report.json")
    if report is None:
        raise ConfigError(f"{source} has no report.json; name the folder of an evaluated run")
    n = str(report["n"])
    accuracy = report["accuracy"]
    steps = {}
    for arm, figures in report["step"].items():
        steps[arm] = {name: figures.get(name) for name in _STEP_FIGURES}
    return {
        "split": report["counts"]["split"],
        "questions": report["counts"]["questions"],
        "n": report["n"],
        "one_sample": accuracy["one_sample"],
        "oracle": accuracy["oracle"][n],
        "majority": accuracy["majority"][n],
        "best_of_n": {arm: by_n[n] for arm, by_n in accuracy.get("best_of_n", {}).items()},
        "sc_rm": {arm: by_n[n] for arm, by_n in accuracy.get("sc_rm", {}).items()},
        "step": steps,
        "by_dataset": report.get("by_dataset", {}),
        "revision": report["environment"].get("revision", ""),
        "usage": read_json(f"{source.rstrip('/')}/usage.json") or {},
    }


def written(text: str) -> str:
    """A document with all its figures as docs/figures has them."""
    text = _TABLE.sub(lambda block: block[1] + TABLES[block[3]](_figures(block[2])) + block[4], text)
    return _FIGURE.sub(lambda place: place[1] + _value(_figures(place[2]), place[3], place[4]) + place[5], text)


def _figures(name: str) -> JsonObject:
    figures: JsonObject = json.loads((FOLDER / f"{name}.json").read_text())
    return figures


def _value(figures: JsonObject, path: str, form: str) -> str:
    """A figure by its path; a share below 1 has no zero before its point, as papers write it."""
    value: Any = figures
    for name in path.split("."):
        value = value[int(name)] if isinstance(value, list) else value[name]
    if form.endswith("%"):
        return f"{format(100 * value, form[:-1] + 'f')} %"
    words = format(value, form)
    return words.removeprefix("0") if words.startswith("0.") else words


def accuracy_table(figures: JsonObject) -> str:
    """One sample, the majority, and best-of-N of each arm, with their intervals."""
    n = figures["n"]
    arm_names = {
        "text_only": f"best of {n}, text-only reward model",
        "multimodal": f"**best of {n}, multimodal**",
        "shuffled_image": f"best of {n}, multimodal, images shuffled between questions",
    }
    rows = {"one sample": figures["one_sample"], "majority vote": figures["majority"]}
    for arm, name in arm_names.items():
        if arm in figures["best_of_n"]:
            rows[name] = figures["best_of_n"][arm]
    held_out = "held-out " if figures["split"] == "test" else f"{figures['split']} "
    lines = [f"| {figures['questions']:,} {held_out}questions, {n} solutions each | accuracy | 95 % interval |"]
    lines.append("|---|---|---|")
    for name, figure in rows.items():
        share = f"{100 * figure['value']:.1f} %"
        share = f"**{share}**" if name.startswith("**") else share
        lines.append(f"| {name} | {share} | {_interval(figure)} |")
    return "\n".join(lines) + "\n"


def _interval(figure: Mapping[str, float | None]) -> str:
    low, high = figure.get("low"), figure.get("high")
    return EN_DASH if low is None or high is None else f"{100 * low:.1f} {EN_DASH} {100 * high:.1f}"


def bench_table(figures: JsonObject) -> str:
    """The rows of a benchmark, as it prints them."""
    lines = ["| measured | baseline | ours | ratio | target |", "|---|---|---|---|---|"]
    for row in figures["rows"]:
        unit = f" {row['unit']}" if row["unit"] else ""
        cells = (row["name"], f"{row['baseline']:.4g}{unit}", f"{row['ours']:.4g}{unit}", f"{row['ratio']:.3g}")
        lines.append(f"| {' | '.join(cells)} | {row['target']} |")
    return "\n".join(lines) + "\n"


TABLES: Mapping[str, Callable[[JsonObject], str]] = {"accuracy": accuracy_table, "bench": bench_table}


if __name__ == "__main__":
    sys.exit(main())
