"""What a judge is asked: shared texts and pictures first, the solution last; and the form of its answer.

A provider keeps the beginning of a prompt that it has read already, so what the solutions of a question share comes
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
SHOWN_AGAIN = 4000  # characters of an answer that does not fit


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
    """The gold one: a judge reads it only where the config shows it, or to the source's own truth."""
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
    references = "".join(f"Similar case {i}: {r.note}\n" for i, r in enumerate(case.references, 1))
    question = question_with_options(case.question, case.options)
    gold = f"\nThe right answer: {case.answer}" if show_answer else ""
    return f"{document_block(documents)}{references}Question: {question}{gold}"


def call_text(call: JudgeCall, lines: bool) -> str:
    """The solutions to review and the form of the answer."""
    if len(call.solutions) == 1:
        [steps] = call.solutions
        only = f"\n\n{ONE_STEP.format(number=call.step)}" if call.step is not None else ""
        return f"Reasoning to review, {len(steps)} steps:\n{solution_text(steps)}{only}\n\n{rule_of(call, lines)}"
    blocks = (f"Solution {i}, {len(steps)} steps:\n{solution_text(steps)}" for i, steps in enumerate(call.solutions, 1))
    return f"{len(call.solutions)} solutions to review:\n\n" + "\n\n".join(blocks) + f"\n\n{rule_of(call, lines)}"


def rule_of(call: JudgeCall, lines: bool) -> str:
    return LINE_RULE if lines else JSON_RULE if len(call.solutions) == 1 else SEVERAL_RULE


def schema_of(call: JudgeCall, exact: bool) -> dict[str, Any]:
    """The JSON schema of the answer; an `exact` one of a single solution holds the number of its steps.

    An exact one also holds each verdict to its three tests, which not every API takes. Behind an API the schema is a
    part of the prompt that calls share: there it must not depend on the solution.
    """
    one = exact and len(call.solutions) == 1
    entry = _entry((None, None, None), "+-", exact, numbered=not one)
    if exact:
        right = _entry((True, True, True), "+", exact, numbered=not one)
        wrong = [_entry(tests, "-", exact, numbered=not one) for tests in _FAILED]
        entry = {"anyOf": [right, *wrong]}
    steps = {"type": "array", "items": entry}
    if len(call.solutions) > 1:
        return _object(solutions={"type": "array", "items": _object(solution={"type": "integer"}, steps=steps)})
    count = len(call.numbers[0])
    return _object(steps={**steps, "minItems": count, "maxItems": count} if one else steps)


_FAILED = ((False, None, None), (True, False, None), (True, True, False))  # all ways to fail a test; None is either


def _entry(tests: Sequence[bool | None], verdicts: str, exact: bool, numbered: bool) -> dict[str, Any]:
    """A step's entry whose `tests` (logical, medical, image_grounded; None is either) go with one of `verdicts`."""
    logical, medical, grounded = ({"type": "boolean"} | ({} if t is None else {"const": t}) for t in tests)
    return _object(
        **({"step": {"type": "integer"}} if numbered else {}),  # else their number and order are held already
        reason={"type": "string", **({"maxLength": REASON_CHARACTERS} if exact else {})},
        logical=logical,
        medical=medical,
        image_grounded=grounded,
        verdict={"type": "string", "enum": list(verdicts)},
        confidence={"type": "string", "enum": ["high", "medium", "low"]},
    )


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def line_pattern(call: JudgeCall) -> str:
    """The regular expression of an answer in lines."""
    return "\n".join(["[01] (high|medium|low)"] * len(call.numbers[0]))
