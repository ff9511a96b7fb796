"""The search itself: one engine an actor, many trees at once on it, each grown by its own coroutine.

The next steps of a node are one request, and so are the rollouts of a node; the rollouts of all new children run side
by side, and their outcomes enter the tree in a fixed order: a tree is the same whatever grows beside it.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from medmm_ray.config import digest
from medmm_ray.data import records
from medmm_ray.data.records import Labels, Solution, Solutions, TreeNode, to_arrow, to_arrow_lists
from medmm_ray.data.sorted_rows import SortedRows
from medmm_ray.data.tables import RowError, attach
from medmm_ray.engines.generator import Generator, MakeGenerator
from medmm_ray.engines.grader import EquivalenceConfig, Grader, MakeGrader
from medmm_ray.engines.llm.access import Apis
from medmm_ray.engines.vllm_engine import actor_options
from medmm_ray.steps.tree_search.tree import (
    ROOT,
    Tree,
    TreeSearchConfig,
    close,
    grow,
    next_action,
    num_right,
    num_rollouts_at,
    select,
    solution_leaves,
    step_labels,
    steps_to,
    unfinished_leaves,
)
from medmm_ray.steps.tree_search.writer import Action, Continuation, StepWriter
from medmm_ray.text import solution_text

if TYPE_CHECKING:
    from ray.data import Dataset


def tree_search(
    ds: "Dataset",
    config: TreeSearchConfig,
    *,
    model: str,
    policy: str,
    config_hash: str,
    evidence: pa.Table | SortedRows | None = None,
    equivalence: EquivalenceConfig | None = None,
    apis: Apis | None = None,
    generator: MakeGenerator = Generator,
) -> "Dataset":
    """Questions -> `records.Tree` rows.

    `model` is the checkpoint that is searched, `policy` what the tables call it, `config_hash` the table's fingerprint.
    `evidence` (question_id, documents) is needed where config.num_documents > 0; of `SortedRows` each task reads what
    it needs. `equivalence` grades open answers as in sampling; `apis` is how the run reaches its model.
    """
    if config.num_documents:
        if evidence is None:
            raise ValueError(f"num_documents={config.num_documents} needs the table evidence; run retrieve first")
        ds = attach(ds, evidence, "question_id", ["documents"])
    return ds.map_batches(
        TreeSearchActor,
        fn_constructor_kwargs={
            "config": config,
            "model": model,
            "policy": policy,
            "config_hash": config_hash,
            "generator": generator,
            "grader": MakeGrader(equivalence or EquivalenceConfig(), apis),
        },
        **actor_options(config.engine),
    )


class TreeSearchActor:
    """The actor: one engine, and on it `batch_size` x `max_concurrency` trees at a time."""

    def __init__(
        self,
        config: TreeSearchConfig,
        model: str,
        policy: str,
        config_hash: str,
        generator: MakeGenerator = Generator,
        grader: MakeGrader | None = None,
    ) -> None:
        self.config = config
        self.policy = policy
        self.config_hash = config_hash
        self.generator = generator(model, config.engine)
        self.grader = grader() if grader else Grader()

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        questions = batch.to_pylist()
        trees = await asyncio.gather(*map(self.search, questions))
        yield to_arrow(records.Tree, list(trees))

    async def search(self, question: Mapping[str, Any]) -> records.Tree:
        """The tree of one question; a fault becomes the row's error, and what had grown before it is kept."""
        writer = StepWriter(
            self.config,
            self.generator,
            question,
            self.config_hash,
            self.grader,
        )
        builder = TreeBuilder(self.config, writer)
        error = None if question["error"] is None else f"upstream: {question['error']}"
        if error is None:
            try:
                await builder.run()
            except RowError as fault:
                error = str(fault)
        return records.Tree(
            question_id=question["question_id"],
            policy=self.policy,
            config_hash=self.config_hash,
            nodes=list(builder.tree),
            num_rejected=writer.num_rejected,
            num_tokens=writer.num_tokens,
            error=error,
        )


