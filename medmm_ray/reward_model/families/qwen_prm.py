"""Qwen2.5-Math-PRM's format (arXiv 2501.07301): "<extra_0>" after each step of the assistant's turn, an MLP there."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2Model

from medmm_ray.prompts import document_block
from medmm_ray.reward_model.families.family import (
    ClassifierHead,
    FamilyName,
    chat_template,
    check_tags,
    joined,
    steps_of,
    tagged,
)
from medmm_ray.reward_model.packing import FullSequence, QuestionContext, Solution, single_id


class QwenPrm(ClassifierHead):
    """The steps in the assistant's turn as they are, each followed by "<extra_0>". Documents stand before the
    question."""

    name: FamilyName = "qwen_prm"
    tag: ClassVar[str] = "<extra_0>"
    system: ClassVar[str] = "Please reason step by step, and put your final answer within \\boxed{}."

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.template = chat_template(tokenizer)
        self.ids: Mapping[str, int] = {"tag": single_id(tokenizer, self.tag)}
        check_tags(self.tag, lambda own: self.written(QuestionContext("Which?"), own))

    def written(self, prompt: QuestionContext, own: str) -> str:
        """The whole text around a solution's `own`."""
        messages = [
            {"role": "system", "content": self.system if prompt.system is None else prompt.system},
            {"role": "user", "content": f"{document_block(prompt.documents)}{prompt.question}"},
            {"role": "assistant", "content": own},
        ]
        return self.template.render(messages, add_generation_prompt=False)

    def sequences(
        self, prompt: QuestionContext, solutions: Mapping[int, Solution]
    ) -> tuple[list[FullSequence], dict[int, str]]:
        steps = {number: joined(solution, steps_of(solution), "") for number, solution in solutions.items()}
        return tagged(self.tokenizer, self.tag, self.ids["tag"], steps, lambda own: self.written(prompt, own))


class QwenProcessRewardModel(PreTrainedModel):
    """The weights of Qwen2.5-Math-PRM, whose own class comes as remote code: a Qwen2 and an MLP with two outputs."""

    config_class = Qwen2Config
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)
        self.model = Qwen2Model(config)
        width = config.hidden_size
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        embed: nn.Module = self.model.embed_tokens
        return embed
