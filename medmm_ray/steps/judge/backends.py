"""Who judges: a source's own truth with errors, or a model, in this process or behind an API.

Enters: what a question's solutions share, and their steps. Leaves, for each solution, a `Judgement` or a `RowError`.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol

from medmm_ray.config import digest
from medmm_ray.data.records import StepLabel
from medmm_ray.data.sources import load_with_truth
from medmm_ray.data.tables import RowError
from medmm_ray.engines.images import open_image
from medmm_ray.engines.llm.endpoint import ChatImage, ChatReply, ChatRequest, Turn
from medmm_ray.engines.llm.served import joined_names
from medmm_ray.engines.llm.store import PricedAnswer
from medmm_ray.engines.llm.structured import Accepted, ChatClient, Retry, ask_until_accepted
from medmm_ray.steps.judge.config import JudgeApi, JudgeConfig, JudgeVllm
from medmm_ray.steps.judge.prompt import (
    AGAIN,
    JSON_RULE,
    LINE_RULE,
    MAX_REPEATED,
    SEVERAL_RULE,
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

# Faults that one solution of a call can bring upon those beside it: they are asked about again, each alone.
_SHARED_FAULTS = ("judge_reply", "prompt_too_long")

# How the confidence of a judge by truth falls: it is low, or medium, more often where its verdict is wrong.
_UNSURE = {True: (0.6, 0.3), False: (0.05, 0.15)}


@dataclass(frozen=True)
class Judgement:
    """One solution's verdicts, what they cost, US dollars, and the model that gave them, as its API names it."""

    steps: list[StepLabel]
    cost: float = 0.0
    answered_by: str | None = None


JudgeResult = Judgement | RowError


def with_cost(result: JudgeResult, cost: float) -> JudgeResult:
    """A judgement or fault that cost so much, US dollars."""
    if isinstance(result, Judgement):
        return replace(result, cost=cost)
    return RowError(result.kind, result.message, cost)


@dataclass(frozen=True)
class CallContext:
    """What the calls about one question share: its case, the documents that fit, and its images with their captions."""

    case: JudgeCase
    documents: Sequence[str]
    images: Sequence[str | ChatImage]


class Judge(Protocol):
    """A judge: verdicts on the solutions (lists of steps) of one case, each a `Judgement` or a fault."""

    annotator: str

    async def judge(self, case: JudgeCase, solutions: Sequence[Sequence[str]]) -> list[JudgeResult]:
        """The results of the solutions, in their order."""
        ...


class TruthJudge:
    """The truth of a source's pictures, with a share of the verdicts flipped; it tends to know where it is unsure.

    `source` is one of `data.sources.WITH_TRUTH`; `error_rate` the share of checkable steps whose verdict is flipped.
    """

    def __init__(self, source: str, error_rate: float, seed: int = 0) -> None:
        self.source = source
        self.error_rate = error_rate
        self.seed = seed
        self.annotator = f"{source}@{digest(source, error_rate, seed)}"
        self._picture_of = load_with_truth(source).drawn_picture

    async def judge(self, case: JudgeCase, solutions: Sequence[Sequence[str]]) -> list[JudgeResult]:
        """Judgements by the truth that the first image's annotation holds; a fault for each where it holds none."""
        annotation = case.images[0].note if case.images else ""
        try:
            picture = self._picture_of(annotation)
        except ValueError:
            fault = RowError(
                "judge_source",
                f"question {case.question_id} has no {self.source}'s annotation; "
                "set judge.engine.kind to vllm, gemini or openai",
            )
            return [fault] * len(solutions)
        judgements: list[JudgeResult] = []
        for steps in solutions:
            labels: list[StepLabel] = []
            for index, step in enumerate(steps):
                is_right = picture.truth(step, case)
                labels.append(self.verdict(is_right, case.question_id, steps, index))
            judgements.append(Judgement(labels))
        return judgements

    def verdict(self, right: bool | None, question_id: str, steps: Sequence[str], index: int) -> StepLabel:
        """What the judge says of step `index`, whose truth is `right`; None says nothing that can be checked."""
        if right is None:
            return StepLabel(confidence="high", reason="nothing to check")
        # 64 bits of a hash: the upper half decides whether the verdict is wrong, the lower one how sure it is.
        bits = int(digest(self.seed, question_id, list(steps), index), 16)
        is_wrong = (bits >> 32) / 2**32 < self.error_rate
        share_low, share_medium = _UNSURE[is_wrong]
        doubt = (bits & 0xFFFFFFFF) / 2**32
        confidence = "high"
        if doubt < share_low:
            confidence = "low"
        elif doubt < share_low + share_medium:
            confidence = "medium"
        return StepLabel(label=int(right != is_wrong), confidence=confidence)


