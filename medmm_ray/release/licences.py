"""On what terms each source of a run may be passed on, and which of its rows come from it.

Enters: the run's questions, images and evidence, and the declarations of data sets (`medmm_ray.data.datasets`). Leaves:
for every data set and corpus its terms and what rests on it, or a `LicenceError` that says what may not be released.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from medmm_ray.config import ConfigError
from medmm_ray.data.datasets import data_sets
from medmm_ray.data.sources import WITHOUT_FILES
from medmm_ray.data.sources.phantom import DOCUMENTS
from medmm_ray.data.tables import filesystem
from medmm_ray.release.config import ReleaseConfig
from medmm_ray.steps.export import Exclusion
from medmm_ray.steps.ingest import IngestConfig
from medmm_ray.steps.write_questions import SOURCE as WRITTEN

UNNAMED = "unnamed"
"""The corpus of documents that name none."""
NUM_EXAMPLES = 3
ACCESS = {
    "agreement": "whoever gets it has to accept its terms first",
    "credentialed": "only holders of an account that is checked may read it",
}


class LicenceError(ConfigError):
    """A public release of what its sources do not let be passed on."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The terms of a data set or a corpus; `licence_id` as the hub spells it, empty where it is none of the hub's."""

    name: str
    title: str
    licence: str
    licence_id: str
    access: str = "open"
    hub_id: str = ""
    get: str = ""
    made_here: bool = False

    @property
    def faults(self) -> list[str]:
        """What speaks against a public release."""
        if self.made_here:
            return []
        faults = []
        # Each is told: leaving out one cause would bring up the next.
        if self.access in ACCESS:
            faults.append(ACCESS[self.access])
        # As in cc-by-nc-nd-4.0.
        if "nd" in self.licence_id.split("-"):
            faults.append("its licence forbids derivatives, as labelled solutions of it are")
        if not self.licence:
            faults.append("its licence is not declared")
        elif not self.licence_id:
            faults.append("its licence is not one that lets everybody pass it on")
        return faults


@dataclass
class SourceUse:
    """The terms of a source, and what of a run rests on it."""

    terms: Terms
    question_ids: list[str] = field(default_factory=list)
    """Questions of it, or about a picture of it."""
    num_shown: int = 0
    """Other questions that have a document or a reference picture of it among their evidence."""

    @property
    def rows(self) -> str:
        """What rests on it, in words, with some ids."""
        parts = []
        if self.question_ids:
            shown = ", ".join(self.question_ids[:NUM_EXAMPLES])
            rest = ", …" if len(self.question_ids) > NUM_EXAMPLES else ""
            parts.append(f"{len(self.question_ids):,} questions ({shown}{rest})")
        if self.num_shown:
            parts.append(f"evidence of {self.num_shown:,} questions")
        return " and ".join(parts)


@dataclass(frozen=True)
class Origins:
    """Where a run's rows come from: its sources by name, and the source of each image."""

    sources: Mapping[str, SourceUse]
    source_of_image: Mapping[str, str]

    def released(self, exclude: Sequence[str]) -> list[SourceUse]:
        """The sources of what stays when some are excluded."""
        return [use for name, use in self.sources.items() if name not in exclude]

    def exclusion(self, exclude: Sequence[str]) -> Exclusion:
        """What stays behind."""
        question_ids: set[str] = set()
        for name in exclude:
            question_ids.update(self.sources[name].question_ids)
        image_ids = {image_id for image_id, source in self.source_of_image.items() if source in exclude}
        corpora = {"" if name == UNNAMED else name for name in exclude}
        return Exclusion(
            question_ids=frozenset(question_ids),
            corpora=frozenset(corpora),
            image_ids=frozenset(image_ids),
        )


@dataclass(frozen=True)
class Declarations:
    """What is known of the sources of a run: licences that its author names, and what the run makes itself."""

    licences: Mapping[str, str]
    made_here: frozenset[str]

    @classmethod
    def of(cls, ingest: IngestConfig, licences: Mapping[str, str]) -> "Declarations":
        """Those of a run: drawn cases with their documents, and questions that a model wrote, are its own."""
        made_here = {*WITHOUT_FILES, WRITTEN}
        # Another corpus may be called as one of the drawn cases': then all have to be declared.
        if not ingest.documents and not set(ingest.names) - set(WITHOUT_FILES):
            made_here.update(document.corpus for document in DOCUMENTS)
        return cls(licences, frozenset(made_here))

    def terms(self, name: str) -> Terms:
        """The terms of a data set or corpus: as the author says, else as declared, else unknown."""
        declared = data_sets().get(name)
        licence = self.licences.get(name)
        if declared:
            # What the author says of a licence does not open what is closed.
            return Terms(
                name=name,
                title=declared.title,
                licence=licence or declared.licence,
                licence_id=licence or declared.licence_id,
                access=declared.access,
                hub_id=declared.hub,
                get=declared.get,
            )
        if licence is None and name in self.made_here:
            return Terms(name=name, title=name, licence="made by this run", licence_id="", made_here=True)
        return Terms(name=name, title=name, licence=licence or "", licence_id=licence or "")


