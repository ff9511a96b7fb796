"""What a judge is asked: shared texts and images first, the solution last; and the form of its answer.

A provider caches the beginning of a prompt that it has processed, so what the solutions of a question share comes
first, byte for byte the same, and the solutions after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medmm_ray.prompts import document_block
from medmm_ray.text import question_with_options, solution_text

SYSTEM = (
    "You are a senior physician who reviews a colleague's reasoning step by step. You get guideline texts, similar "
    "cases with their diagnoses, the question and, where there is one, the patient's image. Put three tests to each "
    "step. Logical: does it follow from the question and from the steps before it? Medical: does it agree with the "
    "guideline texts and with established knowledge? Image-grounded: does what it says about the image agree with "
    "what the image shows? A step that says nothing about the image passes this test. A step is right (+) if it "
    "passes all three and wrong (-) otherwise. Judge each step by itself: a right step stays right after a wrong one. "
    "State your confidence in each verdict: high, medium, or low where the image or the texts leave it open."
)
ENTRY = (
    '{"step": its number, "reason": one or two sentences, "logical": true or false, "medical": true or false, '
    '"image_grounded": true or false, "verdict": "+" or "-", "confidence": "high", "medium" or "low"}'
)
JSON_RULE = f'Answer with JSON and nothing else: {{"steps": [one entry for each step in order: {ENTRY}]}}.'
SEVERAL_RULE = (
    'Answer with JSON and nothing else: {"solutions": [one entry for each solution in order: {"solution": its number, '
    f'"steps": [one entry for each of its steps in order: {ENTRY}]}}]}}.'
)
LINE_RULE = (
    "Answer with one line for each step in order and nothing else: 1 for a right step or 0 for a wrong one, a space, "
    "and your confidence: high, medium or low."
)
ONE_STEP = "Review step {number} only; the steps before it are context."
TOKENS_A_LINE = 16  # room for one line of LINE_RULE in any tokenizer
AGAIN = "Your answer does not fit: {fault}. Answer again. {rule}"
REASON_CHARACTERS = 300  # that a model in this process may write: a small one does not know when to end
MAX_REPEATED = 4000  # characters of an answer that does not fit, in the request that asks again


@dataclass(frozen=True)
class JudgeImage:
    """An image as the tables know it; `note` is its diagnosis (references) or its source's annotation (the query)."""

    uri: str
    note: str


@dataclass(frozen=True)
class JudgeCase:
    """What the solutions of a question share."""

    question_id: str
    question: str
    options: Sequence[str]
    answer: str
    """The gold answer: a judge reads it only where the config shows it, or to the source's own truth."""
    images: Sequence[JudgeImage]
    documents: Sequence[str]
    references: Sequence[JudgeImage]


@dataclass(frozen=True)
class JudgeCall:
    """One request: the solutions that it shows, as lists of steps, and the only step that it is about, if it is one."""

    solutions: tuple[tuple[str, ...], ...]
    step: int | None = None
    """From 1; the one solution is then shown up to this step."""

    @property
    def numbers(self) -> list[list[int]]:
        """The numbers of the steps to judge, for each solution."""
        if self.step is not None:
            return [[self.step]]
        return [list(range(1, len(steps) + 1)) for steps in self.solutions]


def shared_text(case: JudgeCase, documents: Sequence[str], show_answer: bool) -> str:
    """Documents, the reference cases' diagnoses and the question; the gold answer only where it is to be shown."""
    parts = [document_block(documents)]
    for number, image in enumerate(case.references, 1):
        parts.append(f"Similar case {number}: {image.note}\n")
    question = question_with_options(case.question, case.options)
    parts.append(f"Question: {question}")
    if show_answer:
        parts.append(f"\nThe right answer: {case.answer}")
    return "".join(parts)


def call_text(call: JudgeCall, lines: bool) -> str:
    """The solutions to review and the form of the answer."""
    blocks: list[str] = []
    if len(call.solutions) == 1:
        [steps] = call.solutions
        text = solution_text(steps)
        blocks.append(f"Reasoning to review, {len(steps)} steps:\n{text}")
        if call.step is not None:
            blocks.append(ONE_STEP.format(number=call.step))
    else:
        blocks.append(f"{len(call.solutions)} solutions to review:")
        for number, steps in enumerate(call.solutions, 1):
            text = solution_text(steps)
            blocks.append(f"Solution {number}, {len(steps)} steps:\n{text}")

    blocks.append(rule_of(call, lines))
    return "\n\n".join(blocks)


def rule_of(call: JudgeCall, lines: bool) -> str:
    """The form of the answer, in words."""
    if lines:
        return LINE_RULE
    return JSON_RULE if len(call.solutions) == 1 else SEVERAL_RULE


def schema_of(call: JudgeCall, exact: bool) -> dict[str, Any]:
    """The JSON schema of the answer; an `exact` one of a single solution holds the number of its steps.

    An exact one also holds each verdict to its three tests, which not every API takes. Behind an API the schema is a
    part of the prompt that calls share: there it must not depend on the solution.
    """
    # With the count in the schema, the entries need no number of their own.
    holds_count = exact and len(call.solutions) == 1
    numbered = not holds_count
    entry = _entry((None, None, None), "+-", exact, numbered)
    # A verdict against its own tests would only be refused when it is read.
    if exact:
        right = _entry((True, True, True), "+", exact, numbered)
        wrong = [_entry(tests, "-", exact, numbered) for tests in _FAILED]
        entry = {"anyOf": [right, *wrong]}
    steps: dict[str, Any] = {"type": "array", "items": entry}
    if len(call.solutions) > 1:
        solution = _object(solution={"type": "integer"}, steps=steps)
        return _object(solutions={"type": "array", "items": solution})
    if holds_count:
        count = len(call.numbers[0])
        steps |= {"minItems": count, "maxItems": count}
    return _object(steps=steps)


_FAILED = ((False, None, None), (True, False, None), (True, True, False))  # all ways to fail a test; None is either


def _entry(tests: Sequence[bool | None], verdicts: str, exact: bool, numbered: bool) -> dict[str, Any]:
    """A step's entry whose `tests` (logical, medical, image_grounded; None is either) go with one of `verdicts`."""
    number = {"step": {"type": "integer"}} if numbered else {}  # else the list holds their number and order
    reason: dict[str, Any] = {"type": "string"}
    if exact:
        reason["maxLength"] = REASON_CHARACTERS
    logical, medical, image_grounded = map(_boolean, tests)
    return _object(
        **number,
        reason=reason,
        logical=logical,
        medical=medical,
        image_grounded=image_grounded,
        verdict={"type": "string", "enum": list(verdicts)},
        confidence={"type": "string", "enum": ["high", "medium", "low"]},
    )


def _boolean(value: bool | None) -> dict[str, Any]:
    """A truth value, held to `value` unless that is None."""
    schema: dict[str, Any] = {"type": "boolean"}
    if value is not None:
        schema["const"] = value
    return schema


def _object(**properties: Any) -> dict[str, Any]:
    """The schema of an object that has these properties, all of them and no further one."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def line_pattern(call: JudgeCall) -> str:
    """The regular expression of an answer in lines, one a step."""
    num_lines = len(call.numbers[0])
    lines = ["[01] (high|medium|low)"] * num_lines
    return "\n".join(lines)
