"""Solutions become step scores (for reranking) or text states (for training the image part).

Enters: solutions, one row a question, joined with their questions, images and evidence (`inputs`), and a reward model's
folder. Leaves: one row a question with the list of its `Scores` (one a solution and arm) or `States` (one a solution).
The text of a question is read once; all arms that share it add their image part to it. A vision-language model has no
such part: it reads a question once without an image and once for each that an arm shows; what it says without is the
text part, what the image changes of it the image part. What cannot be scored leaves as an entry with an error, never as
an exception.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import pyarrow as pa
from pydantic import Field, model_validator

from medmm_ray.config import ConfigError, digest
from medmm_ray.data.records import Scores, States, to_arrow_lists
from medmm_ray.data.tables import RowError, attach
from medmm_ray.engines.checkpoints import resolve
from medmm_ray.engines.generator import EngineConfig, GeneratorConfig
from medmm_ray.engines.images import MAX_PIXELS, open_image
from medmm_ray.text import question_with_options

if TYPE_CHECKING:
    from PIL.Image import Image
    from ray.data import Dataset

    from medmm_ray.reward_model import ImageFeatures, RewardModel, SolutionStates, StepScores

STATES_VERSION, VERSION = 2, 2  # of what a step makes: raise it when the same config makes something else
Arm = Literal["multimodal", "text_only", "shuffled_image", "no_documents"]
_LOOKING: tuple[Arm, ...] = ("multimodal", "shuffled_image")  # for a model that reads no images they would say nothing
Shown = Literal["own", "shuffled"]
_SHOWN: dict[Arm, Shown | None] = {
    "multimodal": "own", "text_only": None, "shuffled_image": "shuffled", "no_documents": "own"
}  # fmt: skip
Kind = tuple[bool, Shown | None]  # what a text is read with: documents, images


class ScoringConfig(EngineConfig):
    """How a reward model reads solutions, and what runs its text tower. The settings of `EngineConfig` are vLLM's."""

    engine: Literal["torch", "vllm"] = "torch"
    """What runs the text tower. vllm gives what torch does to rounding (1e-5 in float32), with tensor parallelism and
    quantised weights; the last bits also depend on what it computes together, so the engine is part of what identifies
    a table. It reads no images itself. Its further arguments go into `vllm`, max_model_len (default: the checkpoint's
    context) among them."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the text tower."""
    num_documents: int = Field(default=32, ge=0)
    """Retrieved documents that are offered, best first; those within the length are read."""
    max_length: int | None = Field(default=None, ge=1)
    """Tokens of documents, question and solution together by which documents are chosen; null: the checkpoint's own."""
    reserve: int | None = Field(default=None, ge=0)
    """Tokens of max_length that documents leave free; null: the checkpoint's own (Med-PRM: 1024)."""
    token_budget: int | None = Field(default=None, ge=1, json_schema_extra={"identity": False})
    """Most tokens in one forward pass; bounds memory, changes no score. null: 1024 on a CPU, 4096 on a GPU."""
    pack_questions: bool = False
    """Let short questions share a forward pass. Faster, but the last bits of a score then depend on its neighbours: an
    interrupted run equals an undisturbed one to 1e-5, not bit by bit."""
    batch_size: int = Field(default=8, ge=1, json_schema_extra={"identity": False})
    """Questions that an actor takes at a time."""
    num_actors: int = Field(default=1, ge=1, json_schema_extra={"identity": False})
    """Most copies of the model at work."""
    num_cpus: float = Field(default=1.0, ge=0, json_schema_extra={"identity": False})
    """CPUs a copy."""
    num_gpus: float = Field(default=0.0, ge=0, json_schema_extra={"identity": False})
    """GPUs a copy; above 0 the model runs there."""

    @model_validator(mode="after")
    def _engine(self) -> Self:
        if self.engine == "torch" and (self.vllm or self.batch_invariant or self.tensor_parallel_size > 1):
            name = "vllm" if self.vllm else "batch_invariant" if self.batch_invariant else "tensor_parallel_size"
            raise ValueError(f"{name}={getattr(self, name)!r} is a setting of engine=vllm, and engine is 'torch'")
        return self


class StatesConfig(ScoringConfig):
    """How text states are computed; they are kept in `dtype`."""


