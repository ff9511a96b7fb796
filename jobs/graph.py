"""The pipeline as data: every step in order, what it reads and what it makes.

A name is a table (with its record) or an artifact (None: a folder, such as an index or a checkpoint). Each step's code
is ``jobs.<name>.run``, its config the recipe's section of the same name. Raise `version` when a step's code makes
something else from the same config: what was made before is then made again. `shares` names settings of other steps
that decide what this one makes, where it does not read their tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from medmm_ray.data.records import (
    Document,
    Evidence,
    Image,
    Labels,
    Question,
    ReviewItem,
    Scores,
    Solutions,
    States,
    Tree,
    Vector,
    WrittenQuestion,
)


@dataclass(frozen=True)
class Step:
    name: str
    reads: tuple[str, ...]
    makes: Mapping[str, type | None]
    version: int = 1
    shares: tuple[str, ...] = ()
    what: str = field(default="", compare=False)


LABELS = ("judge_labels", "monte_carlo_labels", "expert_labels")
TREES = ("tree_solutions", "tree_labels")

STEPS = (
    Step(
        "ingest",
        (),
        {"raw_questions": Question, "raw_images": Image, "documents": Document, "demonstrations": Solutions},
        version=4,
        what="read the source",
    ),
    Step(
        "write_questions",
        ("raw_questions", "raw_images"),
        {"written_questions": WrittenQuestion, "new_questions": Question},
        version=3,
        what="questions for images without one",
    ),
    Step(
        "curate",
        ("raw_questions", "raw_images", "new_questions"),
        {"questions": Question, "images": Image},
        what="drop duplicates and leaks, split",
    ),
    Step("train_image_tower", ("images",), {"image_tower": None}, what="contrastive image tower (open_clip)"),
    Step(
        "embed",
        ("questions", "images", "documents", "image_tower"),
        {"image_vectors": Vector, "document_vectors": Vector, "query_vectors": Vector},
        what="embed images, documents, questions",
    ),
    Step("index", ("image_vectors", "document_vectors"), {"index": None}, what="FAISS indexes"),
    Step(
        "retrieve",
        ("questions", "images", "documents", "image_vectors", "query_vectors", "index"),
        {"evidence": Evidence},
        what="documents and similar images",
    ),
    Step(
        "train_policy",
        ("questions", "demonstrations", "documents"),
        {"policy": None},
        what="supervised fine-tuning (DeepSpeed)",
    ),
    Step(
        "sample",
        ("questions", "images", "evidence", "policy"),
        {"solutions": Solutions},
        version=4,
        what="solutions by vLLM",
    ),
    Step(
        "judge",
        ("questions", "images", "evidence", "solutions"),
        {"judge_labels": Labels},
        version=2,
        shares=("second_judge",),
        what="a verdict for each step",
    ),
    Step(
        "monte_carlo",
        ("questions", "images", "evidence", "solutions", "judge_labels", "policy"),
        {"monte_carlo_labels": Labels},
        version=3,
        what="continuations of steps (vLLM)",
    ),
    Step(
        "tree_search",
        ("questions", "evidence", "policy"),
        {"trees": Tree, "tree_solutions": Solutions, "tree_labels": Labels},
        version=3,
        shares=("sample.equivalence",),
        what="solutions and labels from trees (vLLM)",
    ),
    Step(
        "review",
        ("questions", "images", "solutions", "judge_labels", "monte_carlo_labels"),
        {"review_queue": ReviewItem, "expert_labels": Labels},
        version=3,
        what="the expert's queue and verdicts",
    ),
    Step(
        "audit",
        ("questions", "images", "evidence", "solutions", *LABELS, *TREES, "review_queue"),
        {"dataset_report": None},
        version=2,
        what="dataset report and quality gates",
    ),
    Step(
        "train_text_prm",
        ("questions", "evidence", "solutions", *LABELS, *TREES, "policy"),
        {"text_prm": None},
        version=4,
        what="text reward model (DeepSpeed)",
    ),
    Step(
        "states",
        ("questions", "evidence", "solutions", "tree_solutions", "text_prm"),
        {"states": States, "tree_states": States},
        version=2,
        what="text states of the training split",
    ),
    Step(
        "train_two_tower",
        (
            "questions",
            "images",
            "evidence",
            "solutions",
            *LABELS,
            *TREES,
            "states",
            "tree_states",
            "text_prm",
            "image_tower",
        ),
        {"two_tower": None},
        version=2,
        what="image fusion on cached states",
    ),
    Step(
        "score",
        ("questions", "images", "evidence", "solutions", "two_tower"),
        {"scores": Scores},
        version=2,
        what="step scores of the test split",
    ),
    Step(
        "evaluate",
        ("questions", "images", "evidence", "solutions", *LABELS, "review_queue", "dataset_report", "scores"),
        {"report": None},
        version=4,
        what="report.json, report.html",
    ),
)

BY_NAME = {step.name: step for step in STEPS}
MAKER = {name: step for step in STEPS for name in step.makes}
