"""Every loader reads all of a model's weights or says which are missing, misnamed, misshapen or not whole.

Each fault is made in a tiny checkpoint and met by all loaders that it concerns.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medmm_ray.engines import vllm_engine
from medmm_ray.engines.weights import WeightMismatch, WeightsError, check_files
from medmm_ray.reward_model import CheckpointError, RewardModel, text_tower
from medmm_ray.train.policy import load_pretrained
from tests.doubles import tiny_reward_model as tiny
from tests.doubles.tiny_reward_model import QUESTION, SOLUTIONS
from tests.doubles.tiny_vision import save_llava
from tests.reward_model.test_families import qwen_prm, token_classification

Weights = dict[str, torch.Tensor]
DOWN = "model.layers.1.mlp.down_proj.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 13472872\n"


def change_weights(folder: Path, change: Callable[[Weights], Weights], name: str = "model.safetensors") -> None:
    weights = {key: weight.clone() for key, weight in load_file(folder / name).items()}
    save_file(change(weights), folder / name, {"format": "pt"})


def set_config(folder: Path, name: str = "config.json", **more: Any) -> None:
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | more))


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: weight for key, weight in weights.items() if key != name}


def renamed(pattern: str) -> Callable[[Weights], Weights]:
    return lambda weights: {pattern.format(key): weight for key, weight in weights.items()}


def shard(folder: Path) -> list[Path]:
    """Lay the weights out in three files with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = [folder / f"model-{i + 1:05}-of-00003.safetensors" for i in range(3)]
    for i, file in enumerate(files):
        save_file({name: weights[name] for name in names[i::3]}, file, {"format": "pt"})
    weight_map = {name: files[i % 3].name for i, name in enumerate(names)}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


def lose_a_shards_place(folder: Path) -> None:
    """The index forgets the third file, which is there."""
    third = shard(folder)[2].name
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != third}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def as_torch_file(folder: Path, change: Callable[[Weights], Weights]) -> Path:
    file = folder / "pytorch_model.bin"
    torch.save(change(load_file(folder / "model.safetensors")), file)
    (folder / "model.safetensors").unlink()
    return file


def cut(file: Path, lost: int = 1000) -> None:
    file.write_bytes(file.read_bytes()[:-lost])


