"""``python -m cluster.lint``: what is wrong in cluster/, a line each; 1 where there is anything.

``--rules`` lists the rules.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.lint import dockerfile, kuberay, launcher, names, serving
from cluster.lint.dockerfile import Dockerfile
from cluster.lint.project import Finding, Project, apply, sentence

RULES: dict[str, tuple[Callable[..., Iterator[str]], ...]] = {
    "launcher": launcher.RULES,
    "kuberay": kuberay.RULES,
    "serve": serving.RULES,
    "images": dockerfile.RULES,
    "all files": names.RULES,
}


def files_of(project: Project) -> dict[str, list[Any]]:
    """The files that each kind's rules are for."""
    return {
        "launcher": project.launchers,
        "kuberay": project.manifests,
        "serve": serving.configs_of(project),
        "images": [Dockerfile(path) for path in project.dockerfiles],
        "all files": names.files_of(project),
    }


def findings(project: Project, only: Callable[..., Iterator[str]] | None = None) -> list[Finding]:
    """All that the rules find in a project, or what one of them does; a file that is read in two forms says it once."""
    faults: dict[Finding, None] = {}
    for kind, files in files_of(project).items():
        rules = [rule for rule in RULES[kind] if only in (None, rule)]
        for file in files:
            faults.update(dict.fromkeys(apply(rules, file, file.path, project)))
    return list(faults)


def main(words: Sequence[str], root: Path = Path(__file__).parents[2]) -> int:
    """Print the findings, or the rules; gives the exit status."""
    if "--rules" in words:
        for kind, rules in RULES.items():
            for rule in rules:
                print(f"{kind:<10}{rule.__name__:<42}{sentence(rule)}")
        return 0
    faults = findings(Project(root))
    for fault in faults:
        print(f"{fault.path.relative_to(root)}: {fault.rule}: {fault.words}", file=sys.stderr)
    if not faults:
        print(f"cluster/: {sum(map(len, RULES.values()))} rules hold")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
