"""Passages are slices of the text, short enough, overlapping, and together hold every word."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmm_ray.text.passages import cut_passages


def words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def test_sentences_stay_whole_and_neighbours_share_some() -> None:
    text = "One two three. Four five. Six seven eight!\nNine ten? Eleven twelve thirteen fourteen."
    assert cut_passages(text, words, 14, 3) == [text]
    assert cut_passages(text, words, 8, 3) == [
        "One two three. Four five. Six seven eight!",
        "Six seven eight!\nNine ten?",
        "Nine ten? Eleven twelve thirteen fourteen.",
    ]
    assert cut_passages(text, words, 8, 0) == [
        "One two three. Four five. Six seven eight!",
        "Nine ten? Eleven twelve thirteen fourteen.",
    ]


def test_a_sentence_that_is_too_long_is_cut_between_words() -> None:
    assert cut_passages("a b c d e f g", words, 3, 1) == ["a b c", "c d e", "e f g"]
    assert cut_passages("Short one. a b c d e", words, 3, 1) == ["Short one. a", "a b c", "c d e"]


def test_a_word_that_is_too_long_stays_whole() -> None:
    def letters(texts: Sequence[str]) -> list[int]:
        return [len(text.replace(" ", "")) for text in texts]

    assert cut_passages("ab abcdefghij cd", letters, 4, 2) == ["ab", "abcdefghij", "cd"]


@given(st.lists(st.sampled_from(["", ".", "!", "\n"]), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 9))
def test_nothing_is_lost_and_every_passage_brings_something_new(ends: list[str], most: int, overlap: int) -> None:
    text = " ".join(f"w{i:02}{end}" for i, end in enumerate(ends))
    passages = cut_passages(text, words, most, overlap)
    numbers = [[int(word.strip("w.!")) for word in passage.split()] for passage in passages]
    assert all(passage in text for passage in passages)
    assert sorted({number for passage in numbers for number in passage}) == list(range(len(ends)))
    last = -1
    for passage in numbers:
        assert len(passage) <= most
        assert last + 1 - overlap <= passage[0] <= last + 1 <= passage[-1]
        last = passage[-1]


def test_no_room_is_refused() -> None:
    with pytest.raises(ValueError, match="passages of 0 tokens"):
        cut_passages("a", words, 0, 0)