class ScoreConfig(ScoringConfig):
    """What is scored."""

    arms: tuple[Arm, ...] = ("multimodal", "text_only", "shuffled_image")
    """multimodal: everything; text_only: no image; shuffled_image: another question's images; no_documents: without."""
    num_references: int = Field(default=3, ge=0)
    """Similar images that are looked at beside a question's own; 0 for a vision-language model."""
    max_pixels: int = MAX_PIXELS
    """Largest image that is opened, width x height in pixels; a larger one is an error of its question."""
    seed: int = 0
    """Seed of the shuffle of images."""


# What a question needs


def inputs(solutions: "Dataset", questions: pa.Table, images: pa.Table, evidence: pa.Table, seed: int = 0) -> "Dataset":
    """`Solutions` rows with all that reading and looking needs; `score` and `states` take such rows.

    `questions`, `images` and `evidence` are whole tables; `seed` is `ScoreConfig.seed`.
    """
    ds = attach(solutions, question_inputs(questions, images, evidence, seed), "question_id", INPUT_SCHEMA.names[1:])
    read = evidence.select(["question_id", "documents", "error"]).rename_columns(
        ["question_id", "documents", "evidence_error"]
    )
    return attach(ds, read, "question_id", ["documents", "evidence_error"])


INPUT_SCHEMA = pa.schema(
    {
        "question_id": pa.string(),
        "question": pa.string(),
        "question_error": pa.string(),
        "image_uris": pa.list_(pa.string()),
        "reference_uris": pa.list_(pa.string()),
        "image_error": pa.string(),
        "shuffled_image_uris": pa.list_(pa.string()),
        "shuffled_reference_uris": pa.list_(pa.string()),
        "shuffled_image_error": pa.string(),
    }
)


def question_inputs(questions: pa.Table, images: pa.Table, evidence: pa.Table, seed: int = 0) -> pa.Table:
    """One row a question (`INPUT_SCHEMA`): its text with options, its images and references, and another question's.

    The other question is of the same split and has other images; its references come along, or they would give the
    first question's diagnosis away.
    """
    files = {row["image_id"]: row for row in images.select(["image_id", "uri", "error"]).to_pylist()}
    similar = {
        row["question_id"]: [image["uri"] for image in row["images"] or []]
        for row in evidence.select(["question_id", "images"]).to_pylist()
    }
    rows = questions.select(["question_id", "split", "question", "options", "image_ids", "error"]).to_pylist()
    own = {row["question_id"]: _look(row["image_ids"], files, similar.get(row["question_id"], [])) for row in rows}
    other = shuffled(rows, seed)
    unknown = _Look([], [], "no_other_image: no other question of this split has another image to swap in")
    table = []
    for row in rows:
        look = own[row["question_id"]]
        swapped = own[other[row["question_id"]]] if row["question_id"] in other else unknown
        swapped = swapped if row["image_ids"] else look  # a question without an image stays without
        table.append(
            {
                "question_id": row["question_id"],
                "question": question_with_options(row["question"], row["options"]),
                "question_error": row["error"],
                "image_uris": look.uris,
                "reference_uris": look.references,
                "image_error": look.error,
                "shuffled_image_uris": swapped.uris,
                "shuffled_reference_uris": swapped.references,
                "shuffled_image_error": swapped.error,
            }
        )
    return pa.Table.from_pylist(table, schema=INPUT_SCHEMA)


class _Look(NamedTuple):
    """What one question shows: files, or why there are none."""

    uris: list[str]
    references: list[str]
    error: str | None


def _look(image_ids: Sequence[str], files: Mapping[str, Mapping[str, Any]], references: list[str]) -> _Look:
    for image_id in image_ids:
        if image_id not in files:
            return _Look([], [], f"image_missing: {image_id} is not in the table images")
        if files[image_id]["error"]:
            return _Look([], [], f"upstream: {files[image_id]['error']}")
    return _Look([files[i]["uri"] for i in image_ids], references, None)


def shuffled(questions: Iterable[Mapping[str, Any]], seed: int) -> dict[str, str]:
    """For each question with images, another one of its split whose images it is shown instead.

    Questions about the same images move together, so that none is shown its own again.
    """
    by_split: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for row in questions:
        if row["image_ids"]:
            by_images = by_split.setdefault(row["split"], {})
            by_images.setdefault(tuple(sorted(row["image_ids"])), []).append(row["question_id"])
    moved: dict[str, str] = {}
    for by_images in by_split.values():
        groups = {min(members): members for members in by_images.values()}
        if len(groups) > 1:
            for group, other in derange(list(groups), seed).items():
                moved |= dict.fromkeys(groups[group], other)
    return moved


