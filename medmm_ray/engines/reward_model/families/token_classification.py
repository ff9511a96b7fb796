"""Two classes at the last token of each step, as TRL and as MedS3 write it (arXiv 2501.12051)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from medmm_ray.engines.reward_model.families.family import FamilyName, TwoClasses, ids_of, with_preamble
from medmm_ray.engines.reward_model.packing import FullSequence, Prompt, Read
from medmm_ray.prompts import document_block
from medmm_ray.text import one_line


class TokenClassification(TwoClasses):
    """TRL's: prompt, then each step and a line break, each tokenised by itself."""

    name: FamilyName = "token_classification"
    separator: ClassVar[str] = "\n"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: Mapping[str, int] = {}

    def sequences(self, prompt: Prompt, solutions: Mapping[int, Read]) -> tuple[list[FullSequence], dict[int, str]]:
        begin = self.tokenizer.bos_token_id
        text = f"{document_block(prompt.documents)}{prompt.question}"
        head = [*([] if begin is None else [begin]), *ids_of(self.tokenizer, text)]
        separator = ids_of(self.tokenizer, self.separator)
        made = []
        for number, (preamble, steps) in solutions.items():
            ids, ends = list(head), []
            for step in with_preamble(preamble, steps):
                ids += ids_of(self.tokenizer, one_line(step)) + separator
                ends.append(len(ids) - 1)
            made.append(FullSequence(number, ids, ends, len(head)))
        return made, {}


class MedS3(TwoClasses):
    """MedS3's: the user's turn, then "Step 0: …", "Step 1: …", each with an empty line and tokenised by itself.

    Step 0 is the root of MedS3's search trees and the same in each solution; it has no score unless the solution
    brings it along. Documents stand before the question.
    """

    name: FamilyName = "meds3"
    separator: ClassVar[str] = "\n\n"
    root: ClassVar[str] = "Let's break down this problem step by step."

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; MedS3's reward model is asked with one")
        self.tokenizer = tokenizer
        self.ids: Mapping[str, int] = {}

    def sequences(self, prompt: Prompt, solutions: Mapping[int, Read]) -> tuple[list[FullSequence], dict[int, str]]:
        messages = [{"role": "user", "content": f"{document_block(prompt.documents)}{prompt.question}"}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        head = ids_of(self.tokenizer, str(text))
        made = []
        for number, (preamble, own) in solutions.items():
            steps = with_preamble(preamble, own)
            if steps[0].strip() != self.root:
                steps = [self.root, *steps]
            ids, ends = list(head), []
            for i, step in enumerate(steps):
                ids += ids_of(self.tokenizer, f"Step {i}: {step.strip()}{self.separator}")
                ends.append(len(ids) - 1)
            start = len(head) if len(steps) == len(own) else ends[0] + 1
            made.append(FullSequence(number, ids, ends[-len(own) :], start))
        return made, {}
