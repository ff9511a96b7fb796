"""Whether a checkpoint's files are whole, and hold the weights that its model needs.

A library that reads a checkpoint fills what the files lack with random numbers, and at most logs it; here that is an
error that names the weights. Nothing is loaded: safetensors headers, sizes and first bytes are all that is read.
"""

import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]

TRANSFORMERS_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""transformers' names for weights, in its order of preference; an index lists shards."""
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""peft's names for weights, in its order of preference."""
OPEN_CLIP_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
)
"""open_clip's names for weights; the last is torch's zip format, read as weights only."""

_TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")  # configs and tokenizers
POINTER = b"version https://git-lfs.github.com/spec/v1"
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_MAX_NAMED = 5  # weights that a message names


class WeightsError(ValueError):
    """Files that are not whole, or do not hold a model's weights; the message names them and says what to do."""


@dataclass(frozen=True)
class _Wrapper:
    """What a program puts around a model, and leaves in the names of its weights."""

    mark: str
    program: str
    unwrap: str
    adds_nothing: bool = True
    """Whether the names are all that it changed."""

    def advice(self) -> str:
        """How to get a checkpoint without the mark."""
        advice = (
            f"The names hold {self.mark!r}, which {self.program} leaves there when the wrapped model is saved. Save "
            f"{self.unwrap}"
        )
        if self.adds_nothing:
            renamed = f"{{k.replace({self.mark!r}, ''): v for k, v in load_file(f).items()}}"
            advice += f", or rename the weights in each file f: save_file({renamed}, f, {{'format': 'pt'}})"
        return advice


_WRAPPERS = (
    _Wrapper("_orig_mod.", "torch.compile", "model._orig_mod"),
    _Wrapper("_fsdp_wrapped_module.", "FSDP", "FSDP's full state dict"),
    _Wrapper("_checkpoint_wrapped_module.", "activation checkpointing", "the model inside"),
    _Wrapper("module.", "DistributedDataParallel or DeepSpeed", "model.module"),
    _Wrapper("base_model.model.", "peft, the adapter not merged", "model.merge_and_unload()", adds_nothing=False),
    _Wrapper("pretrained_model.", "TRL's value-head wrapper", "model.pretrained_model"),
)
_MARKS = re.compile("|".join(rf"(?<![^.]){re.escape(wrapper.mark)}" for wrapper in _WRAPPERS) + r"|(?<=\.)base_layer\.")
_VALUE_HEAD = re.compile(r"(^|\.)(v_head|value_head)\.")


@dataclass(frozen=True)
class WeightMismatch:
    """Weights on one side only: `missing` from the files, `unexpected` by the model.

    `misshapen` are on both sides: name, shape in the files, shape in the model.
    """

    missing: frozenset[str]
    unexpected: frozenset[str]
    misshapen: tuple[tuple[str, Shape, Shape], ...] = ()

    @classmethod
    def between(cls, model: Mapping[str, Any], files: Mapping[str, Any]) -> "WeightMismatch":
        """The mismatch of two state dicts, a model's and a checkpoint's."""
        misshapen: list[tuple[str, Shape, Shape]] = []
        for name in sorted(model.keys() & files.keys()):
            stored_shape, model_shape = tuple(files[name].shape), tuple(model[name].shape)
            if stored_shape != model_shape:
                misshapen.append((name, stored_shape, model_shape))
        missing = frozenset(model.keys() - files.keys())
        return cls(missing, frozenset(files.keys() - model.keys()), tuple(misshapen))

    def without(self, missing: Sequence[str] = (), unexpected: Sequence[str] = ()) -> "WeightMismatch":
        """The mismatch less the names that begin with one of these: those that are rightly on one side only."""
        return WeightMismatch(
            frozenset(name for name in self.missing if not name.startswith(tuple(missing))),
            frozenset(name for name in self.unexpected if not name.startswith(tuple(unexpected))),
            self.misshapen,
        )

    def check(self, source: str | Path) -> None:
        """Raise `WeightsError` unless both sides have the same weights; `source` is what it calls the files."""
        parts = []
        if self.missing:
            parts.append(f"missing are {len(self.missing)}: {_listed(self.missing)}")
        if self.misshapen:
            shapes = [f"{name} is {list(stored)}, not {list(expected)}" for name, stored, expected in self.misshapen]
            parts.append(f"of another shape are {len(shapes)}: {_listed(shapes)}")
        if self.unexpected:
            parts.append(f"of no use to it are {len(self.unexpected)}: {_listed(self.unexpected)}")
        if parts:
            raise WeightsError(f"{source} does not hold its model's weights: {'; '.join(parts)}. {self._advice()}")

    def _advice(self) -> str:
        """What to do about it, by what it looks like."""
        wrapper = self._wrapper()
        if wrapper is not None:
            return wrapper.advice()
        if any(_VALUE_HEAD.search(name) for name in self.unexpected):
            return (
                "A value head (TRL's AutoModelForCausalLMWithValueHead) would be ignored: steps are read from the "
                "language model's own head. Save the language model without it (model.pretrained_model.save_pretrained)"
                ", or train a token classification head, which is read"
            )
        if self.missing == {"lm_head.weight"}:
            return (
                "The config says tie_word_embeddings=false, so the head has weights of its own. Save the checkpoint "
                "with them, or set tie_word_embeddings=true in config.json if the model was trained with a tied head"
            )
        if self.misshapen:
            return "Config and weights are not of one checkpoint: download, or save, both again"
        if not self.missing:
            return "They would be ignored: take the config of the same checkpoint, or save without them"
        return "What is missing would be random: save the checkpoint whole, or download it again"

    def _wrapper(self) -> _Wrapper | None:
        """The program whose mark makes a name in the files differ from one that is missing."""
        missing_by_bare_name = {_MARKS.sub("", name): name for name in self.missing}
        for name in sorted(self.unexpected):
            missing_name = missing_by_bare_name.get(_MARKS.sub("", name))
            if not missing_name:
                continue
            for wrapper in _WRAPPERS:
                if wrapper.mark in name and wrapper.mark not in missing_name:
                    return wrapper
        return None


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    listed = ", ".join(ordered[:_MAX_NAMED])
    num_unlisted = len(ordered) - _MAX_NAMED
    return f"{listed} and {num_unlisted} more" if num_unlisted > 0 else listed


