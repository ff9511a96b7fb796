"""A finished run -> a folder that can be given away, and the same bytes whenever it is made again.

README.md          the release list: what is there, how far it is, what the author has to say
model/             the checkpoint with its card, figures/ and reports/ of the evaluation
dataset/           Parquet shards, pictures, a card with the datasheet, reports/ of the labels
release.json       what it was made from, and the size and hash of every file
SHA256SUMS         for ``sha256sum -c``; written last: a release that has it is whole
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from medmm_ray.config import ConfigError, JsonObject, digest, identity
from medmm_ray.data.artifacts import delete_folder, files_below, name_below, place_file
from medmm_ray.data.hub import upload
from medmm_ray.data.json_documents import to_json
from medmm_ray.data.tables import Artifact, Manifest, filesystem, read_json, write_file
from medmm_ray.engines.images import open_image
from medmm_ray.pages import dataset_page, svg
from medmm_ray.pages.harness import HarnessRun, eval_results
from medmm_ray.pages.report import charts_of, render
from medmm_ray.release import licences
from medmm_ray.release.checklist import Item, markdown, release_list
from medmm_ray.release.config import ReleaseConfig
from medmm_ray.release.datasheet import Facts, Sheet, datasheet
from medmm_ray.release.licences import Declarations, Origins, origins
from medmm_ray.steps.audit import AuditReport
from medmm_ray.steps.evaluate import EvaluationReport
from medmm_ray.steps.export import Exclusion, ExportConfig, Tables, export
from medmm_ray.steps.export.card import CardText
from medmm_ray.steps.ingest import IngestConfig
from medmm_ray.text.folders import strip_folders

if TYPE_CHECKING:
    from medmm_ray.reward_model.card import Measured

VERSION = 1  # of what a release is made of: raise it when the same run makes something else
SUMS = "SHA256SUMS"
RECORD = "release.json"
CHUNK_BYTES = 1 << 20
CLOSED = (
    "Not all of these are open: whether weights that were trained on them may be published, their terms say, which "
    "whoever released this model has to have read."
)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The run's report, what each question came to, and when it was made (ISO 8601)."""

    report: EvaluationReport
    outcomes: pa.Table
    created: str


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What of a run can be released; what a release does not take, or the run does not have, is None."""

    name: str
    tables: Tables
    manifests: Mapping[str, Manifest]
    """Of all tables and artifacts that are complete, by name."""
    ingest: IngestConfig
    models: Mapping[str, str]
    """The policy and the scorer, by role."""
    checkpoint: str | None
    """Folder or URI of the scorer."""
    evaluation: Evaluation | None
    audit: AuditReport | None


@dataclass(frozen=True)
class Release:
    """Where a release lies, whether it was there before, and what is left to its author."""

    folder: str
    was_complete: bool
    items: Sequence[Item]
    open_questions: Mapping[str, str]


def make(folder: str, run: FinishedRun, config: ReleaseConfig) -> Release:
    """Make the release in `folder`; one that was made from the same run with the same settings stays as it is.

    Raises `LicenceError` before anything is written where its sources do not allow it.
    """
    run_origins = _origins(run, config)
    # First: of what may not be passed on no file is made.
    licences.check(run_origins, config)
    key = _key(run, config)
    record = read_json(f"{folder}/{RECORD}")
    if record is not None and record["key"] == key and _is_whole(folder, record):
        items = [Item(**item) for item in record["items"]]
        return Release(folder, True, items, record["open_questions"])
    fs, path = filesystem(folder)
    if record is None and fs.get_file_info(pafs.FileSelector(path, allow_not_found=True)):
        raise ConfigError(f"{folder} has files and is no release; name another folder (release.to=...)")
    # Of an earlier release nothing stays: a file that this one does not have would be pushed with it.
    delete_folder(fs, path)
    Artifact(folder).prepare()
    exclusion = run_origins.exclusion(config.exclude)
    sheet = Sheet("", {})
    if "dataset" in config.parts:
        sheet = _write_dataset(f"{folder}/dataset", run, config, run_origins, exclusion)
    if "model" in config.parts:
        _write_model(f"{folder}/model", run, config, run_origins, exclusion)
    items = release_list(
        run.audit,
        run.evaluation.report if run.evaluation else None,
        run_origins.released(config.exclude),
        sheet.open_questions,
        run.manifests["solutions"].revision,
        # A table that an earlier version made knows nothing of it.
        run.manifests["questions"].config.get("phi", "off"),
    )
    release = Release(folder, False, items, sheet.open_questions)
    _put(f"{folder}/README.md", _readme(run, config, release).encode())
    _seal(folder, key, release)
    return release


def _origins(run: FinishedRun, config: ReleaseConfig) -> Origins:
    images = run.tables.images
    evidence = run.tables.evidence
    return origins(
        run.tables.questions.to_arrow(),
        images.to_arrow() if images else pa.table({"image_id": [], "uri": []}),
        evidence.stream(["question_id", "documents", "images"]) if evidence else (),
        run.ingest,
        Declarations.of(run.ingest, config.licences),
    )


def _key(run: FinishedRun, config: ReleaseConfig) -> str:
    """What a release is made from: every result of the run, and the settings."""
    # A fingerprint stands for a result and all that it was made from.
    fingerprints = {name: manifest.fingerprint for name, manifest in sorted(run.manifests.items())}
    return digest(VERSION, run.name, fingerprints, dict(run.models), identity(config))


def _is_whole(folder: str, record: JsonObject) -> bool:
    """Whether every file that the record names is there with its size, and the sums too."""
    fs, path = filesystem(folder)
    if not fs.get_file_info(f"{path}/{SUMS}").is_file:
        return False
    sizes = {name_below(path, file.path): file.size for file in files_below(fs, path)}
    return all(sizes.get(name) == entry["bytes"] for name, entry in record["files"].items())


# The dataset


def _write_dataset(
    folder: str, run: FinishedRun, config: ReleaseConfig, run_origins: Origins, exclusion: Exclusion
) -> Sheet:
    """The dataset with its card, and the reports of its labels; gives the datasheet."""
    released = run_origins.released(config.exclude)
    sheets: list[Sheet] = []

    def ending(counts: Mapping[str, int]) -> str:
        """The datasheet, which speaks of what was written."""
        facts = Facts(
            sources=released,
            excluded=[run_origins.sources[name] for name in config.exclude],
            counts=counts,
            manifests=run.manifests,
            models=run.models,
            report=run.audit,
            license=config.license,
            private=config.private,
            push=config.push,
        )
        sheets.append(datasheet(facts, config.answers))
        return sheets[-1].text

    # The hub takes several licences; which rows stand under which, the sheet says.
    ids = {use.terms.licence_id or "other" for use in released if not use.terms.made_here}
    ids.add(config.license or "other")
    made_by = {}
    for name in ("questions", "evidence", "solutions", "judge_labels", "monte_carlo_labels", "expert_labels", "scores"):
        if name in run.manifests:
            made_by[name] = (run.manifests[name].fingerprint, run.manifests[name].config)
    # Copied: an address of this machine would lead nobody to a picture.
    settings = ExportConfig(to=folder, format="hf", images="copy", questions_per_shard=config.questions_per_shard)
    export(run.tables, settings, made_by, exclusion, CardText(tuple(sorted(ids)), ending))
    if run.audit is not None:
        _put(f"{folder}/reports/dataset_report.json", to_json(run.audit))
        _put(f"{folder}/reports/dataset_report.html", dataset_page.render(run.audit).encode())
    return sheets[-1]


# The model


def _write_model(
    folder: str, run: FinishedRun, config: ReleaseConfig, run_origins: Origins, exclusion: Exclusion
) -> None:
    """The checkpoint's files, its card, and the reports and figures of its evaluation."""
    assert run.checkpoint is not None
    assert run.evaluation is not None
    _copy_checkpoint(run.checkpoint, folder)
    # The report's examples show questions and pictures.
    evaluation = _without_excluded(run.evaluation, exclusion)
    report = evaluation.report
    _put(f"{folder}/reports/report.html", render(report, open_image).encode())
    _put(f"{folder}/reports/report.json", to_json(_without_places(report)))
    outcomes = pa.BufferOutputStream()
    pq.write_table(evaluation.outcomes, outcomes)
    _put(f"{folder}/reports/outcomes.parquet", outcomes.getvalue().to_pybytes())
    figures = charts_of(report)
    for name, drawing in figures.items():
        _put(f"{folder}/figures/{name}.svg", svg.standalone(drawing).encode())
    # Data sets without an id on the hub have no leaderboard there.
    hub_ids = {name: use.terms.hub_id for name, use in run_origins.sources.items() if use.terms.hub_id}
    harness = HarnessRun(report, evaluation.outcomes, run.models["policy"], evaluation.created)
    for name, content in eval_results(harness, hub_ids).items():
        _put(f"{folder}/{name}", content)
    _put(f"{folder}/README.md", _model_card(folder, run, config, run_origins, list(figures)).encode())


