"""Whether a checkpoint can be loaded, asked before any GPU hour is spent: by names, sizes and small files alone.

Enters: a checkpoint as a recipe names it (`checkpoints.resolve`) and what it is to be. Leaves: `ConfigError` with what
is wrong and what to do, or nothing. Of a hub id, or a URI, the list of files and a few small ones are asked for; no
weights are downloaded, copied or read. The loaders themselves read on, and may find more.
"""

import json
import posixpath
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from pyarrow import fs as pafs

from medmm_ray.config import ConfigError
from medmm_ray.data.tables import filesystem, follow
from medmm_ray.engines.checkpoints import HUB_PREFIX, PACKAGE_PREFIX, check_package, is_hub_id, resolve
from medmm_ray.engines.text_encoder import PUBLISHED
from medmm_ray.engines.weights import (
    ADAPTER_FILES,
    OPEN_CLIP_FILES,
    POINTER,
    TRANSFORMERS_FILES,
    WeightsError,
    check_file,
)

CheckpointKind = Literal[
    "policy", "reward_model", "image_tower", "text_encoder", "pooled_encoder", "reranker", "adapter"
]

TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
)
TEMPLATES = ("chat_template.jinja", "chat_template.json")
OPEN_CLIP = "open_clip_config.json"
VISION = ("dinov2", "dinov2_with_registers", "vit")  # those of transformers that an image tower can be
_POINTER_BYTES = 1024  # that a pointer of git-lfs never reaches


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint by name, each with its size in bytes (None: not told); `read` gives a small one."""

    name: str
    sizes: Mapping[str, int | None]
    read: Callable[[str], bytes]
    is_hub: bool = False
    folder: Path | None = None  # where they lie on this machine

    def matching(self, *patterns: str) -> list[str]:
        """The files whose name fits one of some patterns, in their order."""
        files: list[str] = []
        for file in self.sizes:
            if any(fnmatch(file, pattern) for pattern in patterns):
                files.append(file)
        return files

    def have(self, *patterns: str) -> bool:
        """Whether there is a file whose name fits one of some patterns."""
        return bool(self.matching(*patterns))

    def json(self, file: str) -> dict[str, Any]:
        """A file's JSON object; raises `ConfigError` where it holds none."""
        text = self.read(file)
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{self.name}: {file} is no JSON ({error}); download it again") from None
        if not isinstance(content, dict):
            raise ConfigError(f"{self.name}: {file} holds {type(content).__name__}, not an object; download it again")
        return content


def check_checkpoint(name: str, kind: CheckpointKind, revision: str | None = None) -> None:
    """Raise `ConfigError` where a checkpoint cannot be what it is to be; `revision` is a hub id's."""
    if name.startswith(PACKAGE_PREFIX):
        check_package(name.removeprefix(PACKAGE_PREFIX))
        return
    _CHECKS[kind](_files(name, revision))


# Where the files lie


def _files(name: str, revision: str | None) -> CheckpointFiles:
    if "://" in name:
        return _of_uri(follow(name))
    place = name if name.startswith(HUB_PREFIX) else resolve(name)
    if Path(place).is_dir():
        return _of_folder(name, Path(place))
    assert place.startswith(HUB_PREFIX) or is_hub_id(place), "resolve gives a folder or a hub id"
    return _of_hub(name, place.removeprefix(HUB_PREFIX), revision)


def _of_folder(name: str, folder: Path) -> CheckpointFiles:
    sizes: dict[str, int | None] = {}
    for file in folder.rglob("*"):
        if file.is_file():
            sizes[str(file.relative_to(folder))] = file.stat().st_size
    return CheckpointFiles(name, sizes, lambda file: (folder / file).read_bytes(), folder=folder)


