"""Which questions are not independent of each other: those about one image, one patient, one study or one source text.

An interval that resamples such questions one by one is too narrow; it resamples their clusters instead.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from medmm_ray.stats.metrics import Ints


def clusters_of(keys: Sequence[Iterable[str]]) -> Ints:
    """The number of each entry's cluster, numbered by first appearance; `keys` are the groups that an entry is in.

    Entries that share a key are of one cluster, and so are those that are linked through others: A and B by an image, B
    and C by a patient. Empty keys say nothing; an entry without a key is a cluster of its own.

    >>> clusters_of([["image 1"], [], ["image 2"], ["image 1", "image 2"]]).tolist()
    [0, 1, 0, 0]
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    num_entries = len(keys)
    # Entries and keys are the nodes of a graph, each entry joined to its keys: its components are the clusters.
    node_of_key: dict[str, int] = {}
    entries: list[int] = []
    nodes: list[int] = []
    for entry, keys_of_entry in enumerate(keys):
        for key in filter(None, keys_of_entry):
            entries.append(entry)
            nodes.append(node_of_key.setdefault(key, num_entries + len(node_of_key)))
    num_nodes = num_entries + len(node_of_key)
    edges = coo_array((np.ones(len(entries)), (entries, nodes)), shape=(num_nodes, num_nodes))
    _, component = connected_components(edges, directed=False)
    # Components are numbered as the graph was walked; the caller reads them in the order of its entries.
    _, first_entry, number = np.unique(
        component[:num_entries],
        return_index=True,
        return_inverse=True,
    )
    by_appearance = np.argsort(np.argsort(first_entry))
    return by_appearance[number].astype(np.int64)
