"""Two classes at the last token of each step, as TRL and as MedS3 write it (arXiv 2501.12051)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from medmm_ray.engines.chat_template import ChatTemplate
from medmm_ray.prompts import document_block
from medmm_ray.reward_model.families.family import ClassifierHead, FamilyName, chat_template, ids_of, steps_of
from medmm_ray.reward_model.full_sequence import FullSequence, QuestionContext, Solution
from medmm_ray.text import have_marks, numbered_steps


class TokenClassification(ClassifierHead):
    """TRL's: prompt, then each step as it is and a line break, each tokenised by itself."""

    name: FamilyName = "token_classification"
    template: ChatTemplate | None = None
    separator: ClassVar[str] = "\n"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: Mapping[str, int] = {}

    def sequences(
        self, context: QuestionContext, solutions: Mapping[int, Solution]
    ) -> tuple[list[FullSequence], dict[int, str]]:
        """BOS, documents and question, then the steps."""
        head_ids = ids_of(self.tokenizer, f"{document_block(context.documents)}{context.question}")
        if self.tokenizer.bos_token_id is not None:
            head_ids = [self.tokenizer.bos_token_id, *head_ids]
        # Apart from the step: the two might merge into one token.
        separator_ids = ids_of(self.tokenizer, self.separator)
        sequences: list[FullSequence] = []
        for number, solution in solutions.items():
            pieces = [ids_of(self.tokenizer, step) + separator_ids for step in steps_of(solution)]
            ids, ends = _append(head_ids, pieces)
            sequences.append(FullSequence(number, ids, ends, len(head_ids)))
        return sequences, {}


class MedS3(ClassifierHead):
    """MedS3's: the user's turn, then "Step 0: …", "Step 1: …", each as it is with an empty line, tokenised by itself.

    Step 0 is the root of MedS3's search trees and the same in each solution; it has no score unless the solution
    brings it along. Documents stand before the question.
    """

    name: FamilyName = "meds3"
    separator: ClassVar[str] = "\n\n"
    root: ClassVar[str] = "Let's break down this problem step by step."

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.template = chat_template(tokenizer)
        self.ids: Mapping[str, int] = {}

    def sequences(
        self, context: QuestionContext, solutions: Mapping[int, Solution]
    ) -> tuple[list[FullSequence], dict[int, str]]:
        """The user's turn, then the steps, from the root on."""
        messages = [{"role": "user", "content": f"{document_block(context.documents)}{context.question}"}]
        head_ids = ids_of(self.tokenizer, self.template.render(messages))
        sequences: list[FullSequence] = []
        for number, solution in solutions.items():
            steps, has_root = self._steps(solution)
            pieces = [ids_of(self.tokenizer, f"{step}{self.separator}") for step in steps]
            ids, ends = _append(head_ids, pieces)
            if has_root:
                sequences.append(FullSequence(number, ids, ends, len(head_ids)))
            else:  # the first of `steps` is then the root that was put before them, and has no score
                sequences.append(FullSequence(number, ids, ends[1:], ends[0] + 1))
        return sequences, {}

    def _steps(self, solution: Solution) -> tuple[list[str], bool]:
        """The steps with their marks, from the root on, and whether the solution brought the root along."""
        steps = steps_of(solution)
        if not have_marks(steps):
            first = 0 if steps[0].strip() == self.root else 1
            steps = numbered_steps(steps, first)
        root = f"Step 0: {self.root}"
        has_root = steps[0].strip() == root
        return (steps if has_root else [root, *steps]), has_root


def _append(head_ids: Sequence[int], pieces: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """The ids of a head and of steps one behind the other, and the place of each step's last token."""
    ids = list(head_ids)
    ends: list[int] = []
    for piece in pieces:
        ids += piece
        ends.append(len(ids) - 1)
    return ids, ends
