"""Math-Shepherd's format (arXiv 2312.08935): plain text, "ки" after each step, "+" against "-" there."""

from collections.abc import Mapping
from typing import Any

from medmm_ray.engines.reward_model.families.family import FamilyName, Signs, steps_in_lines, tagged
from medmm_ray.engines.reward_model.packing import FullSequence, Prompt, Read, single_id
from medmm_ray.prompts import document_block
from medmm_ray.text import TAG


class MathShepherd(Signs):
    """Question, a space, "Step 1: … ки" a line a step. Documents stand before the question."""

    name: FamilyName = "math_shepherd"

    def __init__(self, tokenizer: Any) -> None:
        # Its own code takes the last token of " ки" and of " +", " -": a sentencepiece vocabulary has one for each.
        self.tokenizer = tokenizer
        self.ids: Mapping[str, int] = {
            name: single_id(tokenizer, sign) for name, sign in (("tag", "ки"), ("plus", "+"), ("minus", "-"))
        }

    def sequences(self, prompt: Prompt, solutions: Mapping[int, Read]) -> tuple[list[FullSequence], dict[int, str]]:
        def write(own: str) -> str:
            return f"{document_block(prompt.documents)}{prompt.question} {own}"

        return tagged(self.tokenizer, TAG, self.ids["tag"], solutions, write, steps_in_lines)
