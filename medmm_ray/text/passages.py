"""A long text as overlapping passages that an encoder reads whole, cut between sentences where that can be.

Enters: a text, and what counts its tokens. Leaves: slices of the text, byte for byte.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Count = Callable[[Sequence[str]], list[int]]
"""The number of tokens of each text, without the special ones that a model puts around it."""

# A line is a sentence too: headings and lists have no full stop.
_SENTENCE = re.compile(r"\S.*?(?:(?<=[.!?])(?=\s)|\n|\Z)", re.S)
_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class _Piece:
    """A sentence or a word of a text: characters `start` to `end`, and its tokens."""

    start: int
    end: int
    tokens: int


def cut_passages(
    text: str,
    count: Count,
    max_tokens: int,
    overlap: int,
) -> list[str]:
    """A text as passages of at most `max_tokens` tokens each; neighbours share sentences of up to `overlap` tokens.

    A sentence that is longer itself is cut between words; a word that is longer stays whole. A text that fits is its
    only passage, unchanged.
    """
    if max_tokens < 1:
        raise ValueError(f"passages of {max_tokens} tokens: at least 1 is expected")
    if count([text])[0] <= max_tokens:
        return [text]
    # Counted once each: a passage's tokens are the sum of its sentences'.
    pieces = list(_pieces(text, count, max_tokens))
    passages: list[str] = []
    first = 0
    while first < len(pieces):
        end = _end(pieces, first, max_tokens)
        passages.append(text[pieces[first].start : pieces[end - 1].end].rstrip())
        if end == len(pieces):
            break
        first = _next_first(pieces, first, end, overlap, max_tokens)
    return passages


def _pieces(
    text: str,
    count: Count,
    max_tokens: int,
) -> Iterator[_Piece]:
    """The sentences of a text; of one that is too long, its words."""
    for piece in _counted(text, _SENTENCE, 0, count):
        if piece.tokens <= max_tokens:
            yield piece
        else:
            yield from _counted(
                text[piece.start : piece.end],
                _WORD,
                piece.start,
                count,
            )


def _counted(
    text: str,
    pattern: re.Pattern[str],
    offset: int,
    count: Count,
) -> Iterator[_Piece]:
    matches = list(pattern.finditer(text))
    tokens = count([match.group() for match in matches])
    for match, num_tokens in zip(matches, tokens, strict=True):
        yield _Piece(offset + match.start(), offset + match.end(), num_tokens)


def _end(
    pieces: Sequence[_Piece],
    first: int,
    max_tokens: int,
) -> int:
    """The end of the longest passage that begins with the piece `first`; one piece at least."""
    end, room = first + 1, max_tokens - pieces[first].tokens
    while end < len(pieces) and pieces[end].tokens <= room:
        room -= pieces[end].tokens
        end += 1
    return end


def _next_first(
    pieces: Sequence[_Piece],
    first: int,
    end: int,
    overlap: int,
    max_tokens: int,
) -> int:
    """The piece that the next passage begins with: some of the last ones again, and a new one beside them."""
    start, repeated = end, 0
    # Where the next piece would not fit beside what is repeated, the passage would hold nothing new.
    most = min(overlap, max_tokens - pieces[end].tokens)
    while start - 1 > first and repeated + pieces[start - 1].tokens <= most:
        start -= 1
        repeated += pieces[start].tokens
    return start
