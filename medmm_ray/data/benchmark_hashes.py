"""Hashes of benchmarks' test questions, so that training data can be held against them without the questions.

Enters: questions of a test set. Leaves: for each the 16 lowest hashes of its stem's shingles, those of its options, and
how many shingles there are; nothing from which the text could be read. Shipped ones lie in
``medmm_ray/data/datasets/hashes``, one file a benchmark; ``python -m jobs.datasets --hash`` makes more.
"""

import importlib.resources
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medmm_ray.config import ConfigError
from medmm_ray.data.tables import filesystem, write_file
from medmm_ray.text.shingles import hashes_of, shingle_hashes, words_of

NUM_HASHES = 16
"""Hashes of a stem at most: enough to tell how much of it stands in another text, to an eighth or so."""
JUDGED = frozenset(("yes", "no", "maybe", "true", "false"))
"""Options that tell no question from another."""
STEM_SHARE, OPTION_SHARE = 0.6, 0.5
"""Shares of the stem's hashes and of the options that make a question the same, in near words, by its options."""
LONG, LONG_SHARE = 20, 0.9
"""A stem of so many shingles is the same by this share of them, whatever the options."""
EQUAL_OPTIONS_SHARE, MANY_OPTIONS = 0.35, 3
"""So small a share of the stem is enough where all of at least so many options are the same."""
LONG_EQUAL_OPTIONS_SHARE = 0.5
"""The same of a long stem."""
SHORT, OPEN_SHARE, PREFIX = 6, 0.6, 5
"""A stem without options is the same by this share; one of fewer shingles by all of them, in a text not much longer."""
MANY = 100
"""A hash that more stems have says nothing of any."""


class Asked(Protocol):
    """A question as it is asked."""

    @property
    def question(self) -> str:
        """Its text."""

    @property
    def options(self) -> Sequence[str]:
        """The texts of its options."""


@dataclass(frozen=True)
class BenchmarkHashes:
    """The hashes of one test set's questions [Q]; `stems` and `options` are ragged."""

    name: str
    num_shingles: NDArray[np.int32]
    has_picture: NDArray[np.bool_]
    stems: Sequence[NDArray[np.uint32]]
    options: Sequence[NDArray[np.uint32]]


def hash_questions(
    name: str,
    questions: Sequence[Asked],
    has_picture: Sequence[bool],
) -> BenchmarkHashes:
    """The hashes of a test set's questions."""
    stems, options, numbers = [], [], []
    for question in questions:
        hashes = shingle_hashes(question.question)
        numbers.append(len(hashes))
        stems.append(hashes[:NUM_HASHES])
        options.append(option_hashes(question.options))
    return BenchmarkHashes(
        name,
        np.array(numbers, np.int32),
        np.array(has_picture, bool),
        stems,
        options,
    )


def option_hashes(options: Sequence[str]) -> NDArray[np.uint32]:
    """The hashes of options, in no order, without those that tell no question from another."""
    # In no order: a copy may have shuffled them.
    plain = [" ".join(words_of(option)) for option in options]
    return hashes_of(text for text in plain if text and text not in JUDGED)


def save(hashes: BenchmarkHashes, uri: str) -> None:
    """Write the hashes of a benchmark as a Parquet file."""
    columns: dict[str, Any] = {
        "num_shingles": hashes.num_shingles,
        "has_picture": hashes.has_picture,
        "stem": pa.array([stem.tolist() for stem in hashes.stems], pa.list_(pa.uint32())),
        "options": pa.array([option.tolist() for option in hashes.options], pa.list_(pa.uint32())),
    }
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream, compression="zstd")
    fs, path = filesystem(uri)
    write_file(fs, path, stream.getvalue())


def load(name: str, content: bytes) -> BenchmarkHashes:
    """The hashes in the bytes of a file; `name` is the benchmark's."""
    try:
        table = pq.read_table(io.BytesIO(content))
        stems = [np.array(stem, np.uint32) for stem in table["stem"].to_pylist()]
        options = [np.array(option, np.uint32) for option in table["options"].to_pylist()]
        return BenchmarkHashes(
            name, table["num_shingles"].to_numpy(), np.array(table["has_picture"].to_pylist(), bool), stems, options
        )
    except (pa.ArrowInvalid, KeyError) as error:
        raise ConfigError(f"{name} has no hashes of a benchmark ({error}); make them: jobs.datasets --hash") from None


