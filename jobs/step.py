"""What a step's entry needs of its run: the recipe, the tables by name, and `make` (resumable writing)."""

import logging
import operator
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.checkpoint_names import with_followed_names
from jobs.graph import MAKER, STEPS, Step
from jobs.placement import sized_by_cluster, with_placement
from jobs.recipe import Recipe
from medmm_ray.config import ConfigError, digest, identity, load
from medmm_ray.data import tries
from medmm_ray.data.artifacts import delete_folder
from medmm_ray.data.handover import Handover
from medmm_ray.data.sorted_rows import SortedRows, sort_rows
from medmm_ray.data.tables import (
    LOOKUPS,
    Artifact,
    Manifest,
    Provenance,
    Table,
    TableError,
    chosen,
    filesystem,
    pending,
    write_rows,
)
from medmm_ray.engines.llm.access import Apis
from medmm_ray.engines.vllm_engine import VllmEngine

if TYPE_CHECKING:
    from ray.data import Dataset

log = logging.getLogger("medmm_ray")


class Run:
    """A recipe's run: where each table and artifact lies, under the fingerprint of what it is made from.

    Without `asks_stores` names of checkpoints that are URIs are not looked up.
    """

    def __init__(self, recipe: Recipe, asks_stores: bool = True) -> None:
        if not recipe.run:
            raise ConfigError("'run' is required: the output folder, e.g. run=runs/mine")
        # A name such as <run>/two_tower may stand for another result tomorrow, and the fingerprints with it.
        self.recipe = with_followed_names(with_placement(recipe), asks_stores)
        # Workers may have another working folder, so a local path is made absolute.
        self.root = recipe.run.rstrip("/") if "://" in recipe.run else str(Path(recipe.run).absolute())
        self._fingerprints: dict[str, str] = {}

    @property
    def apis(self) -> Apis:
        """How the run reaches models behind APIs, and where it keeps their answers."""
        return Apis(f"{self.root}/api", self.recipe.apis)

    def given(self, name: str) -> str | None:
        """The checkpoint that the recipe names for the artifact `name`, if any."""
        checkpoints: dict[str, str | None] = dict(self.recipe.models)
        return checkpoints.get(name)

    def skipped(self, step: Step) -> bool:
        """Whether a step is left out: because the recipe says so, or because all that it makes is given."""
        return step.name in self.recipe.without or all(self.given(name) is not None for name in step.makes)

    def is_left_out(self, name: str) -> bool:
        """Whether nothing makes the table or artifact `name`, nor is it given."""
        return self.given(name) is None and MAKER[name].name in self.recipe.without

    def upstream(self, step: Step) -> dict[str, str]:
        """What a step reads: each name with the given checkpoint or its maker's fingerprint."""
        names = [name for name in step.reads if not self.is_left_out(name)]
        return {name: self.given(name) or self.fingerprint(MAKER[name]) for name in names}

    def fingerprint(self, step: Step) -> str:
        """Config + upstream + the step's version; not pool sizes, batch sizes or paths."""
        if step.name not in self._fingerprints:
            self._fingerprints[step.name] = digest(step.name, step.version, self.settings(step), self.upstream(step))
        return self._fingerprints[step.name]

    def settings(self, step: Step) -> dict[str, Any]:
        """What of the recipe decides what a step makes: its section, and what it shares with other steps."""
        settings = identity(self.section(step))
        for name in step.shares:
            shared = operator.attrgetter(name)(self.recipe)
            if shared is not None:
                settings[name] = identity(shared)
        return settings

    def section(self, step: Step) -> Any:
        """A step's config: the recipe's section of its name."""
        return getattr(self.recipe, step.name)

    def uri(self, name: str) -> str:
        """Where a table or artifact of the run lies."""
        return f"{self.root}/{name}/{self.fingerprint(MAKER[name])}"

    def model(self, name: str) -> str:
        """The checkpoint that the recipe names, else the run's own, which must be complete."""
        checkpoint = self.given(name)
        if checkpoint is None:
            self.artifact(name).manifest()  # raises where it is not complete
        return checkpoint or self.uri(name)

    def model_id(self, name: str) -> str:
        """What tables call a model: its given name, or the run's own with its fingerprint."""
        return self.given(name) or f"{name}@{self.fingerprint(MAKER[name])}"

    def policy_id(self, step: Step) -> str:
        """What tables call the policy of a step that draws from it: the model, and the adapter that the step puts on.

        What another policy wrote shows nothing of this one, so solutions and continuations are compared by it.
        """
        model, engine = self.model_id("policy"), self.section(step).engine
        adapter = engine.lora if isinstance(engine, VllmEngine) else None
        return model if adapter is None else f"{model}+{adapter}"

    def table(self, name: str) -> Table:
        """A table of the run, whether it is there or not."""
        record = MAKER[name].makes[name]
        assert record is not None, f"{name} is not a table"
        return Table(self.uri(name), record)

    def artifact(self, name: str) -> Artifact:
        """An artifact of the run, or a table as one, whether it is there or not."""
        return Artifact(self.uri(name))

    def outputs(self, step: Step) -> dict[str, Artifact]:
        """The tables and artifacts that a step makes, by name."""
        return {name: self.table(name) if record else self.artifact(name) for name, record in step.makes.items()}

    def is_complete(self, step: Step) -> bool:
        """Whether all that a step makes is there."""
        return all(output.is_complete for output in self.outputs(step).values())

    def point(self, step: Step) -> None:
        """Let the stable names of all that a step has made stand for what this recipe makes."""
        for output in self.outputs(step).values():
            output.point(self.fingerprint(step))

    def manifests(self, step: Step) -> list[Manifest]:
        """The manifests of all that a step has made."""
        return [output.manifest() for output in self.outputs(step).values()]


