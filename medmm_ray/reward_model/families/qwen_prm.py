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
    steps_of,
    tokenize_tagged,
    with_separators,
)
from medmm_ray.reward_model.full_sequence import FullSequence, QuestionContext, Solution, single_id


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
        check_tags(self.tag, lambda solution: self.render(QuestionContext("Which?"), solution))

    def render(self, context: QuestionContext, solution: str) -> str:
        """The whole text around a solution with its tags."""
        messages = [
            {"role": "system", "content": self.system if context.system is None else context.system},
            {"role": "user", "content": f"{document_block(context.documents)}{context.question}"},
            {"role": "assistant", "content": solution},
        ]
        return self.template.render(messages, add_generation_prompt=False)

    def sequences(
        self, context: QuestionContext, solutions: Mapping[int, Solution]
    ) -> tuple[list[FullSequence], dict[int, str]]:
        """Whole conversations, the solution with its tags in the assistant's turn."""
        steps = {number: with_separators(solution, steps_of(solution), "") for number, solution in solutions.items()}
        return tokenize_tagged(
            self.tokenizer, self.tag, self.ids["tag"], steps, lambda solution: self.render(context, solution)
        )


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
        """The token embeddings, as transformers' models give them."""
        embed: nn.Module = self.model.embed_tokens
        return embed