# name -> how the folder is spoilt, what the message must say
FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "one missing": (
        lambda f: change_weights(f, without(DOWN)),
        [f"does not hold its model's weights: missing are 1: {DOWN}.", "save the checkpoint whole, or download it"],
    ),
    "another shape": (
        lambda f: change_weights(f, lambda w: w | {"model.norm.weight": w["model.norm.weight"][:-1].clone()}),
        ["of another shape are 1: model.norm.weight is [31], not [32]"],
    ),
    "one too many": (
        lambda f: change_weights(f, lambda w: w | {"model.layers.3.input_layernorm.weight": torch.ones(32)}),
        ["of no use to it are 1: model.layers.3.input_layernorm.weight. They would be ignored"],
    ),
    "torch.compile": (
        lambda f: change_weights(f, renamed("_orig_mod.{}")),
        [
            "The names hold '_orig_mod.', which torch.compile leaves",
            "Save model._orig_mod",
            "k.replace('_orig_mod.', '')",
        ],
    ),
    "DDP": (
        lambda f: change_weights(f, renamed("module.{}")),
        ["The names hold 'module.', which DistributedDataParallel or DeepSpeed leaves", "Save model.module"],
    ),
    "FSDP": (
        lambda f: change_weights(
            f, lambda w: {k.replace("layers.1.", "layers.1._fsdp_wrapped_module."): v for k, v in w.items()}
        ),
        ["The names hold '_fsdp_wrapped_module.', which FSDP leaves", "missing are 9: model.layers.1.input_layernorm"],
    ),
    "an adapter not merged": (
        lambda f: change_weights(f, renamed("base_model.model.{}")),
        ["The names hold 'base_model.model.', which peft", "model.merge_and_unload()"],
    ),
    "a value head around it": (
        lambda f: change_weights(f, renamed("pretrained_model.{}")),
        ["The names hold 'pretrained_model.', which TRL's value-head wrapper leaves", "model.pretrained_model"],
    ),
    "a value head": (
        lambda f: change_weights(f, lambda w: w | {"v_head.summary.weight": torch.ones(1, 32)}),
        ["of no use to it are 1: v_head.summary.weight.", "A value head", "model.pretrained_model.save_pretrained"],
    ),
    "an untied head": (
        lambda f: set_config(f, tie_word_embeddings=False),
        ["missing are 1: lm_head.weight.", "set tie_word_embeddings=true in config.json"],
    ),
    "no shard": (
        lambda f: shard(f)[1].unlink(),
        ["model-00002-of-00003.safetensors is not there, but the index beside it names it, one of 3 weight files"],
    ),
    "a shard that the index forgot": (lose_a_shards_place, ["missing are 9: ", "and 4 more."]),
    "a shard cut off": (lambda f: cut(shard(f)[1]), ["model-00002-of-00003.safetensors is not whole: it has "]),
    "a pointer": (
        lambda f: (f / "model.safetensors").write_text(POINTER),
        ["model.safetensors is a git-lfs pointer of 133 bytes", "git lfs pull"],
    ),
    "cut off": (
        lambda f: cut(f / "model.safetensors"),
        ["model.safetensors is not whole: it has ", "its header tells of", "get it again"],
    ),
    "cut off in the header": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:100]),
        ["model.safetensors is not whole: its 100 bytes hold no safetensors header"],
    ),
    "torch's format, one missing": (lambda f: as_torch_file(f, without(DOWN)), [f"missing are 1: {DOWN}."]),
    "torch's format, cut off": (
        lambda f: cut(as_torch_file(f, dict)),
        ["pytorch_model.bin is not whole: it has ", "its table of contents is not among them"],
    ),
    "torch's format, a pointer": (
        lambda f: as_torch_file(f, dict).write_text(POINTER),
        ["pytorch_model.bin is a git-lfs pointer"],
    ),
    "a tokenizer's pointer": (
        lambda f: (f / "tokenizer.json").write_text(POINTER),
        ["tokenizer.json is a git-lfs pointer of 133 bytes"],
    ),
    "a tokenizer cut off": (lambda f: cut(f / "tokenizer.json"), ["tokenizer.json is not whole: it has "]),
    "a config's pointer": (lambda f: (f / "config.json").write_text(POINTER), ["config.json is a git-lfs pointer"]),
    "an empty template": (lambda f: (f / "chat_template.jinja").write_text(""), ["chat_template.jinja is not whole"]),
}
# loader -> its error
LOADERS: dict[str, tuple[Callable[[Path], object], type[Exception]]] = {
    "reward model": (RewardModel.from_pretrained, CheckpointError),
    "reward model of vLLM": (lambda folder: text_tower.load_without_weights(folder, None, "float32"), CheckpointError),
    "policy": (lambda folder: load_pretrained(str(folder)), WeightsError),
    "policy of vLLM": (lambda folder: vllm_engine.check_weights(str(folder), {}), vllm_engine.GeneratorError),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_language_model_that_is_not_whole_is_refused(fault: str, loader: str, whole: Path, tmp_path: Path) -> None:
    spoil, words = FAULTS[fault]
    load, kind = LOADERS[loader]
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    spoil(folder)
    with pytest.raises(kind) as caught:
        load(folder)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize("loader", LOADERS)
def test_what_is_whole_is_read(loader: str, whole: Path, tmp_path: Path) -> None:
    load, _ = LOADERS[loader]
    load(whole)
    layouts: dict[str, Callable[[Path], object]] = {"shards": shard, "torch": lambda f: as_torch_file(f, dict)}
    for name, lay_out in layouts.items():
        shutil.copytree(whole, tmp_path / name)
        lay_out(tmp_path / name)
        load(tmp_path / name)
    for name in ("pytorch_model.bin", "optimizer.pt", "model-00001-of-00002.safetensors", "picture.png"):
        (tmp_path / "shards" / name).write_text(POINTER)  # a clone without what nobody reads
    load(tmp_path / "shards")


def test_weights_renamed_as_the_message_says_are_read(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "model")
    change_weights(tmp_path / "model", renamed("_orig_mod.{}"))
    f = tmp_path / "model" / "model.safetensors"
    save_file({k.replace("_orig_mod.", ""): v for k, v in load_file(f).items()}, f, {"format": "pt"})
    found = RewardModel.from_pretrained(tmp_path / "model").score(QUESTION, SOLUTIONS)
    assert found == RewardModel.from_pretrained(whole).score(QUESTION, SOLUTIONS)


def test_the_heads_of_classifiers_must_be_there_and_a_language_models_may_be_left(tmp_path: Path) -> None:
    folders = {"qwen_prm": qwen_prm(tmp_path / "qwen"), "token_classification": token_classification(tmp_path / "trl")}
    for folder in folders.values():
        scores = RewardModel.from_pretrained(folder).score(QUESTION, SOLUTIONS)
        head = torch.ones(3, 32)
        change_weights(folder, lambda w, head=head: w | {"lm_head.weight": head})  # type: ignore[misc]
        assert RewardModel.from_pretrained(folder).score(QUESTION, SOLUTIONS) == scores
    change_weights(folders["qwen_prm"], without("score.2.bias"))
    with pytest.raises(CheckpointError, match=r"missing are 1: score.2.bias"):
        RewardModel.from_pretrained(folders["qwen_prm"])
    change_weights(folders["token_classification"], without("score.weight"))
    with pytest.raises(CheckpointError, match=r"missing are 1: score.weight"):
        RewardModel.from_pretrained(folders["token_classification"])


def test_a_language_model_read_as_a_classifier_has_no_head(whole: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing are 2: score.bias, score.weight.*family token_classification"):
        RewardModel.from_pretrained(whole, family="token_classification")


def test_a_vision_language_model_without_a_part_of_its_image_tower(tmp_path: Path) -> None:
    folder = save_llava(tmp_path)
    (name,) = (key for key in load_file(folder / "model.safetensors") if key.endswith("layers.0.mlp.fc1.bias"))
    change_weights(folder, without(name))
    with pytest.raises(CheckpointError, match=r"missing are 1: .*vision.*layers.0.mlp.fc1.bias"):
        RewardModel.from_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json is a git-lfs pointer"):
        RewardModel.from_pretrained(folder)


def test_both_sides_are_compared_by_name_and_shape() -> None:
    model = {"a": torch.zeros(2, 3), "b": torch.zeros(1), "c": torch.zeros(4)}
    files = {"a": torch.zeros(3, 2), "b": torch.zeros(1), "d": torch.zeros(1)}
    found = WeightMismatch.between(model, files)
    assert (found.missing, found.unexpected) == (frozenset("c"), frozenset("d"))
    assert found.misshapen == (("a", (3, 2), (2, 3)),)
    WeightMismatch.between(model, model).check("nothing is wrong")
    assert found.without(missing=("c",), unexpected=("d",)).misshapen == found.misshapen
    with pytest.raises(WeightsError, match=r"^here does not hold its model's weights: missing are 1: c; of another"):
        found.check("here")


def test_files_of_other_formats_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "config.json").write_text('{"a": [1]}\n')
    check_files(tmp_path)
    (tmp_path / "merges.txt").write_text(POINTER)
    with pytest.raises(WeightsError, match=r"merges.txt is a git-lfs pointer"):
        check_files(tmp_path)
