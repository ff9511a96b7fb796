"""Peak memory of a two-tower worker at two sizes of its states, for `jobs.bench scale`.

The worker is the real stage in the real loop, in a process of its own; states, pictures and labels are made up, of an
8B model's shape. It trains for an epoch, which reads them all, and measures the held-out ones.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.benches import Measured
from jobs.benches.process_memory import highest_bytes, in_new_process
from medmm_ray.config import Config
from medmm_ray.data.records import States
from medmm_ray.data.tables import Provenance, Table
from medmm_ray.train.two_tower import TwoTowerConfig, TwoTowerStage
from medmm_ray.train.two_tower_data import SCHEMA, located_states, states_files

if TYPE_CHECKING:
    from torch import Tensor

GIB = 1 << 30
VOCABULARY = 600


class MemoryConfig(Config):
    """What a two-tower worker is given to read."""

    states_gib: tuple[float, ...] = (0.5, 2.0)
    """Sizes of the states, in GiB; none: memory is not measured."""
    hidden_size: int = 4096
    """Width of the text tower."""
    solutions: int = 64
    """Solutions of a question."""
    steps: int = 8
    """Steps of a solution."""
    cache_gib: float = 0.25
    """The stage's own setting."""
    threads: int = 2
    """Torch threads."""


class Peak(NamedTuple):
    """Memory of a worker in GiB: what it had before it read anything of the data, and the most."""

    before: float
    highest: float


def measure_memory(config: MemoryConfig) -> Iterator[Measured]:
    """The peak at each size against that at the first, and what of it is not libraries."""
    peaks = [in_new_process(_trained, config, size) for size in config.states_gib]
    for size, peak in zip(config.states_gib[1:], peaks[1:], strict=True):
        label = f"peak memory of a two-tower worker, {size:g} GiB of states against {config.states_gib[0]:g}"
        yield Measured(label, peaks[0].highest, peak.highest, peak.highest / peaks[0].highest, "≤ 1.1", "GiB")
        above = peak.highest - peak.before
        label = f"the same above libraries, of 2 GiB, {size:g} GiB of states"
        yield Measured(label, 2.0, above, above / 2.0, "≤ 1", "GiB")


def _trained(config: MemoryConfig, size: float) -> Peak:
    """The peak of an epoch on so many GiB of states."""
    with tempfile.TemporaryDirectory(prefix="states-") as folder:
        inputs = in_new_process(make_inputs, config, size, Path(folder))
        # All that a worker of any size loads: what comes on top is its model and its data.
        import deepspeed
        import open_clip
        import transformers

        from jobs.studies.study import start_alone, train

        del deepspeed, open_clip, transformers
        start_alone()
        before = highest_bytes() / GIB
        settings = TwoTowerConfig(
            epochs=1,
            batch_size=256,
            width=64,
            num_references=0,
            cache_gib=config.cache_gib,
            threads=config.threads,
            trackers=(),
        )
        train(TwoTowerStage, settings, inputs, Path(folder) / "model")
        return Peak(before, highest_bytes() / GIB)


def make_inputs(config: MemoryConfig, size: float, folder: Path) -> dict[str, str]:
    """The stage's inputs: states of `size` GiB, a picture a question, two checkpoints."""
    import torch

    from jobs.benches.two_tower import pictures, small_tower

    torch.manual_seed(0)
    num_bytes = 2 * 2 * config.steps * config.hidden_size  # of a solution: states and summaries in bfloat16
    number = max(4, round(size * GIB / num_bytes / config.solutions))
    table = _states(config, number, folder)
    files = states_files([table])
    places: dict[str, list[list[int]]] = {}
    for part in located_states(files):
        for row in part.to_pylist():
            places.setdefault(row["question_id"], []).append(row["place"])
    rows: list[dict[str, object]] = []
    for question, of_question in sorted(places.items()):
        uri = folder / f"{question}.png"
        pictures(1, int(question[1:]))[0].save(uri)
        rows.append(
            {
                "question_id": question,
                "diagnosis": "",
                "image_uris": [str(uri)],
                "reference_uris": [],
                "solution_ids": [f"{question}-{i}" for i in range(config.solutions)],
                "correct": [i % 2 == 0 for i in range(config.solutions)],
                "targets": [[float(i % 2 == 0)] * config.steps for i in range(config.solutions)],
                "places": of_question,
            }
        )
    inputs = {"text_prm": str(_text_tower(config, folder / "text")), "image_tower": small_tower(folder / "tower")}
    for name, content in (("questions", pa.Table.from_pylist(rows, schema=SCHEMA)), ("files", files)):
        inputs[name] = str(folder / f"{name}.parquet")
        pq.write_table(content, inputs[name], row_group_size=64)
    return inputs


def _states(config: MemoryConfig, number: int, folder: Path) -> Table:
    """The table states of so many questions, four of them in a part file."""
    import torch

    table = Table(str(folder / "states"), States)
    table.prepare()
    noise = torch.randn(config.solutions * config.steps + number, config.hidden_size).to(torch.bfloat16)
    for start in range(0, number, 4):
        rows: list[dict[str, object]] = []
        for question in range(start, min(start + 4, number)):
            rows.append({"question_id": f"q{question:06}", "states": _entries(config, question, noise)})
        table.write_part(pa.Table.from_pylist(rows), "question_id", "states")
    origin = Provenance(name="states", fingerprint="bench", config={}, upstream={})
    table.finish(origin, "question_id", [f"q{question:06}" for question in range(number)], 0.0)
    return table


def _entries(config: MemoryConfig, question: int, noise: "Tensor") -> list[dict[str, object]]:
    from medmm_ray.reward_model.states import to_bytes

    entries: list[dict[str, object]] = []
    for solution in range(config.solutions):
        # Another stretch of the same noise for each.
        start = question + solution * config.steps
        states = to_bytes(noise[start : start + config.steps])
        entries.append(
            {
                "question_id": f"q{question:06}",
                "solution_id": f"q{question:06}-{solution}",
                "model": "bench",
                "evidence_hash": "",
                "num_steps": config.steps,
                "hidden_size": config.hidden_size,
                "dtype": "bfloat16",
                "states": states,
                "summaries": states,
                "text_log_odds": [0.0] * config.steps,
                "error": None,
            }
        )
    return entries


def _text_tower(config: MemoryConfig, folder: Path) -> Path:
    """A reward model of the width, and of nothing else: one narrow block."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from jobs.benches.models import tokenizer
    from medmm_ray.reward_model import RewardModel

    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=config.hidden_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=32,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(shape)  # type: ignore[no-untyped-call]
    model = model.to(torch.bfloat16)
    RewardModel(model, tokenizer(VOCABULARY)).save_pretrained(folder)
    return folder