def weight_files(folder: Path, names: Sequence[str] = TRANSFORMERS_FILES) -> list[Path]:
    """The files that a loader reads weights from: the first of `names` that is there, of an index its shards."""
    first = next((folder / name for name in names if (folder / name).is_file()), None)
    if first is None:
        return []
    if first.suffix != ".json":
        return [first]
    check_file(first)
    try:
        shards = sorted(set(json.loads(first.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f"{first} is no index of weight files: {error}; download it again") from error
    return [folder / name for name in shards]


def check_files(folder: Path, names: Sequence[str] = TRANSFORMERS_FILES) -> None:
    """Raise `WeightsError` where a file that a loader reads is not there whole.

    Checked are configs, tokenizers and the weight files of `weight_files`, no others: people fetch what they need of a
    clone.
    """
    for pattern in _TEXT_FILES:
        for file in sorted(folder.glob(pattern)):
            check_file(file)
    files = weight_files(folder, names)
    for file in files:
        if not file.is_file():
            raise WeightsError(
                f"{file} is not there, but the index beside it names it, one of {len(files)} weight files; download "
                "the checkpoint again"
            )
        check_file(file)


def check_file(file: Path) -> None:
    """Raise `WeightsError` where a file is a git-lfs pointer or was cut off."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        beginning = stream.read(len(POINTER))
    if beginning == POINTER:
        raise WeightsError(
            f"{file} is a git-lfs pointer of {size} bytes, not the file itself; run `git lfs install && git lfs pull` "
            "in its folder, or download it with `hf download`"
        )
    symptom = _cut_off(file, beginning, size)
    if symptom:
        raise WeightsError(
            f"{file} is not whole: {symptom}; its download was cut off or is still under way: get it again"
        )


def _cut_off(file: Path, beginning: bytes, size: int) -> str | None:
    """A symptom of a file whose end is missing; None where it is whole. `beginning` are its first bytes."""
    if file.suffix == ".safetensors":
        expected = _safetensors_size(file, size)
        if expected is None:
            return f"its {size:,} bytes hold no safetensors header"
        return None if size == expected else f"it has {size:,} bytes and its header tells of {expected:,}"
    if beginning[:2] == b"PK":  # torch's zip format, whose table of contents is its end
        if zipfile.is_zipfile(file):
            return None
        return f"it has {size:,} bytes, and its table of contents is not among them"
    if file.suffix == ".json":
        with file.open("rb") as stream:
            stream.seek(max(0, size - 64))
            last_byte = stream.read().rstrip()[-1:]
        return None if last_byte in (b"}", b"]") else f"it has {size:,} bytes and does not end as JSON does"
    return None if size else "it is empty"


def _safetensors_size(file: Path, size: int) -> int | None:
    """The size that a safetensors file's header tells of; None where there is no header."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(_LONGEST_HEADER, size - 8):
            return None
        try:
            header = json.loads(stream.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
    return 8 + length + max(ends, default=0)


def shapes(files: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    """The weights of safetensors (or torch) files as (name, tensor without data), from what says where they are."""
    from transformers.modeling_utils import load_state_dict

    for file in files:
        yield from load_state_dict(file, map_location="meta").items()
