"""Med-PRM's format (arXiv 2506.11474): chat template, " ки" after each step, " +" against " -" there.

The same is read by a vision-language model (`MedPrmVision`), whose images stand where its chat template puts them: in
LLaVA's and InternVL's at the beginning of the user's turn, so before documents and question, as these models are
trained. All solutions share what stands before them anyway, the images too.
"""

from collections.abc import Mapping
from typing import Any

from medmm_ray.engines.reward_model.families.family import FamilyName, Pictures, Signs, steps_in_a_line, tagged
from medmm_ray.engines.reward_model.packing import FullSequence, Prompt, Read, single_id
from medmm_ray.prompts import prm_messages
from medmm_ray.text import TAG


class MedPrm(Signs):
    """Med-PRM's format; " ки", " +" and " -" must each be one token."""

    name: FamilyName = "medprm"

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; a reward model's input is written with one")
        self.tokenizer = tokenizer
        self.ids: Mapping[str, int] = {"tag": single_id(tokenizer, TAG), "plus": single_id(tokenizer, " +"),
                    "minus": single_id(tokenizer, " -")}  # fmt: skip

    def sequences(self, prompt: Prompt, solutions: Mapping[int, Read]) -> tuple[list[FullSequence], dict[int, str]]:
        def write(own: str) -> str:
            messages = prm_messages(prompt.question, own, prompt.documents, training=prompt.training)
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

        return tagged(self.tokenizer, TAG, self.ids["tag"], solutions, write, steps_in_a_line)


class MedPrmVision(MedPrm):
    """Med-PRM's format for a language model that reads the images itself."""

    name: FamilyName = "medprm_vision"

    def __init__(self, tokenizer: Any, pictures: Pictures) -> None:
        super().__init__(tokenizer)
        self.pictures = pictures

    def sequences(self, prompt: Prompt, solutions: Mapping[int, Read]) -> tuple[list[FullSequence], dict[int, str]]:
        def write(own: str) -> str:
            system, user = prm_messages(prompt.question, own, prompt.documents, training=prompt.training)
            messages = [
                {"role": "system", "content": [_text(system["content"])]},
                {"role": "user", "content": [*({"type": "image"} for _ in prompt.images), _text(user["content"])]},
            ]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return self.pictures.placed(str(text), len(prompt.images))

        made, faults = tagged(self.tokenizer, TAG, self.ids["tag"], solutions, write, steps_in_a_line)
        return self.pictures.repeated(prompt, made, faults)


def _text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}