def _copy_checkpoint(source: str, folder: str) -> None:
    """The checkpoint's files, as second names of them on a disk that has such; what only this run needs stays there."""
    fs, path = filesystem(source)
    target_fs, target = filesystem(folder)
    for file in files_below(fs, path):
        name = name_below(path, file.path)
        # Histories and manifests name places of this machine; the card is written anew.
        if PurePosixPath(name).suffix not in (".json", ".safetensors", ".jinja", ".txt", ".model"):
            continue
        if PurePosixPath(name).name in ("manifest.json", "history.json"):
            continue
        target_fs.create_dir(f"{target}/{name}".rpartition("/")[0], recursive=True)
        # Weights of a large model take no second place on the same disk.
        if isinstance(fs, pafs.LocalFileSystem) and isinstance(target_fs, pafs.LocalFileSystem):
            place_file(fs, f"{path}/{name}", f"{target}/{name}")
        else:
            pafs.copy_files(
                f"{path}/{name}", f"{target}/{name}", source_filesystem=fs, destination_filesystem=target_fs
            )


def _without_excluded(evaluation: Evaluation, exclusion: Exclusion) -> Evaluation:
    """The evaluation without what would show an excluded question; its figures are of all questions."""
    if not exclusion.question_ids:
        return evaluation
    report = evaluation.report
    excluded = pc.is_in(evaluation.outcomes["question_id"], pa.array(sorted(exclusion.question_ids)))
    return replace(
        evaluation,
        report=replace(
            report,
            examples=[example for example in report.examples if example.question_id not in exclusion.question_ids],
            disagreements=[case for case in report.disagreements if case.question_id not in exclusion.question_ids],
            by_question={},
        ),
        outcomes=evaluation.outcomes.filter(pc.invert(excluded)),
    )


