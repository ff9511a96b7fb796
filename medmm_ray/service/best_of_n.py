"""Best of N with a policy: samples come in rounds, each is scored, and sampling stops when the answer stands.

Enters: a question, and how many samples it may take. Leaves: a `Round` each time samples were scored, then the
`BestOfNAnswer`. When to stop is `medmm_ray.stats.stopping`'s; which samples are scored at all is the step `sample`'s.
"""

import math
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from medmm_ray.engines.generator import Completion, Sampling, request_seed
from medmm_ray.service.messages import Message
from medmm_ray.service.policy import Policy, PolicyQuestion
from medmm_ray.service.rerank import (
    Aggregate,
    AnswerType,
    ChosenAnswer,
    Context,
    RerankAnswer,
    RerankRequest,
    Scored,
    ScoredSolution,
    StepLogOdds,
    Usage,
    from_base64,
    rerank,
)
from medmm_ray.stats import decoders
from medmm_ray.stats.stopping import Rule, Standing, standing
from medmm_ray.text import extract_answer, split_steps
from medmm_ray.text.quality import NOT_HAD, fault

Stop = Literal["settled", "reliable", "exhausted"]
MAX_STEPS = 64


class BestOfNRequest(Context):
    """A question to be answered: how many solutions to sample at most, and when fewer are enough."""

    answer_type: AnswerType = "choice"
    """How an answer is read from a solution: a letter (choice), yes or no (yes_no), or the stated text (open)."""
    aggregate: Aggregate = "min"
    """Which aggregate of the step probabilities is a solution's reward."""
    rule: Rule = "best_of_n"
    """What chooses the answer: the highest reward, the largest sum of rewards (sc_rm) or of votes (majority)."""
    num_samples: Annotated[int, Field(ge=1, le=256)] = 64
    """N: the most samples that are drawn."""
    round_size: Annotated[int, Field(ge=1, le=64)] = 8
    """Samples of a round, after which it is seen whether more are needed."""
    reliability: Annotated[float, Field(gt=0, le=1)] | None = 0.85
    """Chance that the answer chosen now is also the one chosen at N, at which sampling stops; null stops only where
    nothing can change the choice any more."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    """Sampling temperature of the policy."""
    max_tokens: Annotated[int, Field(ge=1, le=8192)] = 1024
    """Longest solution; one that is cut there is not scored."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Start of the samples' seeds: the same request gives the same samples, as far as the policy's engine does."""
    stream: bool = False
    """Answer with server-sent events: `round` after each round, then `answer`."""

    @property
    def policy_question(self) -> PolicyQuestion:
        """What the policy is asked. Raises `RowError` for an image that is not base64."""
        image = None if self.image is None else from_base64("image", self.image)
        return PolicyQuestion(self.question, tuple(self.options), self.answer_type, tuple(self.documents), image)

    @property
    def sampling(self) -> Sampling:
        """How the policy is sampled."""
        return Sampling(temperature=self.temperature, top_k=0, max_tokens=self.max_tokens)

    def case(self, solutions: Sequence[str]) -> RerankRequest:
        """The rerank request of solutions of this question."""
        shared = {name: getattr(self, name) for name in Context.model_fields}
        return RerankRequest(
            **shared, answer_type=self.answer_type, aggregate=self.aggregate, solutions=list(solutions)
        )


class PolicyUsage(Message):
    """What the policy's samples cost."""

    prompt_tokens: int = 0
    """Tokens of prompts: a prompt counts once a sample, as it is billed."""
    cached_tokens: int = 0
    """Of these, found in the prefix cache."""
    completion_tokens: int = 0
    """Tokens that were generated."""
    cost_usd: float = 0.0
    """US dollars, of a model behind an API."""


class Cost(Message):
    """What an answer cost, policy and scorer apart."""

    policy: PolicyUsage
    scorer: Usage | None
    """Tokens that the reward model read; null where it does not count them."""


class Round(Message):
    """What one round brought."""

    solutions: list[ScoredSolution]
    """The new ones; ranks are among all so far."""
    texts: list[str]
    """Their texts, as the policy wrote them."""
    choice: ChosenAnswer
    """The choice so far; `solution` counts over all rounds."""
    reliability: float
    """Chance that the choice stays."""
    num_drawn: int
    """Samples so far, those that were not scored too."""
    cost: Cost


class BestOfNAnswer(Message):
    """The answer, how sure the choice is, and all that it rests on."""

    choice: ChosenAnswer
    rule: Rule
    reliability: float
    """Chance that more samples, up to N, leave the answer as it is."""
    stopped: Stop
    """Why no more were drawn: no sample could change the choice, the reliability was reached, or all N were drawn."""
    num_drawn: int
    num_samples: int
    """N."""
    rejected: dict[str, int]
    """Samples that were not scored, by fault: cut_off, no_answer, repetition, …"""
    texts: list[str]
    """The scored solutions as the policy wrote them, in the order of `ranking.solutions`."""
    ranking: RerankAnswer | None
    """Every step's score and all rules' choices; null where no sample could be scored."""
    cost: Cost


class PolicyUnavailableError(RuntimeError):
    """The policy gave no sample at all; the message is the first one's fault."""


ScoreCase = Callable[[RerankRequest], Awaitable[Scored]]
NO_CHOICE = ChosenAnswer(answer=None, solution=None, support=0.0)


