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

from medmm_ray.data.tables import filesystem
from medmm_ray.engines.weights import WeightMismatch, check_file
from medmm_ray.train.engine import MOMENTS, Engine

if TYPE_CHECKING:
    import torch

PROGRESS = "progress.json"
BUFFERS = "buffers.safetensors"
FILE_BYTES = 2 << 30  # a worker holds at most about so much of a checkpoint in memory


def save(engine: Engine, progress: Mapping[str, Any], folder: Path, rank: int, size: int) -> None:
    """This worker's share of a checkpoint; all workers call it together."""
    from safetensors.torch import save_file

    held: dict[str, torch.Tensor] = {}
    number = 0
    for place, name in enumerate(engine.trained):
        for moment in (None, *MOMENTS):
            whole = engine.master(name, moment)
            if place % size == rank:
                held[_key(name, moment)] = whole.detach().float().cpu().contiguous()
        if sum(tensor.nbytes for tensor in held.values()) > FILE_BYTES:
            save_file(held, folder / f"weights-{rank}-{number}.safetensors")
            held, number = {}, number + 1
    save_file(held, folder / f"weights-{rank}-{number}.safetensors")
    if rank == 0:
        save_file(dict(_buffers(engine)), folder / BUFFERS)
        (folder / PROGRESS).write_text(json.dumps(progress))


def load(engine: Engine, folder: Path, updates: int) -> None:
    """Set weights and moments to those in `folder`, of `updates` updates; all workers call it together.

    Raises `WeightsError` where a file is not whole, or where they are not those of the weights that are trained.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    paths = sorted(folder.glob("weights-*.safetensors"))
    for path in (*paths, folder / BUFFERS):
        check_file(path)
    files: list[Any] = [safe_open(path, "pt") for path in paths]
    file_of = {key: file for file in files for key in file.keys()}  # noqa: SIM118 - it is no dict
    wanted = frozenset(_key(name, moment) for name in engine.trained for moment in (None, *MOMENTS))
    WeightMismatch(wanted - file_of.keys(), frozenset(file_of.keys() - wanted)).check("the training's checkpoint")
    engine.start_from(updates)
    for name in engine.trained:
        weight, *moments = (file_of[_key(name, m)].get_tensor(_key(name, m)) for m in (None, *MOMENTS))
        engine.set_master(name, weight.to(engine.device), {
            moment: value.to(engine.device) for moment, value in zip(MOMENTS, moments, strict=True)
        })  # fmt: skip
    saved, buffers = load_file(folder / BUFFERS), dict(_buffers(engine))
    WeightMismatch.between(buffers, saved).check("the training's checkpoint")
    for name, buffer in buffers.items():
        buffer.copy_(saved[name])


def progress_in(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((folder / PROGRESS).read_text())
    return told


def _key(name: str, moment: str | None) -> str:
    return name if moment is None else f"{moment}:{name}"


def _buffers(engine: Engine) -> "Iterator[tuple[str, torch.Tensor]]":
    """What a model keeps besides parameters, and saves with them (a batch norm's means, for one)."""
    saved = engine.module.state_dict(keep_vars=True)
    return ((name, buffer) for name, buffer in engine.module.named_buffers() if name in saved)


def save_trained(engine: Engine, path: Path, rank: int) -> None:
    """Rank 0 writes the trained weights, as they stand, without moments; all workers call it together."""
    from safetensors.torch import save_file

    with engine.whole_weights():
        if rank == 0:
            save_file({n: p.detach().cpu().contiguous() for n, p in engine.trained.items()}, path)


def copy(source: str, target: str) -> None:
    """Copy a file or a folder to where nothing, or something older, is."""
    (source_fs, source_path), (fs, path) = filesystem(source), filesystem(target)
    is_file = source_fs.get_file_info(source_path).is_file
    fs.create_dir(path.rpartition("/")[0] if is_file else path, recursive=True)
    pafs.copy_files(source_path, path, source_filesystem=source_fs, destination_filesystem=fs)