def derange(ids: Sequence[str], seed: int) -> dict[str, str]:
    """A shuffle in which no id stays in place: each id to another one, the same for the same ids and seed in any order.

    One cycle through all ids in an order drawn from the seed. Raises `ValueError` for fewer than two ids.
    """
    drawn = sorted(set(ids), key=lambda i: digest(seed, i))
    if len(drawn) < 2:
        raise ValueError(f"cannot swap {len(drawn)} ids among themselves; at least 2 different ones are needed")
    return dict(zip(drawn, [*drawn[1:], drawn[0]], strict=True))


# The steps


def score(ds: "Dataset", config: ScoreConfig, model_path: str, model_id: str) -> "Dataset":
    """Rows of `inputs` -> ``{question_id, scores: list<Scores>}``.

    `model_path` is a reward model's folder or URI; `model_id` (a fingerprint or content hash) goes into each entry.
    Raises `ConfigError` where an arm looks at images and the checkpoint reads none, or reads no reference images.
    """
    check_image_input(model_path, config)
    return _map(ds, Scorer, config, model_path, model_id)


def states(ds: "Dataset", config: StatesConfig, model_path: str, model_id: str) -> "Dataset":
    """Rows of `inputs` -> ``{question_id, states: list<States>}``.

    Raises `ConfigError` for a vision-language model: its states depend on the image, so they are no constants.
    """
    if image_input_of(model_path) == "language_model":
        raise ConfigError(
            f"{model_path} is a vision-language model: its states depend on the image, and no image part is trained on "
            "them; compute states of a text-only reward model"
        )
    return _map(ds, StateExtractor, config, model_path, model_id)


def _map(ds: "Dataset", actor: type, config: ScoringConfig, path: str, model_id: str) -> "Dataset":
    from ray.data import ActorPoolStrategy

    if config.engine == "vllm" and image_input_of(path) == "language_model":
        raise ConfigError(f"engine=vllm reads texts alone, and {path} is a vision-language model; take engine=torch")
    restarts: dict[str, Any] = {"max_restarts": config.max_restarts} if config.engine == "vllm" else {}
    return ds.map_batches(
        actor,
        fn_constructor_kwargs={"config": config, "model": path, "model_id": model_id},
        batch_format="pyarrow",
        batch_size=config.batch_size,
        compute=ActorPoolStrategy(min_size=1, max_size=config.num_actors),
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus,
        **restarts,
    )


def image_input_of(path: str) -> Literal["tower", "language_model"] | None:
    """Before anything is loaded: a local checkpoint says in its configs what reads its images."""
    folder = Path(resolve(path))
    described, model = folder / "reward_model.json", folder / "config.json"
    if described.is_file() and json.loads(described.read_text())["fusion"] is not None:
        return "tower"
    names = json.loads(model.read_text()).get("architectures") if model.is_file() else None
    return "language_model" if any(name.endswith("ForConditionalGeneration") for name in names or []) else None


def check_image_input(path: str, config: ScoreConfig) -> None:
    looking = [arm for arm in config.arms if arm in _LOOKING]
    eyes = image_input_of(path)
    if looking and eyes is None:
        raise ConfigError(
            f"score.arms has {', '.join(looking)}, but {path} has no image tower; "
            "name the folder of a two-tower checkpoint or of a vision-language model, or set score.arms=[text_only]"
        )
    if eyes == "language_model" and config.num_references and any(_SHOWN[arm] for arm in config.arms):
        raise ConfigError(
            f"score.num_references is {config.num_references}, but {path} is a vision-language model, which reads a "
            "question's own images alone; set score.num_references=0"
        )


def load(model: str, config: ScoringConfig, images: bool = True) -> "RewardModel":
    """The reward model of a config: on its engine, on a GPU where the config asks for one.

    Without `images` a vLLM engine is spared the states for the image part, which is then left out.
    """
    from medmm_ray.reward_model import RewardModel

    loaded: RewardModel
    if config.engine == "vllm":
        from medmm_ray.reward_model.vllm import PooledRewardModel

        states = isinstance(config, StatesConfig) or (images and image_input_of(model) == "tower")
        loaded = PooledRewardModel.open(resolve(model), generator_config(config), states=states)
    else:
        device = "cuda" if config.num_gpus else "cpu"
        loaded = RewardModel.from_pretrained(resolve(model), dtype=config.dtype, device=device)
    if config.max_length is not None:
        loaded.max_length = config.max_length
    if config.reserve is not None:
        loaded.reserve = config.reserve
    return loaded


