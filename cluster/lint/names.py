"""What any file of cluster/ names of the project, looked up there."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cluster.lint.project import Project, Rule

OURS = re.compile(r"\bMEDMM_[A-Z_]+\b")
RAYS = re.compile(r"\bRAY_[A-Za-z_0-9]+\b")
OPENS_A_PORT = ("EXPOSE", "hostPort", "hostNetwork", "NodePort", "LoadBalancer")
SECRETS = ("AKIA", "PRIVATE KEY", "hf_", "AIza")


@dataclass(frozen=True)
class TextFile:
    """A file as its text."""

    path: Path
    text: str

    @property
    def code(self) -> str:
        """The text without comments, but for commands in them."""
        return "\n".join(re.sub(r"(^|\s)#(?!\s{3}).*", "", line) for line in self.text.splitlines())


def files_of(project: Project) -> list[TextFile]:
    """All texts of cluster/."""
    return [TextFile(path, text) for path, text in project.texts.items()]


@cache
def _variables_that_are_read(root: Path) -> set[str]:
    """The variables of the project's own, wherever its code or its scripts name them."""
    variables: set[str] = set()
    for folder in ("medmm_ray", "jobs", "cluster/local"):
        for path in (root / folder).rglob("*"):
            if path.suffix in (".py", ".sh", ".env"):
                variables.update(OURS.findall(path.read_text()))
    return variables


@cache
def _variables_of_ray() -> set[str]:
    """The variables that the installed Ray reads: its C++ configuration and its Python sources."""
    import ray

    package = Path(ray.__file__).parent
    variables: set[str] = set()
    for line in (package / "includes" / "ray_config.pxd").read_text().splitlines():
        if match := re.search(r"(\w+)\(\) const", line):
            variables.add(f"RAY_{match[1]}")
    for folder in ("_private", "_common", "autoscaler", "scripts", "serve/_private"):
        for path in (package / folder).rglob("*.py"):
            variables.update(RAYS.findall(path.read_text()))
    return variables


# Rules


def names_modules_that_exist(file: TextFile, project: Project) -> Iterator[str]:
    """Every module that a command starts, or an import path names, is there."""
    modules = re.findall(r"python3? -m ((?:jobs|medmm_ray|tests|cluster)[\w.]*)", file.text)
    modules += re.findall(r"import_path: ([\w.]+):", file.text)
    for module in modules:
        path = project.root / module.replace(".", "/")
        if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file():
            yield f"{module} does not exist"


def names_files_that_exist(file: TextFile, project: Project) -> Iterator[str]:
    """Every recipe, script and file of the project that is named is there."""
    for path in re.findall(
        r"(?:/opt/medmm_ray/|(?<![\w/.]))((?:jobs|cluster|docs)/[\w./-]+\.(?:yaml|sh|py|txt|md))", file.text
    ):
        if not (project.root / path).is_file():
            yield f"{path} does not exist"


def names_images_that_are_built(file: TextFile, project: Project) -> Iterator[str]:
    """Every image of ours that is named is built here and has this version."""
    built = {f"medmm-ray:{project.version}-{path.suffix[1:]}" for path in project.dockerfiles}
    for image in re.findall(r"REGISTRY/([\w.:/-]+)", file.text):
        if image not in built:
            yield f"REGISTRY/{image} is none of {', '.join(sorted(built))}"


def names_extras_that_exist(file: TextFile, project: Project) -> Iterator[str]:
    """Every extra that is installed is one of pyproject.toml's."""
    installs = re.findall(r"setup\.sh (?:cpu|gpu)((?: -?[a-z]\w*)*)", file.code)
    extras = {word.removeprefix("-") for words in installs for word in words.split()}
    for words in re.findall(r"extras\+?=([a-z][\w,]*)", file.code):
        extras.update(words.split(","))
    for extra in sorted(extras - project.extras - {"exit"}):
        yield f"{extra} is no extra of pyproject.toml"


def sets_variables_that_are_read(file: TextFile, project: Project) -> Iterator[str]:
    """Every variable of the project's, and of Ray's, is one that something reads."""
    for variable in set(OURS.findall(file.text)) - _variables_that_are_read(project.root) - {"MEDMM_TOKEN"}:
        yield f"nothing reads {variable}"
    for variable in set(RAYS.findall(file.code)) - _variables_of_ray():
        yield f"Ray does not read {variable}"


def opens_nothing_and_holds_no_secret(file: TextFile, _: Project) -> Iterator[str]:
    """No file opens a port to the outside, turns the token off or holds a key."""
    for word in (*OPENS_A_PORT, *SECRETS, "RAY_AUTH_MODE=disabled"):
        if re.search(rf"\b{re.escape(word)}", file.code):
            yield f"{word} stands there"
    if re.search(r"dashboard-host[=:]\W*(?!\W*127\.0\.0\.1)[\w.:]", file.code):
        yield "the dashboard listens on another address than 127.0.0.1"


RULES: tuple[Rule[TextFile], ...] = (
    names_modules_that_exist,
    names_files_that_exist,
    names_images_that_are_built,
    names_extras_that_exist,
    sets_variables_that_are_read,
    opens_nothing_and_holds_no_secret,
)
