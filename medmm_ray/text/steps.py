"""A solution's steps in text, and the form in which a reward model reads them."""

import re
import string
from collections.abc import Sequence

TAG = " ки"
LETTERS = string.ascii_uppercase

_STEP = re.compile(r"(?:^|(?<=\s))(?:#+\s*|\*\*\s*)?Step\s+(\d+)\s*[:.)]\s*(?:\*\*)?\s*", re.IGNORECASE)
_SPACES = re.compile(r"\s+")


def one_line(text: str) -> str:
    """`text` with every run of white space as one space."""
    return _SPACES.sub(" ", text).strip()


def well_formed(text: str) -> str:
    """`text` with U+FFFD for each half of a surrogate pair, which JSON can hold and no file, table or hash can."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def split_steps(text: str) -> tuple[str, list[str]]:
    """What stands before the first mark, and the steps without their marks; a text without marks is one step.

    A mark is ``Step``, a number and one of ``: . )``. The number itself is not read: steps that are numbered wrongly
    or twice stay as many steps, in the order of the text, and `join_steps` numbers them anew. A mark with nothing
    behind it is no step, an empty text has none.

    >>> split_steps("So: Step 1: Look. Step 2: Think.")
    ('So:', ['Look.', 'Think.'])
    """
    marks = list(_STEP.finditer(text))
    if not marks:
        return "", [one_line(text)] if text.strip() else []
    ends = [m.start() for m in marks[1:]] + [len(text)]
    steps = [one_line(text[m.end() : end]) for m, end in zip(marks, ends, strict=True)]
    return one_line(text[: marks[0].start()]), [s for s in steps if s]


def step_numbers(text: str) -> list[int]:
    """The numbers that the marks of the steps carry, of longer ones than a step can have the first nine digits."""
    return [int(mark.group(1)[:9]) for mark in _STEP.finditer(text)]


def join_steps(steps: Sequence[str], preamble: str = "") -> str:
    """Steps as one line of text: ``Step 1: … Step 2: …``."""
    return _join(steps, preamble, "")


def tag_steps(steps: Sequence[str], preamble: str = "", tag: str = TAG) -> str:
    """Steps as a process reward model reads them, the tag after each: ``Step 1: … ки Step 2: … ки``."""
    return _join(steps, preamble, tag)


def _join(steps: Sequence[str], preamble: str, tag: str) -> str:
    marked = [f"Step {i}: {one_line(step)}{tag}" for i, step in enumerate(steps, 1)]
    return " ".join([one_line(preamble), *marked] if preamble.strip() else marked)


def question_with_options(question: str, options: Sequence[str]) -> str:
    """``question (A) first (B) second``; the question alone where there are no options."""
    return " ".join([question, *(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))])