def _without_places(report: EvaluationReport) -> EvaluationReport:
    """The report without paths of the machine that made it."""
    examples = []
    for example in (*report.examples, *report.disagreements):
        images = [replace(image, uri=f"images/{image.image_id}") for image in example.images]
        examples.append(replace(example, images=images))
    number = len(report.examples)
    return replace(
        report, settings=strip_folders(report.settings), examples=examples[:number], disagreements=examples[number:]
    )


def _model_card(
    folder: str, run: FinishedRun, config: ReleaseConfig, run_origins: Origins, figures: Sequence[str]
) -> str:
    """README.md of the model: what its checkpoint says, what it was trained on, and what the run measured."""
    # Here: the reward model's package brings torch.
    from medmm_ray.reward_model import card, checkpoint

    described = read_json(f"{folder}/{checkpoint.CONFIG}")
    if described is None:
        raise ConfigError(f"{run.checkpoint} is no reward model of ours: it has no {checkpoint.CONFIG}")
    # All that the run read, excluded or not: the weights have seen it.
    trained_on = []
    for use in run_origins.sources.values():
        terms = use.terms
        left_out = ", not in the released dataset" if terms.name in config.exclude else ""
        trained_on.append(f"- {terms.title} ({terms.licence or 'licence unknown'}; access: {terms.access}){left_out}")
    if any(use.terms.faults for use in run_origins.sources.values()):
        trained_on += ["", CLOSED]
    drawings = [f"![{name.replace('_', ' ')}](figures/{name}.svg)" for name in figures]
    publication = card.Publication(
        datasets=[use.terms.hub_id for use in run_origins.sources.values() if use.terms.hub_id],
        measured=_measured(run, run_origins),
        license=config.model_license,
        sections={
            "What the run read": "\n".join(trained_on),
            "Figures": "\n\n".join(drawings),
            "More": "`reports/report.html` has the whole evaluation, `reports/outcomes.parquet` a row a question.",
        },
    )
    return card.write(config.push or run.name, described, publication)


