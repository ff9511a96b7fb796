"""The tree of MedS3's search (arXiv 2501.12051), pure: what to expand next, how it grows, what it says of its steps.

A tree is a tuple of `records.TreeNode`; a function that changes it gives a new one. The root stands for MedS3's fixed
"Step 0": it carries no text here, since the policy's own form begins with step 1.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field

from medmm_ray.config import Splits
from medmm_ray.data.records import StepLabel, TreeNode
from medmm_ray.engines.generator import MAX_SAMPLES
from medmm_ray.steps.tree_search.writer import Action, Continuation, StepWriterConfig

Tree = tuple[TreeNode, ...]

ROOT = TreeNode(parent=-1, step="", action="root")
UNVISITED = 5.0  # the UCB of a node without a visit


class TreeSearchConfig(StepWriterConfig):
    """How trees grow; the defaults are MedS3's (its config trial5.json)."""

    splits: Splits = ("train",)
    """Splits whose questions are searched."""
    max_nodes: int = Field(60, ge=1)
    """A tree of so many nodes is not expanded any further; solutions that were begun are still finished."""
    max_tree_tokens: int | None = Field(None, ge=1)
    """Tokens drawn for one tree after which it stops, unfinished solutions included; null: no bound."""
    max_correct: int = Field(4, ge=1)
    """Right solutions at which a tree stops."""
    num_children: int = Field(3, ge=1)
    """Next steps that are drawn at a node; equal ones become one child."""
    num_rollouts: int = Field(20, ge=1, le=MAX_SAMPLES)
    """Rollouts of a node at depth d: num_rollouts // (d + 1), at least min_rollouts."""
    min_rollouts: int = Field(5, ge=1, le=MAX_SAMPLES)
    """Fewest rollouts of a node."""
    exploration: float = Field(2.0, ge=0)
    """Weight of the exploration term of the UCB."""
    finish_from: float = Field(0.9, gt=0, le=1)
    """A node with at least this share of right rollouts is finished in one go."""
    reflect: bool = True
    """Let the policy doubt a wrong answer, once a path ("But wait, ...")."""
    look_back: float = Field(1.0, ge=0)
    """Lambda of the hard labels: v'_i = v_i - lambda (v'_{i-1} - v_i), a step is right where v'_i > 0."""


# Reading a tree


def children(tree: Tree, at: int) -> list[int]:
    return [i for i, node in enumerate(tree) if node.parent == at]


def path(tree: Tree, at: int) -> list[int]:
    """The nodes from the first step to `at`; none for the root."""
    nodes: list[int] = []
    while at > 0:
        nodes.append(at)
        at = tree[at].parent
    return nodes[::-1]


def steps_to(tree: Tree, at: int) -> list[str]:
    return [tree[i].step for i in path(tree, at)]


def leaves(tree: Tree) -> list[int]:
    inner = {node.parent for node in tree}
    return [i for i in range(1, len(tree)) if i not in inner]


def solved(tree: Tree) -> list[int]:
    """The leaves in which a solution ends, right ones and wrong ones."""
    return [i for i in leaves(tree) if tree[i].answer is not None]


def begun(tree: Tree) -> list[int]:
    """The leaves whose solution goes on, the most promising first."""
    return sorted(
        (i for i in leaves(tree) if tree[i].answer is None and not tree[i].closed),
        key=lambda i: -(tree[i].value or 0.0),
    )


def num_right(tree: Tree) -> int:
    return sum(tree[i].correct is True for i in solved(tree))


# Growing a tree


def ucb(node: TreeNode, parent: TreeNode, exploration: float) -> float:
    """V + c sqrt(ln N_parent / n); a node without a value counts as much as its parent."""
    if not node.visits:
        return UNVISITED
    value = parent.value if node.value is None else node.value
    return (value or 0.0) + exploration * math.sqrt(math.log(parent.visits) / node.visits)


def select(tree: Tree, exploration: float) -> int | None:
    """The childless node to expand: from the root to the open child of the highest UCB, the first of equals; None where
    all is closed.
    """
    if tree[0].closed:
        return None
    at = 0
    while below := children(tree, at):
        parent = tree[at]
        at = max((i for i in below if not tree[i].closed), key=lambda i: ucb(tree[i], parent, exploration))
    return at


