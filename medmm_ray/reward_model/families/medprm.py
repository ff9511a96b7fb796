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
    tokenize_tagged,
)
from medmm_ray.reward_model.full_sequence import FullSequence, QuestionContext, Solution, single_id
from medmm_ray.text import TAG, reference_steps


class MedPrm(TokenPairHead):
    """Med-PRM's format; " ки", " +" and " -" must each be one token."""

    name: FamilyName = "medprm"
    in_parts: ClassVar[bool] = False

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.template = chat_template(tokenizer, self.in_parts)
        self.ids: Mapping[str, int] = {
            "tag": single_id(tokenizer, TAG),
            "plus": single_id(tokenizer, " +"),
            "minus": single_id(tokenizer, " -"),
        }
        check_tags(TAG, lambda solution: self.render(QuestionContext("Which?"), solution))

    def render(self, context: QuestionContext, solution: str) -> str:
        """The whole text around a solution with its tags."""
        messages = prm_messages(context.question, solution, context.documents, context.training, context.system)
        return self.template.render(messages)

    def sequences(
        self, context: QuestionContext, solutions: Mapping[int, Solution]
    ) -> tuple[list[FullSequence], dict[int, str]]:
        """Whole conversations, the solution with its tags in the user's turn."""
        steps = {number: reference_steps(solution) for number, solution in solutions.items()}
        return tokenize_tagged(
            self.tokenizer, TAG, self.ids["tag"], steps, lambda solution: self.render(context, solution)
        )


class MedPrmVision(MedPrm):
    """Med-PRM's format for a language model that reads the images itself."""

    name: FamilyName = "medprm_vision"
    in_parts: ClassVar[bool] = True

    def __init__(self, tokenizer: Any, image_tokens: ImageTokens) -> None:
        self.image_tokens = image_tokens
        super().__init__(tokenizer)

    def render(self, context: QuestionContext, solution: str) -> str:
        """The conversation, its images' marks in the user's turn as the chat template puts them."""
        system, user = prm_messages(context.question, solution, context.documents, context.training, context.system)
        images = [{"type": "image"} for _ in context.images]
        messages = [
            {"role": "system", "content": [_text(system["content"])]},
            {"role": "user", "content": [*images, _text(user["content"])]},
        ]
        return self.image_tokens.place(self.template.render(messages), len(context.images))

    def sequences(
        self, context: QuestionContext, solutions: Mapping[int, Solution]
    ) -> tuple[list[FullSequence], dict[int, str]]:
        """The same, each image's token as often as it has embeddings."""
        sequences, faults = super().sequences(context, solutions)
        return self.image_tokens.expand(context, sequences, faults)


def _text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}
