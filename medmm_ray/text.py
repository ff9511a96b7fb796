"""Steps and answers in text, pure: a solution's steps, the form a reward model reads, the answer it states."""

import re
import string
import unicodedata
from collections.abc import Sequence

TAG = " ки"
LETTERS = string.ascii_uppercase

_STEP = re.compile(r"(?:^|(?<=\s))(?:#+\s*|\*\*\s*)?Step\s+(\d+)\s*[:.)]\s*(?:\*\*)?\s*", re.IGNORECASE)
_SPACES = re.compile(r"\s+")


def one_line(text: str) -> str:
    """`text` with every run of white space as one space."""
    return _SPACES.sub(" ", text).strip()


def split_steps(text: str) -> tuple[str, list[str]]:
    """What stands before "Step 1", and the steps without their marks; a text without marks is one step.

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
    """The numbers that the marks of the steps carry, as written."""
    return [int(mark.group(1)) for mark in _STEP.finditer(text)]


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


def normalise(text: str) -> str:
    """For comparing open answers: lower case, no articles, no punctuation, single spaces, accents decomposed away."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode() or text
    plain = re.sub(r"[^\w\s]", " ", plain.lower())
    return one_line(re.sub(r"\b(a|an|the)\b", " ", plain))


# An option letter stands alone: "appendicitis" is not A, and "is not A" is not an answer.
_LETTER = r"[(\[*_`\"']*(?<![A-Za-z])([A-Z])(?![A-Za-z'’])[)\]*_`\"'.]*"
_LEADS = (
    r"(?:final\s+)?answer\s*(?:choice\s*)?(?:is|:|=|would\s+be|should\s+be)\s*:?\s*(?:therefore\s+)?"
    r"(?:most\s+likely\s+)?(?:(?:the\s+)?(?:option|choice|letter)\s*)?"
)
_LETTER_PATTERNS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"{_LEADS}{_LETTER}",
        rf"\\boxed\s*\{{\s*(?:\\text\s*\{{\s*)?{_LETTER}",
        rf"(?:correct|right|best)\s+(?:option|choice|answer)\s*(?:is|:)\s*{_LETTER}",
        rf"\bis\s*:?\s*\*\*{_LETTER}",
        rf"(?:option|choice)\s+{_LETTER}\s+is\s+(?:the\s+)?(?:correct|right|best|most\s+likely)",
    )
)
_STATED = re.compile(rf"{_LEADS}([^\n]+?)\s*(?:\.\s|\.?$|\n)", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s*\{(?:\\text\s*\{)?([^{}]*)\}", re.IGNORECASE)


def extract_answer(text: str, options: Sequence[str], answer_type: str = "choice") -> str | None:
    """The last answer that `text` states: a letter (choice), ``yes``/``no`` (yes_no), or the stated text (open).

    None where none is stated. A letter counts only if it stands alone and one of `options` has it; an option's text is
    accepted in place of its letter. Nothing is found by substring alone.
    """
    statements = [m.group(1).strip() for m in (*_STATED.finditer(text), *_BOXED.finditer(text))]
    if answer_type == "yes_no":
        words = [normalise(s).split(" ")[0] for s in statements] or [normalise(text)]
        return next((w for w in reversed(words) if w in ("yes", "no")), None)
    if answer_type == "open":
        return statements[-1].strip(" .*\"'`") or None if statements else None
    letters = LETTERS[: len(options)]
    found = [(m.start(), m.group(1)) for p in _LETTER_PATTERNS for m in p.finditer(text)]
    # An upper-case letter, or a lower-case one in brackets: "the answer is a fracture" states no option.
    stated = [(at, letter) for at, letter in found if letter in letters or f"({letter})" in text]
    if stated:
        letter = max(stated)[1].upper()
        return letter if letter in letters else None
    for statement in reversed(statements):
        for letter, option in zip(letters, options, strict=True):
            if normalise(statement) == normalise(option):
                return letter
    bare = re.fullmatch(rf"\s*{_LETTER}\s*", text)
    return bare.group(1) if bare and bare.group(1) in letters else None


def is_correct(answer: str | None, gold: str, answer_type: str) -> bool | None:
    """Whether an extracted answer equals the gold one; None where there is no answer."""
    if answer is None:
        return None
    return answer == gold if answer_type == "choice" else normalise(answer) == normalise(gold)
