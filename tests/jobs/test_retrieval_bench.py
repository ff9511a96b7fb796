"""What retrieval is measured with: the sets as published, recall by hand, files that trec_eval reads, a reranker."""

import json
from pathlib import Path

import numpy as np
import pytest

from jobs import bench
from jobs.benches.retrieval_rankers import interval, recalls
from jobs.benches.retrieval_sets import RetrievalSet, Topic, bioasq, medquad, pubmedqa
from tests.doubles.clip_folders import write_native_clip
from tests.paths import REAL_DATA

needs_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"the published files are not at {REAL_DATA}")


def topic(name: str, relevant: str, group: str = "") -> Topic:
    return Topic(name, f"what is {name}?", frozenset(relevant), group or name)


def test_recall_is_the_share_of_what_could_be_found() -> None:
    topics = [topic("q1", "a"), topic("q2", "bc"), topic("q3", "abc")]
    ranked = {"q1": [("b", 2.0), ("a", 1.0)], "q2": [("b", 2.0), ("a", 1.0), ("c", 0.5)], "q3": [("z", 1.0)]}
    assert recalls(topics, ranked, 1).tolist() == [0.0, 1.0, 0.0]
    assert recalls(topics, ranked, 2).tolist() == [1.0, 0.5, 0.0]
    assert recalls(topics, ranked, 3).tolist() == [1.0, 1.0, 0.0]


def test_an_interval_draws_groups_of_topics() -> None:
    """Of 40 groups with 10 equal topics each it is that of 40 values, about 1.96 / sqrt(40) of their deviation."""
    values_G = np.arange(40) % 2
    topics = [topic(f"q{g}-{i}", "a", f"g{g}") for g in range(40) for i in range(10)]
    found = interval(topics, np.repeat(values_G, 10).astype(float))
    assert found.mean == 0.5
    half = 1.96 * 0.5 / np.sqrt(40)
    assert found.low == pytest.approx(0.5 - half, abs=0.02)
    assert found.high == pytest.approx(0.5 + half, abs=0.02)


@needs_data
def test_the_published_sets() -> None:
    pairs = medquad(REAL_DATA / "medquad", 2000, 1000, seed=0)
    parts = (pairs.train, pairs.tuning, pairs.test)
    assert [len(part) for part in parts] == [11_298, 1000, 2000]
    assert len(pairs.documents) == 16_350
    assert {document_id for part in parts for topic in part for document_id in topic.relevant} == {
        document.document_id for document in pairs.documents
    }
    # What is about one thing is in one part, but for those at its border.
    groups = [{topic.group for topic in part} for part in parts]
    assert len(groups[0] & groups[1]) + len(groups[1] & groups[2]) + len(groups[0] & groups[2]) <= 2
    abstracts = pubmedqa(REAL_DATA / "pubmedqa")
    assert (len(abstracts.documents), len(abstracts.test)) == (1000, 1000)
    snippets = bioasq(REAL_DATA / "mirage/rawdata/bioasq")
    assert len({document.document_id for document in snippets.documents}) == len(snippets.documents)
    assert sum(len(topic.relevant) for topic in snippets.test) >= len(snippets.documents)


def test_a_question_of_several_sources_is_one_topic_whatever_their_ids(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "focus": "Gout", "question": "What is (are) Gout ?", "answer": "Crystals of uric acid."},
        {"id": "1", "focus": "Mumps", "question": "What is mumps?", "answer": "A virus."},
        {"id": "2", "focus": "gout", "question": "what is (are) gout?", "answer": "A painful joint."},
    ]
    (tmp_path / "medquad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    topics = medquad(tmp_path, 2, 0, seed=0).test
    assert sorted((topic.text, len(topic.relevant)) for topic in topics) == [
        ("What is (are) Gout ?", 2),
        ("What is mumps?", 1),
    ]
    assert len({topic.topic_id for topic in topics}) == 2


def test_topics_of_one_id_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 topic ids stand twice, such as 'q1'"):
        RetrievalSet("set", [], [topic("q1", "a")], [], [topic("q1", "b")])


def write_medquad(folder: Path) -> None:
    """Forty pairs of a thing and its answer."""
    lines = []
    for i in range(100, 140):
        row = {
            "id": f"q{i}",
            "focus": f"Thing {i}",
            "question": f"What is thing {i}?",
            "answer": f"Thing {i} is {i}.",
        }
        lines.append(json.dumps(row))
    folder.mkdir(parents=True)
    (folder / "medquad.jsonl").write_text("\n".join(lines))


def test_the_rankers_are_measured_and_written_for_trec_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_medquad(tmp_path / "data/medquad")
    encoder = write_native_clip(tmp_path / "encoder")
    words = [
        f"data={tmp_path}/data", f"folder={tmp_path}/out", f"text_model={encoder}", "sets=[medquad]", "parts=[sets]",
        "test_topics=10", "tuning_topics=5", "reranker_topics=0", f"json={tmp_path}/rows.json",
    ]  # fmt: skip
    assert bench.main(["retrieve", *words]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    # A thing's number is in its title alone, which BM25 reads and this encoder does not know.
    assert rows["MedQuAD: recall@1 of bm25"]["ours"] == 1.0
    judgements = (tmp_path / "out/trec/medquad.qrels").read_text().splitlines()
    assert len(judgements) == 10
    first = {}
    for line in (tmp_path / "out/trec/medquad.bm25.run").read_text().splitlines():
        topic_id, q0, document_id, rank, score, tag = line.split()
        assert (q0, tag, float(score) > 0) == ("Q0", "bm25", True)
        if rank == "1":
            first[topic_id] = document_id
    assert {(topic_id, document_id) for topic_id, _, document_id, _ in map(str.split, judgements)} == set(first.items())
    assert "MedQuAD bm25      R@1 1.000 [1.000, 1.000]" in capsys.readouterr().out
    assert bench.main(["retrieve", "parts=[images]"]) == 2
    assert "say data=<folder>" in capsys.readouterr().err