class Job:
    """One step of a run while it is worked on.

    `waiting` says in a few words what is being waited for, `notes` what is to be shown when the step is done. Through
    `handover` rows go to the step that follows this one, or come from the one that it follows.
    """

    def __init__(self, run: Run, step: Step, handover: Handover | None = None) -> None:
        self.run = run
        self.step = step
        self.recipe = sized_by_cluster(run.recipe)
        self.config = getattr(self.recipe, step.name)
        self.handover = handover
        self.waiting = "starting"
        self.notes: list[str] = []
        self._table_in_progress: tuple[Table, int] | None = None  # and its rows when it is whole
        self._artifact_in_progress: str | None = None  # its folder
        self._last_commit = time.monotonic()

    def origin(self, name: str) -> Provenance:
        """What the manifest of an output says of where it comes from."""
        return Provenance(
            name=name,
            fingerprint=self.run.fingerprint(self.step),
            config=self.run.settings(self.step),
            upstream=self.run.upstream(self.step),
        )

    def table(self, name: str) -> Table:
        """A table of the run."""
        return self.run.table(name)

    def read(self, name: str, columns: Sequence[str] | None = None) -> "pa.Table":
        """A table of the run, whole, in memory: for the small ones; one without rows where its step is left out."""
        table = self.run.table(name)
        if self.run.is_left_out(name):
            empty = table.schema.empty_table()
            return empty if columns is None else empty.select(list(columns))
        return table.to_arrow(columns)

    def read_all(self, names: Sequence[str], columns: Sequence[str] | None = None) -> "list[pa.Table]":
        """`read` of each of the names, in their order."""
        return [self.read(name, columns) for name in names]

    def stream(self, name: str, columns: Sequence[str] | None = None) -> "Iterable[pa.Table]":
        """A table of the run part by part, for what grows with the questions; no part where its step is left out."""
        return () if self.run.is_left_out(name) else self.run.table(name).stream(columns)

    def stream_all(self, names: Sequence[str], columns: Sequence[str] | None = None) -> "Iterable[pa.Table]":
        """`stream` of each of the names, one after another; once."""
        return chain.from_iterable(self.stream(name, columns) for name in names)

    def rows_where(
        self,
        name: str,
        column: str,
        values: Sequence[str] | pa.Array,
    ) -> pa.Table:
        """The rows of a table with one of `values` in a column: they alone are held, whatever the size of the table."""
        rows = [self.run.table(name).schema.empty_table()]
        for part in self.stream(name):
            is_among = pc.is_in(part[column], pa.array(values, pa.string()))
            rows.append(part.filter(is_among))
        return pa.concat_tables(rows)

    @contextmanager
    def lookup_folder(self, name: str) -> "Iterator[str]":
        """A folder beside the rows of the table `name`, for what its tasks look up; it goes with the block.

        What a killed driver leaves goes when the table is complete.
        """
        table = self.run.table(name)
        folder = f"{table.uri}/{LOOKUPS}/{uuid.uuid4().hex}"
        fs, path = filesystem(folder)
        try:
            fs.create_dir(path, recursive=True)
            yield folder
        finally:
            delete_folder(fs, path)

    def lookup(
        self,
        name: str,
        columns: Sequence[str],
        folder: str,
        key: str = "question_id",
    ) -> SortedRows:
        """A table of the run with some columns beside `key`, sorted by that into a file in a `lookup_folder`."""
        schema = self.run.table(name).schema
        columns = [key, *columns]
        taken = pa.schema([schema.field(column) for column in columns])
        return sort_rows(self.stream(name, columns), key, taken, f"{folder}/{name}")

    @property
    def run_name(self) -> str:
        """What Ray Train calls this training: the same name continues it, so the fingerprint is part of it."""
        return f"{self.step.name}-{self.run.fingerprint(self.step)}"

    def solutions_of(self, *splits: str, table: str = "solutions") -> "tuple[Dataset, list[str]]":
        """The rows of a table of solutions about some splits' questions, as a dataset, and these questions' ids."""
        questions = self.read("questions", ["question_id", "split"])
        ids = questions.filter(pc.is_in(questions["split"], pa.array(splits)))["question_id"]
        ids = ids.filter(pc.is_in(ids, self.read(table, ["question_id"])["question_id"]))
        return chosen(self.table(table).dataset(rows_per_block=8), "question_id", ids), ids.to_pylist()

    def seconds(self) -> float:
        """Seconds since the step began or since its last output was committed."""
        now = time.monotonic()
        seconds = now - self._last_commit
        self._last_commit = now
        return seconds

    def make(
        self,
        name: str,
        source: "Dataset",
        ids: Iterable[str],
        transform: "Callable[[Dataset], Dataset]",
        key: str,
        explode: str | None = None,
        output_key: str | None = None,
    ) -> None:
        """Make the table `name` from the rows of `source`, one row in and one row out; resumes what was interrupted.

        Args:
            ids: The rows that the table has when it is whole, by their `key`.
            key: Column of `source` that names a row.
            explode: Column of lists in the rows of `transform`, whose entries are the rows of the table.
            output_key: Column that names the row in what `transform` makes, where it is another.
        """
        table = self.run.table(name)
        if table.is_complete:
            return
        table.prepare()
        expected_ids = list(ids)
        self.waiting, self._table_in_progress = f"rows of {name}", (table, len(expected_ids))
        done_ids = table.done_ids()
        if done_ids:
            log.info("%s: %d of %d rows are there, resuming", name, len(done_ids), len(expected_ids))
        output_key = output_key or key
        handover = self.handover if self.handover and self.handover.name == name else None
        if handover:
            handover.begin(table, table.record, table.parts(), output_key, len(expected_ids))
        if set(expected_ids) - done_ids:  # else a run was killed between its last row and the manifest
            rows = transform(pending(source, key, done_ids))
            table.write(rows, output_key, explode, handover.add if handover else lambda _: None)
        if handover:
            handover.flush()
        limit, keeps_parts = self.recipe.max_error_rate, handover is not None
        manifest = table.finish(
            self.origin(name), output_key, expected_ids, self.seconds(), limit, keeps_parts=keeps_parts
        )
        self.report(name, manifest)

    def make_of_each(
        self,
        name: str,
        source: str,
        transform: "Callable[[Dataset], Dataset]",
        key: str,
        explode: str | None = None,
    ) -> None:
        """`make` of the rows of the table `source`; of one that is still being made, as its rows come.

        Raises `TableError` where that one is not completed; what was made of its rows so far stays.
        """
        if self.handover and self.handover.name == source and not self.handover.is_empty:
            self._make_meanwhile(name, self.handover, transform, key, explode)
        table = self.run.table(source)
        ids = table.to_arrow([key])[key].to_pylist()
        # The rest: of a table that came through a handover, rows with an error.
        self.make(name, table.dataset(rows_per_block=32), ids, transform, key, explode)
        table.delete_leftovers()  # the parts stay while they are read

    def _make_meanwhile(
        self,
        name: str,
        handover: Handover,
        transform: "Callable[[Dataset], Dataset]",
        key: str,
        explode: str | None,
    ) -> None:
        table = self.run.table(name)
        if table.is_complete:
            return
        table.prepare()
        done_ids = table.done_ids()
        self.waiting, self._table_in_progress = f"rows of {name}", (table, handover.num_rows)
        table.write(transform(pending(handover.dataset(), key, done_ids)), key, explode)
        if handover.has_failed:
            raise TableError(f"{self.step.name} reads {handover.name}, which was not completed; run again to go on")

    def make_rows(self, name: str, rows: Sequence[Any], key: str, figures: dict[str, float] | None = None) -> None:
        """Make a small table from rows that the driver has; `figures` go into its manifest."""
        table = self.run.table(name)
        if not table.is_complete:
            limit = self.recipe.max_error_rate
            self.report(name, write_rows(table, rows, self.origin(name), key, self.seconds(), limit, figures))

    def make_artifact(self, name: str, write: Callable[[str], dict[str, float]], resumes: bool = False) -> None:
        """Make a folder by ``write(folder)``, which returns figures for its manifest.

        With `resumes` the folder holds what an interrupted run had written to it.
        """
        artifact = self.run.artifact(name)
        if artifact.is_complete:
            return
        manifest = tries.make(artifact, self.origin(name), write, self.seconds, resumes, partial(self._began, name))
        self.report(name, manifest)

    def _began(self, name: str, folder: str) -> None:
        self.waiting, self._table_in_progress, self._artifact_in_progress = name, None, folder

    def report(self, name: str, manifest: Manifest) -> None:
        """Log an output's rows, and its errors by kind."""
        errors = ", ".join(f"{kind} {count}" for kind, count in manifest.errors.items())
        failed = f", {sum(manifest.errors.values())} failed ({errors})" if errors else ""
        log.info("%s: %s rows%s", name, f"{manifest.rows:,}", failed)

    def note(self, line: str) -> None:
        """Note in one line what the step did or took; a pipeline shows it when the step is done."""
        log.info("%s: %s", self.step.name, line)
        self.notes.append(line)

    def progress(self) -> str:
        """What is being waited for, and how far it is: rows of a table, or updates of a training."""
        if self._table_in_progress:
            table, expected = self._table_in_progress
            return f"{self.waiting}: {table.rows_written:,} of {expected:,}"
        from medmm_ray.train.progress import progress_text

        progress = progress_text(self._artifact_in_progress) if self._artifact_in_progress else ""
        return f"{self.waiting}: {progress}" if progress else self.waiting


