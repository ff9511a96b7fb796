"""A cross-encoder's scores are transformers' own logits for a query and a passage, one by one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from medmm_ray.config import ConfigError
from medmm_ray.engines.cross_encoder import CrossEncoder
from tests.doubles.clip_folders import word_tokenizer

QUERY = "left effusion"
PASSAGES = ["a nodule", "the left lung is normal", "effusion", "a chest", "right"]


def write_reranker(folder: Path, num_labels: int, kind: Any = BertForSequenceClassification) -> Path:
    torch.manual_seed(num_labels)
    config_type: Any = BertConfig
    config = config_type(
        vocab_size=14, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, num_labels=num_labels,
    )  # fmt: skip
    kind(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def logits(folder: Path, query: str, passage: str) -> list[float]:
    """By transformers alone, one pair at a time."""
    model: Any = BertForSequenceClassification.from_pretrained(folder)
    inputs = word_tokenizer()(query, passage, return_tensors="pt")
    with torch.inference_mode():
        values: list[float] = model.eval()(**inputs).logits[0].tolist()
    return values


@pytest.mark.parametrize("batch_size", [2, 32])
def test_one_output_is_the_score(tmp_path: Path, batch_size: int) -> None:
    folder = write_reranker(tmp_path, 1)
    scores_N = CrossEncoder(str(folder), batch_size=batch_size).score(QUERY, PASSAGES)
    assert scores_N == pytest.approx([logits(folder, QUERY, passage)[0] for passage in PASSAGES], abs=1e-6)


def test_of_two_outputs_their_difference_is(tmp_path: Path) -> None:
    folder = write_reranker(tmp_path, 2)
    expected = [logits(folder, QUERY, passage) for passage in PASSAGES]
    scores_N = CrossEncoder(str(folder)).score(QUERY, PASSAGES)
    assert scores_N == pytest.approx([relevant - other for other, relevant in expected], abs=1e-6)
    assert CrossEncoder(str(folder)).score(QUERY, []).shape == (0,)


def test_a_long_passage_loses_its_end(tmp_path: Path) -> None:
    folder = write_reranker(tmp_path, 1)
    reranker = CrossEncoder(str(folder), max_tokens=16)
    # [CLS], two words, [SEP], eleven words, [SEP]
    long, cut = " ".join(["lung", "nodule"] * 20), " ".join(["lung", "nodule"] * 20).split()[:11]
    assert reranker.score(QUERY, [long]) == pytest.approx([logits(folder, QUERY, " ".join(cut))[0]], abs=1e-6)
    assert (reranker.max_tokens, CrossEncoder(str(folder)).max_tokens) == (16, 32)


def test_what_is_no_reranker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)cannot be read: .*classifier.* a checkpoint for sequence classification"
    ):
        CrossEncoder(str(write_reranker(tmp_path / "encoder", 1, BertModel)))
    with pytest.raises(ConfigError, match="has 3 outputs; expected 1 \\(how relevant\\) or 2"):
        CrossEncoder(str(write_reranker(tmp_path / "three", 3)))
    assert np.isfinite(CrossEncoder(str(write_reranker(tmp_path / "one", 1))).score(QUERY, PASSAGES)).all()
