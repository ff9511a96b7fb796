"""Med-PRM's format (arXiv 2506.11474): chat template, " ки" after each step, " +" against " -" there.

The same is read by a vision-language model (`MedPrmVision`), whose images stand where its chat template puts them: in
LLaVA's and InternVL's at the beginning of the user's turn, so before documents and question, as these models are
trained. All solutions share what stands before them anyway, the images too.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from medmm_ray.prompts import prm_messages
from medmm_ray.reward_model.families.family import (
    FamilyName,
    ImageTokens,
    TokenPairHead,
    chat_template,
    check_tags,
    tagged,
)
from medmm_ray.reward_model.packing import FullSequence, QuestionContext, Solution, single_id
from medmm_ray.text import TAG, reference_steps


class MedPrm(TokenPairHead):
    """Med-PRM's format; " ки", " +" and " -" must each be one token."""

    name: FamilyName = "medprm"
    in_parts: ClassVar[bool] = False

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.template = chat_template(tokenizer, self.in_parts)
        self.ids: Mapping[str, int] = {"tag": single_id(tokenizer, TAG), "plus": single_id(tokenizer, " +"),
                    "minus": single_id(tokenizer, " -")}  # fmt: skip
        check_tags(TAG, lambda own: self.written(QuestionContext("Which?"), own))

    def written(self, prompt: QuestionContext, own: str) -> str:
        """The whole text around a solution's `own`."""
        messages = prm_messages(prompt.question, own, prompt.documents, prompt.training, prompt.system)
        return self.template.render(messages)

    def sequences(
        self, prompt: QuestionContext, solutions: Mapping[int, Solution]
    ) -> tuple[list[FullSequence], dict[int, str]]:
        steps = {number: reference_steps(solution) for number, solution in solutions.items()}
        return tagged(self.tokenizer, TAG, self.ids["tag"], steps, lambda own: self.written(prompt, own))


class MedPrmVision(MedPrm):
    """Med-PRM's format for a language model that reads the images itself."""

    name: FamilyName = "medprm_vision"
    in_parts: ClassVar[bool] = True

    def __init__(self, tokenizer: Any, pictures: ImageTokens) -> None:
        self.image_tokens = pictures
        super().__init__(tokenizer)

    def written(self, prompt: QuestionContext, own: str) -> str:
        system, user = prm_messages(prompt.question, own, prompt.documents, prompt.training, prompt.system)
        messages = [
            {"role": "system", "content": [_text(system["content"])]},
            {"role": "user", "content": [*({"type": "image"} for _ in prompt.images), _text(user["content"])]},
        ]
        return self.image_tokens.placed(self.template.render(messages), len(prompt.images))

    def sequences(
        self, prompt: QuestionContext, solutions: Mapping[int, Solution]
    ) -> tuple[list[FullSequence], dict[int, str]]:
        made, faults = super().sequences(prompt, solutions)
        return self.image_tokens.repeated(prompt, made, faults)


def _text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}
