"""Towers of each kind give the numbers of the library that they come from."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from medmm_ray.engines.image_tower import ImageTower, save_open_clip
from tests.doubles.clip_folders import native_config, write_biomed_clip, write_native_clip
from tests.engines.test_weights import POINTER

DATA = os.environ.get("MEDMM_TEST_DATA")


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (50, 70, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_native_clip(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def biomed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_biomed_clip(tmp_path_factory.mktemp("biomed"))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BitImageProcessor, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14, num_register_tokens=4
    )
    model: Any = Dinov2WithRegistersModel(config)
    model.half().save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def test_native_clip_equals_open_clip(native: Path) -> None:
    import open_clip

    tower = ImageTower.from_pretrained(str(native))
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{native}")
    pixels = torch.stack([tower.preprocess(picture(i)) for i in range(2)])
    assert torch.equal(pixels[0], preprocess(picture()))
    assert (tower.width, tower.embed_dim, tower.image_size, tower.path) == (24, 16, 32, str(native))
    with torch.no_grad():
        tokens = tower(pixels)
        assert torch.allclose(tower.embed(pixels), model.encode_image(pixels, normalize=True), atol=1e-6)
        inner = model.visual.forward_intermediates(pixels, indices=[1], output_fmt="NLC")["image_intermediates"][0]
        assert torch.allclose(tokens.patches_BPD, inner, atol=1e-6)
        assert torch.allclose(tokens.pooled_BD @ model.visual.proj, model.visual(pixels), atol=1e-6)
    assert (tokens.pooled_BD.shape, tokens.patches_BPD.shape) == ((2, 24), (2, 16, 24))


def test_biomed_clip_equals_open_clip(biomed: Path) -> None:
    import open_clip

    tower = ImageTower.from_pretrained(str(biomed))
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{biomed}")
    model.eval()
    pixels = tower.preprocess(picture())[None]
    assert torch.equal(pixels[0], preprocess(picture()))
    assert (tower.width, tower.embed_dim, tower.image_size) == (64, 16, 160)
    with torch.no_grad():
        tokens = tower(pixels)
        assert torch.allclose(tower.embed(pixels), model.encode_image(pixels, normalize=True), atol=1e-6)
        trunk = model.visual.trunk
        assert torch.allclose(tokens.pooled_BD, trunk(pixels), atol=1e-6)
        inner = trunk.get_intermediate_layers(pixels, n=[len(trunk.blocks) - 2])[0]
        assert torch.allclose(tokens.patches_BPD, inner, atol=1e-6)
    assert tokens.patches_BPD.shape == (1, 100, 64)


def test_a_timm_tower_by_hand(biomed: Path) -> None:
    """Plain timm's model, its blocks watched: the class token after the last norm, patches before the last block."""
    import timm

    trunk: Any = timm.create_model("test_vit", pretrained=False, num_classes=0)
    weights = torch.load(biomed / "open_clip_pytorch_model.bin", weights_only=True)
    own = {k.removeprefix("visual.trunk."): v for k, v in weights.items() if k.startswith("visual.trunk.")}
    trunk.load_state_dict(own)
    seen: dict[int, torch.Tensor] = {}
    for i, block in enumerate(trunk.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: seen.update({i: out}))
    tower = ImageTower.from_pretrained(biomed)
    pixels = torch.stack([tower.preprocess(picture(i)) for i in range(3)])
    with torch.no_grad():
        trunk.eval()(pixels)
        pooled = trunk.norm(seen[len(trunk.blocks) - 1])[:, 0]
        tokens = tower(pixels)
    torch.testing.assert_close(tokens.pooled_BD, pooled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens.patches_BPD, seen[len(trunk.blocks) - 2][:, 1:], atol=1e-5, rtol=1e-5)


