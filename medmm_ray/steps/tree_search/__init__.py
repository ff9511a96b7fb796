"""Tree search: solutions and labels from one search tree a question (MedS3).

Enters: questions (and their documents, where the prompt carries some). Leaves: one `records.Tree` row a question, and
from it, by pure functions, its solutions and their labels with source "tree_search".
"""

from medmm_ray.steps.tree_search.search import (
    TreeSearchActor,
    labels_batch,
    labels_of,
    solutions_batch,
    solutions_of,
    tree_search,
)
from medmm_ray.steps.tree_search.tree import TreeSearchConfig

VERSION = 3  # of what a step makes: raise it when the same config makes something else
__all__ = [
    "TreeSearchActor",
    "TreeSearchConfig",
    "labels_batch",
    "labels_of",
    "solutions_batch",
    "solutions_of",
    "tree_search",
]
