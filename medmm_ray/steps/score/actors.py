"""The actors of `score` and `states`: a batch of rows in, one entry a solution (and arm) out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pyarrow as pa

from medmm_ray.config import digest
from medmm_ray.data.records import Scores, States, to_arrow_lists
from medmm_ray.data.tables import RowError
from medmm_ray.engines.images import open_image
from medmm_ray.steps.score.config import (
    IMAGES_OF_ARM,
    Arm,
    ImageSource,
    ScoreConfig,
    ScoringConfig,
    StatesConfig,
)
from medmm_ray.steps.score.loading import load, with_trained_inputs

if TYPE_CHECKING:
    from PIL.Image import Image

    from medmm_ray.reward_model import ImageFeatures, RewardModel, SolutionStates, StepScores


class _TextInput(NamedTuple):
    """What a question's text is read with; arms that have it in common share its states."""

    with_documents: bool
    images: ImageSource | None


class Scorer:
    """The actor of `score`."""

    def __init__(self, config: ScoreConfig, model: "str | RewardModel", model_id: str) -> None:
        self.config, self.model_id = with_trained_inputs(config, model), model_id
        uses_images = any(IMAGES_OF_ARM[arm] for arm in config.arms)
        self.model = load(model, config, uses_images) if isinstance(model, str) else model

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Rows of `inputs` to ``{question_id, scores}``; each text is read once, for all arms that have it."""
        rows = batch.to_pylist()
        # Each text input once, and for a vision-language model each without its image too: that is its text part.
        input_of_arm = {arm: self._text_input(arm) for arm in self.config.arms}
        without_image = {arm: text_input._replace(images=None) for arm, text_input in input_of_arm.items()}
        states = {
            text_input: self._states(rows, text_input)
            for text_input in {*input_of_arm.values(), *without_image.values()}
        }
        entries: list[list[dict[str, Any]]] = []
        for i, row in enumerate(rows):
            entries_of_row: list[dict[str, Any]] = []
            for arm, text_input in input_of_arm.items():
                entries_of_row += self._arm_entries(row, arm, states[text_input][i], states[without_image[arm]][i])
            entries.append(entries_of_row)
        return _lists(rows, "scores", entries, Scores)

    def _text_input(self, arm: Arm) -> _TextInput:
        # An image tower's part is added later: to the text it makes no difference.
        images = IMAGES_OF_ARM[arm] if self.model.vision else None
        return _TextInput(arm != "no_documents", images)

    def _states(
        self, rows: Sequence[Mapping[str, Any]], text_input: _TextInput
    ) -> "list[list[SolutionStates] | RowError]":
        images = [self._images(row, text_input.images) for row in rows]
        return states_of_rows(self.model, rows, self.config, text_input.with_documents, images)

    def _images(self, row: Mapping[str, Any], source: ImageSource | None) -> "list[Image] | RowError":
        """The images that the language model reads with a row's text, or what is wrong with them."""
        if source is None or _fault_of(row):  # nothing is opened for a row that is not read
            return []
        try:
            return self._open(_uris(row, source, "image"))
        except RowError as fault:
            return fault

    def _arm_entries(
        self,
        row: Mapping[str, Any],
        arm: Arm,
        states: "list[SolutionStates] | RowError",
        states_without_image: "list[SolutionStates] | RowError",
    ) -> list[dict[str, Any]]:
        """One entry a solution of a question, in the row's order."""
        solutions = row["solutions"] or []
        try:
            scores = self._scores(row, arm, states, states_without_image)
        except RowError as fault:
            return [self._entry(row, solution, arm, [], [], str(fault)) for solution in solutions]
        entries: list[dict[str, Any]] = []
        for solution, of_solution in zip(solutions, scores, strict=True):
            parts = of_solution.text_log_odds, of_solution.image_log_odds
            entries.append(self._entry(row, solution, arm, *parts, of_solution.error))
        return entries

    def _scores(
        self,
        row: Mapping[str, Any],
        arm: Arm,
        states: "list[SolutionStates] | RowError",
        states_without_image: "list[SolutionStates] | RowError",
    ) -> "list[StepScores]":
        """Scores of a question's solutions in an arm; raises the `RowError` that is in their place."""
        if isinstance(states, RowError):
            raise states
        if isinstance(states_without_image, RowError):
            raise states_without_image
        scores = self.model.step_scores(states, self._image_features(row, arm))
        if not self.model.vision:
            return scores
        without_image = self.model.step_scores(states_without_image, None)
        return [split_image_part(*pair) for pair in zip(scores, without_image, strict=True)]

    def _image_features(self, row: Mapping[str, Any], arm: Arm) -> "ImageFeatures | None":
        """What the image tower gives of an arm's images; None where there are none. A fault of one is a `RowError`."""
        from medmm_ray.reward_model import ImageError

        source = IMAGES_OF_ARM[arm]
        if source is None or self.model.fusion is None:
            return None
        uris = _uris(row, source, "image")
        if not uris:
            return None
        reference_uris = _uris(row, source, "reference")[: self.config.num_references]
        images, references = self._open(uris), self._open(reference_uris)
        try:
            return self.model.image_features(images, references)
        except ImageError as error:
            kind, _, message = str(error).partition(": ")
            raise RowError(kind, message) from error

    def _open(self, uris: Sequence[str]) -> "list[Image]":
        return [open_image(uri, self.config.max_pixels) for uri in uris]

    def _entry(
        self,
        row: Mapping[str, Any],
        solution: Mapping[str, Any],
        arm: Arm,
        text_log_odds: list[float],
        image_log_odds: list[float],
        error: str | None,
    ) -> dict[str, Any]:
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
        self.config, self.model_id = with_trained_inputs(config, model), model_id
        self.model = load(model, config) if isinstance(model, str) else model

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Rows of `inputs` to ``{question_id, states}``."""
        rows = batch.to_pylist()
        states = states_of_rows(self.model, rows, self.config)
        entries = [self._entries(*pair) for pair in zip(rows, states, strict=True)]
        return _lists(rows, "states", entries, States)

    def _entries(self, row: Mapping[str, Any], states: "list[SolutionStates] | RowError") -> list[dict[str, Any]]:
        """One entry a solution of one question."""
        document_ids = [document["document_id"] for document in _documents(row, self.config)]
        of_question = {  # the columns that all entries of a question share
            "question_id": row["question_id"],
            "model": self.model_id,
            "evidence_hash": digest(document_ids),
            "hidden_size": self.model.hidden_size,
        }
        solutions = row["solutions"] or []
        entries: list[dict[str, Any]] = []
        if isinstance(states, RowError):
            for solution in solutions:
                entries.append(of_question | self._faulty(solution, states))
        else:
            for solution, of_solution in zip(solutions, states, strict=True):
                entries.append(of_question | _state_columns(solution, of_solution))
        return entries

    def _faulty(self, solution: Mapping[str, Any], fault: RowError) -> dict[str, Any]:
        return {
            "solution_id": solution["solution_id"],
            "num_steps": 0,
            "dtype": self.config.dtype,
            "states": b"",
            "summaries": b"",
            "text_log_odds": [],
            "error": str(fault),
        }


def _state_columns(solution: Mapping[str, Any], states: "SolutionStates") -> dict[str, Any]:
    from medmm_ray.reward_model.states import dtype_name, to_bytes

    return {
        "solution_id": solution["solution_id"],
        "num_steps": len(states.states_TD),
        "dtype": dtype_name(states.states_TD),
        "states": to_bytes(states.states_TD),
        "summaries": to_bytes(states.summaries_TD),
        "text_log_odds": states.log_odds_T.tolist(),
        "error": states.error,
    }


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

    results: list[list[SolutionStates] | RowError] = []
    requests: dict[int, ScoreRequest] = {}
    for i, row in enumerate(rows):
        row_images = images[i] if images else []
        fault = _fault_of(row) or (row_images if isinstance(row_images, RowError) else None)
        results.append(fault or [])
        if fault is None and not isinstance(row_images, RowError):
            documents = [document["text"] for document in _documents(row, config)] if with_documents else []
            solutions = [solution["steps"] for solution in row["solutions"]]
            requests[i] = ScoreRequest(row["question"], solutions, documents, row_images)
    all_states = model.iter_states(requests.values(), token_budget=config.token_budget, together=config.pack_questions)
    for i, (_, states) in zip(requests, all_states, strict=True):
        results[i] = states
    return results


def split_image_part(scores: "StepScores", without_image: "StepScores") -> "StepScores":
    """A vision-language model's answer as what it says without the image, and what the image changes of it."""
    # Without one of the two there is no difference: a missing score is no zero.
    if scores.error:
        return scores
    if without_image.error:
        return without_image
    changes = [s - w for s, w in zip(scores.log_odds, without_image.log_odds, strict=True)]
    return replace(scores, text_log_odds=without_image.log_odds, image_log_odds=changes)