def _measured(run: FinishedRun, run_origins: Origins) -> "list[Measured]":
    """The report's figures at its largest N, by data set."""
    from medmm_ray.reward_model.card import Measured

    assert run.evaluation is not None
    report = run.evaluation.report
    measured = []
    for name, group in report.by_dataset.items():
        figures = {"one sample": group.one_sample, f"majority of {report.n}": group.majority}
        for arm in report.arms:
            figures[f"best of {report.n}, {arm}"] = group.best_of_n[arm]
            figures[f"weighted vote of {report.n}, {arm}"] = group.sc_rm[arm]
        use = run_origins.sources.get(name)
        for rule, figure in figures.items():
            measured.append(
                Measured(
                    data_set=name,
                    hub_id=use.terms.hub_id if use else "",
                    split=report.counts.split,
                    rule=rule,
                    questions=group.questions,
                    value=figure.value,
                    low=figure.low,
                    high=figure.high,
                )
            )
    return measured


# The whole


def _readme(run: FinishedRun, config: ReleaseConfig, release: Release) -> str:
    """README.md of the release: the list, and the open questions."""
    lines = [f"# Release of {run.name}", "", f"{'Private' if config.private else 'Public'}. In it:", ""]
    contents = {
        "model": "[model](model/README.md): the reward model, its card, figures and report",
        "dataset": "[dataset](dataset/README.md): questions, solutions, labels and scores, with their datasheet",
    }
    lines += [f"- {contents[part]}" for part in config.parts]
    lines += [f"- `{RECORD}`: what it was made from; `{SUMS}`: `sha256sum -c {SUMS}` checks every file", ""]
    lines += ["## Release list", "", markdown(release.items)]
    if release.open_questions:
        lines += ["", "## Questions for the author", "", "Answer as `release.answers.<name>=…`, and release again:", ""]
        lines += [f"- `{name}`: {words}" for name, words in release.open_questions.items()]
    return "\n".join(lines) + "\n"


def _seal(folder: str, key: str, release: Release) -> None:
    """Write the record, then the sums: from now on the release is whole."""
    fs, path = filesystem(folder)
    files: dict[str, JsonObject] = {}
    for file in sorted(files_below(fs, path), key=lambda entry: str(entry.path)):
        files[name_below(path, file.path)] = {"bytes": file.size, "sha256": _sha256(fs, file.path)}
    record = {
        "key": key,
        "items": [asdict(item) for item in release.items],
        "open_questions": dict(release.open_questions),
        "files": files,
    }
    content = json.dumps(record, indent=1, ensure_ascii=False).encode()
    _put(f"{folder}/{RECORD}", content)
    # Two spaces, as sha256sum reads it.
    lines = [f"{entry['sha256']}  {name}" for name, entry in files.items()]
    lines.append(f"{hashlib.sha256(content).hexdigest()}  {RECORD}")
    _put(f"{folder}/{SUMS}", ("\n".join(lines) + "\n").encode())


def _sha256(fs: pafs.FileSystem, path: str) -> str:
    total = hashlib.sha256()
    with fs.open_input_stream(path, compression=None) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            total.update(chunk)
    return total.hexdigest()


def _put(uri: str, content: bytes) -> None:
    fs, path = filesystem(uri)
    fs.create_dir(path.rpartition("/")[0], recursive=True)
    write_file(fs, path, content)


def push(release: Release, config: ReleaseConfig) -> list[str]:
    """Put the parts into the hub's repositories of that name; gives the addresses of the commits."""
    addresses = []
    for part in config.parts:
        folder = Path(release.folder) / part
        message = f"Release of a medmm_ray run ({part})"
        addresses.append(upload(folder, config.push, part, config.private, commit_message=message))
    return addresses
