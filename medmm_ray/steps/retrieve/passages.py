"""Passages for a query: dense and lexical rankings of each corpus, fused by rank, reranked, cut to a budget.

Enters: query texts and vectors. Leaves: for each the best passages with what each ranker says of them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.config import ConfigError
from medmm_ray.data.records import RetrievedDocument
from medmm_ray.engines.index import Vectors
from medmm_ray.engines.index.collection import Collection, Hits, Masks, collection_names
from medmm_ray.steps.retrieve.config import RetrieveConfig

Count = Callable[[str], int]


class Reranking(Protocol):
    """What says how well passages fit a query."""

    def score(
        self,
        query: str,
        passages: Sequence[str],
    ) -> "np.ndarray[Any, Any]":
        """A number a passage; a higher one fits better."""


@dataclass(frozen=True)
class Candidate:
    """A passage that a ranker gave: the score that it is ordered by, and what each ranker says."""

    passage_id: str
    corpus: str
    score: float = 0.0
    dense: float | None = None
    lexical: float | None = None
    reranker: float | None = None
    row: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The passage with its document's title, as BM25 and the reranker read it."""
        title = self.row["title"]
        return f"{title}\n{self.row['text']}" if title else str(self.row["text"])


def fuse(
    rankings: Mapping[str, Hits],
    weights: Mapping[str, float],
    k: float,
) -> dict[str, float]:
    """Reciprocal rank fusion: for each id the sum of weight / (k + rank) over the rankings with it, ranks from 1."""
    scores: dict[str, float] = {}
    for ranker, hits in rankings.items():
        for rank, (passage_id, _) in enumerate(hits, 1):
            scores[passage_id] = scores.get(passage_id, 0.0) + weights[ranker] / (k + rank)
    return scores


