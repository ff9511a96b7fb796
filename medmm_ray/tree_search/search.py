"""The search itself: one engine an actor, many trees at once on it, each grown by its own coroutine.

The next steps of a node are one request, and so are the rollouts of a node; the rollouts of all new children run side
by side, and their outcomes enter the tree in a fixed order. Seeds come from the question, the steps so far and the
table's fingerprint: a tree is the same whatever grows beside it. No prompt carries the gold answer.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from medmm_ray import records
from medmm_ray.config import digest
from medmm_ray.engines.generator import (
    Completion,
    Generator,
    MakeGenerator,
    TextGenerator,
    actor_options,
    policy_prompt,
    request_seed,
)
from medmm_ray.records import Labels, Solution, Solutions, TreeNode, arrow_schema, to_arrow
from medmm_ray.tables import RowError, attach
from medmm_ray.text import extract_answer, is_correct, split_steps
from medmm_ray.tree_search.tree import (
    ROOT,
    Action,
    Drawn,
    Tree,
    TreeSearchConfig,
    begun,
    close,
    grow,
    next_action,
    num_right,
    rollouts_at,
    select,
    solved,
    step_labels,
    steps_to,
)

if TYPE_CHECKING:
    from ray.data import Dataset

DOUBT = " But wait,"
_MARKUP = re.compile(r"\n\s*(?:#+|\*\*)\s*$")  # of the next step's mark, before its words


def tree_search(
    ds: "Dataset",
    config: TreeSearchConfig,
    *,
    model: str,
    policy: str,
    config_hash: str,
    evidence: pa.Table | None = None,
    generator: MakeGenerator = Generator,
) -> "Dataset":
    """Questions -> `records.Tree` rows.

    `model` is the checkpoint that is searched, `policy` what the tables call it, `config_hash` the table's fingerprint.
    `evidence` (question_id, documents) is needed where config.num_documents > 0.
    """
    if config.num_documents:
        if evidence is None:
            raise ValueError(f"num_documents={config.num_documents} needs the table evidence; run retrieve first")
        ds = attach(ds, evidence, "question_id", ["documents"])
    return ds.map_batches(
        Searcher,
        fn_constructor_kwargs={
            "config": config,
            "model": model,
            "policy": policy,
            "config_hash": config_hash,
            "generator": generator,
        },
        **actor_options(config),
    )


class Searcher:
    """The actor: one engine, and on it `batch_size` x `max_concurrency` trees at a time."""

    def __init__(
        self, config: TreeSearchConfig, model: str, policy: str, config_hash: str, generator: MakeGenerator = Generator
    ) -> None:
        self.config, self.policy, self.config_hash = config, policy, config_hash
        self.generator = generator(model, config)

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        rows = await asyncio.gather(*(self.search(question) for question in batch.to_pylist()))
        yield to_arrow(records.Tree, list(rows))

    async def search(self, question: Mapping[str, Any]) -> records.Tree:
        """The tree of one question; a fault becomes the row's error."""
        growth = Growth(self.config, self.generator, question, self.config_hash)
        error = None if question["error"] is None else f"upstream: {question['error']}"
        if error is None:
            try:
                await growth.run()
            except RowError as fault:
                error = str(fault)
        return records.Tree(
            question_id=question["question_id"],
            policy=self.policy,
            config_hash=self.config_hash,
            nodes=list(growth.tree),
            num_rejected=growth.num_rejected,
            num_tokens=growth.num_tokens,
            error=error,
        )


