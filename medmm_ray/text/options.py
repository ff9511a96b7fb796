"""Options that stand in the text of their question."""

import re
from collections.abc import Sequence

from medmm_ray.text.steps import LETTERS, one_line

_OPTION = re.compile(r"^\s*\(?([A-Z])[.)]\s+(.*)$")


def lettered_options(text: str) -> tuple[str, list[str]]:
    """A question and its options: the lettered lines at the end of the text, from A on without a gap.

    A line between them that bears no letter, or one out of turn, belongs to the option above it.

    >>> lettered_options("Which?\\nA. one\\nB. two,\\nor more")
    ('Which?', ['one', 'two, or more'])
    """
    lines = text.rstrip().split("\n")
    # From the end: an "A." further up is part of the question.
    for start in reversed(range(len(lines))):
        mark = _OPTION.match(lines[start])
        if not mark or mark[1] != "A":
            continue
        options = _options(lines[start:])
        if len(options) > 1:
            question = "\n".join(lines[:start]).strip()
            return question, list(map(one_line, options))
    return text.strip(), []


def _options(lines: Sequence[str]) -> list[str]:
    """The options in lines of which the first is lettered A."""
    options: list[str] = []
    for line in lines:
        mark = _OPTION.match(line)
        if mark and mark[1] == LETTERS[len(options) : len(options) + 1]:
            options.append(mark[2])
        else:
            options[-1] += f" {line}"
    return options