def next_action(tree: Tree, at: int, config: TreeSearchConfig) -> Action:
    """What to draw below a childless node: a doubt of its wrong answer, the end of a solution, or a next step."""
    node = tree[at]
    if node.answer is not None:
        return "reflect"
    sure = bool(node.num_rollouts) and (node.num_correct or 0) / (node.num_rollouts or 1) >= config.finish_from
    return "finish" if sure or len(path(tree, at)) + 1 >= config.max_steps else "reason"


def rollouts_at(depth: int, config: TreeSearchConfig) -> int:
    return max(config.num_rollouts // (depth + 1), config.min_rollouts)


def grow(
    tree: Tree, at: int, action: Action, drawn: Continuation, right: Sequence[bool] = (), reflect: bool = True
) -> Tree:
    """The tree with the steps of `drawn` below `at`, and what its last one is worth carried up to the root.

    The last step is worth its outcome where it ends the solution, else the share of `right` rollouts: nothing is known
    of it (None) where the answer could not be graded, or no rollout came to one. Steps before it are not rolled out and
    begin with the value of `at`. With `reflect` a wrong answer stays open for one doubt.
    """
    for step in drawn.steps[:-1]:
        between = TreeNode(parent=at, step=step, action=action, value=tree[at].value, visits=1, seed=drawn.seed)
        tree, at = (*tree, between), len(tree)
    ended = drawn.answer is not None
    doubted = action == "reflect" or any(tree[i].action == "reflect" for i in path(tree, at))
    outcomes = right if not ended else [] if drawn.correct is None else [drawn.correct]
    leaf = TreeNode(
        parent=at,
        step=drawn.steps[-1],
        action=action,
        value=sum(outcomes) / len(outcomes) if outcomes else None,
        visits=1,
        num_correct=sum(right),
        num_rollouts=len(right),
        answer=drawn.answer,
        correct=drawn.correct,
        closed=ended and (drawn.correct is not False or doubted or not reflect),
        seed=drawn.seed,
    )
    return backpropagate((*tree, leaf), len(tree))


def backpropagate(tree: Tree, leaf: int) -> Tree:
    """One visit more for every node above `leaf`: V = (V + sum of v_c n_c / sum of n_c) / 2 over its children.

    Children without a value have no part in it; a node that had none takes the mean itself. A node is closed once all
    its children are.
    """
    nodes = list(tree)
    at = nodes[leaf].parent
    while at >= 0:
        node, below = nodes[at], [nodes[i] for i in children(tree, at)]
        known = [(c.value, c.visits) for c in below if c.value is not None]
        value = node.value
        if known:
            mean = sum(v * n for v, n in known) / sum(n for _, n in known)
            value = mean if value is None else (value + mean) / 2
        nodes[at] = replace(node, value=value, visits=node.visits + 1, closed=all(c.closed for c in below))
        at = node.parent
    return tuple(nodes)


def close(tree: Tree, at: int) -> Tree:
    """The tree without hope for `at`, a node that nothing could be drawn below."""
    nodes = list(tree)
    nodes[at] = replace(nodes[at], closed=True)
    while (at := nodes[at].parent) >= 0 and all(nodes[i].closed for i in children(tree, at)):
        nodes[at] = replace(nodes[at], closed=True)
    return tuple(nodes)


# What a tree says


def look_back(values: Sequence[float | None], strength: float = 1.0) -> list[int | None]:
    """MedS3's hard labels of a path: v'_i = v_i - strength (v'_{i-1} - v_i), 1 where v'_i > 0; v'_1 = v_1.

    A node without a value has no label, and is passed over.
    """
    labels: list[int | None] = []
    before: float | None = None
    for value in values:
        if value is None:
            labels.append(None)
            continue
        before = value if before is None else value - strength * (before - value)
        labels.append(int(before > 0))
    return labels


def step_labels(tree: Tree, leaf: int, strength: float = 1.0) -> list[StepLabel]:
    """The labels of the solution that ends in `leaf`: its nodes' values, and the hard labels made of them."""
    nodes = [tree[i] for i in path(tree, leaf)]
    hard = look_back([node.value for node in nodes], strength)
    return [
        StepLabel(
            label=label,
            value=node.value,
            num_correct=node.num_correct,
            num_rollouts=node.num_rollouts,
            stopped_early=False,
        )
        for label, node in zip(hard, nodes, strict=True)
    ]
