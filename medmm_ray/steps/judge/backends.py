"""Who judges: a source's own truth with errors, or a model, in this process or behind an API.

Enters: what a question's solutions share, and their steps. Leaves, for each solution, a `Judgement` or a `RowError`.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from medmm_ray.config import digest
from medmm_ray.data.records import StepLabel
from medmm_ray.data.sources import load_with_truth
from medmm_ray.data.tables import RowError
from medmm_ray.engines.images import open_image
from medmm_ray.engines.llm.endpoint import ChatImage, ChatReply, ChatRequest, Turn, corrected
from medmm_ray.engines.llm.served import joined_names
from medmm_ray.engines.llm.store import PricedAnswer
from medmm_ray.steps.judge.config import JudgeConfig
from medmm_ray.steps.judge.prompt import (
    AGAIN,
    JSON_RULE,
    LINE_RULE,
    SEVERAL_RULE,
    SHOWN_AGAIN,
    SYSTEM,
    TOKENS_A_LINE,
    JudgeCall,
    JudgeCase,
    call_text,
    line_pattern,
    rule_of,
    schema_of,
    shared_text,
)
from medmm_ray.steps.judge.verdicts import verdicts

_SPOILT = ("judge_reply", "prompt_too_long")  # faults that one solution of a call can bring upon the others

# How the confidence of a judge by truth falls: it is low, or medium, more often where its verdict is wrong.
_UNSURE = {True: (0.6, 0.3), False: (0.05, 0.15)}


@dataclass(frozen=True)
class Judgement:
    """One solution's verdicts, what they cost, US dollars, and the model that gave them, as its API names it."""

    steps: list[StepLabel]
    cost: float = 0.0
    answered_by: str | None = None


def at_cost(found: "Judgement | RowError", cost: float) -> "Judgement | RowError":
    """A judgement or fault that cost so much, US dollars."""
    return replace(found, cost=cost) if isinstance(found, Judgement) else RowError(found.kind, found.message, cost)


class Judge(Protocol):
    """A backend: verdicts on the solutions (lists of steps) of one case, each a `Judgement` or a fault."""

    annotator: str

    async def judge(self, case: JudgeCase, solutions: Sequence[Sequence[str]]) -> "list[Judgement | RowError]": ...


class RequestClient(Protocol):
    """Who answers a request: `engines.client.Client`, or a model in this process."""

    async def ask(self, request: ChatRequest, group: str) -> PricedAnswer: ...


class TruthJudge:
    """The truth of a source's pictures, with a share of the verdicts flipped; it tends to know where it is unsure.

    `source` is one of `data.sources.WITH_TRUTH`; `error_rate` the share of checkable steps whose verdict is flipped.
    """

    def __init__(self, source: str, error_rate: float, seed: int = 0) -> None:
        self.source = source
        self.error_rate, self.seed = error_rate, seed
        self.annotator = f"{source}@{digest(source, error_rate, seed)}"
        self._picture_of = load_with_truth(source).drawn_picture

    async def judge(self, case: JudgeCase, solutions: Sequence[Sequence[str]]) -> "list[Judgement | RowError]":
        try:
            picture = self._picture_of(case.images[0].note if case.images else "")
        except ValueError:
            fault = RowError(
                "judge_source",
                f"question {case.question_id} has no {self.source}'s annotation; "
                "set judge.backend to vllm, gemini or openai",
            )
            return [fault for _ in solutions]
        judgements: list[Judgement | RowError] = []
        for steps in solutions:
            truths = [picture.truth(step, case) for step in steps]
            labels = [self.verdict(right, case.question_id, steps, index) for index, right in enumerate(truths)]
            judgements.append(Judgement(labels))
        return judgements

    def verdict(self, right: bool | None, question_id: str, steps: Sequence[str], index: int) -> StepLabel:
        """What the judge says of step `index`, whose truth is `right`; None says nothing that can be checked."""
        if right is None:
            return StepLabel(confidence="high", reason="nothing to check")
        bits = int(digest(self.seed, question_id, list(steps), index), 16)
        wrong = (bits >> 32) / 2**32 < self.error_rate
        low, medium = _UNSURE[wrong]
        doubt = (bits & 0xFFFFFFFF) / 2**32
        confidence = "low" if doubt < low else "medium" if doubt < low + medium else "high"
        return StepLabel(label=int(right != wrong), confidence=confidence)