def generator_config(config: ScoringConfig) -> GeneratorConfig:
    """What of a step's settings its vLLM engine takes; without a length, any that the checkpoint reads."""
    settings = {name: getattr(config, name) for name in EngineConfig.model_fields}
    arguments = dict(config.vllm)
    longest = arguments.pop("max_model_len", sys.maxsize)
    return GeneratorConfig(**settings | {"dtype": config.dtype, "max_model_len": longest, "vllm": arguments})


class Scorer:
    """The actor of `score`."""

    def __init__(self, config: ScoreConfig, model: "str | RewardModel", model_id: str) -> None:
        self.config, self.model_id = config, model_id
        images = any(_SHOWN[arm] for arm in config.arms)
        self.model = load(model, config, images) if isinstance(model, str) else model

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        kinds = {arm: self.kind(arm) for arm in self.config.arms}
        unseen: dict[Arm, Kind] = {arm: (with_documents, None) for arm, (with_documents, _) in kinds.items()}
        read = {kind: self.read(rows, *kind) for kind in {*kinds.values(), *unseen.values()}}
        entries = [
            [
                entry
                for arm, kind in kinds.items()
                for entry in self.arm_entries(row, arm, read[kind][i], read[unseen[arm]][i])
            ]
            for i, row in enumerate(rows)
        ]
        return _lists(rows, "scores", entries, Scores)

    def kind(self, arm: Arm) -> Kind:
        """What an arm's text is read with. Arms of one kind share its states."""
        return arm != "no_documents", _SHOWN[arm] if self.model.vision else None

    def read(
        self, rows: Sequence[Mapping[str, Any]], with_documents: bool, shown: Shown | None
    ) -> "list[list[SolutionStates] | RowError]":
        found = [self.open_images(row, shown) for row in rows]
        return states_of_rows(self.model, rows, self.config, with_documents, found)

    def open_images(self, row: Mapping[str, Any], shown: Shown | None) -> "list[Image] | RowError":
        """The images that the language model is shown of a row that is to be read, or what is wrong with them."""
        if shown is None or _upstream(row):
            return []
        try:
            return self.open(_uris(row, shown, "image"))
        except RowError as fault:
            return fault

    def arm_entries(
        self,
        row: Mapping[str, Any],
        arm: Arm,
        read: "list[SolutionStates] | RowError",
        unseen: "list[SolutionStates] | RowError",
    ) -> list[dict[str, Any]]:
        """One entry a solution of a question, in the row's order; `unseen` is what is read without an image."""
        solutions = row["solutions"] or []
        try:
            if isinstance(read, RowError):
                raise read
            if isinstance(unseen, RowError):
                raise unseen
            found = self.model.step_scores(read, self.image_features(row, arm))
        except RowError as fault:
            return [self.entry(row, s, arm, [], [], str(fault)) for s in solutions]
        if self.model.vision:
            found = [_parted(f, u) for f, u in zip(found, self.model.step_scores(unseen, None), strict=True)]
        return [
            self.entry(row, s, arm, f.text_log_odds, f.image_log_odds, f.error)
            for s, f in zip(solutions, found, strict=True)
        ]

    def image_features(self, row: Mapping[str, Any], arm: Arm) -> "ImageFeatures | None":
        """What the image tower sees in an arm; None where it sees nothing. A fault of an image is a `RowError`."""
        from medmm_ray.reward_model import ImageError

        shown = _SHOWN[arm]
        if shown is None or self.model.fusion is None:
            return None
        uris = _uris(row, shown, "image")
        if not uris:
            return None
        own, references = self.open(uris), self.open(_uris(row, shown, "reference")[: self.config.num_references])
        try:
            return self.model.image_features(own, references)
        except ImageError as error:
            kind, _, message = str(error).partition(": ")
            raise RowError(kind, message) from error

    def open(self, uris: Sequence[str]) -> "list[Image]":
        return [open_image(uri, self.config.max_pixels) for uri in uris]

    def entry(
        self, row: Mapping[str, Any], solution: Mapping[str, Any], arm: Arm,
        text_log_odds: list[float], image_log_odds: list[float], error: str | None,
    ) -> dict[str, Any]:  # fmt: skip
        return {
            "question_id": row["question_id"],
            "solution_id": solution["solution_id"],
            "model": self.model_id,
            "arm": arm,
            "text_log_odds": text_log_odds,
            "image_log_odds": image_log_odds,
            "error": error,
        }


