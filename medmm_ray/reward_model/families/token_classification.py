"""Two classes at the last token of each step, as TRL and as MedS3 write it (arXiv 2501.12051)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from medmm_ray.engines.chat_template import ChatTemplate
from medmm_ray.prompts import document_block
from medmm_ray.reward_model.families.family import ClassifierHead, FamilyName, chat_template, ids_of, steps_of
from medmm_ray.reward_model.packing import FullSequence, QuestionContext, Solution
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
        self, prompt: QuestionContext, solutions: Mapping[int, Solution]
    ) -> tuple[list[FullSequence], dict[int, str]]:
        begin = self.tokenizer.bos_token_id
        text = f"{document_block(prompt.documents)}{prompt.question}"
        head = [*([] if begin is None else [begin]), *ids_of(self.tokenizer, text)]
        separator = ids_of(self.tokenizer, self.separator)
        made = []
        for number, solution in solutions.items():
            ids, ends = list(head), []
            for step in steps_of(solution):
                ids += ids_of(self.tokenizer, step) + separator
                ends.append(len(ids) - 1)
            made.append(FullSequence(number, ids, ends, len(head)))
        return made, {}


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
        self, prompt: QuestionContext, solutions: Mapping[int, Solution]
    ) -> tuple[list[FullSequence], dict[int, str]]:
        messages = [{"role": "user", "content": f"{document_block(prompt.documents)}{prompt.question}"}]
        head = ids_of(self.tokenizer, self.template.render(messages))
        made = []
        root = f"Step 0: {self.root}"
        for number, solution in solutions.items():
            own = steps_of(solution)
            if not have_marks(own):
                first = 0 if own[0].strip() == self.root else 1
                own = numbered_steps(own, first)
            steps = own if own[0].strip() == root else [root, *own]
            ids, ends = list(head), []
            for step in steps:
                ids += ids_of(self.tokenizer, f"{step}{self.separator}")
                ends.append(len(ids) - 1)
            start = len(head) if len(steps) == len(own) else ends[0] + 1
            made.append(FullSequence(number, ids, ends[-len(own) :], start))
        return made, {}
