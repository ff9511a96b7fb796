"""What importing costs, and which way imports point."""

import ast
import subprocess
import sys
from collections.abc import Mapping, Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from jobs.graph import BY_NAME
from tests.paths import ROOT

PACKAGE = ROOT / "medmm_ray"
HEAVY = (
    "torch",
    "transformers",
    "vllm",
    "faiss",
    "open_clip",
    "deepspeed",
    "ray",
    "sentence_transformers",
    "matplotlib",
    "openai",
    "google.generativeai",
    "gradio",
)

# Lower layers first; a module imports from its own layer and from those below.
LAYERS = (
    ("config", "config_tree", "session", "prompts", "text"),
    ("data", "stats", "estimate"),
    ("engines",),
    ("reward_model",),
    ("steps", "train"),
    ("pages", "service"),
    ("client", "retries", "serve", "release"),
    ("rewards",),
)
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """The part of the package that a module belongs to: medmm_ray.engines.index -> engines."""
    return module.split(".")[1] if "." in module else ""


def step_of(module: str) -> str:
    """The step or the training that a module belongs to: medmm_ray.steps.judge.prompt -> judge; else nothing."""
    parts = module.split(".")
    return {"steps": parts[2] if len(parts) > 2 else "", "train": "train"}.get(room(module), "")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {m for m in found if m.split(".")[0] in ("medmm_ray", "jobs")}


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    me = name_of(path)
    for other in imports(path):
        assert not other.startswith("jobs"), f"{me} imports {other}: the library never imports the jobs"
        if room(me) and room(other):  # the package's own name is everybody's
            assert LAYER_OF[room(other)] <= LAYER_OF[room(me)], f"{me} imports {other}, which lies above it"
        if step_of(me) and step_of(other):
            assert step_of(me) == step_of(other), f"{me} imports {other}: steps meet in tables only"


def modules_imported_by(path: Path, names: Set[str]) -> set[str]:
    """Which of the modules `names` a module imports anywhere: for its types alone, and inside a function, too."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            # ``from package import module`` imports the module.
            full_names = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= {full_name if full_name in names else node.module for full_name in full_names}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    return imported & names


def import_cycle(graph: Mapping[str, Set[str]]) -> list[str]:
    """A cycle in a graph of imports, each module importing the one before it; empty without one."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle: list[str] = error.args[1]
        return cycle
    return []


def test_no_import_goes_in_a_circle_not_even_one_for_types_alone() -> None:
    paths = {name_of(path): path for folder in ("medmm_ray", "jobs") for path in (ROOT / folder).rglob("*.py")}
    graph = {name: modules_imported_by(path, paths.keys()) for name, path in paths.items()}
    assert "medmm_ray.reward_model.model" in graph["medmm_ray.reward_model"], "the graph has imports"
    assert import_cycle(graph) == []


def test_a_circle_hidden_behind_type_checking_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p import b\n")
    (tmp_path / "b.py").write_text("def f():\n    from p.a import x\n")
    graph = {f"p.{name}": modules_imported_by(tmp_path / f"{name}.py", {"p.a", "p.b"}) for name in "ab"}
    assert graph == {"p.a": {"p.b"}, "p.b": {"p.a"}}
    assert sorted(import_cycle(graph)) in (["p.a", "p.a", "p.b"], ["p.a", "p.b", "p.b"])


def test_importing_any_step_loads_no_heavy_library() -> None:
    torch_only = (
        "medmm_ray.reward_model",
        "medmm_ray.engines.image_tower",
        "medmm_ray.engines.onednn_linear",
    )  # they are torch modules
    names = [n for n in map(name_of, modules()) if not n.startswith(torch_only)]
    assert_light(names)


def test_a_pipeline_and_its_submission_start_without_a_heavy_library() -> None:
    assert_light(["jobs.pipeline", "jobs.submit", "jobs.preflight", *(f"jobs.{step}" for step in BY_NAME)])


def assert_light(names: list[str]) -> None:
    """Each module is imported, one after another in a new process, and loads none of `HEAVY`."""
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
    loaded = [heavy for heavy in {HEAVY!r} if heavy in sys.modules]
    assert not loaded, f"{{name}} imports {{loaded}}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_the_reward_model_needs_torch_and_transformers_only() -> None:
    code = """
import sys
for absent in ("ray", "pydantic", "pyarrow", "vllm", "deepspeed", "faiss"):
    sys.modules[absent] = None
import medmm_ray.reward_model
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
