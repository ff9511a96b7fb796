"""The grader of the MIRAGE leaderboard, by its published rule: for comparing with its table, not for grading.

It reads what stands behind the last ``"answer_choice": "`` (else the whole reply), tries ten forms of a letter A to D
in a fixed order, and takes the first hit of the first form that hits. Where none does, it answers A: a reply that
abstains counts as right where the key is A.
"""

import re

MARK = '"answer_choice": "'

_FORMS = tuple(
    re.compile(form)
    for form in (
        r"^\s*([ABCD])$",
        r"^\s*([ABCD]) or",
        r"^\s*([ABCD]) and",
        r"^\s*([ABCD])/",
        r"^\s*([ABCD]),",
        r"[Oo]ption ([ABCD])",
        r":\s*([ABCD])",
        r"^\s*([ABCD])\.",
        r"^\s*([ABCD])\"",
        r"^\s*([ABCD]):",
    )
)


def mirage_answer(reply: str) -> str:
    """The letter that the leaderboard reads in `reply`: always one of A to D.

    >>> mirage_answer('{"step_by_step_thinking": "...", "answer_choice": "C. fever"}'), mirage_answer("Unknown")
    ('C', 'A')
    """
    choice = reply.rpartition(MARK)[2].strip()
    for form in _FORMS:
        hit = form.search(choice)
        if hit:
            return hit[1]
    return "A"
