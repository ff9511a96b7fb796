"""VisualPRM's format (arXiv 2503.10291): a conversation in which each step is a turn, and each answer "+" or "-".

One pass scores all steps: every answer is written as "+", and read at the token before it. The conversation is written
out here, as the model's own code does it, not with a chat template; the steps are kept as they are, line breaks too.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from medmm_ray.engines.chat_template import ChatTemplate
from medmm_ray.prompts import document_block
from medmm_ray.reward_model.families.family import (
    FamilyName,
    ImageTokens,
    TokenPairHead,
    ids_of,
    steps_of,
)
from medmm_ray.reward_model.packing import FullSequence, QuestionContext, Solution, common, single_id

# The text with which VisualPRM's training data is made (`PRM_SYSTEM_PROMPT` of InternVL's reasoning data pipeline).
SYSTEM = """\
You are an advanced AI assistant, designed to serve as a process supervision model. In this task, I will provide a \
problem statement followed by the first step of the solution process. For each subsequent turn, I will give you a new \
step in the solution. Your role is to assess whether the solution process is correct up to the current step.

- In the **first round**, I will input the problem and the first step of the solution process.
- In **each subsequent round**, I will provide the next step in the solution.

For each step, you should:

- Respond with **"+"** if you believe the solution process is correct up to this step.
- Respond with **"-"** if you detect any issues or errors in the process up to this step.

Please note:
- Only respond with **"+"** or **"-"**. Do not provide any additional explanations, comments, or justifications.

Your task is to verify the accuracy and correctness of each step in the given solution process."""

_ASSISTANT, _END = "<|im_start|>assistant\n", "<|im_end|>\n"


class VisualPrm(TokenPairHead):
    """Images and documents stand at the beginning of the question, in the first turn."""

    name: FamilyName = "visualprm"
    template: ChatTemplate | None = None
    answer: ClassVar[str] = "+"

    def __init__(self, tokenizer: Any, pictures: ImageTokens) -> None:
        self.tokenizer, self.image_tokens = tokenizer, pictures
        for mark in ("<|im_start|>", "<|im_end|>"):
            single_id(tokenizer, mark)
        plus, minus = tokenizer.convert_tokens_to_ids(["+", "-"])
        self._ahead = ids_of(tokenizer, _ASSISTANT)
        self._turn = ids_of(tokenizer, _ASSISTANT + self.answer + _END)
        if self._turn[: len(self._ahead) + 1] != [*self._ahead, plus] or minus in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"the tokenizer encodes an assistant's turn of '+' as {self._turn}; expected the token '+' after "
                f"{self._ahead}, and a token '-': the model reads one against the other"
            )
        self.ids: Mapping[str, int] = {"plus": plus, "minus": minus}

    def sequences(
        self, prompt: QuestionContext, solutions: Mapping[int, Solution]
    ) -> tuple[list[FullSequence], dict[int, str]]:
        question = (
            f"{_named(self.image_tokens.text, len(prompt.images))}{document_block(prompt.documents)}{prompt.question}"
        )
        head = (
            f"<|im_start|>system\n{SYSTEM}{_END}<|im_start|>user\n### Question:\n{question}\n\n### Solution Process:\n"
        )
        answered = f"{_END}{_ASSISTANT}{self.answer}{_END}"
        turns = {number: steps_of(solution) for number, solution in solutions.items()}
        texts = [head + f"{answered}<|im_start|>user\n".join(steps) + answered for steps in turns.values()]
        rows: list[list[int]] = self.tokenizer([head, *texts])["input_ids"]
        head_ids, *rows = rows
        made: list[FullSequence] = []
        faults: dict[int, str] = {}
        for (number, steps), ids in zip(turns.items(), rows, strict=True):
            reads = [at + len(self._ahead) - 1 for at in _found(self._turn, ids)]
            if len(reads) == len(steps):
                made.append(FullSequence(number, ids[: reads[-1] + 1], reads, common([head_ids, ids])))
            else:
                faults[number] = f"tags: {len(reads)} turns of the assistant for {len(steps)} steps; expected as many"
        return self.image_tokens.repeated(prompt, made, faults)


def _named(picture: str, number: int) -> str:
    """One image stands alone, several have numbers, as InternVL is asked."""
    if number == 1:
        return f"{picture}\n"
    return "".join(f"Image-{i}: {picture}\n" for i in range(1, number + 1))


def _found(part: list[int], ids: list[int]) -> list[int]:
    """Where `part` begins in `ids`."""
    return [at for at, first in enumerate(ids) if first == part[0] and ids[at : at + len(part)] == part]
