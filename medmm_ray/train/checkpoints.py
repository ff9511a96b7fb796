"""A training's checkpoint: weights, AdamW's moments and progress, as safetensors and JSON; the best epoch's weights.

Each trained weight is there whole, by its name, as float32, with its two moments; frozen weights are not. Every worker
writes a share of them. So a checkpoint is continued by any number of workers, with any ZeRO stage and off-load, and
nothing in it is pickled.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarrow import fs as pafs

from medmm_ray.data.storage import retried
from medmm_ray.data.tables import filesystem
from medmm_ray.engines.weights import WeightMismatch, check_file
from medmm_ray.train.engine import MOMENTS, Engine

if TYPE_CHECKING:
    import torch

PROGRESS = "progress.json"
BUFFERS = "buffers.safetensors"
FILE_BYTES = 2 << 30  # a worker holds at most about so much of a checkpoint in memory


def save(engine: Engine, progress: Mapping[str, Any], folder: Path, rank: int, size: int) -> None:
    """Write this worker's share of a checkpoint; all workers call it together."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    file_number = 0
    for place, name in enumerate(engine.trainable):
        for moment in (None, *MOMENTS):
            # Gathered by all workers together, also where another one writes it.
            weight = engine.master_weight(name, moment)
            if place % size == rank:
                tensors[_key(name, moment)] = weight.detach().float().cpu().contiguous()
        if sum(tensor.nbytes for tensor in tensors.values()) > FILE_BYTES:
            save_file(tensors, folder / f"weights-{rank}-{file_number}.safetensors")
            tensors = {}
            file_number += 1
    save_file(tensors, folder / f"weights-{rank}-{file_number}.safetensors")
    if rank == 0:
        save_file(dict(_buffers(engine)), folder / BUFFERS)
        (folder / PROGRESS).write_text(json.dumps(progress))


def load(engine: Engine, folder: Path, updates: int) -> None:
    """Set weights and moments to those in `folder`, of `updates` updates; all workers call it together.

    Raises `WeightsError` where a file is not whole, or where they are not those of the weights that are trained.
    """
    from safetensors.torch import load_file

    file_of = _open_weight_files(folder)
    expected_keys: set[str] = set()
    for name in engine.trainable:
        expected_keys.update(_key(name, moment) for moment in (None, *MOMENTS))
    # Before anything is set: a training that went on from half a checkpoint would look like one that works.
    missing = frozenset(expected_keys - file_of.keys())
    WeightMismatch(missing, frozenset(file_of.keys() - expected_keys)).check("the training's checkpoint")
    engine.reset_optimizer(updates)
    for name in engine.trainable:
        weight = _read_tensor(file_of, _key(name, None))
        moments = {}
        for moment in MOMENTS:
            moments[moment] = _read_tensor(file_of, _key(name, moment)).to(engine.device)
        engine.set_master_weight(name, weight.to(engine.device), moments)
    saved_buffers, buffers = load_file(folder / BUFFERS), dict(_buffers(engine))
    WeightMismatch.between(buffers, saved_buffers).check("the training's checkpoint")
    for name, buffer in buffers.items():
        buffer.copy_(saved_buffers[name])


def _open_weight_files(folder: Path) -> dict[str, Any]:
    """The open file that holds each tensor; safetensors reads a tensor when it is asked for."""
    from safetensors import safe_open

    paths = sorted(folder.glob("weights-*.safetensors"))
    for path in (*paths, folder / BUFFERS):
        check_file(path)
    file_of: dict[str, Any] = {}
    for path in paths:
        file: Any = safe_open(path, "pt")
        file_of.update(dict.fromkeys(file.keys(), file))
    return file_of


def _read_tensor(file_of: Mapping[str, Any], key: str) -> "torch.Tensor":
    tensor: torch.Tensor = file_of[key].get_tensor(key)
    return tensor


def read_progress(folder: Path) -> dict[str, Any]:
    """The fields of the `Progress` in a checkpoint."""
    progress: dict[str, Any] = json.loads((folder / PROGRESS).read_text())
    return progress


def _key(name: str, moment: str | None) -> str:
    return name if moment is None else f"{moment}:{name}"


def _buffers(engine: Engine) -> "Iterator[tuple[str, torch.Tensor]]":
    """What a model keeps besides parameters, and saves with them (a batch norm's means, for one)."""
    saved = engine.module.state_dict(keep_vars=True)
    return ((name, buffer) for name, buffer in engine.module.named_buffers() if name in saved)


def save_trainable(engine: Engine, path: Path, rank: int) -> None:
    """Write the trained weights, as they stand, without moments, on rank 0; all workers call it together."""
    from safetensors.torch import save_file

    with engine.gathered_weights():
        if rank == 0:
            weights = {name: p.detach().cpu().contiguous() for name, p in engine.trainable.items()}
            save_file(weights, path)


def copy(source: str, target: str) -> None:
    """Copy a file or a folder to where nothing, or something older, is."""
    (source_fs, source_path), (fs, path) = filesystem(source), filesystem(target)
    is_file = source_fs.get_file_info(source_path).is_file
    fs.create_dir(path.rpartition("/")[0] if is_file else path, recursive=True)
    retried(
        lambda: pafs.copy_files(source_path, path, source_filesystem=source_fs, destination_filesystem=fs),
        f"copying {source} to {target}",
    )