def shipped() -> list[BenchmarkHashes]:
    """The hashes that come with the package."""
    folder = importlib.resources.files("medmm_ray.data.datasets") / "hashes"
    files = sorted(folder.iterdir(), key=lambda entry: entry.name)
    return [load(Path(file.name).stem, file.read_bytes()) for file in files if file.name.endswith(".parquet")]


class Guard:
    """Tells which benchmark's test set a question is of."""

    def __init__(self, benchmarks: Sequence[BenchmarkHashes]) -> None:
        self.names: list[str] = []
        self.stems: list[NDArray[np.uint32]] = []
        self.options: list[NDArray[np.uint32]] = []
        numbers: list[int] = []
        for benchmark in benchmarks:
            for place, stem in enumerate(benchmark.stems):
                # Short questions on pictures are the same of many: their pictures tell them apart.
                if not len(stem) or (benchmark.has_picture[place] and benchmark.num_shingles[place] < LONG):
                    continue
                self.names.append(benchmark.name)
                self.stems.append(stem)
                self.options.append(benchmark.options[place])
                numbers.append(int(benchmark.num_shingles[place]))
        self.num_shingles: NDArray[np.int64] = np.array(numbers, np.int64)
        self.stems = _without_common(self.stems)
        self.lengths = np.array([len(stem) for stem in self.stems], np.int64)
        owners = np.repeat(np.arange(len(self.stems)), self.lengths)
        hashes = np.concatenate(self.stems) if self.stems else np.empty(0, np.uint32)
        order = np.argsort(hashes, kind="stable")
        self.hashes, self.owners = hashes[order], owners[order]

    def find(self, question: Asked) -> str | None:
        """The benchmark that has the question in its test set: with options in another order or number, behind a
        prefix, or in near words; None where none has."""
        asked = shingle_hashes(question.question)
        low = np.searchsorted(self.hashes, asked, "left")
        high = np.searchsorted(self.hashes, asked, "right")
        hits = [self.owners[start:end] for start, end in zip(low, high, strict=True) if end > start]
        if not hits:
            return None
        # A hash counts once for a stem, however often the text repeats it.
        places, counts = np.unique(np.concatenate(hits), return_counts=True)
        shares = counts / self.lengths[places]
        is_likely = shares >= EQUAL_OPTIONS_SHARE
        if not is_likely.any():
            return None
        options = option_hashes(question.options)
        for place, share in zip(places[is_likely], shares[is_likely], strict=True):
            if self._is_same(
                int(place),
                float(share),
                len(asked),
                options,
            ):
                return self.names[int(place)]
        return None

    def _is_same(
        self,
        place: int,
        share: float,
        num_asked: int,
        options: NDArray[np.uint32],
    ) -> bool:
        number = self.num_shingles[place]
        if number >= LONG and share >= LONG_SHARE:
            return True
        expected = self.options[place]
        if len(expected):
            common = len(np.intersect1d(expected, options))
            if share < STEM_SHARE:
                # Vignettes of one disease share options and phrases, and are no repeats.
                is_enough = number < LONG or share >= LONG_EQUAL_OPTIONS_SHARE
                return is_enough and common == len(expected) >= MANY_OPTIONS
            return common >= OPTION_SHARE * len(expected)
        # Without options of their own only the words of the stem tell.
        if number >= SHORT:
            return share >= OPEN_SHARE
        return bool(share == 1.0 and num_asked <= number + PREFIX)


def _without_common(stems: Sequence[NDArray[np.uint32]]) -> list[NDArray[np.uint32]]:
    """The stems without hashes that many of them have ("which of the"); of one that has no other, its rarest."""
    if not stems:
        return []
    values, counts = np.unique(np.concatenate(stems), return_counts=True)
    telling = []
    for stem in stems:
        occurrences = counts[np.searchsorted(values, stem)]
        # A stem of common words alone is still told by its options.
        rare = stem[occurrences <= MANY]
        telling.append(rare if len(rare) else stem[[int(np.argmin(occurrences))]])
    return telling
