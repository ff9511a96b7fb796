"""Questions with their known passages, from published data sets: what retrieval is measured on.

Enters: the files of MedQuAD, PubMedQA and BioASQ as they are published. Leaves: documents, questions, and for each
question the documents that answer it.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medmm_ray.config import digest
from medmm_ray.data.records import Document


@dataclass(frozen=True)
class Topic:
    """A question, the documents that answer it, and the group of topics that it is not independent of."""

    topic_id: str
    text: str
    relevant: frozenset[str]
    group: str


@dataclass(frozen=True)
class RetrievalSet:
    """Documents, and topics in three parts: to train a reranker on, to choose settings on, to measure on."""

    name: str
    documents: Sequence[Document]
    train: Sequence[Topic]
    tuning: Sequence[Topic]
    test: Sequence[Topic]

    def __post_init__(self) -> None:
        # Rankings are known by their topic: two of one id would share the last one's.
        counts = Counter(topic.topic_id for topic in (*self.train, *self.tuning, *self.test))
        if repeated := [topic_id for topic_id, count in counts.items() if count > 1]:
            raise ValueError(f"{self.name}: {len(repeated)} topic ids stand twice, such as {repeated[0]!r}")


def medquad(
    folder: Path,
    num_test: int,
    num_tuning: int,
    seed: int,
) -> RetrievalSet:
    """MedQuAD: its answers under what they are about, as title; equal ones once. Topics about one thing stay together.

    A question that several of its sources answer is one topic with several documents. Its ids are not unique: each
    source counts its own.
    """
    rows = [json.loads(line) for line in (folder / "medquad.jsonl").read_text().splitlines()]
    documents: dict[str, Document] = {}
    answering: dict[str, set[str]] = {}
    asked: dict[str, tuple[str, str]] = {}  # a question's words and what it is about, by its key
    for row in rows:
        document_id = f"d{digest(row['focus'], row['answer'])}"
        documents[document_id] = Document(
            document_id=document_id, corpus="medquad", title=row["focus"], text=row["answer"]
        )
        key = " ".join(re.findall(r"\w+", row["question"].lower()))
        answering.setdefault(key, set()).add(document_id)
        asked.setdefault(key, (row["question"], row["focus"].lower()))
    topics: dict[str, list[Topic]] = {}
    for key, (question, focus) in asked.items():
        topics.setdefault(focus, []).append(Topic(f"q{digest(key)}", question, frozenset(answering[key]), focus))
    focuses = sorted(topics)
    random.Random(seed).shuffle(focuses)
    ordered: list[Topic] = []
    for focus in focuses:
        ordered += topics[focus]
    end = num_test + num_tuning
    return RetrievalSet(
        "MedQuAD",
        list(documents.values()),
        ordered[end:],
        ordered[num_test:end],
        ordered[:num_test],
    )


def pubmedqa(folder: Path) -> RetrievalSet:
    """PubMedQA: a question and the abstract that it was made of, without its title, which is the question."""
    entries: Mapping[str, Mapping[str, object]] = json.loads((folder / "ori_pqal.json").read_text())
    documents: list[Document] = []
    topics: list[Topic] = []
    for pmid, entry in entries.items():
        contexts = entry["CONTEXTS"]
        assert isinstance(contexts, list)
        text, date = "\n".join(contexts), str(entry["YEAR"] or "")
        documents.append(
            Document(
                document_id=pmid,
                corpus="pubmed",
                title="",
                text=text,
                date=date,
            )
        )
        topics.append(Topic(pmid, str(entry["QUESTION"]), frozenset({pmid}), pmid))
    return RetrievalSet("PubMedQA", documents, (), (), topics)


def bioasq(folder: Path) -> RetrievalSet:
    """BioASQ's golden questions and the snippets of PubMed that its experts chose for each; equal ones once."""
    documents: dict[str, Document] = {}
    topics: list[Topic] = []
    for file in sorted(folder.rglob("*_golden.json")):
        for question in json.loads(file.read_text())["questions"]:
            relevant: set[str] = set()
            for snippet in question.get("snippets", ()):
                document_id = f"d{digest(snippet['document'], snippet['text'])}"
                text = snippet["text"].strip()
                documents[document_id] = Document(
                    document_id=document_id,
                    corpus="pubmed",
                    title="",
                    text=text,
                )
                relevant.add(document_id)
            if relevant:
                topics.append(
                    Topic(
                        question["id"],
                        question["body"],
                        frozenset(relevant),
                        question["id"],
                    )
                )
    return RetrievalSet("BioASQ", list(documents.values()), (), (), topics)
