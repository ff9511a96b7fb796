"""How densely the code is written: figures of a tree beside the limits that `make check` holds it to.

    python .ci/density.py [FOLDER ...]      # medmm_ray and jobs, held to the limits; any other is only shown
    python .ci/density.py --where FOLDER    # the statements and functions that the figures come from, densest first

A line of code is one that is neither blank, a comment nor part of a docstring. The limits are what readable codebases
of the field keep to.
"""

import ast
import io
import statistics
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Names of locals that say how a value came instead of what it is.
# fmt: off
VAGUE = {
    "found", "own", "said", "told", "asked", "made", "kept", "one", "held", "due", "shown",
    "seen", "given", "wanted", "more", "other", "others", "left", "drawn", "known",
}
# fmt: on
NODES, COMMENTS = "AST nodes a code line", "comments, % of lines"
# The folders that are held to the limits, with those of their own: an entry point prints more than it computes, and
# what it does needs fewer words on why.
HELD: Mapping[str, Mapping[str, float]] = {
    "medmm_ray": {NODES: 5.2, COMMENTS: 3},
    "jobs": {NODES: 5.8, COMMENTS: 1.5},
}
COMPREHENSIONS = (ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Counts:
    """What was counted in a tree; `places` holds what to look at first: (weight, path:line, what)."""

    code_lines: int = 0
    nodes: int = 0
    comprehensions: int = 0
    nested: int = 0
    fmt_skips: int = 0
    comments: int = 0
    lines: int = 0
    locals: int = 0
    vague: Counter[str] = field(default_factory=Counter)
    public: int = 0
    documented: int = 0
    modules: list[int] = field(default_factory=list)
    functions: list[int] = field(default_factory=list)
    places: list[tuple[float, str, str]] = field(default_factory=list)

    def add(self, path: Path) -> None:
        source = path.read_text()
        tree = ast.parse(source)
        docstrings = _docstring_lines(tree)
        lines = source.split("\n")
        code = [n for n, line in enumerate(lines, 1) if _is_code(line) and n not in docstrings]
        self.code_lines += len(code)
        self.lines += len(lines) - 1
        self.modules.append(len(lines) - 1)
        self.fmt_skips += source.count("fmt: skip")
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        self.comments += sum(token.type == tokenize.COMMENT for token in tokens)
        for node in ast.walk(tree):
            self._count(node, path)

    def _count(self, node: ast.AST, path: Path) -> None:
        if isinstance(node, ast.expr | ast.stmt):
            self.nodes += 1
        if isinstance(node, COMPREHENSIONS):
            self.comprehensions += 1
            if len(node.generators) > 1 or any(isinstance(inner, COMPREHENSIONS) for inner in _below(node)):
                self.nested += 1
                self.places.append((1000, f"{path}:{node.lineno}", "nested comprehension"))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            self.locals += 1
            if node.id in VAGUE:
                self.vague[node.id] += 1
                self.places.append((500, f"{path}:{node.lineno}", f"local {node.id!r}"))
        if isinstance(node, DEFINITIONS):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            self.functions.append(length)
            if not node.name.startswith("_"):
                self.public += 1
                self.documented += ast.get_docstring(node) is not None
            per_line = sum(isinstance(inner, ast.expr | ast.stmt) for inner in _below(node)) / length
            self.places.append((per_line, f"{path}:{node.lineno}", f"{node.name}: {per_line:.1f} nodes a line"))


@dataclass(frozen=True)
class Figure:
    """A measured value, and the bounds that it is held to."""

    name: str
    value: float
    most: float = float("inf")
    least: float = 0.0

    @property
    def met(self) -> bool:
        return self.least <= self.value <= self.most

    @property
    def bounds(self) -> str:
        limits = [f"≥ {self.least:g}"] if self.least else []
        limits += [f"≤ {self.most:g}"] if self.most < float("inf") else []
        return ", ".join(limits)


def figures(counts: Counts, folder: str) -> list[Figure]:
    """The figures of a folder, in the order in which they are shown."""
    limits = HELD.get(folder, HELD["medmm_ray"])
    thousands = counts.code_lines / 1000
    return [
        Figure(NODES, counts.nodes / counts.code_lines, most=limits[NODES]),
        Figure("comprehensions per 1,000 code lines", counts.comprehensions / thousands, most=30),
        Figure("nested comprehensions per 1,000 code lines", counts.nested / thousands, most=0.5),
        Figure("vague locals, %", 100 * counts.vague.total() / max(counts.locals, 1), most=0.5),
        Figure("fmt: skip", counts.fmt_skips, most=10),
        Figure(COMMENTS, 100 * counts.comments / counts.lines, least=limits[COMMENTS], most=6),
        Figure("public functions with a docstring, %", 100 * counts.documented / max(counts.public, 1), least=90),
        Figure("module lines, median", statistics.median(counts.modules), most=200),
        Figure("module lines, 90th percentile", _p90(counts.modules), most=450),
        Figure("function lines, median", statistics.median(counts.functions or [0]), most=12),
        Figure("function lines, 90th percentile", _p90(counts.functions or [0]), most=30),
    ]


def _p90(values: Sequence[int]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]


def _below(node: ast.AST) -> Iterator[ast.AST]:
    return (inner for inner in ast.walk(node) if inner is not node)


def _is_code(line: str) -> bool:
    stripped = line.strip()
    return bool(stripped) and not stripped.startswith("#")


def _docstring_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or not node.body:
            continue
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            lines.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def main(words: Sequence[str]) -> int:
    """Print the figures of each folder; 1 where one that is held to the limits misses one."""
    where = "--where" in words
    folders = [word for word in words if word != "--where"] or list(HELD)
    missed = False
    for folder in folders:
        root = Path(folder)
        counts = Counts()
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            counts.add(path)
        print(f"{folder}: {counts.code_lines:,} lines of code")
        for figure in figures(counts, folder):
            mark = "" if figure.met else "  <- missed"
            print(f"  {figure.name:<44} {figure.value:7.1f}   {figure.bounds}{mark}")
            missed |= folder in HELD and not figure.met
        if where:
            for _, place, what in sorted(counts.places, reverse=True)[:60]:
                print(f"  {place}  {what}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
