"""The images' files, read instruction by instruction."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

from cluster.lint.project import Project, Rule

CODE = {"medmm_ray", "jobs"}
KEPT_OUT = (".git", ".venv", "runs/quickstart/report.json", "tests", "shared", ".env")


@dataclass(frozen=True)
class Dockerfile:
    """An image's file."""

    path: Path

    @property
    def kind(self) -> str:
        """The kind of environment that the image holds, which its name ends with."""
        return self.path.suffix[1:]

    @cached_property
    def instructions(self) -> list[tuple[str, str]]:
        """Each instruction with its words, continued lines joined."""
        lines = [line for line in self.path.read_text().splitlines() if not line.lstrip().startswith("#")]
        joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
        return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines() if line.strip()]

    def words(self, instruction: str) -> list[str]:
        """The words of every instruction of a name, in order."""
        return [words for name, words in self.instructions if name == instruction]

    def place(self, instruction: str, pattern: str) -> int | None:
        """Where the first such instruction stands whose words match."""
        for place, (name, words) in enumerate(self.instructions):
            if name == instruction and re.search(pattern, words):
                return place
        return None


def ignores(project: Project, path: str) -> bool:
    """Whether .dockerignore keeps a path from the builder: of the lines that match, the last one says."""
    file = project.root / ".dockerignore"
    ignored = False
    for line in file.read_text().splitlines() if file.is_file() else []:
        pattern = line.strip().removeprefix("!").strip("/")
        if pattern and not line.startswith("#") and _covers(pattern, path):
            ignored = not line.strip().startswith("!")
    return ignored


def _covers(pattern: str, path: str) -> bool:
    parts = path.split("/")
    parents = ["/".join(parts[:number]) for number in range(1, len(parts) + 1)]
    return any(fnmatch(parent, pattern.removeprefix("**/")) for parent in parents)


# Rules


def pins_its_base(file: Dockerfile, _: Project) -> Iterator[str]:
    """The base is named by its digest: a tag is another image next month."""
    for base in file.words("FROM"):
        if not re.search(r"@sha256:[0-9a-f]{64}$", base):
            yield f"FROM {base}"


def installs_the_lock(file: Dockerfile, _: Project) -> Iterator[str]:
    """Packages come from the lock of the image's kind, by setup.sh, with the launcher and without what tests need."""
    (setup,) = [words for words in file.words("RUN") if "setup.sh" in words] or [""]
    if f"cluster/local/setup.sh {file.kind} launcher -dev" not in setup:
        yield f"no RUN has cluster/local/setup.sh {file.kind} launcher -dev"
    if "PIP_NO_CACHE_DIR=1" not in setup:
        yield "pip's cache stays in the layer: PIP_NO_CACHE_DIR=1 is not set"
    for words in file.words("RUN"):
        if "pip install" in words:
            yield "a bare pip install is not pinned"


def installs_before_it_copies_the_code(file: Dockerfile, _: Project) -> Iterator[str]:
    """A change of the code leaves the layer of the packages as it is."""
    setup = file.place("RUN", "setup.sh")
    for place, (name, words) in enumerate(file.instructions):
        if name == "COPY" and CODE & set(words.split()) and (setup is None or place < setup):
            yield f"COPY {words} stands before the packages"


def copies_what_there_is(file: Dockerfile, project: Project) -> Iterator[str]:
    """What is copied exists and reaches the builder."""
    for words in file.words("COPY"):
        for source in words.split()[:-1]:
            if not (project.root / source).exists():
                yield f"{source} does not exist"
            elif ignores(project, source):
                yield f"{source} is kept from the builder by .dockerignore"


def sends_nothing_else_to_the_builder(_: Dockerfile, project: Project) -> Iterator[str]:
    """.dockerignore keeps runs, environments and history out of the context."""
    for path in KEPT_OUT:
        if not ignores(project, path):
            yield f"{path} is sent to the builder"


def writes_a_bill_of_materials(file: Dockerfile, project: Project) -> Iterator[str]:
    """The image lists what it holds, and its build command attests it."""
    if file.place("RUN", r"cluster/local/sbom\.sh") is None or not (project.cluster / "local" / "sbom.sh").is_file():
        yield "no RUN has cluster/local/sbom.sh"
    if "--sbom=true" not in file.path.read_text():
        yield "the build command at the top lacks --sbom=true"


def finds_ray_in_a_login_shell(file: Dockerfile, _: Project) -> Iterator[str]:
    """A login shell, in which the launcher runs everything, finds Ray: /etc/profile sets PATH anew."""
    if file.place("RUN", r"export PATH=/opt/medmm_ray/\.venv/bin:\$PATH' > /etc/profile\.d/\w+\.sh") is None:
        yield "nothing in /etc/profile.d puts /opt/medmm_ray/.venv/bin on the PATH"


def runs_as_nobody_special(file: Dockerfile, _: Project) -> Iterator[str]:
    """The image's user is ray (1000), who owns the folders that volumes are mounted at."""
    if file.words("USER") != ["ray"] or file.instructions[-1] != ("USER", "ray"):
        yield f"USER {file.words('USER')}, expected ray, at the end"
    folders = " ".join(file.words("RUN"))
    if not re.search(r"useradd .*--uid 1000 ray && mkdir /runs /cache && chown ray /runs /cache", folders):
        yield "/runs and /cache are not the user's"


def asks_for_the_token(file: Dockerfile, _: Project) -> Iterator[str]:
    """Ray in the image asks for a token unless it is told otherwise."""
    if not any("RAY_AUTH_MODE=token" in words for words in file.words("ENV")):
        yield "ENV lacks RAY_AUTH_MODE=token"


def differs_in_what_a_gpu_needs(file: Dockerfile, project: Project) -> Iterator[str]:
    """The images differ in the kind of environment and NVIDIA's variables alone."""
    plain = set()
    for path in project.dockerfiles:
        instructions = Dockerfile(path).instructions
        text = "\n".join(f"{name} {words}" for name, words in instructions).replace(
            f"setup.sh {path.suffix[1:]}", "setup.sh"
        )
        plain.add(re.sub(r"NVIDIA_\w+=\S+ ", "", text))
    if len(plain) > 1:
        yield f"{file.path.name} differs in more"


RULES: tuple[Rule[Dockerfile], ...] = (
    pins_its_base,
    installs_the_lock,
    installs_before_it_copies_the_code,
    copies_what_there_is,
    sends_nothing_else_to_the_builder,
    writes_a_bill_of_materials,
    finds_ray_in_a_login_shell,
    runs_as_nobody_special,
    asks_for_the_token,
    differs_in_what_a_gpu_needs,
)