def _uris(row: Mapping[str, Any], source: ImageSource, kind: Literal["image", "reference"]) -> list[str]:
    """A row's own images or those of another question, or the references that go with them; raises their `RowError`."""
    prefix = "shuffled_" if source == "shuffled" else ""
    if row[f"{prefix}image_error"]:
        fault, _, message = row[f"{prefix}image_error"].partition(": ")
        raise RowError(fault, message)
    return list(row[f"{prefix}{kind}_uris"])


def _documents(row: Mapping[str, Any], config: ScoringConfig) -> list[Mapping[str, Any]]:
    return list(row["documents"] or [])[: config.num_documents]


def _fault_of(row: Mapping[str, Any]) -> RowError | None:
    """Why a row's text cannot be read: its question is missing, or an earlier step failed on it."""
    if row["question"] is None:
        return RowError("question_missing", f"{row['question_id']} is not in the table questions")
    if not row["question"].strip():
        return RowError("question_empty", f"{row['question_id']} has no text")
    for column in ("error", "question_error", "evidence_error"):  # of the solutions, the question, the evidence
        if row[column]:
            return RowError("upstream", row[column])
    return None


def _lists(
    rows: Sequence[Mapping[str, Any]], column: str, entries: Sequence[list[dict[str, Any]]], record: type
) -> pa.Table:
    """One row a question with the list of its entries."""
    ids = pa.array([row["question_id"] for row in rows], pa.string())
    return pa.table({"question_id": ids, column: to_arrow_lists(record, entries)})
