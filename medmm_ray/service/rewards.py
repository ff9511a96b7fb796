"""`POST /v1/rewards`: rewards for reinforcement learning. From log-odds to a number each.

Enters: prompts, each with the completions that a policy wrote to it, and what an answer is worth. Leaves: rewards in
the order of the completions. The reward is

    reward = process + answer_weight * answer + length_weight * length

with PURE's min-form of the step probabilities (`medmm_ray.stats.credit.min_form`), 1 or 0 for an answer that is right
or not, and DAPO's punishment of long completions (`overlong_penalty`); terms that were not asked for are 0.
"""

from collections.abc import Sequence

from pydantic import Field, model_validator

from medmm_ray.service.messages import Answer, Message
from medmm_ray.service.problems import Kind, Problem
from medmm_ray.service.rerank import (
    AnswerType,
    Case,
    Context,
    Scored,
    Solution,
    StepLogOdds,
    Usage,
    stated_answer,
    step_totals,
)
from medmm_ray.stats import metrics
from medmm_ray.stats.credit import PURE_TEMPERATURE, min_form, overlong_penalty
from medmm_ray.text import is_correct


class RewardTerms(Message):
    """What a completion is rewarded for, beside its steps."""

    temperature: float = Field(default=PURE_TEMPERATURE, ge=0, le=10)
    """Of PURE's min-form: 0 is the exact minimum over the steps; 0.1 is PURE's."""
    answer_weight: float = Field(default=1.0, ge=0, le=100)
    """What a right answer adds, where a gold answer was sent."""
    length_weight: float = Field(default=1.0, ge=0, le=100)
    """What a completion of `max_characters` loses; it counts where `max_characters` is set."""
    max_characters: int | None = Field(default=None, ge=1)
    """Length from which on a completion is punished in full; null: length does not count."""
    margin_characters: int = Field(default=0, ge=0)
    """Over how many characters before `max_characters` the punishment rises."""


class PromptCompletions(Context):
    """A prompt (question, options, documents, images) and the completions that a policy wrote to it."""

    completions: list[Solution | str] = Field(min_length=1)
    """What the policy wrote: a text with `Step 1:` … marks, or a list of steps; an empty one gets the least reward."""
    gold: str | None = None
    """The right answer: a letter, yes or no, or a text, as `answer_type` has it; null: answers are not checked."""
    answer_type: AnswerType = "choice"
    """How an answer is read from a completion."""

    @model_validator(mode="after")
    def _has_options_to_choose_from(self) -> "PromptCompletions":
        if self.gold is not None and self.answer_type == "choice" and not self.options:
            raise ValueError("gold is a letter of the options, and there are none; send them, or answer_type: open")
        return self

    def case(self) -> Case | None:
        """The completions that have a text, as a case to score; None where none has."""
        solutions: list[Solution] = [self.completions[place] for place in self.places()]
        if not solutions:
            return None
        shared = self.model_dump(include=set(Context.model_fields))
        return Case(**shared, solutions=solutions)

    def places(self) -> list[int]:
        """Which completions have a text."""
        places: list[int] = []
        for place, completion in enumerate(self.completions):
            # A policy may well end at once: that is no fault of the request.
            if not isinstance(completion, str) or completion.strip():
                places.append(place)
        return places


class RewardsRequest(Message):
    """Prompts with their completions, and what they are rewarded for."""

    prompts: list[PromptCompletions] = Field(min_length=1)
    """Each with one completion or more; those of one prompt share the reading of it."""
    terms: RewardTerms = RewardTerms()
    """What completions are rewarded for, beside their steps."""


class Reward(Answer):
    """One completion's reward and what it is made of."""

    prompt: int
    """Which prompt of the request, from 0."""
    completion: int
    """Which of its completions, from 0."""
    reward: float
    """process + answer_weight * answer + length_weight * length."""
    process: float
    """PURE's min-form of the steps, in [-1, 1]; -1 where the completion has no steps or could not be scored."""
    answer: float | None
    """1 where the stated answer is the gold one, else 0; null without a gold answer."""
    length: float
    """DAPO's punishment, in [-1, 0]."""
    step_rewards: list[float]
    """Each step's part of `process`: they add up to it."""
    probabilities: list[float]
    """Probability that each step is right."""
    stated: str | None
    """The answer that the completion states."""
    error: str | None = None
    """Why the completion could not be scored."""


class RewardsAnswer(Answer):
    """The rewards, prompt by prompt, in the order of the completions."""

    model: str
    rewards: list[Reward]
    warnings: list[str] = Field(default=[])
    """What of the request is outside of what the model was trained on."""
    usage: Usage | None = None
    """What the request cost; null where it was not counted."""


def rewards_of(number: int, prompt: PromptCompletions, scored: Scored | None, terms: RewardTerms) -> list[Reward]:
    """The rewards of one prompt's completions, from the scores of `prompt.case()`; `number` is the prompt's place."""
    scores: dict[int, StepLogOdds] = {}
    if scored is not None:
        scores = dict(zip(prompt.places(), scored.solutions, strict=True))
    rewards: list[Reward] = []
    for place in range(len(prompt.completions)):
        rewards.append(_reward(number, place, prompt, scores.get(place), terms))
    return rewards


def _reward(
    number: int,
    place: int,
    prompt: PromptCompletions,
    score: StepLogOdds | None,
    terms: RewardTerms,
) -> Reward:
    completion = prompt.completions[place]
    probabilities: list[float] = []
    error: str | None = "empty: the completion has no text"
    if score is not None:
        totals = step_totals(score)
        probabilities = [float(metrics.probability(value)) for value in totals.log_odds]
        error = totals.error
        if error is not None and error.startswith("not_finite:"):
            # The model's fault, not the policy's: a reward for it would teach nonsense.
            raise Problem(Kind.INTERNAL, error)
    credit = min_form(probabilities, terms.temperature)
    stated = stated_answer(completion, prompt.options, prompt.answer_type)
    # A completion that states no answer is as wrong as one that states another.
    answer = None
    if prompt.gold is not None:
        answer = float(is_correct(stated, prompt.gold, prompt.answer_type) is True)
    length = _length_term(completion, terms)
    return Reward(
        prompt=number,
        completion=place,
        reward=credit.reward + terms.answer_weight * (answer or 0.0) + terms.length_weight * length,
        process=credit.reward,
        answer=answer,
        length=length,
        step_rewards=credit.steps,
        probabilities=probabilities,
        stated=stated,
        error=error,
    )


def _length_term(completion: str | Sequence[str], terms: RewardTerms) -> float:
    if terms.max_characters is None:
        return 0.0
    # Steps in a list are written without what joins them: marks are the family's, not the policy's.
    characters = len(completion) if isinstance(completion, str) else sum(map(len, completion))
    return overlong_penalty(characters, terms.max_characters, terms.margin_characters)
