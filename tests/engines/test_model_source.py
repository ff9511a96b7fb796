"""Where models came from: hub ids with commits, folders with a hash of their weights."""

from pathlib import Path

from medmm_ray.engines import model_source
from medmm_ray.engines.model_source import ModelSource, content_hash


def write(file: Path, content: bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def test_a_hub_id_keeps_its_commit_and_a_folder_its_name_alone(tmp_path: Path) -> None:
    assert ModelSource.of("org/model", "abc") == ModelSource("org/model", "abc")
    write(tmp_path / "private" / "policy" / "model.safetensors", b"weights")
    found = ModelSource.of(tmp_path / "private" / "policy")
    assert found == ModelSource("policy", content_hash(tmp_path / "private" / "policy"))


def test_the_hash_is_of_the_weights_wherever_they_lie(tmp_path: Path) -> None:
    for folder, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        write(tmp_path / folder / "model.safetensors", content)
        write(tmp_path / folder / "README.md", folder.encode())
    a, b, c = (content_hash(tmp_path / name) for name in "abc")
    assert a == b != c
    write(tmp_path / "b" / "more.safetensors", b"")
    assert content_hash(tmp_path / "b") != a


def test_a_large_file_is_sampled_from_its_first_to_its_last_byte(tmp_path: Path) -> None:
    size = model_source._WHOLE + 3
    content = bytearray(size)
    first = content_hash(write(tmp_path / "x.gguf", bytes(content)))
    for place in (0, size - 1):
        content[place] = 1
        assert content_hash(write(tmp_path / "x.gguf", bytes(content))) != first
        content[place] = 0
    assert content_hash(write(tmp_path / "x.gguf", bytes(content))) == first
    assert content_hash(write(tmp_path / "x.gguf", bytes(content) + b"\0")) != first