class StateExtractor:
    """The actor of `states`."""

    def __init__(self, config: StatesConfig, model: "str | RewardModel", model_id: str) -> None:
        self.config, self.model_id = config, model_id
        self.model = load(model, config) if isinstance(model, str) else model

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        read = states_of_rows(self.model, rows, self.config)
        entries = [self.entries(row, found) for row, found in zip(rows, read, strict=True)]
        return _lists(rows, "states", entries, States)

    def entries(self, row: Mapping[str, Any], read: "list[SolutionStates] | RowError") -> list[dict[str, Any]]:
        """One entry a solution of one question."""
        from medmm_ray.reward_model.states import dtype_name, to_bytes

        evidence_hash = digest([document["document_id"] for document in _documents(row, self.config)])
        shared = {
            "question_id": row["question_id"],
            "model": self.model_id,
            "evidence_hash": evidence_hash,
            "hidden_size": self.model.hidden_size,
        }
        empty: dict[str, Any] = {
            "num_steps": 0,
            "dtype": self.config.dtype,
            "states": b"",
            "summaries": b"",
            "text_log_odds": [],
        }
        solutions = row["solutions"] or []
        if isinstance(read, RowError):
            return [shared | empty | {"solution_id": s["solution_id"], "error": str(read)} for s in solutions]
        return [
            shared
            | {
                "solution_id": solution["solution_id"],
                "num_steps": len(own.states_TD),
                "dtype": dtype_name(own.states_TD),
                "states": to_bytes(own.states_TD),
                "summaries": to_bytes(own.summaries_TD),
                "text_log_odds": own.log_odds_T.tolist(),
                "error": own.error,
            }
            for solution, own in zip(solutions, read, strict=True)
        ]


def states_of_rows(
    model: "RewardModel",
    rows: Sequence[Mapping[str, Any]],
    config: ScoringConfig,
    with_documents: bool = True,
    images: "Sequence[list[Image] | RowError] | None" = None,
) -> "list[list[SolutionStates] | RowError]":
    """What the text tower says of each question's solutions, or why it was not asked.

    `images` of each row, where the language model reads them itself.
    """
    from medmm_ray.reward_model import ScoreRequest

    shown = images or [[] for _ in rows]
    faults = [
        _upstream(row) or (pictures if isinstance(pictures, RowError) else None)
        for row, pictures in zip(rows, shown, strict=True)
    ]
    requests = (
        ScoreRequest(
            row["question"],
            [solution["steps"] for solution in row["solutions"]],
            [document["text"] for document in _documents(row, config)] if with_documents else [],
            None if isinstance(pictures, RowError) else pictures,
        )
        for row, fault, pictures in zip(rows, faults, shown, strict=True)
        if fault is None
    )
    found = model.iter_states(requests, token_budget=config.token_budget, together=config.pack_questions)
    return [next(found) if fault is None else fault for fault in faults]


def _parted(seen: "StepScores", unseen: "StepScores") -> "StepScores":
    """A vision-language model's answer as what it says without the image, and what the image changes of it."""
    if seen.error or unseen.error:
        return seen if seen.error else unseen
    changes = [s - u for s, u in zip(seen.log_odds, unseen.log_odds, strict=True)]
    return replace(seen, text_log_odds=unseen.log_odds, image_log_odds=changes)


def _uris(row: Mapping[str, Any], shown: Shown, kind: Literal["image", "reference"]) -> list[str]:
    """A row's own images or those of another question, or the references that go with them; raises their `RowError`."""
    name = "shuffled_" if shown == "shuffled" else ""
    if row[f"{name}image_error"]:
        fault, _, message = row[f"{name}image_error"].partition(": ")
        raise RowError(fault, message)
    return list(row[f"{name}{kind}_uris"])


def _documents(row: Mapping[str, Any], config: ScoringConfig) -> list[Mapping[str, Any]]:
    return list(row["documents"] or [])[: config.num_documents]


def _upstream(row: Mapping[str, Any]) -> RowError | None:
    if row["question"] is None:
        return RowError("question_missing", f"{row['question_id']} is not in the table questions")
    if not row["question"].strip():
        return RowError("question_empty", f"{row['question_id']} has no text")
    fault = next((row[column] for column in ("error", "question_error", "evidence_error") if row[column]), None)
    return RowError("upstream", fault) if fault else None


def _lists(
    rows: Sequence[Mapping[str, Any]], column: str, entries: Sequence[list[dict[str, Any]]], record: type
) -> pa.Table:
    ids = pa.array([row["question_id"] for row in rows], pa.string())
    return pa.table({"question_id": ids, column: to_arrow_lists(record, entries)})