def test_pixels_are_normalised_as_the_checkpoint_says(biomed: Path) -> None:
    """BiomedCLIP's config has CLIP's own mean and deviation."""
    pixels = ImageTower.from_pretrained(biomed).preprocess(Image.new("RGB", (90, 70), (255, 0, 51)))
    expected = [(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, (0.2 - 0.40821073) / 0.27577711]
    assert pixels.shape == (3, 160, 160)
    for channel, value in zip(pixels, expected, strict=True):
        assert channel.min().item() == pytest.approx(value, abs=1e-5)
        assert channel.max().item() == pytest.approx(value, abs=1e-5)


def test_a_frozen_tower_stays_as_it_was(biomed: Path, tmp_path: Path) -> None:
    tower = ImageTower.from_pretrained(biomed).requires_grad_(False)
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    head = torch.nn.Linear(tower.width, 1)
    optimizer = torch.optim.SGD([*tower.parameters(), *head.parameters()], lr=1.0)
    head(tower(tower.preprocess(picture())[None]).pooled_BD).sum().backward()
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in tower.state_dict().items())
    assert not any(p.requires_grad for p in tower.parameters())


def test_where_a_tower_came_from(native: Path, biomed: Path, tmp_path: Path) -> None:
    tower = ImageTower.from_pretrained(biomed)
    assert tower.origin.source == biomed.name
    assert str(tower.origin.revision).startswith("content:")
    assert tower.origin == ImageTower.from_pretrained(biomed).origin
    tower.save_pretrained(tmp_path / biomed.name)
    with torch.no_grad():
        next(tower.parameters()).add_(0.5)
    tower.save_pretrained(tmp_path / "trained" / biomed.name)
    revisions = {ImageTower.from_pretrained(f / biomed.name).origin.revision for f in (tmp_path, tmp_path / "trained")}
    assert len(revisions) == 2
    with pytest.raises(ValueError, match="revision is 'main', but a folder has none"):
        ImageTower.from_pretrained(native, revision="main")


