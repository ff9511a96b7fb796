"""A judge's reply as labels, pure: JSON, with or without prose around it, or bare verdicts in lines."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from medmm_ray.records import StepLabel
from medmm_ray.tables import RowError

TRIES = 50  # places at which a reply is read as JSON

_LABELS = {"+": 1, "-": 0, "1": 1, "0": 0, "correct": 1, "incorrect": 0, "right": 1, "wrong": 0}
_CONFIDENCES = ("high", "medium", "low")
_CRITERIA = ("logical", "medical", "image_grounded")
_LINE = re.compile(
    r"(?:step\s*\d+\s*[:.)]?\s*)?([01+-])(?:\s*[,:]?\s*(high|medium|low))?(?=[\s,;]|$)[\s,;]*", re.IGNORECASE
)


def verdicts(reply: str, numbers: Sequence[Sequence[int]]) -> list[list[StepLabel]]:
    """One label a step of each solution; `numbers` are the numbers of the steps that were asked about.

    Raises `RowError` judge_reply: ``judge gave 2 verdicts for 3 steps: '1 0'``.
    """
    if len(numbers) == 1:
        return [_solution(reply, _value(reply), numbers[0])]
    found = _value(reply)
    solutions = found.get("solutions") if isinstance(found, dict) else None
    if not isinstance(solutions, list) or len(solutions) != len(numbers):
        given = len(solutions) if isinstance(solutions, list) else "no"
        raise RowError("judge_reply", f"judge gave {given} solutions' verdicts for {len(numbers)}: {_quote(reply)}")
    for place, entry in enumerate(solutions, 1):
        if not isinstance(entry, dict) or entry.get("solution", place) != place:
            raise RowError("judge_reply", f"judge's entry {place} is about another solution: {_quote(reply)}")
    return [_solution(reply, entry, asked) for entry, asked in zip(solutions, numbers, strict=True)]


def _solution(reply: str, value: Any, numbers: Sequence[int]) -> list[StepLabel]:
    found = _from_value(value, numbers, reply)
    if found is None:
        found = _from_lines(reply)
    if found is None:
        raise RowError("judge_reply", f"judge gave no verdicts for {len(numbers)} steps: {_quote(reply)}")
    if len(found) != len(numbers):
        raise RowError("judge_reply", f"judge gave {len(found)} verdicts for {len(numbers)} steps: {_quote(reply)}")
    return found


def _value(reply: str) -> Any:
    """The first JSON object or list in the text that reads as an answer; None without one."""
    decoder = json.JSONDecoder()
    for match in islice(re.finditer(r"[{\[]", reply), TRIES):
        try:
            value, _ = decoder.raw_decode(reply, match.start())
        except (ValueError, RecursionError):  # not JSON; a number of 5,000 digits; 100,000 brackets
            continue
        if (isinstance(value, list) and value) or (isinstance(value, dict) and {"steps", "solutions"} & set(value)):
            return value
    return None


def _from_value(value: Any, numbers: Sequence[int], reply: str) -> list[StepLabel] | None:
    entries = value.get("steps") if isinstance(value, dict) else value
    if not isinstance(entries, list):
        return None
    if all(isinstance(entry, dict) for entry in entries):
        places = [*numbers, *range(len(numbers) + 1, len(entries) + 1)]
        return [_entry(entry, number, reply) for entry, number in zip(entries, places, strict=False)]
    if all(isinstance(entry, int | str) and str(entry) in _LABELS for entry in entries):
        return [StepLabel(label=_LABELS[str(entry)]) for entry in entries]
    return None


def _entry(entry: Mapping[str, Any], number: int, reply: str) -> StepLabel:
    label = str(entry.get("verdict", entry.get("label"))).lower()
    confidence = str(entry.get("confidence")).lower()
    if entry.get("step", number) != number:
        raise RowError("judge_reply", f"judge's verdict {number} is about step {entry['step']}: {_quote(reply)}")
    if label not in _LABELS:
        raise RowError("judge_reply", f"judge's verdict {number} has the label {label[:20]!r}, not '+' or '-'")
    if confidence not in _CONFIDENCES:
        raise RowError("judge_reply", f"judge's verdict {number} has the confidence {confidence[:20]!r}")
    for name in _CRITERIA:
        if entry.get(name) not in (True, False, None):
            raise RowError("judge_reply", f"judge's verdict {number} has {name} {str(entry[name])[:20]!r}, not a truth")
    reason = entry.get("reason", entry.get("reasoning"))
    return StepLabel(
        label=_LABELS[label],
        confidence=confidence,
        reason=str(reason) if reason else None,
        **{name: None if entry.get(name) is None else bool(entry[name]) for name in _CRITERIA},
    )


def _from_lines(reply: str) -> list[StepLabel] | None:
    """Bare verdicts and nothing else; None where other words stand between them."""
    text = reply.strip()
    found, at = [], 0
    while at < len(text):
        match = _LINE.match(text, at)
        if match is None:
            return None
        confidence = match.group(2)
        found.append(StepLabel(label=_LABELS[match.group(1)], confidence=confidence.lower() if confidence else None))
        at = match.end()
    return found or None


def _quote(reply: str) -> str:
    return repr(reply.strip()[:80])
