"""A judge's reply as labels, pure: JSON of the asked form, prose around it or not, or bare verdicts in lines."""

import json
import re
from collections.abc import Sequence
from typing import Any

from medmm_ray.data.records import StepLabel
from medmm_ray.data.tables import RowError
from medmm_ray.engines.llm.structured import json_objects
from medmm_ray.text import well_formed

_LABELS = {"+": 1, "-": 0, "1": 1, "0": 0, "correct": 1, "incorrect": 0, "right": 1, "wrong": 0}
_CONFIDENCES = ("high", "medium", "low")
_CRITERIA = ("logical", "medical", "image_grounded")
_LINE = re.compile(
    r"(?:step\s*(\d{1,4})\s*[:.)]?\s*)?([01+-])(?:\s*[,:]?\s*(high|medium|low))?(?=[\s,;]|$)[\s,;]*", re.IGNORECASE
)
_LIST = re.compile(r"\s*(?:```\w*\s*)?(\[.*\])\s*(?:```\s*)?", re.DOTALL)


def verdicts(reply: str, numbers: Sequence[Sequence[int]], lines: bool = False) -> list[list[StepLabel]]:
    """One label a step of each solution; `numbers` are the numbers of the steps that were asked about.

    With `lines` the reply to `prompt.LINE_RULE`, about one solution; else to `JSON_RULE` or `SEVERAL_RULE`. Raises
    `RowError` judge_reply: ``judge gave 2 verdicts for 3 steps: '1 0'``.
    """
    if lines:
        [step_numbers] = numbers
        labels_of_lines = _labels_of_lines(reply, step_numbers)
        return [labels_of_lines]
    if len(numbers) == 1:
        entries = _json_list(reply, "steps")
        if entries is None:
            entries = _bare_list(reply)
        return [_labels_of_entries(reply, entries, numbers[0])]
    solutions = _json_list(reply, "solutions")
    if solutions is None or len(solutions) != len(numbers):
        count = "no" if solutions is None else len(solutions)
        raise _fault(f"judge gave {count} solutions' verdicts for {len(numbers)}: {_quote(reply)}")
    # All of the entries are looked at before any label is read: a shift of one spoils those behind it.
    for place, entry in enumerate(solutions, 1):
        if not isinstance(entry, dict) or entry.get("solution", place) != place:
            raise _fault(f"judge's entry {place} is about another solution: {_quote(reply)}")
    labels: list[list[StepLabel]] = []
    for entry, step_numbers in zip(solutions, numbers, strict=True):
        steps = entry.get("steps")
        labels.append(_labels_of_entries(reply, steps, step_numbers))
    return labels


def _labels_of_entries(reply: str, entries: Any, numbers: Sequence[int]) -> list[StepLabel]:
    """The labels of one solution's entries, a list in JSON."""
    labels: list[StepLabel] = []
    for entry, number in zip(_checked_count(reply, entries, numbers), numbers, strict=True):
        label = _label(entry, number, reply)
        labels.append(label)
    return labels


def _checked_count(reply: str, entries: Any, numbers: Sequence[int]) -> list[Any]:
    """`entries`, a list with as many entries as `numbers`."""
    num_steps = len(numbers)
    if not isinstance(entries, list) or not entries:
        raise _fault(f"judge gave no verdicts for {num_steps} steps: {_quote(reply)}")
    num_entries = len(entries)
    # A verdict too many or too few may be anywhere: none of them can be trusted to be about its step.
    if num_entries != num_steps:
        raise _fault(f"judge gave {num_entries} verdicts for {num_steps} steps: {_quote(reply)}")
    return entries


def _json_list(reply: str, name: str) -> list[Any] | None:
    """The list `name` of the last JSON object in the text that has one with entries: a draft stands before the answer.

    None without one.
    """
    entries: list[Any] | None = None
    for answer in json_objects(reply):
        if isinstance(answer.get(name), list) and answer[name]:
            entries = answer[name]
    return entries


def _bare_list(reply: str) -> Any:
    """A reply that is one JSON list, in a code fence or not: in prose such a list may as well be a citation."""
    match = _LIST.fullmatch(reply)
    try:
        return json.loads(match[1]) if match else None
    except (ValueError, RecursionError):
        return None


def _label(entry: Any, number: int, reply: str) -> StepLabel:
    """A step's label; its verdict must agree with its three tests."""
    if not isinstance(entry, dict):
        raise _fault(
            f"judge's verdict {number} is {str(entry)[:20]!r}, not an object with the three tests, verdict and "
            "confidence"
        )
    # A model may write a verdict as a number and a confidence with a capital.
    verdict = str(entry.get("verdict")).lower()
    confidence = str(entry.get("confidence")).lower()
    if entry.get("step", number) != number:
        raise _fault(f"judge's verdict {number} is about step {entry['step']!r}: {_quote(reply)}")
    if verdict not in _LABELS:
        raise _fault(f"judge's verdict {number} has the label {verdict[:20]!r}, not '+' or '-'")
    if confidence not in _CONFIDENCES:
        raise _fault(f"judge's verdict {number} has the confidence {confidence[:20]!r}")
    tests: dict[str, bool] = {}
    for name in _CRITERIA:
        passed = entry.get(name)
        if not isinstance(passed, bool):
            raise _fault(f"judge's verdict {number} has {name} {str(passed)[:20]!r}, not a truth")
        tests[name] = passed
    # A verdict against its own tests shows that the model lost the thread: ask again.
    failed = [name for name, passed in tests.items() if not passed]
    label = _LABELS[verdict]
    if label == bool(failed):
        outcome = f"{' and '.join(failed)} false" if failed else "all three tests true"
        raise _fault(f"judge's verdict {number} is {verdict!r} with {outcome}")
    reason = well_formed(str(entry.get("reason") or ""))  # JSON in the reply may hold what the reply does not
    return StepLabel(
        label=label,
        confidence=confidence,
        reason=reason or None,
        **tests,
    )


def _labels_of_lines(reply: str, numbers: Sequence[int]) -> list[StepLabel]:
    """Bare verdicts; numbers of steps, where they stand before them, must be those that were asked about."""
    labels: list[StepLabel] = []
    entries = _checked_count(reply, _lines(reply), numbers)
    for (stated, label), number in zip(entries, numbers, strict=True):
        if stated is not None and int(stated) != number:
            raise _fault(f"judge's verdict {number} is about step {stated}: {_quote(reply)}")
        labels.append(label)
    return labels


def _lines(reply: str) -> list[tuple[str | None, StepLabel]] | None:
    """Bare verdicts, each with the stated number of its step; None where other words stand between them."""
    values = _bare_list(reply)
    labels: list[tuple[str | None, StepLabel]] = []
    if isinstance(values, list) and all(map(_is_bare_verdict, values)):
        for value in values:
            label = StepLabel(label=_LABELS[str(value)])
            labels.append((None, label))
        return labels
    text = reply.strip()
    position = 0
    while position < len(text):
        match = _LINE.match(text, position)
        if match is None:
            return None
        number, verdict, confidence = match.groups()
        confidence = confidence.lower() if confidence else None
        label = StepLabel(label=_LABELS[verdict], confidence=confidence)
        labels.append((number, label))
        position = match.end()
    return labels


def _is_bare_verdict(value: Any) -> bool:
    return isinstance(value, int | str) and str(value) in _LABELS


def _fault(message: str) -> RowError:
    return RowError("judge_reply", message)


def _quote(reply: str) -> str:
    beginning = reply.strip()[:80]
    return repr(beginning)