def _of_uri(uri: str) -> CheckpointFiles:
    fs, path = filesystem(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    files = {posixpath.relpath(info.path, path): info for info in infos if info.is_file}
    if not files:
        raise ConfigError(f"{uri!r}: no files are there; check the name, and the permission to list it")

    def read(file: str) -> bytes:
        with fs.open_input_stream(files[file].path, compression=None) as stream:
            return bytes(stream.read())

    return CheckpointFiles(uri, {file: info.size for file, info in files.items()}, read)


def _of_hub(name: str, repo: str, revision: str | None) -> CheckpointFiles:
    """The files that the hub lists; where it cannot be reached, those of an earlier download."""
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = constants.ENDPOINT
    refused = (
        f"{repo}: {hub} gives no access to it; ask for it at {hub}/{repo} and set HF_TOKEN to a token of whoever got it"
    )
    try:
        info = HfApi().model_info(repo, revision=revision)
    except GatedRepoError:
        raise ConfigError(refused) from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"{repo} is neither a folder here nor a model of {hub} that can be seen; check the name, and set HF_TOKEN "
            "where it is private"
        ) from None
    except RevisionNotFoundError:
        raise ConfigError(f"{repo} has no revision {revision!r} at {hub}; name a branch, tag or commit") from None
    except (HfHubHTTPError, HTTPError, OSError) as error:
        try:
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        except IncompleteSnapshotError as incomplete:  # what is needed may be there all the same
            folder = Path(incomplete.snapshot_path)
        except LocalEntryNotFoundError:
            raise ConfigError(
                f"{repo} is not on this machine, and {hub} cannot be reached ({type(error).__name__}); check the "
                "network, HF_HUB_OFFLINE and HF_ENDPOINT, or download it first: hf download " + repo
            ) from None
        return _of_folder(name, folder)

    def read(file: str) -> bytes:
        try:
            return Path(hf_hub_download(repo, file, revision=info.sha)).read_bytes()
        except GatedRepoError:
            raise ConfigError(refused) from None
        except (HfHubHTTPError, HTTPError, OSError) as error:
            raise ConfigError(f"{repo}: {file} cannot be read from {hub}: {str(error).splitlines()[0]}") from None

    return CheckpointFiles(name, {file.rfilename: None for file in info.siblings or []}, read, is_hub=True)


# What is looked for


def _policy(files: CheckpointFiles) -> None:
    """A language model that vLLM and transformers read, with a chat template."""
    _known_architecture(files)
    _has_weights(files)
    _has_tokenizer(files)
    if not _has_chat_template(files):
        raise ConfigError(
            f"{files.name}: its tokenizer has no chat template, which a policy needs; take an instruction-tuned model"
        )


def _reward_model(files: CheckpointFiles) -> None:
    """A folder of ours, an adapter on a base, or a checkpoint of a known family."""
    from medmm_ray.reward_model import families

    if files.have("reward_model.json"):
        saved = files.json("reward_model.json")
        if saved.get("family") not in families.NAMES:
            raise ConfigError(
                f"{files.name}: reward_model.json has the family {saved.get('family')!r}; known are "
                f"{', '.join(families.NAMES)}"
            )
        missing: list[str] = []
        if saved.get("fusion") and not files.have("fusion.safetensors"):
            missing.append("fusion.safetensors")
        if saved.get("image_tower") and not files.have("image_tower/*"):
            missing.append("image_tower/")
        if missing:
            raise ConfigError(f"{files.name}: {' and '.join(missing)} of its image part are missing; copy it whole")
    elif files.have("adapter_config.json") and not files.have("config.json"):
        _adapter(files)
        base = files.json("adapter_config.json").get("base_model_name_or_path")
        if not base:
            raise ConfigError(f"{files.name}: adapter_config.json names no base model (base_model_name_or_path)")
        try:
            _language_model(_files(str(base), None))
        except ConfigError as error:
            raise ConfigError(f"the base of the adapter {files.name}: {error}") from None
        return
    architectures = _known_architecture(files).get("architectures") or []
    if families.detect(architectures, _Template(_has_chat_template(files))) is None:
        raise ConfigError(
            f"{files.name} fits no family of reward models: its architecture is "
            f"{', '.join(map(str, architectures)) or 'not stated'}; the families are {', '.join(families.NAMES)}"
        )
    _has_weights(files)
    _has_tokenizer(files)


class _Template:
    """A tokenizer as far as its files tell: whether it has a chat template. Of its entries nothing is known."""

    def __init__(self, has_template: bool) -> None:
        self.chat_template = "there is one" if has_template else None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:  # noqa: ARG002
        return {"input_ids": [0]}


def _language_model(files: CheckpointFiles) -> None:
    _known_architecture(files)
    _has_weights(files)
    _has_tokenizer(files)


def _image_tower(files: CheckpointFiles) -> None:
    """An open_clip checkpoint, or a vision model of transformers."""
    if not files.have(OPEN_CLIP):
        if files.name.startswith(HUB_PREFIX) or not files.have("config.json"):
            raise ConfigError(f"image tower {files.name}: holds neither {OPEN_CLIP} (open_clip) nor config.json")
        model_type = files.json("config.json").get("model_type")
        if model_type not in VISION:
            raise ConfigError(
                f"image tower {files.name}: model type {model_type!r} is not supported; expected {', '.join(VISION)} "
                "or an open_clip checkpoint"
            )
    _has_weights(files, OPEN_CLIP_FILES if files.have(OPEN_CLIP) else TRANSFORMERS_FILES)


def _text_encoder(files: CheckpointFiles) -> None:
    """A sentence-transformers model, an open_clip checkpoint, whose text half is taken, or one whose use is known."""
    if not (files.have(OPEN_CLIP, "modules.json") or files.name in PUBLISHED):
        raise ConfigError(
            f"text encoder {files.name}: holds neither modules.json (sentence-transformers) nor {OPEN_CLIP}, so how "
            "its vectors are pooled is not known; say it: embed.pooling=cls (as MedCPT) or mean"
        )
    _pooled_encoder(files)


