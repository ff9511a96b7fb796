"""Exact shared-prefix packing: many solutions of one question as one prefix and its branches.

Enters: a question (its options in the text), solutions as lists of steps (or raw text), documents in rank order, and
the family whose format they are written in. Leaves: a `Packing`, of `PackedQuestion` groups. Every full sequence is
tokenised as the family's own code does it, so its ids are exactly ``prefix_ids + branch.ids``; later tokens than the
last tag are cut, as they cannot influence a causal score. A tag is the place at which a step is read.

Legend: T tags of all branches, I embeddings of all images, D text width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from medmm_ray.reward_model.families.family import Family
from medmm_ray.reward_model.full_sequence import FullSequence, QuestionContext, Solution, common_prefix
from medmm_ray.text import cut_steps, without_mark

Fit = Literal["skip", "break"]
MAX_LENGTH = 4096  # tokens; Med-PRM's
RESERVE = 1024  # tokens kept free of documents, for system prompt, question and solution; Med-PRM's


@dataclass(frozen=True)
class ImageEmbeddings:
    """A question's images for a vision-language model: ``rows_ID`` take the place of their tokens' embeddings, and
    `lengths` says how many each image has."""

    rows_ID: Tensor
    lengths: Sequence[int]


@dataclass(frozen=True)
class Branch:
    """One solution after the shared prefix.

    `solution` is its index in the list that was packed, `ids` end with the last step's tag. `tags` are the indices of
    the steps' tags in `ids`; `start` is where the solution's own text starts, counted from the start of the full
    sequence: it does not depend on how much is shared.
    """

    solution: int
    ids: list[int]
    tags: list[int]
    start: int

    def spans(self, prefix: int) -> list[tuple[int, int]]:
        """Each step's tokens, its tag left out, as [start, end) counted in the full sequence, `prefix` tokens ahead."""
        spans: list[tuple[int, int]] = []
        start = self.start
        for tag in self.tags:
            # A step without text has at least its tag's neighbour, so that it has a mean state.
            spans.append((min(start, prefix + tag - 1), prefix + tag))
            start = prefix + tag + 1
        return spans


