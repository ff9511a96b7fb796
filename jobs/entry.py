"""What an entry point does with its words: arguments, ``--help``, one readable sentence for a fault."""

import argparse
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from jobs.graph import BY_NAME, Step
from jobs.recipe import Recipe
from jobs.settings_help import all_settings, overview
from jobs.step import Run, load_recipe, run_step
from medmm_ray.config import Config, ConfigError

log = logging.getLogger("medmm_ray")


def parser(name: str, what: str) -> argparse.ArgumentParser:
    """The arguments of ``python -m jobs.<name>``."""
    parser = argparse.ArgumentParser(
        f"python -m jobs.{name}", description=what, add_help=False, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", help="a recipe, e.g. jobs/recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="a setting that the recipe does not have")
    parser.add_argument("-h", "--help", action="store_true", help="the settings that most runs change")
    parser.add_argument("--help-all", action="store_true", help="every setting, its type and default")
    return parser


def add_range(arguments: argparse.ArgumentParser) -> None:
    """Add ``--from`` and ``--until``, which name a range of steps."""
    arguments.add_argument("--from", dest="first", metavar="STEP", help=f"first step: {', '.join(BY_NAME)}")
    arguments.add_argument("--until", dest="last", metavar="STEP", help="last step")


def read_arguments(arguments: argparse.Namespace, section: str | None) -> Recipe:
    """The recipe that parsed arguments name; names without a section are settings of `section`."""
    words = [arguments.recipe, *arguments.overrides] if arguments.recipe else []
    return load_recipe(words, section)


def main(name: str, words: Sequence[str] | None = None) -> int:
    """``python -m jobs.<name> recipe.yaml name=value``: run one step in a Ray session of its own."""
    step = BY_NAME[name]
    arguments = parser(name, step.what)
    return launch(arguments, words, lambda parsed: _main(step, parsed), Recipe, name)


def _main(step: Step, arguments: argparse.Namespace) -> int:
    from medmm_ray.session import session

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run = Run(read_arguments(arguments, step.name))
    if run.is_complete(step):
        log.info("%s: complete already", step.name)
        run.point(step)
    else:
        from jobs.preflight import require

        require(run, [step], lambda note: log.info("note: %s", note))
        with session():
            run_step(run, step)
    for output in run.outputs(step):
        log.info("%s: %s", output, run.uri(output))
    return 0


def launch(
    arguments: argparse.ArgumentParser,
    words: Sequence[str] | None,
    work: Callable[[argparse.Namespace], int],
    config: type[Config] | None = None,
    section: str | None = None,
) -> int:
    """An entry point: ``--help`` prints its arguments and `config`'s settings; otherwise `work` is done, `guarded`.

    ``--help`` is one screen, ``--help-all`` has every setting.
    """
    parsed = arguments.parse_intermixed_args(words)
    if parsed.help or parsed.help_all:
        describe = all_settings if parsed.help_all else overview
        settings = describe(config, section) if config else ""
        print(f"{arguments.format_help()}\n{settings}".rstrip())
        return 0
    return guarded(lambda: work(parsed))


def guarded(work: Callable[[], int]) -> int:
    """Run an entry point; a fault ends in one readable sentence and a code, the whole trace in a file."""
    try:
        return work()
    except KeyboardInterrupt:
        print("\ninterrupted; what is written is kept: run the same command again to resume", file=sys.stderr)
        return 130
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # noqa: BLE001 - the outermost frame of the program
        trace = Path(tempfile.gettempdir()) / f"medmm_ray-error-{os.getpid()}.log"
        trace.write_text(traceback.format_exc())
        print(f"error: {root_cause(error)}\n(the whole trace is in {trace})", file=sys.stderr)
        return 1


OURS = "medmm_ray."
# The first "module.Error: words" of a trace: Ray keeps an error that crossed a stage only as text.
_RAISED = re.compile(
    r"^(?P<kind>[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt)): (?P<words>.+?)(?:\n\n|\Z)", re.M | re.S
)


def root_cause(error: BaseException) -> str:
    """The message of the outermost error of ours in the chain, else of the innermost; Ray's wrapping is taken off.

    An error of ours says what happened and what to do; of others the name of their class says part of it.
    """
    # Down the chain to the first error that says something: ours, or the last one that is no mark of Ray Data's.
    while (inner := error.__cause__) is not None and not _is_ours(error) and not _is_a_mark(inner):
        error = inner
    text = str(error)
    raised = None
    if type(error).__name__ == "ActorDiedError":  # an engine that could not start: its last line says why
        text = text.strip().splitlines()[-1].strip()
        raised = _RAISED.match(text)
    elif "Ray" in type(error).__name__:
        raised = _first_raised(text)
    kind, words = (raised["kind"], raised["words"]) if raised else (_kind(error), text)
    return words if kind.startswith(OURS) else f"{kind.rpartition('.')[2]}: {words}"


def _first_raised(trace: str) -> re.Match[str] | None:
    """The first error of ours in the text of a trace, else the first of any kind."""
    errors = list(_RAISED.finditer(trace))
    for error in errors:
        if error["kind"].startswith(OURS):
            return error
    return errors[0] if errors else None


def _kind(error: BaseException) -> str:
    return f"{type(error).__module__}.{type(error).__name__}"


def _is_ours(error: BaseException) -> bool:
    return _kind(error).startswith(OURS)


def _is_a_mark(error: BaseException) -> bool:
    """Whether Ray Data only marks by it what kind of error came before it."""
    return type(error).__module__ == "ray.data.exceptions" and not str(error)
