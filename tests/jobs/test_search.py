"""A question and a picture find evidence in a run's index, and the screen shows ids, titles and the rankers' scores."""

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image as Picture

from jobs.search import find_images, find_passages, main
from jobs.step import Run, load_recipe
from medmm_ray.config import ConfigError
from medmm_ray.data.records import Document, Image, Passage, arrow_schema, to_arrow
from medmm_ray.data.tables import Artifact, Provenance
from medmm_ray.engines.encoder import ImageEncoder
from medmm_ray.engines.image_tower import load_preprocess
from medmm_ray.engines.index import IndexConfig
from medmm_ray.engines.index.encoders import IndexEncoders
from medmm_ray.engines.text_encoder import TextEncoder
from medmm_ray.steps.embed import EmbedConfig, document_passages, image_vectors
from medmm_ray.steps.index import build_index, recorded_encoder, sources
from medmm_ray.steps.retrieve import RetrieveConfig
from tests.doubles.clip_folders import write_native_clip
from tests.doubles.vector_tables import table_of, vector_table
from tests.engines.test_weights import change_weights
from tests.paths import ROOT

CLIP_WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The recipe and settings of a run whose index is there."""
    folder = tmp_path_factory.mktemp("run")
    tower = str(write_native_clip(folder / "tower"))
    recipe = [str(ROOT / "jobs/recipes/tiny.yaml"), f"run={folder}", f"models.image_tower={tower}",
              "embed.text_model=null", "retrieve.num_documents=2"]  # fmt: skip
    documents = [("d1", "Pleura", "the left effusion"), ("d2", "", "a normal chest"), ("d3", "", "a nodule")]
    rows = to_arrow(Document, [Document(document_id=i, corpus="books", title=t, text=x) for i, t, x in documents])
    lists = document_passages(rows, TextEncoder(tower), EmbedConfig())["passages"].combine_chunks()
    images = []
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 100))):
        Picture.new("RGB", (40, 40), colour).save(folder / f"{name}.png")
        images.append(
            Image(
                image_id=name, uri=f"{folder}/{name}.png", sha256=name, perceptual_hash="", width=40, height=40,
                split="train", modality="radiology", diagnosis=f"{name} lung", annotation="",
            )
        )  # fmt: skip
    vectors = image_vectors(to_arrow(Image, images), load_preprocess(tower), ImageEncoder(tower), 10_000)
    tables = [
        table_of(Image, to_arrow(Image, images), f"{folder}/t/images"),
        vector_table(f"{folder}/t/vectors", vectors),
        table_of(
            Passage, pa.Table.from_struct_array(lists.flatten()).cast(arrow_schema(Passage)), f"{folder}/t/passages"
        ),
    ]
    index = Artifact(Run(load_recipe(recipe)).uri("index"))
    encoders = IndexEncoders(
        recorded_encoder(tables[1]), recorded_encoder(tables[2]), TextEncoder(tower).query_identity
    )
    build_index(sources(*tables), IndexConfig(), index, encoders=encoders)
    index.commit(Provenance(name="index", fingerprint="f", config={}, upstream={}), 0.0, {})
    return recipe


def test_passages_and_images(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    blue = str(Path(words[1].removeprefix("run=")) / "blue.png")
    assert main([*words, "effusion of the pleura", f"image={blue}"]) == 0
    shown = capsys.readouterr().out
    assert "2 passages" in shown
    (line,) = [line for line in shown.splitlines() if "d1#0" in line]
    assert "Pleura" in line
    assert "books" in line
    # No reranker is named: its place is empty, and the other rankers have a number.
    numbers = [cell.strip() for cell in line.split("│")[-5:-1]]
    assert numbers[2] == "–"
    assert all(float(number) > 0 for number in (numbers[1], numbers[3]))
    assert "similar training images" in shown
    assert "red lung" in shown


def test_a_model_of_the_same_width_that_did_not_make_the_index_is_refused(words: list[str], tmp_path: Path) -> None:
    run = Path(words[1].removeprefix("run="))
    other = str(shutil.copytree(run / "tower", tmp_path / "other"))
    change_weights(Path(other), lambda weights: {name: 2 * weight for name, weight in weights.items()}, CLIP_WEIGHTS)
    index = Path(Run(load_recipe(words)).uri("index"))
    refusal = "and this is other: weights '.*Search with the recipe and the models that the index was made with"
    with pytest.raises(ConfigError, match=f"its passages are looked for with queries by tower, {refusal}"):
        find_passages("a nodule", index, RetrieveConfig(), EmbedConfig(), other)
    with pytest.raises(ConfigError, match=f"its images' vectors were made by tower, {refusal}"):
        find_images(str(run / "blue.png"), index, RetrieveConfig(), EmbedConfig(), other)


def test_what_cannot_be_looked_for(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "nothing to look for" in capsys.readouterr().err
    assert main([*words, "one question", "another one"]) == 2
    assert "two questions" in capsys.readouterr().err
    assert main([*words, "x", "retrieve.corpora=[papers]"]) == 2
    assert "names papers, and the index has the corpora books" in capsys.readouterr().err