def origins(
    questions: pa.Table,
    images: pa.Table,
    evidence: Iterable[pa.Table],
    ingest: IngestConfig,
    declarations: Declarations,
) -> Origins:
    """The sources of a run's usable questions, of their pictures and of their evidence; `evidence` comes in parts."""
    source_of_image = _sources_of_images(images, ingest)
    sources: dict[str, SourceUse] = {}

    def use_of(name: str) -> SourceUse:
        if name not in sources:
            sources[name] = SourceUse(declarations.terms(name))
        return sources[name]

    # By question: what its own text and pictures come from.
    own_sources: dict[str, set[str]] = {}
    columns = ["question_id", "source", "dataset", "image_ids", "error"]
    for row in questions.select(columns).sort_by("question_id").to_pylist():
        if row["error"] is not None:
            continue
        names = {row["source"]}
        # A collection's declaration speaks for parts of it that have none of their own.
        dataset = row["dataset"]
        if dataset and (declarations.terms(dataset).licence or not declarations.terms(row["source"]).licence):
            names.add(dataset)
        for image_id in row["image_ids"]:
            names.add(source_of_image.get(image_id) or row["source"])
        own_sources[row["question_id"]] = names
        for name in sorted(names):
            use_of(name).question_ids.append(row["question_id"])
    for part in evidence:
        for row in part.select(["question_id", "documents", "images"]).to_pylist():
            if row["question_id"] not in own_sources:
                continue
            shown = {document["corpus"] or UNNAMED for document in row["documents"]}
            for image in row["images"]:
                shown.add(source_of_image.get(image["image_id"], ""))
            # What a question is itself made of is counted with it.
            for name in sorted(shown - own_sources[row["question_id"]] - {""}):
                use_of(name).num_shown += 1
    return Origins(sources, source_of_image)


def _sources_of_images(images: pa.Table, ingest: IngestConfig) -> dict[str, str]:
    """The source of each image by where it lies; images of a place that is no source's are not among them.

    A picture that a source draws, or takes out of a table, lies in a folder of the source's name in the run.
    """
    folders = {source.name: filesystem(source.path)[1].rstrip("/") for source in ingest.sources if source.path}
    found: dict[str, str] = {}
    for row in images.select(["image_id", "uri"]).to_pylist():
        path = filesystem(row["uri"])[1]
        for source in ingest.sources:
            folder = folders.get(source.name)
            lies_in_source = folder is not None and (path == folder or path.startswith(f"{folder}/"))
            if lies_in_source or f"/raw_images/{_drawn_below(path)}/files/{source.name}/" in path:
                found[row["image_id"]] = source.name
    return found


def _drawn_below(path: str) -> str:
    """The fingerprint of the run's images in the path of one that lies in the run; empty for others."""
    return path.partition("/raw_images/")[2].partition("/")[0]


def check(origins_: Origins, config: ReleaseConfig) -> None:
    """Raise `LicenceError` where a public release would pass on what it may not, with the rows and what to do."""
    unknown = [name for name in (*config.exclude, *config.licences) if name not in origins_.sources]
    if unknown:
        raise ConfigError(
            f"release.exclude or release.licences names {unknown[0]!r}, and nothing in this run comes from it; its "
            f"sources are {', '.join(origins_.sources)}"
        )
    if config.private:
        return
    faulty = [use for use in origins_.released(config.exclude) if use.terms.faults]
    if not faulty:
        return
    causes = []
    for use in faulty:
        terms = use.terms
        causes.append(f"{terms.name} ({terms.licence or 'no licence'}): {', '.join(terms.faults)}: {use.rows}")
    names = [use.terms.name for use in faulty]
    advice = [
        f"leave them out with release.exclude=[{', '.join([*config.exclude, *names])}]",
        "or release to those who may read them with release.private=true",
    ]
    # A licence that is known cannot be talked away.
    undeclared = [use.terms.name for use in faulty if not use.terms.licence]
    if undeclared:
        advice.append(f"or say what you know of it: release.licences.{undeclared[0]}=<licence, as cc-by-4.0>")
    raise LicenceError(f"this run cannot be released publicly: {'; '.join(causes)}. {', '.join(advice).capitalize()}")
