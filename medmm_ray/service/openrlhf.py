"""What OpenRLHF posts to its remote reward model (`--reward.remote_url`), and what it reads of the answer."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, ValidationError, model_validator

from medmm_ray.service.messages import Answer, Message
from medmm_ray.service.problems import Kind, Problem
from medmm_ray.service.rerank import AnswerType
from medmm_ray.service.rewards import PromptCompletions, Reward, RewardsRequest

# Queries are decoded with special tokens: those behind a completion are no part of it.
END_TOKENS = re.compile(r"(?:\s*(?:<\|[^<>|]*\|>|</?s>|<eos>|<pad>|<end_of_turn>))+\s*$")


class OpenRlhfRequest(Message):
    """OpenRLHF's body: one entry of each list a sample."""

    query: list[str] = Field(min_length=1)
    """Prompts with the completion behind each, special tokens included."""
    prompts: list[str]
    """The prompts alone."""
    labels: list[str | None] | None = None
    """Right answers (the column `--data.label_key`): yes or no, or a text; null or empty: not known. Or an object as
    JSON text with fields of a prompt of `/v1/rewards` (question, options, documents, image, gold): best where there are
    options, for then a letter and an option's text are one answer."""

    @model_validator(mode="after")
    def _has_lists_of_one_length(self) -> "OpenRlhfRequest":
        labels = len(self.query) if self.labels is None else len(self.labels)
        if not len(self.query) == len(self.prompts) == labels:
            raise ValueError(f"{len(self.query)} queries, {len(self.prompts)} prompts, {labels} labels; one each")
        return self

    def rewards_request(self) -> RewardsRequest:
        """The same as a request of ours; samples of a prompt that follow each other share it."""
        prompts: list[dict[str, Any]] = []
        for place, (query, prompt) in enumerate(zip(self.query, self.prompts, strict=True)):
            fields = {"question": prompt, **_label_fields(self.labels[place] if self.labels else None)}
            completion = _completion(query, prompt, place)
            if prompts and {**prompts[-1], "completions": None} == {**fields, "completions": None}:
                prompts[-1]["completions"].append(completion)
            else:
                prompts.append({**fields, "completions": [completion]})
        try:
            return RewardsRequest(prompts=[PromptCompletions(**fields) for fields in prompts])
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            raise Problem(Kind.INVALID, f"labels: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None


class OpenRlhfAnswer(Answer):
    """What OpenRLHF reads: rewards for the advantage, scores in [0, 1] for its filter, figures to log."""

    rewards: list[float]
    scores: list[float]
    """1 or 0 for a right or wrong answer where the right one is known, else the least step probability."""
    extra_logs: dict[str, list[float]]
    """The reward's parts."""


def openrlhf_answer(rewards: Sequence[Reward]) -> OpenRlhfAnswer:
    """Our rewards in OpenRLHF's shape, in the order of the queries."""
    scores: list[float] = []
    for reward in rewards:
        least = min(reward.probabilities, default=0.0)
        scores.append(least if reward.answer is None else reward.answer)
    return OpenRlhfAnswer(
        rewards=[reward.reward for reward in rewards],
        scores=scores,
        extra_logs={
            "process": [reward.process for reward in rewards],
            "length": [reward.length for reward in rewards],
            "num_steps": [float(len(reward.probabilities)) for reward in rewards],
        },
    )


def _completion(query: str, prompt: str, place: int) -> str:
    if not query.startswith(prompt):
        raise Problem(Kind.INVALID, f"query.{place} does not begin with prompts.{place}; expected prompt + completion")
    return END_TOKENS.sub("", query[len(prompt) :])


def _label_fields(label: str | None) -> Mapping[str, Any]:
    """What a label says of its prompt."""
    if label is None or not label.strip():
        return {}
    if label.lstrip().startswith("{"):
        try:
            fields = json.loads(label)
        except ValueError:
            fields = None  # a text that begins with a brace
        if isinstance(fields, dict):
            return fields
    return {"gold": label, "answer_type": _answer_type(label)}


def _answer_type(gold: str) -> AnswerType:
    # A letter too is found as an open answer: which options it is of, only an object says.
    return "yes_no" if gold.lower() in ("yes", "no") else "open"
