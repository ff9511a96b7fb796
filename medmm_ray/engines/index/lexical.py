"""BM25 over one shard of a corpus (bm25s), memory-mapped; the scores are those of the corpus as a whole.

Enters: the texts of a shard, in the order of their rows, and the statistics of the corpus. Leaves: for each query the
rows with the best scores. Every shard weighs a word by how rare it is in the corpus, not in the shard, so that a
passage's score does not depend on which others it lies beside.

The weights are Lucene's (Kamphuis et al. 2020): log(1 + (N - n + .5) / (n + .5)) for a word in n of N passages, times
f / (f + k1 (1 - b + b L / mean L)) where it occurs f times in a passage of L words. bm25s computes the same of the
texts that it is given; here they are summed over shards first, and built a few at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmm_ray.config import ConfigError
from medmm_ray.engines.index.shard import TIE_DIGITS

Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]
WORD = r"\w+"  # bm25s's own pattern drops letters that stand alone, as in hepatitis B
AT_ONCE = 8192  # texts that are cut into words at a time: as Python objects words take ten times their room


@dataclass(frozen=True)
class CorpusStatistics:
    """What BM25 needs to know of a corpus: its passages, its words in all, and in how many passages each word is."""

    num_passages: int
    num_words: int
    frequencies: dict[str, int]

    @classmethod
    def of(cls, texts: Sequence[str]) -> "CorpusStatistics":
        """The statistics of some texts."""
        return cls.of_terms(_Terms.of(texts))

    @classmethod
    def of_terms(cls, terms: "_Terms") -> "CorpusStatistics":
        """The statistics of texts whose words are counted."""
        frequencies = np.bincount(terms.word_P, minlength=len(terms.words)).tolist()
        num_words = int(terms.length_N.sum())
        return cls(len(terms.length_N), num_words, dict(zip(terms.words, frequencies, strict=True)))

    @classmethod
    def sum(cls, parts: "Sequence[CorpusStatistics]") -> "CorpusStatistics":
        """The statistics of all shards' texts together."""
        # By the words themselves, as each shard numbers its own.
        frequencies: dict[str, int] = {}
        for part in parts:
            for word, number in part.frequencies.items():
                frequencies[word] = frequencies.get(word, 0) + number
        num_passages = sum(part.num_passages for part in parts)
        return cls(
            num_passages,
            sum(part.num_words for part in parts),
            frequencies,
        )


@dataclass(frozen=True)
class _Terms:
    """The words of N texts: for each of P pairs of a text and a word in it the text's row, the word and how often."""

    words: list[str]
    length_N: NDArray[np.int64]
    row_P: NDArray[np.int32]
    word_P: NDArray[np.int32]
    count_P: NDArray[np.int32]

    @classmethod
    def of(cls, texts: Sequence[str]) -> "_Terms":
        numbers: dict[str, int] = {}
        lengths: list[int] = []
        parts: list[tuple[NDArray[np.int32], ...]] = [(np.zeros(0, np.int32),) * 3]
        for first in range(0, len(texts), AT_ONCE):
            some = _tokenized(texts[first : first + AT_ONCE], return_ids=True)
            some_lengths = list(map(len, some.ids))
            # The library numbers the words of these texts alone; here they get their numbers among all.
            number_V = np.array([numbers.setdefault(word, len(numbers)) for word in some.vocab], np.int64)
            by_id_V = number_V[np.argsort(list(some.vocab.values()))]
            flat = by_id_V[np.fromiter(chain.from_iterable(some.ids), np.int64, sum(some_lengths))]
            rows = np.repeat(np.arange(first, first + len(some_lengths)), some_lengths)
            # A pair of text and word as one number, so that equal ones are counted by one sort.
            pairs, counts = np.unique(rows << 32 | flat, return_counts=True)
            parts.append(
                ((pairs >> 32).astype(np.int32), (pairs & 0xFFFFFFFF).astype(np.int32), counts.astype(np.int32))
            )
            lengths += some_lengths
        row_P, word_P, count_P = map(np.concatenate, zip(*parts, strict=True))
        return cls(
            list(numbers),
            np.array(lengths, np.int64),
            row_P,
            word_P,
            count_P,
        )


@cache
def _stemmer() -> Any:
    import Stemmer

    return Stemmer.Stemmer("english")


def words_of(texts: Sequence[str]) -> list[list[str]]:
    """The words of each text as BM25 compares them: lower case, English stems, without stop words."""
    words: list[list[str]] = _tokenized(texts, return_ids=False)
    return words


