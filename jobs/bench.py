"""Measurements against a baseline in the same run: ``python -m jobs.bench scoring [name=value] [json=PATH]``.

Each prints a table and, with ``json=PATH``, writes rows of {name, baseline, ours, ratio, target, unit}.
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.table import Table as Grid

from jobs.benches import Measured
from jobs.entry import guarded
from jobs.settings_help import all_settings
from medmm_ray.config import Config, ConfigError, load

BENCHES = (
    "scoring",
    "adaptive",
    "training",
    "two_tower",
    "gguf",
    "answers",
    "near_duplicates",
    "curate",
    "phi",
    "index",
    "embed",
    "retrieve",
    "sampling",
    "judge",
    "sharing",
    "monte_carlo",
    "resume",
    "files",
    "tree_search",
    "evaluate",
    "serve",
    "attack",
    "scale",
)
# Finished ones: no claim of today rests on them, but their figures can be measured again.
STUDIES = ("arms",)


def main(words: Sequence[str] | None = None) -> int:
    """``python -m jobs.bench``."""
    arguments = list(sys.argv[1:] if words is None else words)
    return guarded(lambda: _main(arguments))


def _main(words: list[str]) -> int:
    if not words or words[0] not in BENCHES + STUDIES:
        print(__doc__)
        for name in BENCHES + STUDIES:
            print(f"  {name:<15} {str(_module(name).__doc__).splitlines()[0]}")
        if not words or words[0] in ("-h", "--help"):
            return 0
        raise ConfigError(f"there is no benchmark {words[0]!r}; expected one of {', '.join(BENCHES + STUDIES)}")
    bench = _module(words[0])
    config_type: type[Config] = bench.BenchConfig
    if {"-h", "--help"} & set(words):
        print(f"usage: python -m jobs.bench {words[0]} [name=value ...] [json=PATH]\n\n{all_settings(config_type)}")
        return 0
    # json= is the command's own; all other words are settings of the benchmark.
    settings, paths = [], []
    for word in words[1:]:
        if word.startswith("json="):
            paths.append(word.removeprefix("json="))
        else:
            settings.append(word)
    config = load(config_type, None, settings)
    logging.basicConfig(level=logging.WARNING)
    console = Console() if sys.stdout.isatty() else Console(width=150)
    rows: list[Measured] = []
    for row in bench.measure(config, console):
        rows.append(row)
        console.print(f"[dim]{row.name}: {row.ratio:.3g} ({row.target})[/dim]")
    console.print(table(rows))
    for path in paths:
        Path(path).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return 0


def _module(name: str) -> ModuleType:
    folder = "studies" if name in STUDIES else "benches"
    return import_module(f"jobs.{folder}.{name}")


def table(rows: Sequence[Measured]) -> Grid:
    """The rows as a table for a screen; a missed target is red."""
    grid = Grid("measured", "", box=None, pad_edge=False, header_style="bold")
    for column in ("baseline", "ours", "ratio", "target"):
        grid.add_column(column, justify="right")
    for row in rows:
        style = {True: "green", False: "bold red", None: ""}[row.met]
        ratio = f"[{style}]{row.ratio:.3g}[/]" if style else f"{row.ratio:.3g}"
        grid.add_row(row.name, f"[dim]{row.unit}[/dim]", f"{row.baseline:.4g}", f"{row.ours:.4g}", ratio, row.target)
    return grid


if __name__ == "__main__":
    sys.exit(main())
