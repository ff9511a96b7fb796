"""What a sampled solution must be to be kept, pure: `fault` names the first thing that is wrong with it.

A solution is kept if the model ended it, it has steps in number and in order, states an answer, and is caught in no
loop. What a loop is: see `repeats`.
"""

import re
from collections import Counter
from collections.abc import Sequence

from medmm_ray.text import step_numbers

NOT_HAD = ("unavailable", "request")  # a sample that no attempt brought, or whose request the API would not have
FAULTS = ("refused", *NOT_HAD, "empty", "cut_off", "num_steps", "step_numbers", "repetition", "no_answer")

MAX_PERIOD = 128  # words; a longer passage that stands there three times takes a solution of 400 words
MIN_REPEATS = 3
MIN_LOOP_WORDS = 16  # fewer are emphasis ("very, very, very") or a row of a table
_WORD = re.compile(r"\w{1,24}|[^\w\s]")  # a run of letters without spaces is cut, so that it too can be seen to repeat
_MARK = re.compile(r"Step\s+\d+", re.IGNORECASE)


def fault(
    text: str,
    steps: Sequence[str],
    answer: str | None,
    finish_reason: str,
    min_steps: int,
    max_steps: int,
) -> str | None:
    """Why a sample is refused, one of `FAULTS`; None keeps it."""
    if finish_reason in ("refused", *NOT_HAD):
        return finish_reason
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
    only those periods are looked at in which many runs of four words come again.
    """
    words = _WORD.findall(_MARK.sub("", text))
    last_place: dict[tuple[str, ...], int] = {}
    gaps: Counter[int] = Counter()
    runs_of_four = zip(
        words,
        words[1:],
        words[2:],
        words[3:],
        strict=False,
    )
    for place, four_words in enumerate(runs_of_four):
        gaps[place - last_place.get(four_words, place)] += 1
        last_place[four_words] = place
    for gap, count in gaps.items():
        # A loop of w words has w - gap - 3 runs that come again `gap` words on; nearer repeats may hide half of them.
        has_enough_runs = 2 * count >= _loop_words(gap) - gap - 3
        if 0 < gap <= MAX_PERIOD and has_enough_runs and _run(words, gap) >= _loop_words(gap):
            return True
    return False


def _loop_words(period: int) -> int:
    return max(MIN_REPEATS * period, MIN_LOOP_WORDS)


def _run(words: Sequence[str], period: int) -> int:
    """The longest stretch of words in which each equals the one a period before it."""
    longest = run = 0
    for earlier, later in zip(words, words[period:], strict=False):
        run = run + 1 if earlier == later else 0
        longest = max(longest, run)
    return longest + period
