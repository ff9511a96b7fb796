"""How far a training is: what a checkpoint holds besides weights, and the small file that those who wait read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from medmm_ray.data.tables import filesystem, write_file

WORK = ".checkpoints"
HISTORY = "history.json"
PROGRESS = f"{WORK}/progress.json"


@dataclass
class Progress:
    """Where training is: everything that a checkpoint holds besides weights and optimizer.

    `epoch` and `batch` are the next ones; `updates` and `epochs` hold a row of figures for each that is done.
    """

    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    tokens: int = 0
    samples: int = 0
    updates: list[dict[str, float]] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)

    @property
    def best_epoch(self) -> int | None:
        """The epoch, from 0, with the highest selection figure (the first of equals); None where there is none."""
        best: dict[str, float] | None = None
        for row in self.epochs:
            if "selection" in row and (best is None or row["selection"] > best["selection"]):
                best = row
        return None if best is None else int(best["epoch"])

    def is_over(self, epochs: int, patience: int | None) -> bool:
        """Whether all epochs are done, or the last `patience` of them brought no better selection figure."""
        best = self.best_epoch
        num_stale = 0 if best is None else self.epoch - 1 - best
        return self.epoch >= epochs or (patience is not None and num_stale >= patience)


def selected_figures(epochs: Sequence[Mapping[str, float]], best_epoch: int | None) -> dict[str, float]:
    """What was measured in the epoch whose weights are saved: the best one, else the last."""
    # The epoch's number and what selected it are no results.
    figures = dict(epochs[-1 if best_epoch is None else best_epoch])
    figures.pop("epoch", None)
    figures.pop("selection", None)
    return figures


def write_progress(folder: str, progress: Progress, num_updates: int) -> None:
    """Write ``progress.json`` beside the checkpoints of the training of `folder`, of `num_updates` updates in all."""
    num_done = len(progress.updates)
    report = {
        "update": num_done,
        "updates": num_updates,
        "loss": progress.updates[-1]["loss"],
        "tokens_per_second": progress.tokens / progress.seconds,
        "seconds_left": progress.seconds / num_done * (num_updates - num_done),
    }
    # Through the folder's filesystem: who waits may run on another machine.
    fs, path = filesystem(f"{folder}/{PROGRESS}")
    fs.create_dir(path.rpartition("/")[0], recursive=True)
    write_file(fs, path, json.dumps(report).encode())


def progress_text(folder: str) -> str:
    """The last report of the training of `folder`, in words; empty where none is under way (or none has come yet)."""
    fs, path = filesystem(f"{folder}/{PROGRESS}")
    try:
        with fs.open_input_stream(path) as stream:
            report = json.loads(stream.read())
    except FileNotFoundError:
        return ""
    return (
        f"update {report['update']:,} of {report['updates']:,}, loss {report['loss']:.3f}, "
        f"{report['tokens_per_second']:,.0f} tokens/s, {report['seconds_left']:.0f} s left"
    )
