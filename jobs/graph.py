"""The pipeline as data: every step in order, what it reads and what it makes.

A name is a table (with its record) or an artifact (None: a folder, such as an index or a checkpoint). Each step's code
is ``jobs.<name>.run``, its config the recipe's section of the same name. A step's `version` stands in the module that
does its work: raise it there when the code makes something else from the same config, and what was made before is made
again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from medmm_ray.config import ConfigError
from medmm_ray.data.records import (
    Document,
    Evidence,
    Image,
    Labels,
    Passage,
    Query,
    Question,
    ReviewItem,
    Scores,
    Solutions,
    States,
    Tree,
    Vector,
    WrittenQuestion,
)
from medmm_ray.steps import (
    audit,
    curate,
    embed,
    evaluate,
    index,
    ingest,
    judge,
    monte_carlo,
    retrieve,
    review,
    sample,
    score,
    tree_search,
    write_questions,
)
from medmm_ray.train import image_text, policy, text_prm, two_tower


@dataclass(frozen=True)
class Step:
    """One step: the names that it reads and makes, and a line about it for people.

    `shares` names settings of other steps that decide what this one makes, where it does not read their tables.
    `follows` is a table that it reads one row at a time, so that it can begin before the others are there.
    """

    name: str
    what: str = field(compare=False)
    reads: tuple[str, ...]
    makes: Mapping[str, type | None]
    version: int
    shares: tuple[str, ...] = ()
    follows: str | None = None


LABELS = ("judge_labels", "monte_carlo_labels", "expert_labels")
TREES = ("tree_solutions", "tree_labels")
ALL_LABELS = (*LABELS, "tree_labels")  # of sampled solutions, and of those that search trees found

STEPS = (
    # Questions, images and documents
    Step(
        "ingest",
        "read the source",
        reads=(),
        makes={"raw_questions": Question, "raw_images": Image, "documents": Document, "demonstrations": Solutions},
        version=ingest.VERSION,
    ),
    Step(
        "write_questions",
        "questions for images without one",
        reads=("raw_questions", "raw_images"),
        makes={"written_questions": WrittenQuestion, "new_questions": Question},
        version=write_questions.VERSION,
    ),
    Step(
        "curate",
        "drop duplicates and leaks, split",
        reads=("raw_questions", "raw_images", "new_questions"),
        makes={"questions": Question, "images": Image, "curation_report": None},
        version=curate.VERSION,
    ),
    # What each question is read with
    Step(
        "train_image_tower",
        "contrastive image tower (open_clip)",
        reads=("images",),
        makes={"image_tower": None},
        version=image_text.VERSION,
    ),
    Step(
        "embed",
        "embed images, documents, questions",
        reads=("questions", "images", "documents", "image_tower"),
        makes={"image_vectors": Vector, "passages": Passage, "queries": Query},
        version=embed.VERSION,
    ),
    Step(
        "index",
        "FAISS and BM25 indexes",
        reads=("images", "image_vectors", "passages"),
        makes={"index": None},
        version=index.VERSION,
    ),
    Step(
        "retrieve",
        "passages and similar images",
        reads=("questions", "images", "image_vectors", "queries", "index"),
        makes={"evidence": Evidence},
        version=retrieve.VERSION,
    ),
    # Solutions and the labels of their steps
    Step(
        "train_policy",
        "supervised fine-tuning (DeepSpeed)",
        reads=("questions", "demonstrations", "documents"),
        makes={"policy": None},
        version=policy.VERSION,
    ),
    Step(
        "sample",
        "solutions by vLLM",
        reads=("questions", "images", "evidence", "policy"),
        makes={"solutions": Solutions},
        version=sample.VERSION,
    ),
    Step(
        "judge",
        "a verdict for each step",
        reads=("questions", "images", "evidence", "solutions"),
        makes={"judge_labels": Labels},
        version=judge.VERSION,
        shares=("second_judge",),
        follows="solutions",
    ),
    Step(
        "monte_carlo",
        "continuations of steps (vLLM)",
        reads=("questions", "images", "evidence", "solutions", "judge_labels", "policy"),
        makes={"monte_carlo_labels": Labels},
        version=monte_carlo.VERSION,
    ),
    Step(
        "tree_search",
        "solutions and labels from trees (vLLM)",
        reads=("questions", "evidence", "policy"),
        makes={"trees": Tree, "tree_solutions": Solutions, "tree_labels": Labels},
        version=tree_search.VERSION,
        shares=("sample.equivalence",),
    ),
    Step(
        "review",
        "the expert's queue and verdicts",
        reads=("questions", "images", "solutions", "judge_labels", "monte_carlo_labels"),
        makes={"review_queue": ReviewItem, "expert_labels": Labels},
        version=review.VERSION,
    ),
    Step(
        "audit",
        "dataset report and quality gates",
        reads=("questions", "images", "evidence", "solutions", *LABELS, *TREES, "review_queue"),
        makes={"dataset_report": None},
        version=audit.VERSION,
    ),
    # The reward model
    Step(
        "train_text_prm",
        "text reward model (DeepSpeed)",
        reads=("questions", "evidence", "solutions", *LABELS, *TREES, "policy"),
        makes={"text_prm": None},
        version=text_prm.VERSION,
    ),
    Step(
        "states",
        "text states of the training split",
        reads=("questions", "evidence", "solutions", "tree_solutions", "text_prm"),
        makes={"states": States, "tree_states": States},
        version=score.STATES_VERSION,
    ),
    Step(
        "train_two_tower",
        "image fusion on cached states",
        reads=(
            *("questions", "images", "evidence", "solutions", *LABELS, *TREES),
            *("states", "tree_states", "text_prm", "image_tower"),
        ),
        makes={"two_tower": None},
        version=two_tower.VERSION,
    ),
    # What it is worth
    Step(
        "score",
        "step scores of the test split",
        reads=("questions", "images", "evidence", "solutions", "two_tower"),
        makes={"scores": Scores},
        version=score.VERSION,
    ),
    Step(
        "evaluate",
        "report.json, report.html",
        reads=("questions", "images", "evidence", "solutions", *LABELS, "review_queue", "dataset_report", "scores"),
        makes={"report": None},
        version=evaluate.VERSION,
    ),
)


def _makers() -> dict[str, Step]:
    makers = {}
    for step in STEPS:
        for name in step.makes:
            makers[name] = step
    return makers


BY_NAME = {step.name: step for step in STEPS}
MAKER = _makers()  # of each table and artifact


def steps_between(first: str | None, last: str | None) -> list[Step]:
    """The steps from `first` until `last`, both included; without one, from the beginning or to the end."""
    for name in (first, last):
        if name is not None and name not in BY_NAME:
            raise ConfigError(f"unknown step {name!r}; the steps are {', '.join(BY_NAME)}")
    names = list(BY_NAME)
    start = names.index(first) if first else 0
    end = names.index(last) + 1 if last else None
    steps = STEPS[start:end]
    if not steps:
        raise ConfigError(f"--from {first} comes after --until {last}; the order is {', '.join(names)}")
    return list(steps)
