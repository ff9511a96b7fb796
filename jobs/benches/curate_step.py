"""Altered pictures through the real steps ingest and curate on Ray.

Enters: a folder of pictures. They, a quarter of most of them (another picture of the same kind) and altered copies of
some make a data set in VQA-RAD's published form, one question a picture. Leaves: which copies became one with their
original, and which other pictures became one.
"""

import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import PIL.Image
from rich.console import Console

from jobs.benches import Measured
from jobs.evaluate_on import BASE, RECIPES
from jobs.graph import steps_between
from jobs.pipeline import run_pipeline
from jobs.step import Run, load_recipe

LEAST_SIDE = 128  # pixels of a quarter: smaller ones show too little
Alter = Callable[[PIL.Image.Image], PIL.Image.Image]


def altered_on_ray(pictures: Path, alterations: Mapping[str, Alter], num_altered: int, seed: int) -> Iterator[Measured]:
    """Rows of copies found by alteration, and of other pictures that were merged, through ingest and curate."""
    with tempfile.TemporaryDirectory() as work:
        original_of = _write_pictures(pictures, alterations, num_altered, seed, Path(work))
        run = _curated(work)
        final_name = _final_names(run)
    for number, alteration in enumerate(alterations):
        copies = [name for name in original_of if name.startswith(f"altered{number}-")]
        num_found = sum(final_name[name] == final_name[original_of[name]] for name in copies)
        label = f"{alteration}: copies found by the step on Ray"
        yield Measured(label, len(copies), num_found, num_found / len(copies), "≥ 0.9", "pictures")
    others = [name for name in final_name if name not in original_of]
    num_merged = len(others) - len({final_name[name] for name in others})
    label = "pictures that are no copies and became another one"
    yield Measured(label, len(others), num_merged, num_merged / len(others), "≤ 0.001", "pictures")


def _write_pictures(
    pictures: Path, alterations: Mapping[str, Alter], num_altered: int, seed: int, work: Path
) -> dict[str, str]:
    """Write the data set into `work`; gives the original's name of each altered copy."""
    (work / "images").mkdir()
    files = sorted(pictures.glob("*.jpg"))
    names: list[str] = []
    for file in files:
        picture = PIL.Image.open(file).convert("L")
        picture.save(work / "images" / f"{file.stem}.png")
        names.append(f"{file.stem}.png")
        quarter = picture.crop((0, 0, picture.width // 2, picture.height // 2))
        if min(quarter.size) >= LEAST_SIDE:
            quarter.save(work / "images" / f"quarter-{file.stem}.png")
            names.append(f"quarter-{file.stem}.png")
    original_of: dict[str, str] = {}
    for file in random.Random(seed).sample(files, min(num_altered, len(files))):
        for number, alter in enumerate(alterations.values()):
            name = f"altered{number}-{file.stem}.png"
            alter(PIL.Image.open(file).convert("L")).save(work / "images" / name)
            original_of[name] = f"{file.stem}.png"
    rows = [_question(number, name) for number, name in enumerate([*names, *original_of])]
    (work / "trainset.json").write_text(json.dumps(rows))
    (work / "testset.json").write_text("[]")
    return original_of


def _question(number: int, name: str) -> dict[str, object]:
    # Each has words of its own, so that no question leaves as a repeat.
    return {"qid": number, "image_name": name, "image_organ": "CHEST", "question": f"What is seen in {name}?",
            "answer": "A finding", "answer_type": "OPEN"}  # fmt: skip


def _curated(work: str) -> Run:
    """The run of ingest and curate, in a Ray session of its own."""
    source = f"ingest.sources=[{{name: vqa_rad, path: {work}}}]"
    recipe = load_recipe([str(RECIPES / BASE), source, f"run={work}/run", "curate.benchmark_guard=false"])
    return run_pipeline(recipe, steps_between(None, "curate"), Console())


def _final_names(run: Run) -> dict[str, str]:
    """By picture: the id of the image that the questions on it have after curation."""
    questions: list[dict[str, Any]] = run.table("questions").to_arrow(["question", "image_ids"]).to_pylist()
    final_name: dict[str, str] = {}
    for question in questions:
        name = str(question["question"]).removeprefix("What is seen in ").removesuffix("?")
        (final_name[name],) = question["image_ids"]
    return final_name
