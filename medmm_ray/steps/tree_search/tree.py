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
UNVISITED = 5.0  # UCB of a node without a visit: above any other, so that each child is tried once


class TreeSearchConfig(StepWriterConfig):
    """How trees grow; the defaults are MedS3's (its config trial5.json)."""

    splits: Splits = ("train",)
    """Splits whose questions are searched."""
    max_nodes: int = Field(60, ge=1)
    """A tree of so many nodes is not expanded any further; solutions that were begun are still finished."""
    max_tree_tokens: int | None = Field(None, ge=1)
    """Tokens generated for one tree after which it stops, unfinished solutions included; null: no bound."""
    max_correct: int = Field(4, ge=1)
    """Right solutions at which a tree stops."""
    num_children: int = Field(3, ge=1)
    """Next steps that are sampled at a node; equal ones become one child."""
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
    """The nodes right below `at`, in the order in which they grew."""
    return [i for i, node in enumerate(tree) if node.parent == at]


def path(tree: Tree, at: int) -> list[int]:
    """The nodes from the first step to `at`; none for the root."""
    nodes: list[int] = []
    # From the leaf upwards, then turned round.
    while at > 0:
        nodes.append(at)
        at = tree[at].parent
    return nodes[::-1]


def steps_to(tree: Tree, at: int) -> list[str]:
    """The texts from the first step to `at`."""
    return [tree[i].step for i in path(tree, at)]


def leaves(tree: Tree) -> list[int]:
    """The nodes without a child, but for the root."""
    parents = {node.parent for node in tree}
    return [i for i in range(1, len(tree)) if i not in parents]


def solution_leaves(tree: Tree) -> list[int]:
    """The leaves in which a solution ends, right ones and wrong ones."""
    ended: list[int] = []
    for i in leaves(tree):
        if tree[i].answer is not None:
            ended.append(i)
    return ended


def unfinished_leaves(tree: Tree) -> list[int]:
    """The leaves whose solution goes on, the most promising first."""
    unfinished: list[int] = []
    for i in leaves(tree):
        if tree[i].answer is None and not tree[i].closed:
            unfinished.append(i)
    return sorted(unfinished, key=lambda i: -(tree[i].value or 0.0))


def num_right(tree: Tree) -> int:
    """How many right solutions the tree holds."""
    num = 0
    for i in solution_leaves(tree):
        num += tree[i].correct is True  # None: the answer could not be graded
    return num


# Growing a tree


def ucb(node: TreeNode, parent: TreeNode, exploration: float) -> float:
    """V + c sqrt(ln N_parent / n); a node without a value counts as much as its parent."""
    # Its exploration term would divide by zero.
    if not node.visits:
        return UNVISITED
    value = parent.value if node.value is None else node.value
    uncertainty = math.sqrt(math.log(parent.visits) / node.visits)
    return (value or 0.0) + exploration * uncertainty


def select(tree: Tree, exploration: float) -> int | None:
    """The childless node to expand: from the root to the open child of the highest UCB, the first of equals; None where
    all is closed.
    """
    if tree[0].closed:
        return None
    at = 0
    while child_nodes := children(tree, at):
        parent = tree[at]
        open_children = [i for i in child_nodes if not tree[i].closed]
        at = max(open_children, key=lambda i: ucb(tree[i], parent, exploration))
    return at


def next_action(tree: Tree, at: int, config: TreeSearchConfig) -> Action:
    """What to sample below a childless node: a doubt of its wrong answer, the end of a solution, or a next step."""
    node = tree[at]
    if node.answer is not None:
        return "reflect"
    share_right = 0.0
    if node.num_rollouts:
        share_right = (node.num_correct or 0) / node.num_rollouts
    depth = len(path(tree, at))
    # A node from which nearly all rollouts come out right needs no branches below it.
    if share_right >= config.finish_from or depth + 1 >= config.max_steps:
        return "finish"
    return "reason"