def _tokenized(texts: Sequence[str], return_ids: bool) -> Any:
    import bm25s

    return bm25s.tokenize(
        list(texts),
        token_pattern=WORD,
        stopwords="en",
        stemmer=_stemmer(),
        return_ids=return_ids,
        show_progress=False,
    )


class LexicalShard:
    """The BM25 scores of one shard's texts; made by `build` or `load`."""

    def __init__(self, scores: Any) -> None:
        self._scores = scores
        self.num_rows = int(scores.scores["num_docs"])

    @classmethod
    def build(
        cls,
        texts: Sequence[str],
        corpus: CorpusStatistics | None,
        k1: float,
        b: float,
    ) -> "LexicalShard":
        """The scores of `texts`, which are some of the corpus's; without its statistics they are all of it."""
        import bm25s

        terms = _Terms.of(texts)
        corpus = corpus or CorpusStatistics.of_terms(terms)
        frequency_V = np.array([corpus.frequencies[word] for word in terms.words], np.float64)
        idf_V = np.log(1 + (corpus.num_passages - frequency_V + 0.5) / (frequency_V + 0.5))
        # A corpus of empty texts has no mean length, and no score that would ask for it.
        mean_length = max(corpus.num_words / max(corpus.num_passages, 1), 1e-9)
        norm_N = k1 * (1 - b + b * terms.length_N / mean_length)
        score_P = idf_V[terms.word_P] * terms.count_P / (norm_N[terms.row_P] + terms.count_P)
        # A word's scores lie together, by its rows: a query reads one stretch of the file for each of its words.
        by_word = np.argsort(terms.word_P, kind="stable")
        scores = bm25s.BM25(k1=k1, b=b, method="lucene")
        ends_V = np.cumsum(np.bincount(terms.word_P, minlength=len(terms.words)))
        scores.scores = {
            "data": score_P[by_word].astype(np.float32),
            "indices": terms.row_P[by_word],
            "indptr": np.concatenate([[0], ends_V]).astype(np.int64),
            "num_docs": len(texts),
        }
        scores.vocab_dict = dict(
            zip(
                terms.words,
                range(len(terms.words)),
                strict=True,
            )
        )
        # Of BM25's kinds this one gives nothing to passages without a word; the library looks for it all the same.
        scores.nonoccurrence_array = None
        return cls(scores)

    def search(
        self,
        queries: Sequence[Sequence[str]],
        k: int,
        mask_N: Mask | None = None,
    ) -> "Iterator[Ranked]":
        """The up to `k` best rows of each query (its words), of those that `mask_N` allows; equal ones by their rows.

        Only rows that share a word with the query are among them.
        """
        for words in queries:
            score_N = self._score(words)
            # Filtered before the best are taken, so that a filter that lets few pass still fills its places.
            if mask_N is not None:
                score_N = np.where(mask_N, score_N, 0)
            yield _best(score_N, k)

    def _score(self, words: Sequence[str]) -> NDArray[np.float32]:
        index = self._scores.scores
        score_N = np.zeros(self.num_rows, np.float32)
        for word in self._scores.get_tokens_ids(list(words)):
            first, end = index["indptr"][word], index["indptr"][word + 1]
            # A word's rows are distinct, so that this adds to each once; `np.add.at` of bm25s takes four times as long.
            score_N[index["indices"][first:end]] += index["data"][first:end]
        return score_N

    def save(self, folder: str | Path) -> None:
        """Write the scores, as bm25s does."""
        self._scores.save(str(folder), show_progress=False)

    @classmethod
    def load(cls, folder: str | Path) -> "LexicalShard":
        """Read what `save` wrote; scores stay on the disk until they are looked at."""
        import bm25s

        try:
            return cls(
                bm25s.BM25.load(
                    str(folder),
                    mmap=True,
                    show_progress=False,
                )
            )
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"no BM25 index can be read at {folder} ({error}); run the index step again") from error


Ranked = tuple[NDArray[np.float64], Rows]
"""Scores and rows of the best, best first."""


def _best(score_N: NDArray[np.float32], k: int) -> Ranked:
    row_M = np.flatnonzero(score_N)
    # Rounded as similarities are: sums in another order differ in the last bits.
    score_M = np.round(score_N[row_M].astype(np.float64), TIE_DIGITS)
    if len(row_M) > k:
        # All that tie with the last stay until they are ranked by their rows.
        threshold = np.partition(score_M, len(score_M) - k)[len(score_M) - k]
        is_best = score_M >= threshold
        row_M, score_M = row_M[is_best], score_M[is_best]
    order = np.lexsort((row_M, -score_M))[:k]
    return score_M[order], row_M[order]
