"""A solution's steps in text, and the form in which a reward model reads them.

Two readers of raw text meet here. `split_steps` is ours: it reads what a policy wrote, knows the many ways in which
models mark steps, and normalises white space. `cut_steps` is the reference's: it cuts a solution that is to be scored
where Med-PRM's own code cuts it, at ``Step 1:`` alone, and edits nothing. So text is normalised once, where it is
sampled, and what is stored then is what is scored. To score raw text that marks its steps in another way, split it
first and give the list of steps.
"""

import re
import string
from collections.abc import Iterator, Sequence
from itertools import pairwise
from re import Match

TAG = " ки"
LETTERS = string.ascii_uppercase
STEP_MARK = "Step {number}:"  # what the policy's prompt asks for, and every solution is written with

_SPACES = re.compile(r"\s+")


def one_line(text: str) -> str:
    """`text` with every run of white space as one space."""
    return _SPACES.sub(" ", text).strip()


def well_formed(text: str) -> str:
    """`text` with U+FFFD for each half of a surrogate pair, which JSON can hold and no file, table or hash can."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# How a policy writes a solution. Its prompt asks for this form, its training shows it, and Monte Carlo and tree search
# continue it: all of them must agree to the byte.


def step_mark(number: int) -> str:
    """``Step 3:``, the mark of step `number` (from 1)."""
    return STEP_MARK.format(number=number)


def numbered_steps(steps: Sequence[str], first: int = 1) -> list[str]:
    """Each step behind its mark, numbered from `first`: ``Step 1: …``."""
    return [f"{step_mark(number)} {step}" for number, step in enumerate(steps, first)]


def solution_text(steps: Sequence[str]) -> str:
    """Steps as the policy writes them, one a line, without a line break at the end.

    >>> solution_text(["Look.", "Think."])
    'Step 1: Look.\\nStep 2: Think.'
    """
    return "\n".join(numbered_steps(steps))


def solution_prefix(steps: Sequence[str]) -> str:
    """The beginning of a solution: `steps` and the mark of the next one, so that another step must follow.

    >>> solution_prefix(["Look."])
    'Step 1: Look.\\nStep 2:'
    """
    lines = [f"{step}\n" for step in numbered_steps(steps)]
    return "".join(lines) + step_mark(len(steps) + 1)


# What a policy wrote. A mark begins a line, or stands inside one, where clinical text has steps of its own: "GINA
# step 3", "USMLE Step 1". Linear in the text: what repeats is possessive.

_MARK = re.compile(
    r"""
    (?: (?P<line> ^ [ \t]*+ (?: (?:[>•+*-] | \d++[.)]) [ \t]++ )?+ ) | (?<![^\s。！？；]) )
    (?P<styled> (?: \#{1,6} [ \t]*+ )?+ (?: (?P<bold> \*{1,3} | _{1,3} ) [ \t]*+ )?+ )
    (?: (?P<word>step) [ \t]*+ \#?+ (?P<number>\d++) (?: [ \t]*+ (?:/|of) [ \t]*+ \d++ )?+
      | 步[骤驟] [ \t]*+ (?P<chinese>\d++) | 第 [ \t]*+ (?P<ordinal>\d++) [ \t]*+ 步 )
    (?P<closed> [*_]{1,3} )?+
    (?: [ \t]*+ (?: (?P<colon>[:：]) | (?P<stop>[.)．]) )
      | [ \t]*+ (?: [-–—] (?=\s) | (?=[(（]) ) | [ \t]*+ $ )
    (?P<closed_behind> [ \t]*+ [*_]{1,3} (?=\s|$) )?+
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_SENTENCE_END = re.compile(rf"(?:[.!?:;…。！？：；][\"'”’»)\]*_`]*|{TAG})\s*\Z")
_OTHER_STEPS = re.compile(
    r"\b(?:USMLE|COMLEX|NBME|GINA|NAEPP|EPR-?\d|WHO|BTS|SIGN|GOLD|ladder)(?:['’]s)?(?:\s+\d{4})?\s+\Z", re.IGNORECASE
)
_CONTEXT = 32  # characters before a mark that tell whether it begins a step


def split_steps(text: str) -> tuple[str, list[str]]:
    """What stands before the first mark, and the steps without their marks; a text without marks is one step.

    Marks are those of `step_marks`. Steps that are numbered wrongly or twice stay as many steps, in the order of the
    text, and `join_steps` numbers them anew. A mark with nothing behind it is no step, an empty text has none. White
    space is normalised: this is how a policy's solution enters the tables.

    >>> split_steps("So: Step 1: Look. **Step 2:** Think of GINA step 3.")
    ('So:', ['Look.', 'Think of GINA step 3.'])
    """
    marks = step_marks(text)
    if not marks:
        return "", [one_line(text)] if text.strip() else []
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    steps = []
    for mark, end in zip(marks, ends, strict=True):
        step = _behind(mark, text[mark.end() : end])
        if step:
            steps.append(step)
    return one_line(text[: marks[0].start()]), steps


def step_numbers(text: str) -> list[int]:
    """The numbers that the marks of the steps carry, of longer ones than a step can have the first nine digits."""
    return list(map(_number, step_marks(text)))


def step_marks(text: str) -> list[Match[str]]:
    """The marks that begin steps: ``Step 1:``, ``**Step 1:**``, ``### Step 1``, ``Step 1 -``, ``步骤1：`` and the like.

    A capital mark with a colon, or with other signs of a heading, at the beginning of a line or behind the end of a
    sentence is one whatever its number. A weaker one (inside a sentence, in small letters, without a colon) must carry
    the next number, and no clear mark with that number may follow; else it is what the text speaks of: "calls for step
    3: low-dose ICS". So are the steps of examinations and guidelines ("USMLE Step 1", "the WHO ladder Step 2").
    """
    candidates = list(_MARK.finditer(text))
    clear = [_is_clear(mark, text) for mark in candidates]
    following = _following_numbers(candidates, clear)
    marks: list[Match[str]] = []
    for mark, is_clear, next_number in zip(candidates, clear, following, strict=True):
        # Some models count their steps from 0.
        expected = (_number(marks[-1]) + 1,) if marks else (0, 1)
        number = _number(mark)
        fits = number in expected and number != next_number
        if is_clear or (fits and _may_mark(mark, text)):
            marks.append(mark)
    return marks


def _following_numbers(candidates: Sequence[Match[str]], clear: Sequence[bool]) -> list[int | None]:
    """For each candidate the number of the next clear mark behind it."""
    following: list[int | None] = []
    number: int | None = None
    for mark, is_clear in zip(reversed(candidates), reversed(clear), strict=True):
        following.append(number)
        if is_clear:
            number = _number(mark)
    return following[::-1]


def _is_clear(mark: Match[str], text: str) -> bool:
    """Whether a mark begins a step whatever its number."""
    capital = mark["word"] is None or mark["word"][0] == "S"
    is_styled = bool(mark["styled"].strip())  # a heading's or an emphasis's signs
    if mark["line"] is not None:
        is_stopped = bool(mark["colon"] or mark["stop"])
        return is_styled or (capital and is_stopped)
    before = text[max(0, mark.start() - _CONTEXT) : mark.start()]
    if _OTHER_STEPS.search(before):
        return False
    begins_sentence = is_styled or _SENTENCE_END.search(before) is not None
    return capital and mark["colon"] is not None and begins_sentence


def _may_mark(mark: Match[str], text: str) -> bool:
    """Whether a mark that is not clear could begin a step, where its number fits."""
    if mark["line"] is not None:
        return True
    before = text[max(0, mark.start() - _CONTEXT) : mark.start()]
    if _OTHER_STEPS.search(before):
        return False
    capital = mark["word"] is None or mark["word"][0] == "S"
    return (capital and mark["colon"] is not None) or bool(_SENTENCE_END.search(before))


def _number(mark: Match[str]) -> int:
    digits: str = mark["number"] or mark["chinese"] or mark["ordinal"]
    # Python refuses to read numbers of thousands of digits.
    return int(digits[:9])


def _behind(mark: Match[str], text: str) -> str:
    """A step's text, without the emphasis that its mark opened: "**Step 1: Look.** Left" is "Look. Left"."""
    # Its closing signs stand somewhere in the step.
    if mark["bold"] and not (mark["closed"] or mark["closed_behind"]):
        text = text.replace(mark["bold"], "", 1)
    return one_line(text)


# What a reward model reads

# Med-PRM's own (`STEP_PATTERN` of its sampling code), which looks for it where line breaks have become spaces.
_REFERENCE_MARK = re.compile(r"(?:##[ \n])?Step[ \n]\d+:")
_TAGS = re.compile(r"[ \n]ки(?!\w)|<extra_0>")  # Med-PRM's and Math-Shepherd's, Qwen's


def cut_steps(text: str) -> list[str]:
    """A solution that is to be scored, cut into its steps as Med-PRM's own code cuts it; nothing is edited.

    Where the text has step tags, the steps are what they end, and what stands behind the last; else each begins at its
    mark ``Step 1:`` (which it keeps), the first with what stands before. A text without either is one step, an
    empty one has none. But for the tags, the steps joined are the text.

    >>> cut_steps("So. Step 1:  Look.\\nStep 2: Think.")
    ['So. Step 1:  Look.\\n', 'Step 2: Think.']
    >>> cut_steps("Step 1:  Look. ки Step 2: Think. ки")
    ['Step 1:  Look.', ' Step 2: Think.']
    """
    if is_tagged(text):
        # What stands behind the last tag is a step that was cut off, unless it is white space.
        *steps, rest = _TAGS.split(text)
        steps += [rest] if rest.strip() else []
    else:
        # What stands before the first mark belongs to the first step.
        starts = [mark.start() for mark in _REFERENCE_MARK.finditer(text)][1:]
        steps = [text[start:end] for start, end in pairwise([0, *starts, len(text)])]
    return steps if any(map(str.strip, steps)) else []


def is_tagged(text: str) -> bool:
    """Whether `text` has step tags; the letters inside a word ("левая кисть") are none."""
    return _TAGS.search(text) is not None


def have_marks(steps: Sequence[str]) -> bool:
    """Whether each of the steps carries its mark ``Step 1:``; before the first's there may be other text."""
    if not steps or not _REFERENCE_MARK.search(steps[0]):
        return False
    return all(_REFERENCE_MARK.match(step.lstrip()) for step in steps[1:])


def without_tags(steps: Sequence[str]) -> list[str]:
    """The steps without the tag behind each; as they are where not all have one."""
    if not all(step.endswith(TAG) for step in steps):
        return list(steps)
    return [step.removesuffix(TAG) for step in steps]


def without_mark(step: str) -> str:
    """A step of `cut_steps` as one line without its mark, for reading.

    >>> without_mark("So. Step 1:  Look.\\n")
    'So. Look.'
    """
    return one_line(_REFERENCE_MARK.sub("", step, count=1))


def reference_steps(solution: str | Sequence[str], preamble: str = "") -> list[str]:
    """A solution's steps as Med-PRM writes them, each up to its tag: with the tags they are its processed text.

    Line breaks become single spaces and the ends of steps are stripped, as in the reference (`prm_process_solution` of
    its sampling code); all else stays, double spaces and tabs too. Raw text is cut by `cut_steps`; tagged text keeps
    its tags where they are. A list is numbered anew, unless each step carries a mark of its own.

    >>> reference_steps("So.\\nStep 1:  Look.\\n\\nStep 2: Think.")
    ['So. Step 1:  Look.', ' Step 2: Think.']
    >>> reference_steps([" Look.", "Think\\ntwice."])
    ['Step 1:  Look.', ' Step 2: Think twice.']
    """
    if isinstance(solution, str):
        line = solution.replace("\n", " ")
        return cut_steps(line) if is_tagged(line) else _spaced(_marked(line))
    steps = without_tags([step.replace("\n", " ") for step in solution])
    if have_marks(steps):
        steps = [step.strip().removeprefix("## ") for step in steps]
    else:
        steps = list(map(str.rstrip, numbered_steps(steps)))
    head = preamble.replace("\n", " ").strip()
    if head and steps:
        steps = [f"{head} {steps[0]}", *steps[1:]]
    return _spaced(steps)


def _marked(line: str) -> Iterator[str]:
    """The steps of a line by their marks, which lose their "## "; a line without marks is one step."""
    for number, step in enumerate(cut_steps(line)):
        mark = _REFERENCE_MARK.search(step)
        if mark is None:
            yield step.strip()
            continue
        head = step[: mark.start()].strip()
        marked_step = step[mark.start() :].strip().replace("## ", "")
        yield f"{head} {marked_step}" if number == 0 and head else marked_step


def _spaced(steps: Iterator[str] | Sequence[str]) -> list[str]:
    """Steps with the space that parts each from the tag before it."""
    spaced: list[str] = []
    for step in steps:
        spaced.append(f" {step}" if spaced else step)
    return spaced


def join_steps(steps: Sequence[str], preamble: str = "") -> str:
    """Steps as one line of text: ``Step 1: … Step 2: …``."""
    return "".join(reference_steps(steps, preamble))


def tag_steps(steps: Sequence[str], preamble: str = "", tag: str = TAG) -> str:
    """Steps as a process reward model reads them, the tag after each: ``Step 1: … ки Step 2: … ки``."""
    return "".join(f"{step}{tag}" for step in reference_steps(steps, preamble))


def question_with_options(question: str, options: Sequence[str]) -> str:
    """``question (A) first (B) second``; the question alone where there are no options."""
    parts = [question]
    for letter, option in zip(LETTERS, options, strict=False):
        parts.append(f"({letter}) {option}")
    return " ".join(parts)