def num_rollouts_at(depth: int, config: TreeSearchConfig) -> int:
    """How many rollouts a node at `depth` gets: fewer, the less is open behind it."""
    return max(config.num_rollouts // (depth + 1), config.min_rollouts)


def grow(
    tree: Tree,
    at: int,
    action: Action,
    continuation: Continuation,
    rollouts: Sequence[bool] = (),
    reflect: bool = True,
) -> Tree:
    """The tree with the steps of `continuation` below `at`, and what its last one is worth carried up to the root.

    The last step is worth its outcome where it ends the solution, else the share of right `rollouts`: nothing is known
    of it (None) where the answer could not be graded, or no rollout came to one. Steps before it are not rolled out and
    begin with the value of `at`. With `reflect` a wrong answer stays open for one doubt.
    """
    correct, seed = continuation.correct, continuation.seed
    # Several steps come at once where a policy goes on to the end: they form a chain.
    *inner_steps, last_step = continuation.steps
    for step in inner_steps:
        inner = TreeNode(
            parent=at,
            step=step,
            action=action,
            value=tree[at].value,
            visits=1,
            seed=seed,
        )
        at = len(tree)
        tree = (*tree, inner)
    is_ended = continuation.answer is not None
    outcomes = rollouts
    if is_ended:
        outcomes = [] if correct is None else [correct]
    # A path is doubted once: a second doubt would only undo the first.
    was_doubted = action == "reflect" or any(tree[i].action == "reflect" for i in path(tree, at))
    leaf = TreeNode(
        parent=at,
        step=last_step,
        action=action,
        value=sum(outcomes) / len(outcomes) if outcomes else None,
        visits=1,
        num_correct=sum(rollouts),
        num_rollouts=len(rollouts),
        answer=continuation.answer,
        correct=correct,
        closed=is_ended and (correct is not False or was_doubted or not reflect),
        seed=seed,
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
        node = nodes[at]
        weighted_sum, visits, is_closed = 0.0, 0, True
        for i in children(tree, at):
            child = nodes[i]
            is_closed &= child.closed
            if child.value is not None:
                weighted_sum += child.value * child.visits
                visits += child.visits
        # MedS3 averages the old value with the children's, rather than replacing it.
        value = node.value
        if visits:
            mean = weighted_sum / visits
            value = mean if value is None else (value + mean) / 2
        nodes[at] = replace(node, value=value, visits=node.visits + 1, closed=is_closed)
        at = node.parent
    return tuple(nodes)


def close(tree: Tree, at: int) -> Tree:
    """The tree with `at` closed, a node below which nothing could be sampled.

    Each node above that has no open child then is closed too.
    """
    nodes = list(tree)
    nodes[at] = replace(nodes[at], closed=True)
    at = nodes[at].parent
    while at >= 0 and all(nodes[i].closed for i in children(tree, at)):
        nodes[at] = replace(nodes[at], closed=True)
        at = nodes[at].parent
    return tuple(nodes)


# What a tree says


def look_back(values: Sequence[float | None], strength: float = 1.0) -> list[int | None]:
    """MedS3's hard labels of a path: v'_i = v_i - strength (v'_{i-1} - v_i), 1 where v'_i > 0; v'_1 = v_1.

    A node without a value has no label, and is passed over.
    """
    labels: list[int | None] = []
    previous: float | None = None
    for value in values:
        if value is None:
            labels.append(None)
            continue
        # The adjusted value is carried on, as in MedS3.
        previous = value if previous is None else value - strength * (previous - value)
        labels.append(int(previous > 0))
    return labels


def step_labels(tree: Tree, leaf: int, strength: float = 1.0) -> list[StepLabel]:
    """The labels of the solution that ends in `leaf`: its nodes' values, and the hard labels made of them."""
    nodes = [tree[i] for i in path(tree, leaf)]
    hard_labels = look_back([node.value for node in nodes], strength)
    records: list[StepLabel] = []
    for label, node in zip(hard_labels, nodes, strict=True):
        records.append(
            StepLabel(
                label=label,
                value=node.value,
                num_correct=node.num_correct,
                num_rollouts=node.num_rollouts,
                stopped_early=False,
            )
        )
    return records