def run_step(
    run: Run,
    step: Step,
    started: Callable[[Job], None] = lambda _: None,
    handover: Handover | None = None,
) -> None:
    """Run one step in the present Ray session; what it reads must be complete, or come by `handover`.

    `started` is called with its job.
    """
    for name in step.reads:
        maker = MAKER[name]
        comes_by_handover = handover is not None and handover.name == name
        if not run.skipped(maker) and not comes_by_handover and not run.artifact(name).is_complete:
            raise TableError(
                f"{step.name} reads {name}, which is not complete ({run.uri(name)}). Run python -m jobs.{maker.name} "
                f"with the same recipe first, or python -m jobs.pipeline with --until {step.name}"
            )
    job = Job(run, step, handover)
    started(job)
    import_module(f"jobs.{step.name}").run(job)


def load_recipe(words: Sequence[str], section: str | None = None) -> Recipe:
    """A recipe file and ``name=value`` words as the settings of a run."""
    if not words or "=" in words[0]:
        files = (Path(__file__).parent / "recipes").glob("*.yaml")
        shipped = ", ".join(sorted(file.name for file in files))
        raise ConfigError(f"name a recipe file first; jobs/recipes/ has {shipped}")
    return load(Recipe, words[0], words[1:], section)


__all__ = ["STEPS", "Job", "Run", "load_recipe", "run_step"]
