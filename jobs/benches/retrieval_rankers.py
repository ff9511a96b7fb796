"""A retrieval set through the pipeline's own code: passages, index, rankers; recall with intervals, and TREC files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jobs.benches.retrieval_sets import RetrievalSet, Topic
from medmm_ray.data.records import Document, Passage, to_arrow
from medmm_ray.data.tables import Artifact, Provenance, Table
from medmm_ray.engines.index import IndexConfig, Vectors
from medmm_ray.engines.index.collection import COLLECTIONS, Collection, Hits, collection_names
from medmm_ray.steps.embed import DocumentEncoding, EmbedConfig, QueryEncoding, document_passages
from medmm_ray.steps.index import build_index
from medmm_ray.steps.index.sources import passage_sources
from medmm_ray.steps.retrieve import PassageSearch, RetrieveConfig
from medmm_ray.steps.retrieve.passages import Reranking, fuse

DOCUMENTS_AT_ONCE = 512
TOPICS_AT_ONCE = 128
DEPTHS = (1, 10, 32)
PASSAGES = 200  # that each ranking gives
Ranked = Mapping[str, Sequence[tuple[str, float]]]
"""The documents of each topic with their scores, best first."""


@dataclass(frozen=True)
class Interval:
    """A mean over topics with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def passages_of(
    documents: Sequence[Document],
    encoder: DocumentEncoding,
    config: EmbedConfig,
    uri: str,
) -> Table:
    """The table of the documents' passages; what an interrupted run has written is not made again."""
    table = Table(uri, Passage)
    if table.is_complete:
        return table
    table.prepare()
    done_ids = table.done_ids()
    # Of like length together, as a batch is as long as its longest.
    pending = sorted((d for d in documents if d.document_id not in done_ids), key=lambda d: len(d.text))
    for first in range(0, len(pending), DOCUMENTS_AT_ONCE):
        rows = to_arrow(Document, list(pending[first : first + DOCUMENTS_AT_ONCE]))
        table.write_part(
            document_passages(
                rows,
                encoder,
                config,
            ),
            "document_id",
            "passages",
        )
    origin = Provenance(
        name="passages",
        fingerprint="bench",
        config={},
        upstream={},
    )
    table.finish(
        origin,
        "document_id",
        [document.document_id for document in documents],
        0.0,
    )
    return table


def index_of(
    passages: Table,
    config: IndexConfig,
    folder: Path,
) -> Path:
    """The folder of an index of passages."""
    if not (folder / COLLECTIONS).exists():
        build_index(passage_sources(passages), config, Artifact(str(folder)))
    return folder


def query_vectors(topics: Sequence[Topic], encoder: QueryEncoding) -> Vectors:
    """The topics' queries as vectors_QD."""
    parts: list[Vectors] = []
    for first in range(0, len(topics), TOPICS_AT_ONCE):
        parts.append(encoder.encode_queries([topic.text for topic in topics[first : first + TOPICS_AT_ONCE]]))
    return np.concatenate(parts)


@dataclass(frozen=True)
class Searched:
    """Topics, their queries' vectors, and what the dense ranking and BM25 give for each."""

    index: Path
    topics: Sequence[Topic]
    vectors_QD: Vectors
    dense: Sequence[Hits]
    lexical: Sequence[Hits]

    @classmethod
    def of(
        cls,
        index: Path,
        topics: Sequence[Topic],
        encoder: QueryEncoding,
    ) -> "Searched":
        """Both rankings of the index's one corpus, `PASSAGES` deep."""
        (name,) = collection_names(index)
        collection = Collection(index, name)
        vectors_QD = query_vectors(topics, encoder)
        dense = collection.nearest(vectors_QD, PASSAGES)
        lexical = collection.matching([topic.text for topic in topics], PASSAGES)
        return cls(index, topics, vectors_QD, dense, lexical)

    def fused(
        self,
        weights: Mapping[str, float],
        fusion_k: float,
    ) -> "Ranked":
        """The documents of each topic by the fusion of both rankings, as retrieval fuses them."""
        ranked: dict[str, list[tuple[str, float]]] = {}
        for topic, dense, lexical in zip(self.topics, self.dense, self.lexical, strict=True):
            hits = {"dense": dense, "lexical": lexical}
            rankings = {name: hits[name] for name, weight in weights.items() if weight}
            scores = fuse(rankings, weights, fusion_k)
            in_order = sorted(scores.items(), key=lambda hit: (-hit[1], hit[0]))
            ranked[topic.topic_id] = documents_of(in_order)
        return ranked

    def reranked(
        self,
        config: RetrieveConfig,
        reranker: Reranking,
    ) -> "Ranked":
        """The documents of each topic through the whole of retrieval."""
        search = PassageSearch(config, self.index, reranker)
        ranked: dict[str, list[tuple[str, float]]] = {}
        for first in range(0, len(self.topics), TOPICS_AT_ONCE):
            some = self.topics[first : first + TOPICS_AT_ONCE]
            texts = [topic.text for topic in some]
            vectors = self.vectors_QD[first : first + TOPICS_AT_ONCE]
            by_topic = search.search(texts, vectors, [""] * len(some))
            for topic, documents in zip(some, by_topic, strict=True):
                ranked[topic.topic_id] = documents_of([(d.passage_id, d.score) for d in documents])
        return ranked


def documents_of(hits: Hits) -> list[tuple[str, float]]:
    """The documents of passages, best first: each as good as its best passage."""
    best: dict[str, float] = {}
    for passage_id, score in hits:
        best.setdefault(passage_id.rpartition("#")[0], score)
    return list(best.items())


def recalls(
    topics: Sequence[Topic],
    ranked: Ranked,
    depth: int,
) -> NDArray[np.float64]:
    """For each topic the share of its documents among the first `depth`; of what could be there, with fewer places."""
    shares: list[float] = []
    for topic in topics:
        first = {document_id for document_id, _ in ranked[topic.topic_id][:depth]}
        shares.append(len(first & topic.relevant) / min(len(topic.relevant), depth))
    return np.array(shares)


def interval(
    topics: Sequence[Topic],
    values_Q: NDArray[np.float64],
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean over topics, with its interval by bootstrap over groups of topics."""
    groups, group_Q = np.unique([topic.group for topic in topics], return_inverse=True)
    sum_G = np.bincount(group_Q, values_Q, len(groups))
    size_G = np.bincount(group_Q, minlength=len(groups))
    drawn_SG = np.random.default_rng(seed).integers(
        0,
        len(groups),
        (samples, len(groups)),
    )
    means_S = sum_G[drawn_SG].sum(1) / size_G[drawn_SG].sum(1)
    low, high = np.percentile(means_S, [2.5, 97.5])
    return Interval(float(values_Q.mean()), float(low), float(high))


def write_trec(
    folder: Path,
    retrieval_set: RetrievalSet,
    rankers: Mapping[str, Ranked],
) -> None:
    """A run file for each ranker and the relevance judgements, as trec_eval reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    name = retrieval_set.name.lower()
    judgements: list[str] = []
    for topic in retrieval_set.test:
        judgements += [f"{topic.topic_id} 0 {document_id} 1" for document_id in sorted(topic.relevant)]
    (folder / f"{name}.qrels").write_text("\n".join(judgements) + "\n")
    for ranker, ranked in rankers.items():
        lines: list[str] = []
        for topic_id, documents in ranked.items():
            for rank, (document_id, score) in enumerate(documents, 1):
                lines.append(f"{topic_id} Q0 {document_id} {rank} {score:.6f} {ranker}")
        (folder / f"{name}.{ranker}.run").write_text("\n".join(lines) + "\n")