def test_the_text_half_is_not_needed(biomed: Path, tmp_path: Path) -> None:
    """A BiomedCLIP folder loads where its BERT's own config cannot be reached."""
    config = json.loads((biomed / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_model_name"] = "nobody/unreachable"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes((biomed / "open_clip_pytorch_model.bin").read_bytes())
    pixels = ImageTower.from_pretrained(str(biomed)).preprocess(picture())[None]
    with torch.no_grad():
        expected = ImageTower.from_pretrained(str(biomed)).embed(pixels)
        assert torch.equal(ImageTower.from_pretrained(str(tmp_path)).embed(pixels), expected)


def test_dinov2_equals_transformers(dinov2: Path) -> None:
    from transformers import AutoModel

    tower = ImageTower.from_pretrained(str(dinov2))
    model = AutoModel.from_pretrained(dinov2, dtype=torch.float32)
    pixels = tower.preprocess(picture())[None]
    assert (tower.width, tower.embed_dim, tower.image_size, pixels.shape) == (24, 24, 28, (1, 3, 28, 28))
    with torch.no_grad():
        tokens = tower(pixels)
        output = model(pixel_values=pixels, output_hidden_states=True)
        assert torch.allclose(tokens.pooled_BD, output.pooler_output, atol=1e-6)
        assert torch.allclose(tokens.patches_BPD, output.hidden_states[2][:, 5:], atol=1e-6)
        assert torch.allclose(tower.embed(pixels), normalize(output.pooler_output, dim=-1), atol=1e-6)
    assert tokens.patches_BPD.shape == (1, 4, 24)


def test_dinov2_sees_the_whole_picture(dinov2: Path) -> None:
    """A wide picture is squashed: what lies at its border is not cropped away."""
    tower = ImageTower.from_pretrained(dinov2)
    wide = Image.new("RGB", (280, 28))
    wide.paste((255, 255, 255), (0, 0, 10, 28))
    pixels = tower.preprocess(wide)
    assert pixels.shape == (3, 28, 28)
    assert (pixels[:, :, 0] > pixels[:, :, 14] + 1).all()


@pytest.mark.parametrize("kind", ["native", "biomed", "dinov2"])
def test_gradients_reach_the_first_layer_and_the_patches(kind: str, request: pytest.FixtureRequest) -> None:
    tower = ImageTower.from_pretrained(str(request.getfixturevalue(kind)))
    pixels = tower.preprocess(picture())[None].requires_grad_()
    for part in tower(pixels):
        (gradient,) = torch.autograd.grad(part.square().sum(), pixels, retain_graph=True)
        assert gradient.abs().max() > 0
    first = next(
        p for n, p in tower.named_parameters() if n.endswith(("conv1.weight", "proj.weight", "projection.weight"))
    )
    (gradient,) = torch.autograd.grad(tower.embed(pixels)[0, 0], first)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("kind", ["native", "biomed", "dinov2"])
def test_a_trained_tower_survives_saving(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    tower = ImageTower.from_pretrained(str(request.getfixturevalue(kind)))
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.full_like(parameter, 0.01))
    tower.save_pretrained(tmp_path / "saved")
    again = ImageTower.from_pretrained(str(tmp_path / "saved"))
    pixels = tower.preprocess(picture())[None]
    with torch.no_grad():
        assert torch.equal(again.embed(pixels), tower.embed(pixels))
        assert torch.equal(again(pixels).patches_BPD, tower(pixels).patches_BPD)


def test_a_saved_tower_keeps_the_text_half(native: Path, tmp_path: Path) -> None:
    import open_clip

    tower = ImageTower.from_pretrained(str(native))
    with torch.no_grad():
        next(tower.parameters()).add_(1.0)
    tower.save_pretrained(tmp_path)
    before = open_clip.create_model(f"local-dir:{native}")
    after = open_clip.create_model(f"local-dir:{tmp_path}")
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(["normal chest"])
    assert torch.equal(before.encode_text(ids), after.encode_text(ids))
    assert not torch.equal(before.visual.class_embedding, after.visual.class_embedding)
    tower.save_pretrained(native)  # over its own source, too
    assert torch.equal(open_clip.create_model(f"local-dir:{native}").encode_text(ids), after.encode_text(ids))


VISION = native_config()["vision_cfg"]


@pytest.mark.parametrize(
    ("vision", "says"),
    [
        ({"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}, "ResNet has no patch tokens"),
        ({**VISION, "image_size": [32, 64]}, "not square"),
        ({**VISION, "width": 36}, "Config and weights are not of one checkpoint"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path: Path, vision: dict[str, object], says: str) -> None:
    save_open_clip(tmp_path, {**native_config(), "vision_cfg": vision}, {"visual.class_embedding": torch.zeros(24)})
    with pytest.raises(ValueError, match=says):
        ImageTower.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("vision", "says"),
    [
        ({**VISION, "attentional_pool": True}, "attentional pooling"),
        ({"timm_model_name": "test_resnet", "image_size": 64}, "ResNet is not supported"),
    ],
)
def test_towers_without_a_class_token_are_refused(tmp_path: Path, vision: dict[str, object], says: str) -> None:
    from open_clip.model import _build_vision_tower

    weights = _build_vision_tower(16, dict(vision)).state_dict()
    save_open_clip(tmp_path, {**native_config(), "vision_cfg": vision}, {f"visual.{k}": v for k, v in weights.items()})
    with pytest.raises(ValueError, match=says):
        ImageTower.from_pretrained(str(tmp_path))


def test_folders_without_a_tower_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds neither open_clip_config"):
        ImageTower.from_pretrained(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": native_config()}))
    with pytest.raises(ValueError, match="none of the weight files"):
        ImageTower.from_pretrained(str(tmp_path))


def test_other_vision_models_are_refused(tmp_path: Path) -> None:
    from transformers import ConvNextConfig, ConvNextImageProcessor, ConvNextModel

    model: Any = ConvNextModel
    model(ConvNextConfig(hidden_sizes=[4, 4, 4, 4], depths=[1, 1, 1, 1])).save_pretrained(tmp_path)
    ConvNextImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'convnext' is not supported"):
        ImageTower.from_pretrained(str(tmp_path))


@pytest.mark.engine
@pytest.mark.skipif(DATA is None, reason="MEDMM_TEST_DATA does not name a folder of test data")
def test_a_real_dinov2() -> None:
    tower = ImageTower.from_pretrained(f"{DATA}/models/dinov2-small-registers")
    with torch.no_grad():
        tokens = tower(tower.preprocess(picture())[None])
    assert (tower.image_size, tokens.pooled_BD.shape, tokens.patches_BPD.shape) == (224, (1, 384), (1, 256, 384))


@pytest.mark.parametrize("kind", ["native", "biomed", "dinov2"])
def test_a_tower_that_is_not_whole_is_refused(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source: Path = request.getfixturevalue(kind)
    (file_name,) = (file.name for file in source.iterdir() if file.suffix in (".safetensors", ".bin"))
    read = torch.load if file_name.endswith(".bin") else load_file
    weights: dict[str, torch.Tensor] = dict(read(source / file_name))
    name = {
        "native": "visual.transformer.resblocks.1.ln_1.weight",
        "biomed": "visual.trunk.blocks.1.norm1.weight",
        "dinov2": "encoder.layer.1.norm1.weight",
    }[kind]

    def fault(change: Any) -> str:
        folder = tmp_path / "tower"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        if isinstance(change, bytes):
            (folder / file_name).write_bytes(change)
        else:
            write = torch.save if file_name.endswith(".bin") else save_file
            write({k: v.clone() for k, v in change.items()}, folder / file_name)
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is looked at
            ImageTower.from_pretrained(folder)
        return str(caught.value)

    assert f"missing are 1: {name}." in fault({k: v for k, v in weights.items() if k != name})
    width = len(weights[name])
    assert f"of another shape are 1: {name} is [{width - 1}], not [{width}]" in fault(
        weights | {name: weights[name][1:]}
    )
    assert "The names hold 'module.'" in fault({f"module.{k}": v for k, v in weights.items()})
    assert f"{file_name} is a git-lfs pointer of 133 bytes" in fault(POINTER.encode())
    assert f"{file_name} is not whole" in fault((source / file_name).read_bytes()[:-1000])


def test_heads_and_a_pooler_that_a_tower_does_not_read_may_be_there_or_not(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, image_size=32,
                       patch_size=8)  # fmt: skip
    classifier: Any = ViTForImageClassification(config)
    classifier.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    tower = ImageTower.from_pretrained(tmp_path)
    plain: Any = ViTModel.from_pretrained(tmp_path, add_pooling_layer=False)
    pixels = torch.stack([tower.preprocess(picture())])
    with torch.no_grad():
        assert torch.equal(tower(pixels).pooled_BD, plain.eval()(pixels).last_hidden_state[:, 0])


def test_a_tower_is_read_in_the_format_and_onto_the_device_that_is_named(native: Path, dinov2: Path) -> None:
    half = ImageTower.from_pretrained(dinov2, dtype="auto", device_map="auto")  # the folder is in float16
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert {p.dtype for p in ImageTower.from_pretrained(native, dtype="auto").parameters()} == {torch.float32}
    exact, rough = ImageTower.from_pretrained(native), ImageTower.from_pretrained(native, torch_dtype=torch.bfloat16)
    pixels = torch.stack([exact.preprocess(picture())])
    with torch.no_grad():
        assert rough(pixels).patches_BPD.dtype == torch.bfloat16
        assert torch.allclose(exact.embed(pixels), rough.embed(pixels).float(), atol=0.02)
    with pytest.raises(ValueError, match=r"device_map is 'balanced'; expected cpu, cuda"):
        ImageTower.from_pretrained(native, device_map="balanced")