class Growth:
    """One question's tree while it grows."""

    def __init__(
        self, config: TreeSearchConfig, generator: TextGenerator, question: Mapping[str, Any], config_hash: str
    ) -> None:
        self.config, self.generator, self.question = config, generator, question
        self.config_hash = config_hash
        self.tree: Tree = (ROOT,)
        self.num_tokens = self.num_rejected = 0

    async def run(self) -> None:
        """Expand until the tree is full or closed; then, if it lacks right solutions, end what was begun."""
        room = self.config.max_model_len - self.config.max_tokens
        self.prompt = policy_prompt(self.generator, self.question, self.config.num_documents, room)
        while not self.is_full and (at := select(self.tree, self.config.exploration)) is not None:
            await self.expand([at])
        if not self.is_spent and num_right(self.tree) < self.config.max_correct:
            await self.expand(begun(self.tree), "finish")

    @property
    def is_spent(self) -> bool:
        return self.config.max_tree_tokens is not None and self.num_tokens >= self.config.max_tree_tokens

    @property
    def is_full(self) -> bool:
        config = self.config
        return self.is_spent or len(self.tree) >= config.max_nodes or num_right(self.tree) >= config.max_correct

    async def expand(self, nodes: Sequence[int], action: Action | None = None) -> None:
        """Draw what follows each of `nodes`, roll it out, let it grow there."""
        actions = [action or next_action(self.tree, at, self.config) for at in nodes]
        found = await asyncio.gather(*(self.draw(at, how) for at, how in zip(nodes, actions, strict=True)))
        rolled = await asyncio.gather(
            *(self.roll(at, drawn) for at, all_drawn in zip(nodes, found, strict=True) for drawn in all_drawn)
        )
        outcomes = iter(rolled)
        for at, how, all_drawn in zip(nodes, actions, found, strict=True):
            for drawn in all_drawn:
                self.tree = grow(self.tree, at, how, drawn, next(outcomes), self.config.reflect)
            if not all_drawn:
                self.tree = close(self.tree, at)

    async def draw(self, at: int, action: Action) -> list[Drawn]:
        """What may follow node `at`, equal samples once; cut, empty and answerless ones are rejected."""
        steps = steps_to(self.tree, at)
        said = begin(steps) + (DOUBT if action == "reflect" else "")
        stop = mark(len(steps) + 2) if action == "reason" else None
        samples = await self.ask("step", said, self.config.num_children if stop else 1, stop)
        read = [self.read(said, len(steps), sample, stop) for sample in samples]
        self.num_rejected += read.count(None)
        return list({drawn.steps: drawn for drawn in reversed(read) if drawn}.values())[::-1]

    def read(self, said: str, before: int, sample: Completion, stop: str | None) -> Drawn | None:
        """What a sample says behind `before` steps: the next one, or all to the end; None where it is no use."""
        if sample.finish_reason != "stop":
            return None
        stopped = bool(stop) and sample.text.endswith(str(stop))
        text = _MARKUP.sub("", sample.text.removesuffix(str(stop))) if stopped else sample.text
        steps = split_steps(said[said.rindex(mark(before + 1)) :] + text)[1]
        if stopped:
            return Drawn((steps[0],), seed=sample.seed) if steps else None
        answer = extract_answer(said + text, self.question["options"], self.question["answer_type"])
        if answer is None or not steps or before + len(steps) > self.config.max_steps:
            return None
        correct = is_correct(answer, self.question["answer"], self.question["answer_type"])
        return Drawn(tuple(steps), answer, correct, sample.seed)

    async def roll(self, at: int, drawn: Drawn) -> list[bool]:
        """Whether each rollout that ended with an answer is right; none are needed where the solution has ended."""
        if drawn.answer is not None:
            return []
        steps = [*steps_to(self.tree, at), *drawn.steps]
        said = begin(steps)
        samples = await self.ask("rollout", said, rollouts_at(len(steps), self.config))
        asked = self.question
        right = [
            is_correct(
                extract_answer(said + s.text, asked["options"], asked["answer_type"]),
                asked["answer"],
                asked["answer_type"],
            )
            for s in samples
            if s.finish_reason == "stop"
        ]
        return [r for r in right if r is not None]

    async def ask(self, purpose: str, said: str, n: int, stop: str | None = None) -> list[Completion]:
        """One request; none comes back where the path has outgrown the model's length."""
        seed = request_seed("tree_search", self.config_hash, self.question["question_id"], purpose, said)
        prompt, how = replace(self.prompt, said=said), replace(self.config.sampling, stop=(stop,) if stop else ())
        try:
            samples = await self.generator.generate(prompt, n, seed, how)
        except RowError:
            if len(self.tree) == 1:
                raise
            return []
        self.num_tokens += sum(sample.num_tokens for sample in samples)
        return samples


def mark(number: int) -> str:
    return f"Step {number}:"


def begin(steps: Sequence[str]) -> str:
    """Steps as the policy writes them, one a line, and the mark of the next, so that another must follow."""
    return "".join(f"{mark(i)} {step}\n" for i, step in enumerate(steps, 1)) + mark(len(steps) + 1)


# From trees to tables


def solutions_of(row: Mapping[str, Any]) -> Solutions:
    """The solutions that end in a tree row (a plain one), in the order in which they were found."""
    tree = nodes_of(row)
    return Solutions(
        question_id=row["question_id"],
        policy=row["policy"],
        config_hash=row["config_hash"],
        num_requested=len(solved(tree)),
        num_rejected=row["num_rejected"],
        solutions=[_solution(row, tree, leaf) for leaf in solved(tree)],
        error=row["error"] and f"upstream: {row['error'].removeprefix('upstream: ')}",
    )


def labels_of(row: Mapping[str, Any], strength: float) -> list[Labels]:
    """The labels of those solutions, with source tree_search."""
    tree = nodes_of(row)
    return [
        Labels(
            question_id=row["question_id"],
            solution_id=_solution_id(row, leaf),
            source="tree_search",
            annotator=f"{row['policy']}@{row['config_hash']}",
            steps=step_labels(tree, leaf, strength),
            cost=0.0,
        )
        for leaf in solved(tree)
    ]


def nodes_of(row: Mapping[str, Any]) -> Tree:
    return tuple(TreeNode(**node) for node in row["nodes"])


def solutions_batch(batch: pa.Table) -> pa.Table:
    """`records.Tree` rows -> `Solutions` rows."""
    return to_arrow(Solutions, [solutions_of(row) for row in batch.to_pylist()])


def labels_batch(batch: pa.Table, strength: float) -> pa.Table:
    """`records.Tree` rows -> ``{question_id, labels}``."""
    nested = [[asdict(label) for label in labels_of(row, strength)] for row in batch.to_pylist()]
    kind = pa.list_(pa.struct(list(arrow_schema(Labels))))
    return pa.table({"question_id": batch["question_id"], "labels": pa.array(nested, kind)})


def _solution_id(row: Mapping[str, Any], leaf: int) -> str:
    return "s" + digest(row["question_id"], row["policy"], row["config_hash"], leaf)


def _solution(row: Mapping[str, Any], tree: Tree, leaf: int) -> Solution:
    steps = steps_to(tree, leaf)
    text = "\n".join(f"{mark(i)} {step}" for i, step in enumerate(steps, 1))
    return Solution(
        solution_id=_solution_id(row, leaf),
        index=leaf,
        text=text,
        steps=steps,
        answer=tree[leaf].answer,
        correct=tree[leaf].correct,
        finish_reason="stop",
        seed=tree[leaf].seed,
        text_sha=digest(text),
    )
