"""The actors of `score` and `states`: a batch of rows in, one entry a solution (and arm) out."""

import operator
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
        self.config = with_trained_inputs(config, model)
        self.model_id = model_id
        if isinstance(model, str):
            # A vLLM engine gives the states for the image part only where some arm has images.
            uses_images = any(map(IMAGES_OF_ARM.get, config.arms))
            self.model = load(model, config, uses_images)
        else:
            self.model = model

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Rows of `inputs` to ``{question_id, scores}``; each text is read once, for all arms that have it."""
        rows = batch.to_pylist()
        states: dict[_TextInput, list[list[SolutionStates] | RowError]] = {}
        inputs_of_arms: list[tuple[Arm, _TextInput, _TextInput]] = []
        for arm in dict.fromkeys(self.config.arms):
            text_input = self._text_input(arm)
            without_image = text_input._replace(images=None)
            inputs_of_arms.append((arm, text_input, without_image))
            # Each text input once, and for a vision-language model each without its image too: that is its text part.
            for needed in (text_input, without_image):
                if needed not in states:
                    states[needed] = self._states(rows, needed)
        entries: list[list[dict[str, Any]]] = []
        for i, row in enumerate(rows):
            entries_of_row: list[dict[str, Any]] = []
            for arm, text_input, without_image in inputs_of_arms:
                entries_of_row += self._arm_entries(
                    row,
                    arm,
                    states[text_input][i],
                    states[without_image][i],
                )
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
        return states_of_rows(
            self.model,
            rows,
            self.config,
            text_input.with_documents,
            images,
        )

    def _images(self, row: Mapping[str, Any], source: ImageSource | None) -> "list[Image] | RowError":
        """The images that the language model reads with a row's text, or what is wrong with them."""
        if source is None or _fault_of(row):  # nothing is opened for a row that is not read
            return []
        try:
            uris = _uris(row, source, "image")
            return self._open(uris)
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
            # A question's fault is that of each of its solutions: every one has its row.
            message = str(fault)
            return [self._entry(row, solution, arm, [], [], message) for solution in solutions]
        entries: list[dict[str, Any]] = []
        for solution, solution_scores in zip(solutions, scores, strict=True):
            entry = self._entry(
                row,
                solution,
                arm,
                solution_scores.text_log_odds,
                solution_scores.image_log_odds,
                solution_scores.error,
            )
            entries.append(entry)
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
        image_features = self._image_features(row, arm)
        scores = self.model.step_scores(states, image_features)
        if not self.model.vision:
            return scores
        # What a vision-language model says without the image is its text part.
        scores_without_image = self.model.step_scores(states_without_image, None)
        parts: list[StepScores] = []
        for with_image, without_image in zip(scores, scores_without_image, strict=True):
            parts.append(split_image_part(with_image, without_image))
        return parts

    def _image_features(self, row: Mapping[str, Any], arm: Arm) -> "ImageFeatures | None":
        """What the image tower gives of an arm's images; None where there are none. A fault of one is a `RowError`."""
        from medmm_ray.reward_model import ImageError  # here, as it loads PyTorch

        source = IMAGES_OF_ARM[arm]
        if source is None or self.model.fusion is None:
            return None
        uris = _uris(row, source, "image")
        if not uris:
            return None
        reference_uris = _uris(row, source, "reference")
        images = self._open(uris)
        references = self._open(reference_uris[: self.config.num_references])
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
        self.config = with_trained_inputs(config, model)
        self.model_id = model_id
        self.model = load(model, config) if isinstance(model, str) else model

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Rows of `inputs` to ``{question_id, states}``."""
        rows = [_with_fewer_solutions(row, self.config) for row in batch.to_pylist()]
        states = states_of_rows(self.model, rows, self.config)
        entries: list[list[dict[str, Any]]] = []
        for row, row_states in zip(rows, states, strict=True):
            entries.append(self._entries(row, row_states))
        return _lists(rows, "states", entries, States)

    def _entries(self, row: Mapping[str, Any], states: "list[SolutionStates] | RowError") -> list[dict[str, Any]]:
        """One entry a solution of one question."""
        # The hash tells which documents the text was read with: the states hold for no others.
        documents = _documents(row, self.config)
        document_ids = [document["document_id"] for document in documents]
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
            for solution, solution_states in zip(solutions, states, strict=True):
                entries.append(of_question | _state_columns(solution, solution_states))
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


def _with_fewer_solutions(row: Mapping[str, Any], config: StatesConfig) -> dict[str, Any]:
    """A row with the solutions whose states are stored."""
    return {**row, "solutions": stored_solutions(row["solutions"] or [], config.max_solutions, config.choose)}


def stored_solutions(
    solutions: Sequence[Mapping[str, Any]], max_solutions: int | None, choose: Literal["first", "balanced"]
) -> list[Mapping[str, Any]]:
    """At most `max_solutions` of a question's solutions, in their order (`StatesConfig`)."""
    if max_solutions is None or len(solutions) <= max_solutions:
        return list(solutions)
    if choose == "first":
        return list(solutions[:max_solutions])
    right = [number for number, solution in enumerate(solutions) if solution["correct"]]
    wrong = [number for number, solution in enumerate(solutions) if not solution["correct"]]
    # Half of each kind; where one has fewer, the other fills up.
    num_right = min(len(right), max(max_solutions // 2, max_solutions - len(wrong)))
    chosen = sorted([*right[:num_right], *wrong[: max_solutions - num_right]])
    return [solutions[number] for number in chosen]


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
        fault = _fault_of(row)
        if fault is not None:
            results.append(fault)
            continue
        if isinstance(row_images, RowError):
            results.append(row_images)
            continue
        documents: list[str] = []
        if with_documents:
            documents = [document["text"] for document in _documents(row, config)]
        solutions = [solution["steps"] for solution in row["solutions"]]
        results.append([])
        requests[i] = ScoreRequest(
            row["question"],
            solutions,
            documents,
            row_images,
        )
    # The whole batch at once: with `pack_questions` short questions share a forward pass.
    all_states = model.iter_states(
        requests.values(),
        token_budget=config.token_budget,
        together=config.pack_questions,
    )
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
    text_log_odds = without_image.log_odds
    changes = [s - w for s, w in zip(scores.log_odds, text_log_odds, strict=True)]
    return replace(scores, text_log_odds=text_log_odds, image_log_odds=changes)


def _uris(row: Mapping[str, Any], source: ImageSource, kind: Literal["image", "reference"]) -> list[str]:
    """A row's own images or those of another question, or the references that go with them; raises their `RowError`."""
    prefix = "shuffled_" if source == "shuffled" else ""
    error = row[f"{prefix}image_error"]
    if error:
        fault, _, message = error.partition(": ")
        raise RowError(fault, message)
    uris: list[str] = row[f"{prefix}{kind}_uris"]
    return list(uris)


def _documents(row: Mapping[str, Any], config: ScoringConfig) -> list[Mapping[str, Any]]:
    """The documents that are offered to the model, best first; a question that retrieval left out has none."""
    documents: list[Mapping[str, Any]] = list(row["documents"] or [])
    return documents[: config.num_documents]


def _fault_of(row: Mapping[str, Any]) -> RowError | None:
    """Why a row's text cannot be read: its question is missing, or an earlier step failed on it."""
    if row["question"] is None:
        return RowError("question_missing", f"{row['question_id']} is not in the table questions")
    if not row["question"].strip():
        return RowError("question_empty", f"{row['question_id']} has no text")
    for column in ("error", "question_error", "evidence_error"):  # of the solutions, the question, the evidence
        error = row[column]
        if error:
            return RowError("upstream", error)
    return None


def _lists(
    rows: Sequence[Mapping[str, Any]],
    column: str,
    entries: Sequence[list[dict[str, Any]]],
    record: type,
) -> pa.Table:
    """One row a question with the list of its entries."""
    ids = list(map(operator.itemgetter("question_id"), rows))
    question_ids = pa.array(ids, pa.string())
    lists = to_arrow_lists(record, entries)
    return pa.table(
        {
            "question_id": question_ids,
            column: lists,
        }
    )