class ModelJudge:
    """A model that reads a case and judges `solutions_per_call` solutions, or one step, a request.

    `count` gives the tokens of a request, `room` the most that one may have; `exact` says whether a schema may hold the
    number of steps.
    """

    def __init__(
        self,
        config: JudgeConfig,
        model: str,
        client: RequestClient,
        count: Callable[[ChatRequest], int],
        room: int,
        exact: bool,
    ) -> None:
        self.config, self.client = config, client
        self._count, self._room, self._exact = count, room, exact
        self._lines = config.reply == "lines"
        self._most_pictures = config.num_images if config.backend == "vllm" else config.max_images
        prompts = (SYSTEM, JSON_RULE, SEVERAL_RULE, LINE_RULE, AGAIN)
        how = (config.reply, config.granularity, config.solutions_per_call, config.show_answer)
        self.annotator = f"{model}@{digest(prompts, how, schema_of(JudgeCall((('',),)), False))}"

    async def judge(self, case: JudgeCase, solutions: Sequence[Sequence[str]]) -> "list[Judgement | RowError]":
        try:
            pictures = await asyncio.to_thread(self._pictures, case)
        except RowError as fault:
            return [fault for _ in solutions]
        documents = self._documents(case, pictures)
        groups = self._groups(case, documents, pictures, solutions)
        calls = [self._calls([solutions[i] for i in group]) for group in groups]
        distinct = list(dict.fromkeys(call for part in calls for call in part))
        # The first call goes ahead of the others, so that they find what they share in the provider's cache.
        ahead = len(calls[0]) if calls and self.config.warm_cache else 0
        outcomes: dict[JudgeCall, list[Judgement | RowError]] = {}
        for part in (distinct[:ahead], distinct[ahead:]):
            asked = [self._judge_call(case, documents, pictures, call) for call in part]
            outcomes |= dict(zip(part, await asyncio.gather(*asked), strict=True))
        results: dict[int, Judgement | RowError] = {}
        for group, part in zip(groups, calls, strict=True):
            found = [outcomes[call] for call in part]
            results |= dict(zip(group, found[0] if len(found) == 1 else [_joined(found)], strict=True))
            outcomes |= {call: [at_cost(one, 0.0) for one in outcomes[call]] for call in part}  # paid for once
        empty = RowError("empty_solution", "the solution has no steps")
        return [results.get(i, empty) for i in range(len(solutions))]

    def _groups(
        self, case: JudgeCase, documents: Sequence[str], pictures: Sequence[str | ChatImage],
        solutions: Sequence[Sequence[str]],
    ) -> list[list[int]]:  # fmt: skip
        """The solutions with steps, by place, in calls: as many together as may be and fit beside the documents."""
        size = 1 if self.config.granularity == "step" else self.config.solutions_per_call
        groups: list[list[int]] = []
        for place in (i for i, steps in enumerate(solutions) if steps):
            if groups and len(groups[-1]) < size:
                [together] = self._calls([solutions[i] for i in (*groups[-1], place)])
                if self._count(self._request(case, documents, pictures, together)) <= self._room:
                    groups[-1].append(place)
                    continue
            groups.append([place])
        return groups

    def _calls(self, solutions: Sequence[Sequence[str]]) -> list[JudgeCall]:
        """One call about the solutions, or one about each step of the only one."""
        shown = tuple(tuple(steps) for steps in solutions)
        if self.config.granularity == "solution":
            return [JudgeCall(shown)]
        return [JudgeCall((shown[0][:number],), number) for number in range(1, len(shown[0]) + 1)]

    def _pictures(self, case: JudgeCase) -> list[str | ChatImage]:
        """The query's images, then each similar case's after its number; opened and encoded once for all calls."""
        named = [("The patient's image:", picture) for picture in case.images]
        named += [(f"The image of similar case {i}:", picture) for i, picture in enumerate(case.references, 1)]
        parts: list[str | ChatImage] = []
        for name, picture in named[: self._most_pictures]:
            parts += [name, ChatImage(open_image(picture.uri), self.config.image_px)]
        return parts

    def _documents(self, case: JudgeCase, pictures: Sequence[str | ChatImage]) -> Sequence[str]:
        """The first documents that leave room for a solution, chosen by the question alone."""
        blank = JudgeCall((("",),))
        room = self._room - min(self.config.solution_reserve * self.config.solutions_per_call, self._room // 2)
        documents = case.documents
        while documents and self._count(self._request(case, documents, pictures, blank)) > room:
            documents = documents[:-1]
        return documents

    async def _judge_call(
        self, case: JudgeCase, documents: Sequence[str], pictures: Sequence[str | ChatImage], call: JudgeCall
    ) -> "list[Judgement | RowError]":
        """What is said of each solution of a call; where they spoil it together, each is asked about alone."""
        try:
            found, cost, answered_by = await self._ask(case, documents, pictures, call)
            return [Judgement(steps, cost / len(found), answered_by) for steps in found]
        except RowError as fault:
            share = fault.cost / len(call.solutions)
            if len(call.solutions) == 1 or fault.kind not in _SPOILT:
                return [at_cost(fault, share) for _ in call.solutions]
        alone = (self._judge_call(case, documents, pictures, JudgeCall((steps,))) for steps in call.solutions)
        return [at_cost(one, one.cost + share) for [one] in await asyncio.gather(*alone)]

    async def _ask(
        self, case: JudgeCase, documents: Sequence[str], pictures: Sequence[str | ChatImage], call: JudgeCall
    ) -> tuple[list[list[StepLabel]], float, str | None]:
        """The labels, their cost and the model that gave them; a reply that does not fit is asked for again, with the
        fault named."""
        request, paid = self._fitting(case, documents, pictures, call), 0.0
        for left in reversed(range(self.config.tries)):
            try:
                answer = await self.client.ask(request, case.question_id)
            except RowError as fault:
                raise RowError(fault.kind, fault.message, fault.cost + paid) from None
            paid += answer.cost
            try:
                return self._labels(answer, call, request.max_tokens), paid, answer.reply.model
            except RowError as fault:
                misfit = fault
            if left:
                words = AGAIN.format(fault=misfit.message, rule=rule_of(call, self._lines))
                request = corrected(request, answer.reply.text[:SHOWN_AGAIN], words)
        raise RowError(misfit.kind, misfit.message, paid)

    def _labels(self, answer: PricedAnswer, call: JudgeCall, max_tokens: int) -> list[list[StepLabel]]:
        reply = answer.reply
        if reply.cut_off:
            raise RowError("judge_reply", f"judge's answer was cut off at max_tokens={max_tokens} {self._cut(reply)}")
        if not reply.text.strip():
            thoughts = reply.choices[0].thoughts
            beside = f"; {thoughts} characters of reasoning beside it are not of the asked form" if thoughts else ""
            raise RowError(
                "judge_reply",
                f"judge's answer is empty ({reply.completion_tokens} tokens, thoughts among them){beside}",
            )
        return verdicts(reply.text, call.numbers, self._lines)

    def _cut(self, reply: ChatReply) -> str:
        """How far an answer came that was cut off, and what to do."""
        if reply.text.strip():
            return f"({len(reply.text)} characters); shorter reasons are enough, or a larger judge.max_tokens"
        more = "take reply=json, which leaves room to think" if self._lines else "raise judge.max_tokens"
        return f"before it began: all tokens went into thoughts (reasoning); {more}, or lower judge.reasoning_effort"

    def _fitting(
        self, case: JudgeCase, documents: Sequence[str], pictures: Sequence[str | ChatImage], call: JudgeCall
    ) -> ChatRequest:
        """The request; a solution that is longer than the reserve goes with fewer documents."""
        request = self._request(case, documents, pictures, call)
        while (tokens := self._count(request)) > self._room:
            if not documents:
                raise RowError(
                    "prompt_too_long",
                    f"about {tokens:,} prompt tokens without any document, and {self._room:,} are allowed; raise "
                    "judge.max_prompt_tokens (an API) or judge.max_model_len (vllm), or leave such solutions out",
                )
            documents = documents[:-1]
            request = self._request(case, documents, pictures, call)
        return request

    def _request(
        self, case: JudgeCase, documents: Sequence[str], pictures: Sequence[str | ChatImage], call: JudgeCall
    ) -> ChatRequest:
        shared = shared_text(case, documents, self.config.show_answer)
        asked = Turn("user", (shared, *pictures, call_text(call, self._lines)))
        max_tokens = self.config.max_tokens
        if self._lines:
            max_tokens = min(max_tokens, TOKENS_A_LINE * sum(map(len, call.numbers)))
        constrain = self.config.constrain
        return ChatRequest(
            system=SYSTEM,
            turns=(asked,),
            schema=schema_of(call, self._exact) if constrain and not self._lines else None,
            pattern=line_pattern(call) if constrain and self._lines else None,
            max_tokens=max_tokens,
            temperature=self.config.temperature,
            seed=self.config.seed if self._exact else None,
        )


def _joined(parts: "Sequence[Sequence[Judgement | RowError]]") -> "Judgement | RowError":
    """A solution's judgement from those of its steps, each of them alone; the first fault where there is one."""
    cost = sum(one.cost for [one] in parts)
    for [one] in parts:
        if isinstance(one, RowError):
            return at_cost(one, cost)
    found = [one for [one] in parts if isinstance(one, Judgement)]
    return Judgement([one.steps[0] for one in found], cost, joined_names(one.answered_by for one in found))