class TreeBuilder:
    """One question's tree while it grows."""

    def __init__(self, config: TreeSearchConfig, writer: StepWriter) -> None:
        self.config = config
        self.writer = writer
        self.tree: Tree = (ROOT,)

    async def run(self) -> None:
        """Expand until the tree is full or closed; then, if it lacks right solutions, end those that were begun."""
        while not self.is_full:
            at = select(self.tree, self.config.exploration)
            if at is None:
                break
            action = next_action(self.tree, at, self.config)
            await self.expand({at: action})
        if not self.is_spent and num_right(self.tree) < self.config.max_correct:
            # A solution that was begun costs little to end, and may be a right one.
            leaves = unfinished_leaves(self.tree)
            await self.expand(dict.fromkeys(leaves, "finish"))

    @property
    def is_spent(self) -> bool:
        """Whether the tree's tokens are used up."""
        max_tokens = self.config.max_tree_tokens
        return max_tokens is not None and self.writer.num_tokens >= max_tokens

    @property
    def is_full(self) -> bool:
        """Whether the tree is not expanded any further."""
        config = self.config
        if self.is_spent or len(self.tree) >= config.max_nodes:
            return True
        return num_right(self.tree) >= config.max_correct

    async def expand(self, actions: Mapping[int, Action]) -> None:
        """Sample what follows each node, roll it out, and let it grow there, in order."""
        requests = [self.candidates(at, action) for at, action in actions.items()]
        candidates = await asyncio.gather(*requests)
        # In the order of the nodes, not of arrival: a tree must not depend on timing.
        for (at, action), continuations in zip(actions.items(), candidates, strict=True):
            for continuation, rollouts in continuations:
                self.tree = grow(
                    self.tree,
                    at,
                    action,
                    continuation,
                    rollouts,
                    self.config.reflect,
                )
            # Else it would be selected for ever.
            if not continuations:
                self.tree = close(self.tree, at)

    async def candidates(self, at: int, action: Action) -> list[tuple[Continuation, list[bool]]]:
        """What may follow node `at`, each with the outcomes of its rollouts; an ended solution needs none."""
        steps = steps_to(self.tree, at)
        # An end or a doubt is sampled once: it is a whole solution.
        num_samples = self.config.num_children if action == "reason" else 1
        continuations = await self.writer.continuations(steps, action, num_samples)
        requests = [self.roll_out(steps, continuation) for continuation in continuations]
        rollouts = await asyncio.gather(*requests)
        return list(zip(continuations, rollouts, strict=True))

    async def roll_out(self, steps: Sequence[str], continuation: Continuation) -> list[bool]:
        """Whether each answered rollout behind a continuation of `steps` is right."""
        if continuation.answer is not None:
            return []
        steps = [*steps, *continuation.steps]
        num = num_rollouts_at(len(steps), self.config)
        return await self.writer.rollouts(steps, num)


# From trees to tables


def solutions_of(row: Mapping[str, Any]) -> Solutions:
    """The solutions that end in a tree row (a plain one), in the order in which they grew."""
    tree = nodes_of(row)
    solutions = [_solution(row, tree, leaf) for leaf in solution_leaves(tree)]
    # A question that failed before the search says so already.
    error = row["error"] and f"upstream: {row['error'].removeprefix('upstream: ')}"
    return Solutions(
        question_id=row["question_id"],
        policy=row["policy"],
        config_hash=row["config_hash"],
        num_requested=len(solutions),
        num_drawn=len(solutions),
        solutions=solutions,
        error=error,
    )


def labels_of(row: Mapping[str, Any], strength: float) -> list[Labels]:
    """The labels of those solutions, with source tree_search."""
    tree = nodes_of(row)
    annotator = f"{row['policy']}@{row['config_hash']}"
    labels: list[Labels] = []
    for leaf in solution_leaves(tree):
        labels.append(
            Labels(
                question_id=row["question_id"],
                solution_id=_solution_id(row, leaf),
                source="tree_search",
                annotator=annotator,
                steps=step_labels(tree, leaf, strength),
                cost=0.0,
            )
        )
    return labels


def nodes_of(row: Mapping[str, Any]) -> Tree:
    """The tree that a row (a plain one) holds."""
    nodes: list[TreeNode] = []
    for node in row["nodes"]:
        nodes.append(TreeNode(**node))
    return tuple(nodes)


def solutions_batch(batch: pa.Table) -> pa.Table:
    """`records.Tree` rows -> `Solutions` rows."""
    rows = list(map(solutions_of, batch.to_pylist()))
    return to_arrow(Solutions, rows)


def labels_batch(batch: pa.Table, strength: float) -> pa.Table:
    """`records.Tree` rows -> ``{question_id, labels}``."""
    labels = [labels_of(row, strength) for row in batch.to_pylist()]
    return pa.table(
        {
            "question_id": batch["question_id"],
            "labels": to_arrow_lists(Labels, labels),
        }
    )


def _solution_id(row: Mapping[str, Any], leaf: int) -> str:
    """A solution's id: the same for its row and its labels, which are made apart."""
    content = digest(
        row["question_id"],
        row["policy"],
        row["config_hash"],
        leaf,
    )
    return f"s{content}"


def _solution(row: Mapping[str, Any], tree: Tree, leaf: int) -> Solution:
    steps = steps_to(tree, leaf)
    text = solution_text(steps)
    node = tree[leaf]
    return Solution(
        solution_id=_solution_id(row, leaf),
        index=leaf,
        text=text,
        steps=steps,
        answer=node.answer,
        correct=node.correct,
        finish_reason="stop",
        seed=node.seed,
        text_sha=digest(text),
    )