@dataclass
class Drawn:
    """All samples of a request so far: the scored ones, and what became of the others."""

    texts: list[str] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)
    scores: list[StepLogOdds] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    policy: Counter[str] = field(default_factory=Counter)
    cost_usd: float = 0.0
    scorer_tokens: int | None = 0

    @property
    def num_drawn(self) -> int:
        """Samples so far."""
        return len(self.texts) + self.rejected.total()

    @property
    def cost(self) -> Cost:
        """What they cost."""
        policy = PolicyUsage(
            prompt_tokens=self.policy["prompt"],
            cached_tokens=self.policy["cached"],
            completion_tokens=self.policy["completion"],
            cost_usd=self.cost_usd,
        )
        return Cost(policy=policy, scorer=Scored((), self.scorer_tokens).usage)

    def take(self, request: BestOfNRequest, completions: Sequence[Completion]) -> list[str]:
        """Count a round's samples, and give the texts that are to be scored."""
        texts: list[str] = []
        for completion in completions:
            self.policy["prompt"] += completion.prompt_tokens
            self.policy["cached"] += completion.cached_tokens
            self.policy["completion"] += completion.num_tokens
            self.cost_usd += completion.cost
            _, steps = split_steps(completion.text)
            answer = extract_answer(completion.text, request.options, request.answer_type)
            reason = fault(completion.text, steps, answer, completion.finish_reason, 1, MAX_STEPS)
            # As the step `sample` has it: the scorer was trained on none of these.
            if reason is not None:
                self.rejected[reason] += 1
                continue
            texts.append(completion.text)
            self.answers.append(answer)
        return texts

    def add(self, texts: Sequence[str], scored: Scored) -> None:
        """Take the scores of a round's texts."""
        self.texts += texts
        self.scores += scored.solutions
        # One round that is not counted makes the sum unknown.
        counted = None if scored.num_tokens is None or self.scorer_tokens is None else scored.num_tokens
        self.scorer_tokens = None if counted is None else (self.scorer_tokens or 0) + counted


async def best_of_n(
    request: BestOfNRequest, policy: Policy, score: ScoreCase, model: str, warnings: Sequence[str] = ()
) -> AsyncGenerator[Round | BestOfNAnswer]:
    """The rounds of a request, and at last its answer.

    Raises `PolicyUnavailableError` where the first round brings no sample, and what `policy` and `score` raise.
    """
    drawn = Drawn()
    question = request.policy_question
    seed = request_seed(question.question, *question.options, request.seed)
    now = Standing(None, 0.0, is_settled=False)
    ranking: RerankAnswer | None = None
    while drawn.num_drawn < request.num_samples and not now.suffices(request.reliability):
        num = min(request.round_size, request.num_samples - drawn.num_drawn)
        # Seeds go on where the last round ended, so that rounds of any size draw the same samples.
        completions = await policy.sample(question, num, seed + drawn.num_drawn, request.sampling)
        _check_any(completions, drawn)
        texts = drawn.take(request, completions)
        num_before = len(drawn.texts)
        if texts:
            drawn.add(texts, await score(request.case(texts)))
            scored = Scored(drawn.scores, drawn.scorer_tokens)
            # Over all so far: a new sample may change every rank.
            ranking = rerank(request.case(drawn.texts), scored, model, warnings)
        now = _standing(request, drawn)
        yield Round(
            solutions=[] if ranking is None else ranking.solutions[num_before:],
            texts=texts,
            choice=_choice(request, ranking),
            reliability=now.reliability,
            num_drawn=drawn.num_drawn,
            cost=drawn.cost,
        )
    yield BestOfNAnswer(
        choice=_choice(request, ranking),
        rule=request.rule,
        reliability=now.reliability,
        stopped=_stop(request, drawn, now),
        num_drawn=drawn.num_drawn,
        num_samples=request.num_samples,
        rejected=dict(sorted(drawn.rejected.items())),
        texts=drawn.texts,
        ranking=ranking,
        cost=drawn.cost,
    )


def _check_any(completions: Sequence[Completion], drawn: Drawn) -> None:
    """Raise where the policy's first round has no sample: a later one may fail, and what there is stands."""
    faults = [completion.fault for completion in completions if completion.finish_reason in NOT_HAD]
    if not drawn.num_drawn and len(faults) == len(completions):
        raise PolicyUnavailableError(f"the policy gave none of {len(completions)} samples: {faults[0]}")


def _standing(request: BestOfNRequest, drawn: Drawn) -> Standing:
    """Where the choice stands; a sample that was not scored is one less to come."""
    rewards: list[float] = []
    for score in drawn.scores:
        log_odds = [text + image for text, image in zip(score.text_log_odds, score.image_log_odds, strict=True)]
        is_scored = score.error is None and all(map(math.isfinite, log_odds))
        rewards.append(decoders.aggregate(log_odds, request.aggregate) if is_scored else math.nan)
    return standing(request.rule, drawn.answers, rewards, request.num_samples - drawn.rejected.total())


def _choice(request: BestOfNRequest, ranking: RerankAnswer | None) -> ChosenAnswer:
    if ranking is None:
        return NO_CHOICE
    choices = {"best_of_n": ranking.best_of_n, "sc_rm": ranking.sc_rm, "majority": ranking.majority}
    return choices[request.rule]


def _stop(request: BestOfNRequest, drawn: Drawn, now: Standing) -> Stop:
    # First: with no sample to come every choice is settled.
    if drawn.num_drawn >= request.num_samples:
        return "exhausted"
    return "settled" if now.is_settled else "reliable"
