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
    places_of,
    steps_of,
)
from medmm_ray.reward_model.full_sequence import FullSequence, QuestionContext, Solution, common_prefix, single_id
from medmm_ray.reward_model.shared_text import tokenize_sharing

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

    def __init__(self, tokenizer: Any, image_tokens: ImageTokens) -> None:
        self.tokenizer, self.image_tokens = tokenizer, image_tokens
        # The turns are found by their ids, so that the marks must be tokens of their own.
        for mark in ("<|im_start|>", "<|im_end|>"):
            single_id(tokenizer, mark)
        plus, minus = tokenizer.convert_tokens_to_ids(["+", "-"])
        self._assistant_ids = ids_of(tokenizer, _ASSISTANT)
        self._turn_ids = ids_of(tokenizer, _ASSISTANT + self.answer + _END)
        expected_ids = [*self._assistant_ids, plus]
        if self._turn_ids[: len(expected_ids)] != expected_ids or minus in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"the tokenizer encodes an assistant's turn of '+' as {self._turn_ids}; expected the token '+' after "
                f"{self._assistant_ids}, and a token '-': the model reads one against the other"
            )
        self.ids: Mapping[str, int] = {"plus": plus, "minus": minus}

    def sequences(
        self, context: QuestionContext, solutions: Mapping[int, Solution]
    ) -> tuple[list[FullSequence], dict[int, str]]:
        """Conversations that answer every step with "+", to be read at the token before each answer."""
        images = _numbered(self.image_tokens.text, len(context.images))
        question = f"{images}{document_block(context.documents)}{context.question}"
        head = (
            f"<|im_start|>system\n{SYSTEM}{_END}<|im_start|>user\n### Question:\n{question}\n\n### Solution Process:\n"
        )
        turn_end = f"{_END}{_ASSISTANT}{self.answer}{_END}"
        steps_by_number = {number: steps_of(solution) for number, solution in solutions.items()}
        texts = [head + f"{turn_end}<|im_start|>user\n".join(steps) + turn_end for steps in steps_by_number.values()]
        head_ids, *rows = tokenize_sharing(self.tokenizer, head, [head, *texts])
        sequences: list[FullSequence] = []
        faults: dict[int, str] = {}
        for (number, steps), ids in zip(steps_by_number.items(), rows, strict=True):
            reads = [place + len(self._assistant_ids) - 1 for place in places_of(self._turn_ids, ids)]
            if len(reads) == len(steps):
                start = common_prefix([head_ids, ids])
                sequences.append(FullSequence(number, ids[: reads[-1] + 1], reads, start))
            else:
                faults[number] = f"tags: {len(reads)} turns of the assistant for {len(steps)} steps; expected as many"
        return self.image_tokens.expand(context, sequences, faults)


def _numbered(image: str, number: int) -> str:
    """The text of the images: one stands alone, several have numbers, as InternVL is asked."""
    if number == 1:
        return f"{image}\n"
    return "".join(f"Image-{i}: {image}\n" for i in range(1, number + 1))