@dataclass(frozen=True)
class PackedQuestion:
    """Solutions of a question as one row: the prefix, with `num_documents` documents, then the branches in order.

    Tags are numbered over all branches in order. `image_embeddings`: the images of the prefix, where the language model
    reads them.
    """

    prefix_ids: list[int]
    branches: list[Branch]
    num_documents: int
    image_embeddings: ImageEmbeddings | None = field(default=None, compare=False)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole row."""
        return len(self.prefix_ids) + sum(len(branch.ids) for branch in self.branches)

    @property
    def tag_solutions(self) -> list[int]:
        """The solution of each tag [T]."""
        solutions: list[int] = []
        for branch in self.branches:
            solutions += [branch.solution] * len(branch.tags)
        return solutions

    @property
    def tag_steps(self) -> list[int]:
        """The step, from 0, of each tag [T]."""
        steps: list[int] = []
        for branch in self.branches:
            steps += range(len(branch.tags))
        return steps


@dataclass(frozen=True)
class Packing:
    """A question's solutions, packed.

    `groups` differ in how many documents they read: nearly always there is one; a solution too long for the context
    reads fewer, alone. `errors` has one entry a solution: None, or ``kind: message`` for one that is in no group.
    """

    groups: list[PackedQuestion]
    errors: list[str | None]

    @property
    def num_tokens(self) -> int:
        """Tokens to run, prefixes counted once a group."""
        return sum(group.num_tokens for group in self.groups)


def choose_documents(
    tokenizer: Any,
    documents: Sequence[str],
    max_length: int = MAX_LENGTH,
    reserve: int = RESERVE,
    fit: Fit = "skip",
) -> list[str]:
    """Whole documents, in rank order, within ``max_length - reserve`` tokens.

    The choice depends on the question's documents alone, never on a solution. A document that does not fit is left
    out; with ``fit="break"`` (the reference's rule) it also ends the choice.
    """
    chosen: list[str] = []
    free = max_length - reserve
    for document in documents:
        cost = len(tokenizer(document, add_special_tokens=False)["input_ids"]) + 1
        if cost <= free:
            chosen.append(document)
            free -= cost
        elif fit == "break":
            break
    return chosen


def has_steps(solution: Solution) -> bool:
    """Whether there is a step with text in it, besides its mark."""
    if isinstance(solution, str):
        return any(without_mark(step) for step in cut_steps(solution))
    return any(step.strip() for step in solution)


def pack(
    family: Family,
    question: str,
    solutions: Sequence[Solution],
    documents: Sequence[str] = (),
    max_length: int = MAX_LENGTH,
    reserve: int = RESERVE,
    context: int | None = None,
    fit: Fit = "skip",
    training: bool = False,
    image_embeddings: ImageEmbeddings | None = None,
    system: str | None = None,
) -> Packing:
    """Pack one question's solutions.

    A solution that does not fit the context with the question's documents loses the last of them, as many as it must;
    no other solution is touched, and one that does not fit without any gets an error.

    Args:
        family: how solutions are written and read.
        question: with its options, as `text.question_with_options` writes it.
        solutions: each a list of steps, or raw text (`text.cut_steps` says where it is cut). Neither is edited but as
            the family's own code does it.
        max_length, reserve, fit: the documents' budget, see `choose_documents`.
        context: tokens a full sequence may have (default `max_length`).
        training: the reference's training prompt, which differs by a space.
        system: a system prompt in the place of the family's own.
        image_embeddings: the images, where the language model reads them; documents leave room for them in the context.
    """
    limit = context or max_length
    # Images come first: documents are chosen for what they leave.
    room = max_length if image_embeddings is None else min(max_length, limit - len(image_embeddings.rows_ID))
    chosen = choose_documents(family.tokenizer, documents, room, reserve, fit)
    images = image_embeddings.lengths if image_embeddings else ()
    errors: list[str | None] = [None] * len(solutions)
    unpacked: dict[int, Solution] = {}
    for i, solution in enumerate(solutions):
        if has_steps(solution):
            unpacked[i] = solution
        else:
            errors[i] = "no_steps: the solution is empty; expected at least one step of text"
    groups: list[PackedQuestion] = []
    for num_documents in range(len(chosen), -1, -1):
        if not unpacked:
            break
        context_of_question = QuestionContext(question, chosen[:num_documents], images, training, system)
        sequences, faults = family.sequences(context_of_question, unpacked)
        fitting = [sequence for sequence in sequences if len(sequence.ids) <= limit]
        if fitting:
            groups.append(_share(fitting, num_documents, image_embeddings))
        for i, fault in faults.items():
            errors[i] = fault
        # What is too long is tried again with one document fewer.
        too_long = [sequence for sequence in sequences if len(sequence.ids) > limit]
        if num_documents == 0:
            for sequence in too_long:
                length = len(sequence.ids)
                errors[sequence.solution] = f"too_long: {length} tokens without a document; the limit is {limit}"
        unpacked = {sequence.solution: unpacked[sequence.solution] for sequence in too_long}
    return Packing(groups, errors)


def _share(
    sequences: Sequence[FullSequence], num_documents: int, image_embeddings: ImageEmbeddings | None
) -> PackedQuestion:
    """The longest common beginning as prefix, the rest as branches; every tag belongs to a branch."""
    # Equal first steps would put their tag into the prefix; a tag is read in its branch.
    first_tag = min(sequence.tags[0] for sequence in sequences)
    prefix = min(common_prefix([sequence.ids for sequence in sequences]), first_tag)
    branches: list[Branch] = []
    for sequence in sequences:
        tags = [tag - prefix for tag in sequence.tags]
        branches.append(Branch(sequence.solution, sequence.ids[prefix:], tags, sequence.start))
    return PackedQuestion(sequences[0].ids[:prefix], branches, num_documents, image_embeddings)