class ModelJudge:
    """A model that judges `solutions_per_call` solutions of a case, or one step, a request.

    `count` gives the tokens of a request, `max_prompt_tokens` the most that one may have; `exact` says whether a schema
    may hold the number of steps.
    """

    def __init__(
        self,
        config: JudgeConfig,
        model: str,
        client: ChatClient,
        count: Callable[[ChatRequest], int],
        max_prompt_tokens: int,
        exact: bool,
    ) -> None:
        self.config = config
        self.client = client
        self._count = count
        self._max_prompt_tokens = max_prompt_tokens
        self._exact = exact
        self._lines = config.reply == "lines"
        engine = config.engine
        # A phantom's judge looks at no image: it knows what is drawn.
        self._max_images = engine.max_images if isinstance(engine, JudgeApi) else 0
        if isinstance(engine, JudgeVllm):
            self._max_images = engine.num_images
        # Another prompt or form of answer is another annotator: its verdicts are not mixed with these.
        prompts = (SYSTEM, JSON_RULE, SEVERAL_RULE, LINE_RULE, AGAIN)
        settings = (
            config.reply,
            config.granularity,
            config.solutions_per_call,
            config.show_answer,
        )
        schema = schema_of(JudgeCall((("",),)), False)
        self.annotator = f"{model}@{digest(prompts, settings, schema)}"

    async def judge(self, case: JudgeCase, solutions: Sequence[Sequence[str]]) -> list[JudgeResult]:
        """A result for each solution; equal calls are made, and paid for, once."""
        # In a thread: opening and encoding would hold up the requests of other questions.
        try:
            images = await asyncio.to_thread(self._images, case)
        except RowError as fault:
            return [fault] * len(solutions)
        context = CallContext(case, case.documents, images)
        context = self._with_fitting_documents(context)
        groups = self._groups(context, solutions)
        calls_of_groups: list[list[JudgeCall]] = []
        for group in groups:
            group_solutions = [solutions[i] for i in group]
            calls_of_groups.append(self._calls(group_solutions))
        results_of_call = await self._judge_calls(context, calls_of_groups)
        results: dict[int, JudgeResult] = {}
        for group, calls in zip(groups, calls_of_groups, strict=True):
            group_results: list[JudgeResult] = []
            for call in calls:
                group_results += results_of_call[call]
            if len(calls) > 1:  # the steps of one solution
                group_results = [_joined(group_results)]
            results |= zip(group, group_results, strict=True)
            for call in calls:  # an equal call of another solution is paid for once
                results_of_call[call] = [with_cost(result, 0.0) for result in results_of_call[call]]
        empty = RowError("empty_solution", "the solution has no steps")
        return [results.get(i, empty) for i in range(len(solutions))]

    async def _judge_calls(
        self, context: CallContext, calls_of_groups: Sequence[Sequence[JudgeCall]]
    ) -> dict[JudgeCall, list[JudgeResult]]:
        """The results of each distinct call, of which those of the first group may go ahead.

        The others then find what all calls share in the provider's prompt cache.
        """
        distinct = list(dict.fromkeys(chain.from_iterable(calls_of_groups)))
        num_ahead = len(calls_of_groups[0]) if calls_of_groups and self.config.warm_cache else 0
        results_of_call: dict[JudgeCall, list[JudgeResult]] = {}
        for calls in (distinct[:num_ahead], distinct[num_ahead:]):
            results = await asyncio.gather(*(self._judge_call(context, call) for call in calls))
            results_of_call |= zip(calls, results, strict=True)
        return results_of_call

    def _groups(self, context: CallContext, solutions: Sequence[Sequence[str]]) -> list[list[int]]:
        """The solutions with steps, by place, in calls: as many together as may be and fit beside the documents."""
        # A call about one step shows one solution.
        max_size = 1 if self.config.granularity == "step" else self.config.solutions_per_call
        groups: list[list[int]] = []
        for place, steps in enumerate(solutions):
            if not steps:
                continue
            # Filled in order, never reordered: the calls of a rerun are the same, and their answers stored.
            if groups and len(groups[-1]) < max_size:
                together = [solutions[i] for i in (*groups[-1], place)]
                [call] = self._calls(together)
                if self._count(self._request(context, call)) <= self._max_prompt_tokens:
                    groups[-1].append(place)
                    continue
            groups.append([place])
        return groups

    def _calls(self, solutions: Sequence[Sequence[str]]) -> list[JudgeCall]:
        """One call about the solutions, or one about each step of the only one."""
        frozen = tuple(tuple(steps) for steps in solutions)
        if self.config.granularity == "solution":
            return [JudgeCall(frozen)]
        [steps] = frozen
        calls: list[JudgeCall] = []
        for number in range(1, len(steps) + 1):
            shown_steps = steps[:number]
            calls.append(JudgeCall((shown_steps,), number))
        return calls

    def _images(self, case: JudgeCase) -> list[str | ChatImage]:
        """The query's images, then each similar case's after its number; opened and encoded once for all calls."""
        captions = ["The patient's image:"] * len(case.images)
        for number in range(1, len(case.references) + 1):
            captions.append(f"The image of similar case {number}:")
        images = [*case.images, *case.references]
        parts: list[str | ChatImage] = []
        for caption, image in zip(captions, images[: self._max_images], strict=False):
            pixels = open_image(image.uri)
            parts.append(caption)
            parts.append(ChatImage(pixels, self.config.image_px))
        return parts

    def _with_fitting_documents(self, context: CallContext) -> CallContext:
        """The context with the first documents that leave room for a solution, chosen by the question alone."""
        blank = JudgeCall((("",),))
        # Chosen before any solution is seen, so that all calls share the same documents.
        reserve = self.config.solution_reserve * self.config.solutions_per_call
        # A reserve larger than the prompt must not drop every document.
        reserve = min(reserve, self._max_prompt_tokens // 2)
        room = self._max_prompt_tokens - reserve
        while context.documents and self._count(self._request(context, blank)) > room:
            context = replace(context, documents=context.documents[:-1])
        return context

    async def _judge_call(self, context: CallContext, call: JudgeCall) -> list[JudgeResult]:
        """The results of a call's solutions; where they spoil it together, each is asked about alone."""
        try:
            answer = await self._ask(context, call)
            share = answer.cost / len(answer.value)
            return [Judgement(steps, share, answer.model) for steps in answer.value]
        except RowError as fault:
            # What a failed call cost is shared by its solutions.
            share = fault.cost / len(call.solutions)
            if len(call.solutions) == 1 or fault.kind not in _SHARED_FAULTS:
                return [with_cost(fault, share)] * len(call.solutions)
        calls_alone = [self._judge_call(context, JudgeCall((steps,))) for steps in call.solutions]
        results: list[JudgeResult] = []
        for [result] in await asyncio.gather(*calls_alone):
            total = result.cost + share
            results.append(with_cost(result, total))
        return results

    async def _ask(self, context: CallContext, call: JudgeCall) -> Accepted[list[list[StepLabel]]]:
        """The labels; a reply that does not fit is asked for again, with the fault named."""
        request = self._fitting_request(context, call)

        def read(answer: PricedAnswer) -> list[list[StepLabel]]:
            """Labels of an answer to this call."""
            return self._labels(answer, call, request.max_tokens)

        def instruction(fault: RowError) -> str:
            """What the model is told of its reply."""
            return AGAIN.format(fault=fault.message, rule=rule_of(call, self._lines))

        retry = Retry(self.config.tries, instruction, MAX_REPEATED)
        return await ask_until_accepted(
            self.client,
            request,
            context.case.question_id,
            read,
            retry,
        )

    def _labels(self, answer: PricedAnswer, call: JudgeCall, max_tokens: int) -> list[list[StepLabel]]:
        """The labels that an answer states; `RowError` judge_reply where it is not of the asked form."""
        reply = answer.reply
        if reply.cut_off:
            raise RowError("judge_reply", f"judge's answer was cut off at max_tokens={max_tokens} {self._cut(reply)}")
        # A reasoning model may think until its tokens are gone, or answer in its thoughts.
        if not reply.text.strip():
            message = f"judge's answer is empty ({reply.completion_tokens} tokens, thoughts among them)"
            thoughts = reply.choices[0].thoughts
            if thoughts:
                message += f"; {thoughts} characters of reasoning beside it are not of the asked form"
            raise RowError("judge_reply", message)
        return verdicts(reply.text, call.numbers, self._lines)

    def _cut(self, reply: ChatReply) -> str:
        """How far an answer came that was cut off, and what to do."""
        if reply.text.strip():
            return f"({len(reply.text)} characters); shorter reasons are enough, or a larger judge.max_tokens"
        advice = "take reply=json, which leaves room to think" if self._lines else "raise judge.max_tokens"
        effort = "judge.engine.reasoning_effort"
        return f"before it began: all tokens went into thoughts (reasoning); {advice}, or lower {effort}"

    def _fitting_request(self, context: CallContext, call: JudgeCall) -> ChatRequest:
        """The request; a solution that is longer than the reserve goes with fewer documents."""
        request = self._request(context, call)
        # Of documents in order of relevance the last is missed least.
        while (tokens := self._count(request)) > self._max_prompt_tokens:
            if not context.documents:
                raise RowError(
                    "prompt_too_long",
                    f"about {tokens:,} prompt tokens without any document, and {self._max_prompt_tokens:,} are "
                    "allowed; raise judge.engine.max_prompt_tokens (an API) or judge.engine.max_model_len (vllm), or "
                    "leave such solutions out",
                )
            context = replace(context, documents=context.documents[:-1])
            request = self._request(context, call)
        return request

    def _request(self, context: CallContext, call: JudgeCall) -> ChatRequest:
        """The request of a call: what calls share first, the solutions after it."""
        shared = shared_text(context.case, context.documents, self.config.show_answer)
        solutions = call_text(call, self._lines)
        turn = Turn("user", (shared, *context.images, solutions))
        max_tokens = self.config.max_tokens
        schema: dict[str, Any] | None = None
        pattern: str | None = None
        if self._lines:
            num_lines = sum(map(len, call.numbers))
            max_tokens = min(max_tokens, TOKENS_A_LINE * num_lines)
        if self.config.constrain and self._lines:
            pattern = line_pattern(call)
        elif self.config.constrain:
            schema = schema_of(call, self._exact)
        return ChatRequest(
            system=SYSTEM,
            turns=(turn,),
            schema=schema,
            pattern=pattern,
            max_tokens=max_tokens,
            temperature=self.config.temperature,
            seed=self.config.seed if self._exact else None,
        )


def _joined(results: Sequence[JudgeResult]) -> JudgeResult:
    """A solution's judgement from those of its steps; the first fault where there is one."""
    # All steps were paid for, whatever came of them.
    cost = sum(result.cost for result in results)
    steps: list[StepLabel] = []
    models: list[str | None] = []
    for result in results:
        if isinstance(result, RowError):
            return with_cost(result, cost)
        steps.append(result.steps[0])
        models.append(result.answered_by)
    return Judgement(steps, cost, joined_names(models))