class PassageSearch:
    """The passages of an index folder, and the models that rank them."""

    def __init__(
        self,
        config: RetrieveConfig,
        folder: Path,
        reranker: Reranking | None = None,
        count: Count | None = None,
    ) -> None:
        self.config = config
        self.reranker = reranker
        self.count = count
        self.collections: dict[str, Collection] = {}
        for name in collection_names(folder):
            if name.of == "passages":
                self.collections[name.corpus] = Collection(folder, name)
        unknown = set(config.corpora or ()) - set(self.collections)
        if unknown:
            raise ConfigError(
                f"retrieve.corpora names {', '.join(sorted(unknown))}, and the index has the corpora "
                f"{', '.join(sorted(self.collections)) or 'none'}; leave it out for all, or name such documents in "
                "ingest.documents"
            )
        if config.corpora is not None:
            self.collections = {name: self.collections[name] for name in sorted(config.corpora)}
        self._masks: dict[tuple[str, str], Masks | None] = {}

    def search(
        self, texts: Sequence[str], vectors_QD: Vectors, modalities: Sequence[str]
    ) -> list[list[RetrievedDocument]]:
        """The passages of each query, best first."""
        results: list[list[RetrievedDocument]] = []
        by_query = self.candidates(texts, vectors_QD, modalities)
        for text, candidates in zip(texts, by_query, strict=True):
            ranked = self._reranked(text, candidates) if self.reranker else candidates
            fitting = self._within_budget(ranked)
            results.append(list(map(_document, fitting)))
        return results

    def candidates(
        self,
        texts: Sequence[str],
        vectors_QD: Vectors,
        modalities: Sequence[str],
    ) -> list[list[Candidate]]:
        """What the rankers give for each query, best first by the fusion: at most `candidates` of each corpus."""
        by_query: list[dict[str, dict[str, Hits]]] = [{} for _ in texts]
        # Those of one modality together: they share what filters the rows.
        for modality in sorted(set(modalities)):
            of_modality = [i for i, name in enumerate(modalities) if name == modality]
            some_texts = [texts[i] for i in of_modality]
            some_vectors = vectors_QD[of_modality]
            for corpus, collection in self.collections.items():
                masks = self._mask(corpus, modality)
                rankings = self._rankings(collection, some_texts, some_vectors, masks)
                for i, of_query in zip(of_modality, rankings, strict=True):
                    by_query[i][corpus] = of_query
        fused = [self._fused(of_query) for of_query in by_query]
        # Texts are read once for all queries, as neighbouring ones share many passages.
        rows = self._rows(fused)
        results: list[list[Candidate]] = []
        for of_fusion in fused:
            results.append([replace(candidate, row=rows[candidate.passage_id]) for candidate in of_fusion])
        return results

    def _rankings(
        self,
        collection: Collection,
        texts: Sequence[str],
        vectors_QD: Vectors,
        masks: Masks | None,
    ) -> list[dict[str, Hits]]:
        """For each query the hits of each ranker in one corpus."""
        k = self.config.candidates
        by_ranker: dict[str, list[Hits]] = {}
        if self.config.dense_weight:
            by_ranker["dense"] = collection.nearest(vectors_QD, k, masks)
        if self.config.lexical_weight:
            by_ranker["lexical"] = collection.matching(texts, k, masks)
        rankings: list[dict[str, Hits]] = []
        for i in range(len(texts)):
            rankings.append({ranker: hits[i] for ranker, hits in by_ranker.items()})
        return rankings

    def _fused(self, by_corpus: Mapping[str, Mapping[str, Hits]]) -> list[Candidate]:
        """The candidates of one query: ranks are those among all corpora."""
        scores: dict[str, dict[str, float]] = {"dense": {}, "lexical": {}}
        corpus_of: dict[str, str] = {}
        for corpus, rankings in by_corpus.items():
            for ranker, hits in rankings.items():
                scores[ranker] |= dict(hits)
                corpus_of |= dict.fromkeys(dict(hits), corpus)
        # Similarities and BM25 of all corpora compare with each other, as one model and one formula made them.
        ranked = {ranker: sorted(of_ranker.items(), key=_best_first) for ranker, of_ranker in scores.items()}
        weights = {"dense": self.config.dense_weight, "lexical": self.config.lexical_weight}
        fused = fuse(ranked, weights, self.config.fusion_k)
        candidates: list[Candidate] = []
        num_of_corpus = dict.fromkeys(by_corpus, 0)
        for passage_id, score in sorted(fused.items(), key=_best_first):
            corpus = corpus_of[passage_id]
            num_of_corpus[corpus] += 1
            # As many of each corpus, so that a large one does not keep the others from the reranker.
            if num_of_corpus[corpus] <= self.config.candidates:
                dense, lexical = scores["dense"].get(passage_id), scores["lexical"].get(passage_id)
                candidates.append(
                    Candidate(
                        passage_id,
                        corpus,
                        score,
                        dense,
                        lexical,
                    )
                )
        return candidates

    def _rows(self, candidates: Iterable[Sequence[Candidate]]) -> dict[str, dict[str, Any]]:
        """What the passages of all queries are, looked up once."""
        ids: dict[str, set[str]] = {}
        for of_query in candidates:
            for candidate in of_query:
                ids.setdefault(candidate.corpus, set()).add(candidate.passage_id)
        rows: dict[str, dict[str, Any]] = {}
        for corpus, of_corpus in ids.items():
            rows |= self.collections[corpus].take(of_corpus)
        return rows

    def _reranked(
        self,
        query: str,
        candidates: Sequence[Candidate],
    ) -> list[Candidate]:
        assert self.reranker is not None
        scores = self.reranker.score(query, [candidate.text for candidate in candidates]).tolist()
        scored: list[Candidate] = []
        for candidate, score in zip(candidates, scores, strict=True):
            scored.append(replace(candidate, reranker=score, score=score))
        by_reranker = sorted(scored, key=_order)
        weight = self.config.reranker_weight
        if weight == 1:
            return by_reranker
        # By ranks: the reranker's log-odds and fused scores have no unit in common.
        rankings = {"fusion": _hits(candidates), "reranker": _hits(by_reranker)}
        fused = fuse(
            rankings,
            {"fusion": 1 - weight, "reranker": weight},
            self.config.fusion_k,
        )
        return sorted((replace(candidate, score=fused[candidate.passage_id]) for candidate in scored), key=_order)

    def _within_budget(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The first that fit the number and the tokens that a question may have."""
        room = self.config.token_budget
        fitting: list[Candidate] = []
        for candidate in candidates:
            if len(fitting) == self.config.num_documents:
                break
            if room is not None and self.count is not None:
                tokens = self.count(candidate.row["text"])
                if tokens > room:  # a shorter one after it may still fit
                    continue
                room -= tokens
            fitting.append(candidate)
        return fitting

    def _mask(
        self,
        corpus: str,
        modality: str,
    ) -> Masks | None:
        """Which passages of a corpus a question of a modality may have; None: all. Computed once."""
        # Without the filter all modalities share one entry.
        modality = modality if self.config.same_modality else ""
        if (corpus, modality) not in self._masks:
            self._masks[corpus, modality] = passage_masks(
                self.collections[corpus], modality, self.config.published_until
            )
        return self._masks[corpus, modality]


def passage_masks(
    collection: Collection,
    modality: str,
    published_until: str | None,
) -> Masks | None:
    """Which passages are of a modality or of none, and not later than a date; None without such a filter."""
    if not modality and published_until is None:
        return None

    def is_allowed(rows: pa.Table) -> pa.ChunkedArray:
        allowed = pa.chunked_array([pa.array(np.ones(len(rows), np.bool_))])
        if modality:
            allowed = pc.is_in(rows["modality"], pa.array([modality, ""]))
        if published_until is not None:
            # Dates are compared as far as both are known: 2024-05 is not after 2024.
            dates = pc.utf8_slice_codeunits(rows["date"], 0, len(published_until))
            is_early = pc.and_(pc.not_equal(dates, ""), pc.less_equal(dates, published_until))
            allowed = pc.and_(allowed, is_early)
        return allowed

    return collection.masks(is_allowed)


def _best_first(hit: tuple[str, float]) -> tuple[float, str]:
    return -hit[1], hit[0]


def _order(candidate: Candidate) -> tuple[float, str]:
    return -candidate.score, candidate.passage_id


def _hits(candidates: Sequence[Candidate]) -> Hits:
    return [(candidate.passage_id, candidate.score) for candidate in candidates]


def _document(candidate: Candidate) -> RetrievedDocument:
    return RetrievedDocument(
        document_id=candidate.row["document_id"],
        text=candidate.row["text"],
        score=candidate.score,
        passage_id=candidate.passage_id,
        corpus=candidate.corpus,
        title=candidate.row["title"],
        dense=candidate.dense,
        lexical=candidate.lexical,
        reranker=candidate.reranker,
    )
