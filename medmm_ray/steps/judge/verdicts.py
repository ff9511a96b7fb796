"""A judge's reply as labels, pure: JSON of the asked form, prose around it or not, or bare verdicts in lines."""

import json
import re
from collections.abc import Sequence
from typing import Any

from medmm_ray.data.records import StepLabel
from medmm_ray.data.tables import RowError
from medmm_ray.text import well_formed

TRIES = 50  # places at which a reply is read as JSON

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
        [asked] = numbers
        return [_from_lines(reply, asked)]
    if len(numbers) == 1:
        entries = _listed(reply, "steps")
        return [_solution(reply, _list(reply) if entries is None else entries, numbers[0])]
    solutions = _listed(reply, "solutions")
    if solutions is None or len(solutions) != len(numbers):
        given = "no" if solutions is None else len(solutions)
        raise RowError("judge_reply", f"judge gave {given} solutions' verdicts for {len(numbers)}: {_quote(reply)}")
    for place, entry in enumerate(solutions, 1):
        if not isinstance(entry, dict) or entry.get("solution", place) != place:
            raise RowError("judge_reply", f"judge's entry {place} is about another solution: {_quote(reply)}")
    return [_solution(reply, entry.get("steps"), asked) for entry, asked in zip(solutions, numbers, strict=True)]


def _solution(reply: str, entries: Any, numbers: Sequence[int]) -> list[StepLabel]:
    found = _counted(reply, entries, numbers)
    return [_entry(entry, number, reply) for entry, number in zip(found, numbers, strict=True)]


def _counted(reply: str, found: Any, numbers: Sequence[int]) -> list[Any]:
    """`found`, a list with as many entries as `numbers`."""
    if not isinstance(found, list) or not found:
        raise RowError("judge_reply", f"judge gave no verdicts for {len(numbers)} steps: {_quote(reply)}")
    if len(found) != len(numbers):
        raise RowError("judge_reply", f"judge gave {len(found)} verdicts for {len(numbers)} steps: {_quote(reply)}")
    return found


def _listed(reply: str, name: str) -> list[Any] | None:
    """The list `name` of the last JSON object in the text that has one with entries: a draft stands before the answer.

    None without one.
    """
    decoder, at = json.JSONDecoder(), reply.find("{")
    found: list[Any] | None = None
    for _ in range(TRIES):
        if at < 0:
            break
        try:
            value, end = decoder.raw_decode(reply, at)
        except (ValueError, RecursionError):  # not JSON; a number of 5,000 digits; 100,000 brackets
            end = at + 1
        else:
            if isinstance(value.get(name), list) and value[name]:
                found = value[name]
        at = reply.find("{", end)  # what stands within an object is no answer
    return found


def _list(reply: str) -> Any:
    """A reply that is one JSON list, in a code fence or not: in prose such a list may as well be a citation."""
    match = _LIST.fullmatch(reply)
    try:
        return json.loads(match[1]) if match else None
    except (ValueError, RecursionError):
        return None


def _entry(entry: Any, number: int, reply: str) -> StepLabel:
    """A step's label; its verdict is what its three tests say."""
    if not isinstance(entry, dict):
        raise RowError(
            "judge_reply",
            f"judge's verdict {number} is {str(entry)[:20]!r}, not an object with the three tests, verdict and "
            "confidence",
        )
    label = str(entry.get("verdict")).lower()
    confidence = str(entry.get("confidence")).lower()
    tests = {name: entry.get(name) for name in _CRITERIA}
    if entry.get("step", number) != number:
        raise RowError("judge_reply", f"judge's verdict {number} is about step {entry['step']!r}: {_quote(reply)}")
    if label not in _LABELS:
        raise RowError("judge_reply", f"judge's verdict {number} has the label {label[:20]!r}, not '+' or '-'")
    if confidence not in _CONFIDENCES:
        raise RowError("judge_reply", f"judge's verdict {number} has the confidence {confidence[:20]!r}")
    for name, passed in tests.items():
        if not isinstance(passed, bool):
            raise RowError("judge_reply", f"judge's verdict {number} has {name} {str(passed)[:20]!r}, not a truth")
    failed = [name for name, passed in tests.items() if not passed]
    if _LABELS[label] == bool(failed):
        said = f"{' and '.join(failed)} false" if failed else "all three tests true"
        raise RowError("judge_reply", f"judge's verdict {number} is {label!r} with {said}")
    reason = well_formed(str(entry.get("reason") or ""))  # JSON in the reply may hold what the reply does not
    return StepLabel(label=_LABELS[label], confidence=confidence, reason=reason or None, **tests)


def _from_lines(reply: str, numbers: Sequence[int]) -> list[StepLabel]:
    """Bare verdicts; numbers of steps, where they stand before them, must be those that were asked about."""
    found = _counted(reply, _lines(reply), numbers)
    for (stated, _), number in zip(found, numbers, strict=True):
        if stated is not None and int(stated) != number:
            raise RowError("judge_reply", f"judge's verdict {number} is about step {stated}: {_quote(reply)}")
    return [label for _, label in found]


def _lines(reply: str) -> list[tuple[str | None, StepLabel]] | None:
    """Bare verdicts, each with the stated number of its step; None where other words stand between them."""
    listed = _list(reply)
    if isinstance(listed, list) and all(isinstance(one, int | str) and str(one) in _LABELS for one in listed):
        return [(None, StepLabel(label=_LABELS[str(one)])) for one in listed]
    text = reply.strip()
    found: list[tuple[str | None, StepLabel]] = []
    at = 0
    while at < len(text):
        match = _LINE.match(text, at)
        if match is None:
            return None
        number, label, confidence = match.groups()
        found.append((number, StepLabel(label=_LABELS[label], confidence=confidence.lower() if confidence else None)))
        at = match.end()
    return found


def _quote(reply: str) -> str:
    return repr(reply.strip()[:80])
