"""What a sampled solution must be to be kept, pure: `fault` names the first thing that is wrong with it.

A solution is kept if the model ended it, it has steps in number and in order, states an answer, and is caught in no
loop. What a loop is: see `repeats`.
"""

import re
from collections.abc import Sequence

import numpy as np

from medmm_ray.text import step_numbers

FAULTS = ("refused", "empty", "cut_off", "num_steps", "step_numbers", "repetition", "no_answer")

MAX_PERIOD = 128  # words; a longer passage that stands there three times takes a solution of 400 words
MIN_REPEATS = 3
MIN_LOOP_WORDS = 16  # fewer are emphasis ("very, very, very") or a row of a table
_WORD = re.compile(r"\w{1,24}|[^\w\s]")  # a run of letters without spaces is cut, so that it too can be seen to repeat
_MARK = re.compile(r"Step\s+\d+", re.IGNORECASE)


def fault(
    text: str, steps: Sequence[str], answer: str | None, finish_reason: str, min_steps: int, max_steps: int
) -> str | None:
    """Why a sample is refused, one of `FAULTS`; None keeps it."""
    if finish_reason == "refused":
        return "refused"
    if not text.strip():
        return "empty"
    if finish_reason != "stop":
        return "cut_off"
    if not min_steps <= len(steps) <= max_steps:
        return "num_steps"
    if not in_order(step_numbers(text)):
        return "step_numbers"
    if repeats(text):
        return "repetition"
    return "no_answer" if answer is None else None


def in_order(numbers: Sequence[int]) -> bool:
    """Whether steps are numbered 1, 2, 3 …; a text without marks has no numbers, and no disorder."""
    return list(numbers) == list(range(1, len(numbers) + 1))


def repeats(text: str) -> bool:
    """Whether some passage of up to 128 words stands three times or more in a row, 16 words or more in all.

    The marks of steps do not count, so that a step which is stated again and again is a loop too. Linear in the text:
    each period is one comparison of the words with themselves, shifted.
    """
    words = _WORD.findall(_MARK.sub("", text))
    known: dict[str, int] = {}
    ids_W = np.array([known.setdefault(word, len(known)) for word in words])
    for period in range(1, min(MAX_PERIOD, len(words) // MIN_REPEATS) + 1):
        same = ids_W[period:] == ids_W[:-period]
        if _longest_run(same) + period >= max(MIN_REPEATS * period, MIN_LOOP_WORDS):
            return True
    return False


def _longest_run(flags: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> int:
    ends = np.flatnonzero(np.concatenate(([True], ~flags, [True])))
    return int(np.diff(ends).max()) - 1
