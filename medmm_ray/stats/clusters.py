"""Which questions are not independent of each other: those about one image, one patient, one study or one source text.

An interval that resamples such questions one by one is too narrow; it resamples their clusters instead.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.stats.metrics import Ints


def clusters_of(keys: Sequence[Iterable[str]]) -> Ints:
    """The number of each entry's cluster, numbered by first appearance; `keys` are the groups that an entry is in.

    Entries that share a key are of one cluster, and so are those that are linked through others: A and B by an image, B
    and C by a patient. Empty keys say nothing; an entry without a key is a cluster of its own.

    >>> clusters_of([["image 1"], [], ["image 2"], ["image 1", "image 2"]]).tolist()
    [0, 1, 0, 0]
    """
    number_of_key: dict[str, int] = {}
    entries: list[int] = []
    numbers: list[int] = []
    for entry, keys_of_entry in enumerate(keys):
        for key in filter(None, keys_of_entry):
            entries.append(entry)
            numbers.append(number_of_key.setdefault(key, len(number_of_key)))
    return _components(len(keys), np.array(entries, np.int64), np.array(numbers, np.int64))


def _components(num_entries: int, entries: Ints, keys: Ints) -> Ints:
    """The number of each entry's cluster; entry `entries[k]` has the key of number `keys[k]`."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # Entries and keys are the nodes of a graph, each entry joined to its keys: its components are the clusters.
    num_nodes = num_entries + int(keys.max(initial=-1)) + 1
    edges = coo_array((np.ones(len(entries), np.bool_), (entries, num_entries + keys)), shape=(num_nodes, num_nodes))
    _, component = connected_components(edges, directed=False)
    # Components are numbered as the graph was walked; the caller reads them in the order of its entries.
    _, first_entry, number = np.unique(
        component[:num_entries],
        return_index=True,
        return_inverse=True,
    )
    by_appearance = np.argsort(np.argsort(first_entry))
    return by_appearance[number].astype(np.int64)


def question_keys(image_ids: Iterable[str], group: str) -> list[str]:
    """What a question shares with others that are not independent of it: its images and its group."""
    # Told apart from the id of an image.
    return [*image_ids, f"group {group}" if group else ""]


@dataclass(frozen=True)
class ClusterNames:
    """The cluster of each question by name, which is the least id of its questions; for tables that come in parts.

    `question_ids` and `names` are of those questions alone whose cluster is named otherwise than they are.
    """

    question_ids: pa.StringArray
    names: pa.StringArray

    @classmethod
    def of(cls, questions: Iterable[pa.Table]) -> "ClusterNames":
        """The clusters of all questions of a table."""
        ids: list[pa.Array] = []
        entries, hashes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        num_questions = 0
        for part in questions:
            ids += part["question_id"].chunks
            shared = list(_hashed_keys(part))
            entries.append(num_questions + np.array([entry for entry, _ in shared], np.int64))
            hashes.append(np.array([hashed for _, hashed in shared], np.int64))
            num_questions += part.num_rows
        # Hashes in place of the keys: at 10^6 questions the keys alone would be 100 MB.
        _, keys = np.unique(np.concatenate(hashes), return_inverse=True)
        # Questions that are alone need no entry: where no image is shared the tables are empty.
        cluster = pa.array(_components(num_questions, np.concatenate(entries), keys.astype(np.int64)))
        table = pa.table({"question_id": pa.chunked_array(ids, pa.string()), "cluster": cluster})
        least = table.group_by("cluster").aggregate([("question_id", "min")])
        named = table.join(least, "cluster")
        is_other = pc.not_equal(named["question_id"], named["question_id_min"])
        others = named.filter(is_other).combine_chunks()
        return cls(others["question_id"].combine_chunks(), others["question_id_min"].combine_chunks())

    def column(self, question_ids: pa.ChunkedArray) -> pa.ChunkedArray:
        """The names of the clusters of some questions; one that no table had is a cluster of its own."""
        rows = pc.index_in(question_ids, self.question_ids)
        return pc.coalesce(pc.take(self.names, rows), question_ids)


def _hashed_keys(questions: pa.Table) -> Iterator[tuple[int, int]]:
    """The row of each key of a question, and the key's hash."""
    columns = (questions["image_ids"].to_pylist(), questions["group"].to_pylist())
    for row, (image_ids, group) in enumerate(zip(*columns, strict=True)):
        for key in filter(None, question_keys(image_ids, group)):
            yield row, hash(key)
