"""Texts that begin alike are tokenised as each would be alone, their common beginning once.

64 solutions of one question stand behind the same documents: tokenised one by one that beginning is most of the work.
A tokenizer cuts a text into words before it makes tokens of them, so a text may be cut where one word ends and the next
begins; whether this tokenizer does so is seen on the first text, which is tokenised whole as well.
"""

import re
from collections.abc import Sequence
from typing import Any

_BETWEEN_WORDS = re.compile(r"[a-z](?= [a-z]+ )")
"""A place between two words of which the second ends within the text: what comes later cannot move the cut."""
_REACH = 4000
"""Characters at the end of the beginning in which the cut is looked for."""


def tokenize_sharing(tokenizer: Any, head: str, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text with the tokenizer's special tokens around it; `head` is what all texts begin with.

    They are exactly ``tokenizer(texts)["input_ids"]``.
    """
    cut = _cut_of(head)
    if len(texts) < 2 or cut is None or not all(text.startswith(head) for text in texts):
        return _ids(tokenizer, texts, special=True)
    first = _ids(tokenizer, texts[:1], special=True)[0]
    shared, *tails = _ids(tokenizer, [head[:cut], *(text[cut:] for text in texts)], special=False)
    # Seen on one text it holds for all: what decides about the cut stands in the part that they share.
    around = _special_around(first, [*shared, *tails[0]])
    if around is None:
        return _ids(tokenizer, texts, special=True)
    before, behind = around
    return [[*before, *shared, *tail, *behind] for tail in tails]


def _ids(tokenizer: Any, texts: Sequence[str], special: bool) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=special)["input_ids"]
    return ids


def _cut_of(head: str) -> int | None:
    """The last place between words; None where there is none near the end."""
    start = max(0, len(head) - _REACH)
    cut = None
    for match in _BETWEEN_WORDS.finditer(head, start):
        cut = match.end()
    return cut


def _special_around(whole: list[int], parts: list[int]) -> tuple[list[int], list[int]] | None:
    """What stands before and behind `parts` in `whole`; None where they are not in it as they are."""
    # Few: a mark at the beginning, perhaps one at the end.
    num_special = len(whole) - len(parts)
    for start in range(num_special + 1):
        end = start + len(parts)
        if whole[start:end] == parts:
            return whole[:start], whole[end:]
    return None
