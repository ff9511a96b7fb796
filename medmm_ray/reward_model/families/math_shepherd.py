"""Math-Shepherd's format (arXiv 2312.08935): plain text, "ки" after each step, "+" against "-" there."""

from collections.abc import Mapping
from typing import Any

from medmm_ray.engines.chat_template import ChatTemplate
from medmm_ray.prompts import document_block
from medmm_ray.reward_model.families.family import FamilyName, TokenPairHead, steps_of, tokenize_tagged, with_separators
from medmm_ray.reward_model.full_sequence import FullSequence, QuestionContext, Solution, single_id
from medmm_ray.text import TAG, have_marks, numbered_steps


class MathShepherd(TokenPairHead):
    """Question, a space, "Step 1: … ки" a line a step, each as it is. Documents stand before the question."""

    name: FamilyName = "math_shepherd"
    template: ChatTemplate | None = None

    def __init__(self, tokenizer: Any) -> None:
        # Its own code takes the last token of " ки" and of " +", " -": a sentencepiece vocabulary has one for each.
        self.tokenizer = tokenizer
        self.ids: Mapping[str, int] = {
            "tag": single_id(tokenizer, "ки"),
            "plus": single_id(tokenizer, "+"),
            "minus": single_id(tokenizer, "-"),
        }

    def sequences(
        self, context: QuestionContext, solutions: Mapping[int, Solution]
    ) -> tuple[list[FullSequence], dict[int, str]]:
        """Plain texts: the question, then a line a step."""
        head = f"{document_block(context.documents)}{context.question}"
        lines = {number: _lines(solution) for number, solution in solutions.items()}
        return tokenize_tagged(self.tokenizer, TAG, self.ids["tag"], lines, lambda solution: f"{head} {solution}")


def _lines(solution: Solution) -> list[str]:
    steps = steps_of(solution)
    if not isinstance(solution, str) and not have_marks(steps):
        steps = numbered_steps(steps)
    return with_separators(solution, steps, "\n")
