"""Training data is held against benchmarks' test questions by hashes alone."""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from medmm_ray.config import ConfigError
from medmm_ray.data.benchmark_hashes import Guard, hash_questions, load, save, shipped
from medmm_ray.data.sources import SourceQuestion
from medmm_ray.steps.ingest import SourceConfig, read_source
from medmm_ray.text.shingles import hashes_of
from tests.paths import REAL_DATA

STEM = (
    "A 40-year-old man with long-standing diabetes is brought to the clinic by his wife because of swelling "
    "of both legs for three weeks. Urinalysis shows heavy proteinuria. Which of the following is the most likely "
    "finding on biopsy?"
)
OPTIONS = ["nodular sclerosis", "crescents", "linear deposits", "a normal glomerulus"]


@dataclass
class Asked:
    question: str
    options: list[str] = field(default_factory=list)


def guard(*tests: Asked, has_picture: bool = False) -> Guard:
    return Guard([hash_questions("exam", tests, [has_picture] * len(tests))])


@pytest.mark.parametrize(
    ("question", "options", "is_leak"),
    [
        (STEM, OPTIONS[::-1], True),  # in another order
        (STEM, ["an option more", *OPTIONS], True),  # five for four
        (f"Answer the question step by step.\n\nQuestion: {STEM}", OPTIONS, True),
        (STEM.replace("wife", "husband").replace("three", "two").upper(), OPTIONS, True),
        (STEM, [], True),  # asked openly
        ("Which of the following is the most likely finding on biopsy?", OPTIONS, False),
        (STEM[:60] + "chest pain. What should be done next?", ["aspirin", "rest", "surgery", "nothing"], False),
    ],
)
def test_the_forms_of_a_leak(question: str, options: list[str], is_leak: bool) -> None:
    assert guard(Asked(STEM, OPTIONS)).find(Asked(question, options)) == ("exam" if is_leak else None)


def test_a_short_stem_needs_its_options_and_one_without_options_all_of_its_words() -> None:
    short = guard(Asked("Metabolism is determined by the:", ["age", "sex", "genes", "diet"]))
    assert short.find(Asked("Metabolism is determined by the:", ["diet", "genes", "sex", "age"])) == "exam"
    assert short.find(Asked("Metabolism is determined by the:", ["liver", "thyroid", "heart", "brain"])) is None
    judged = guard(Asked("Is losartan safe in pregnancy?", ["yes", "no"]))
    assert judged.find(Asked("Question: Is losartan safe in pregnancy?")) == "exam"
    assert judged.find(Asked("Is aspirin safe in pregnancy?")) is None


def test_short_questions_on_pictures_are_told_apart_by_their_pictures() -> None:
    assert (
        guard(Asked("Is there a fracture of the rib?"), has_picture=True).find(Asked("Is there a fracture of the rib?"))
        is None
    )


def test_hashes_are_the_same_everywhere_and_survive_a_file(tmp_path: Path) -> None:
    assert hashes_of(["a b c"]).tolist() == [729170548]
    hashes = hash_questions("exam", [Asked(STEM, OPTIONS), Asked("", [])], [False, True])
    assert hashes.num_shingles.tolist() == [35, 0]  # 41 words less four articles, in runs of three
    save(hashes, f"{tmp_path}/exam.parquet")
    again = load("exam", (tmp_path / "exam.parquet").read_bytes())
    assert [stem.tolist() for stem in again.stems] == [stem.tolist() for stem in hashes.stems]
    assert np.array_equal(again.has_picture, [False, True])
    assert Guard([again]).find(Asked(STEM, OPTIONS)) == "exam"
    with pytest.raises(ConfigError, match="has no hashes of a benchmark"):
        load("exam", b"what")


def test_shipped_hashes_hold_the_denominators() -> None:
    counts = {benchmark.name: len(benchmark.stems) for benchmark in shipped()}
    assert {name: counts[name] for name in ("medqa", "medmcqa", "pubmedqa")} == {
        "medqa": 1273, "medmcqa": 4183, "pubmedqa": 500,
    }  # fmt: skip
    assert all(len(stem) <= 16 for benchmark in shipped() for stem in benchmark.stems)


def published(name: str, path: str, dataset: str) -> list[SourceQuestion]:
    questions = read_source(SourceConfig(name=name, path=str(REAL_DATA / path))).questions
    return [question for question in questions if question.dataset in (dataset, "")]


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"the real data sets are not at {REAL_DATA}")
def test_real_leaks_are_found_and_nothing_else() -> None:
    """Five options for four, a prefix, and the test questions among Med-PRM's published training samples."""
    knows = Guard(shipped())
    rng = random.Random(0)
    for question in published("mirage", "mirage", "medqa"):
        options = [*question.options, "an option of its own"]
        rng.shuffle(options)
        assert knows.find(Asked(question.question, options)) == "medqa"
    prefixed = published("meds3", "medsss_eval/pubmedqa.json", "pubmedqa")
    assert len(prefixed) == 500
    assert {knows.find(question) for question in prefixed} == {"pubmedqa"}
    training = read_source(SourceConfig(name="med_prm", path=str(REAL_DATA / "med_prm"))).questions
    assert [question.name.rpartition("-")[2] for question in training if knows.find(question)] == [
        "90", "91", "96", "97", "98", "99",
    ]  # fmt: skip
    others = [
        json.loads(line)["question"] for line in (REAL_DATA / "medquad" / "medquad.jsonl").read_text().splitlines()
    ]
    assert not any(knows.find(Asked(text)) for text in others[:2000])
    train = read_source(SourceConfig(name="pubmedqa", path=str(REAL_DATA / "pubmedqa"), num_test=0)).questions
    assert not any(map(knows.find, train))