def _pooled_encoder(files: CheckpointFiles) -> None:
    """A text encoder whose pooling is said."""
    if not files.have(OPEN_CLIP):
        _known_architecture(files)
        _has_tokenizer(files)
    _has_weights(files, OPEN_CLIP_FILES if files.have(OPEN_CLIP) else TRANSFORMERS_FILES)


def _reranker(files: CheckpointFiles) -> None:
    """A model of transformers for sequence classification."""
    architectures = list(map(str, _known_architecture(files).get("architectures") or []))
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise ConfigError(
            f"reranker {files.name}: its architecture is {', '.join(architectures) or 'not stated'}; a checkpoint for "
            "sequence classification is expected, as ncbi/MedCPT-Cross-Encoder"
        )
    _has_weights(files)
    _has_tokenizer(files)


def _adapter(files: CheckpointFiles) -> None:
    """A peft adapter."""
    if not files.have("adapter_config.json"):
        raise ConfigError(f"{files.name}: holds no adapter_config.json: it is no peft adapter")
    weights = [file for file in ADAPTER_FILES if files.have(file)]
    if not weights:
        raise ConfigError(f"{files.name}: holds no {ADAPTER_FILES[0]}; download it whole")
    _are_whole(files, weights[:1])


_CHECKS: dict[CheckpointKind, Callable[[CheckpointFiles], None]] = {
    "policy": _policy,
    "reward_model": _reward_model,
    "image_tower": _image_tower,
    "text_encoder": _text_encoder,
    "pooled_encoder": _pooled_encoder,
    "reranker": _reranker,
    "adapter": _adapter,
}


def _known_architecture(files: CheckpointFiles) -> dict[str, Any]:
    """The checkpoint's config, of a model type that transformers knows."""
    if not files.have("config.json"):
        raise ConfigError(f"{files.name}: holds no config.json: it is no checkpoint of transformers; check the name")
    from transformers import CONFIG_MAPPING, __version__

    config = files.json("config.json")
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        own_code = "; it comes with code of its own, and none is ever run" if "auto_map" in config else ""
        raise ConfigError(
            f"{files.name}: transformers {__version__} does not know its model type {model_type!r}{own_code}; take a "
            "checkpoint that is converted to transformers' layout"
        )
    return config


def _has_weights(files: CheckpointFiles, names: Sequence[str] = TRANSFORMERS_FILES) -> None:
    """The files that a loader reads, by its order of `names`, are there whole; of others nothing is asked."""
    first = next((file for file in names if files.have(file)), None)
    if first is None:
        weights = [file for file in files.sizes if fnmatch(file, "*.safetensors") and "/" not in file]  # as vLLM reads
        if not weights:
            raise ConfigError(f"{files.name}: holds no weights ({', '.join(names)}); download it whole")
        _are_whole(files, weights)
        return
    if not first.endswith(".json"):
        _are_whole(files, [first])
        return
    shard_of_weight = dict(files.json(first).get("weight_map") or {})
    shards = sorted({str(shard) for shard in shard_of_weight.values()})
    missing = [shard for shard in shards if shard not in files.sizes]
    if missing or not shards:
        raise ConfigError(
            f"{files.name}: {len(missing)} of the {len(shards)} weight files in {first} are missing "
            f"({', '.join(missing[:3])}); download it whole"
        )
    _are_whole(files, shards)


def _are_whole(files: CheckpointFiles, names: Collection[str]) -> None:
    """No name stands for a pointer of git-lfs, an empty file or, on this machine, one that was cut off."""
    for file in names:
        size = files.sizes[file]
        if files.folder is not None:
            try:
                check_file(files.folder / file)
            except WeightsError as error:
                raise ConfigError(str(error)) from None
        elif size == 0:
            raise ConfigError(f"{files.name}: {file} is empty; download it again")
        elif size is not None and size < _POINTER_BYTES and files.read(file).startswith(POINTER):
            raise ConfigError(
                f"{files.name}: {file} is a git-lfs pointer of {size} bytes, not the file itself; download it with hf "
                "download, and copy it there"
            )


def _has_tokenizer(files: CheckpointFiles) -> None:
    tokenizer_files = files.matching(*TOKENIZERS)
    if not tokenizer_files:
        raise ConfigError(f"{files.name}: holds no tokenizer ({', '.join(TOKENIZERS)}); copy it beside the weights")
    _are_whole(files, tokenizer_files)


def _has_chat_template(files: CheckpointFiles) -> bool:
    if files.have(*TEMPLATES):
        return True
    return files.have("tokenizer_config.json") and bool(files.json("tokenizer_config.json").get("chat_template"))
