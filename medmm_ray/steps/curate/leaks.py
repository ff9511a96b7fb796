"""Training questions that are a benchmark's test questions, also of benchmarks that are not in the run."""

from collections import Counter
from collections.abc import Collection, Sequence

from medmm_ray.data.benchmark_hashes import BenchmarkHashes, Guard, hash_questions, load, shipped
from medmm_ray.data.records import Question
from medmm_ray.data.tables import filesystem
from medmm_ray.steps.curate.config import CurateConfig


def benchmark_guard(
    questions: Sequence[Question],
    config: CurateConfig,
    official_ids: Collection[str] = (),
) -> Guard:
    """Knows the shipped benchmarks, those of `config.guard`, and the run's own test questions.

    Where all questions are split anew (`leakage: resplit`), only official tests are the run's own.
    """
    benchmarks = list(shipped()) if config.benchmark_guard else []
    for uri in config.guard:
        fs, path = filesystem(uri)
        with fs.open_input_stream(path) as stream:
            benchmarks.append(load(uri.rpartition("/")[2].partition(".")[0], stream.read()))
    tests = [question for question in questions if question.split == "test"]
    if config.leakage == "resplit":
        tests = [question for question in tests if question.question_id in official_ids]
    return Guard([*benchmarks, *_own_tests(tests)])


def _own_tests(tests: Sequence[Question]) -> list[BenchmarkHashes]:
    by_dataset: dict[str, list[Question]] = {}
    for question in tests:
        by_dataset.setdefault(question.dataset, []).append(question)
    own = []
    for name, members in by_dataset.items():
        own.append(hash_questions(name, members, [bool(question.image_ids) for question in members]))
    return own


def without_benchmarks(
    questions: Sequence[Question],
    guard: Guard,
    figures: Counter[str],
) -> list[Question]:
    """The questions without those of training that a benchmark has in its test set, counted by benchmark."""
    clean: list[Question] = []
    for question in questions:
        # A test may share questions with another: only training must not.
        benchmark = guard.find(question) if question.split != "test" else None
        if benchmark is None:
            clean.append(question)
        else:
            figures[f"questions_of_benchmark_{benchmark}"] += 1
    return clean
