"""A question as a model writes it, checked by its text alone: four options, none of which gives itself away."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from medmm_ray.config import digest
from medmm_ray.data.tables import RowError
from medmm_ray.engines.llm.structured import AnswerForm, Text, json_schema, parse
from medmm_ray.text import LETTERS, normalise, one_line, well_formed

NUM_OPTIONS = 4
LONGEST_SHARE = 2.5  # a right option longer than this times the mean of the others gives itself away
ALIKE = 0.8  # share of words that two questions on one image may have in common

# A model may letter its options although it is told not to.
_LETTERED = re.compile(r"^\s*[(\[]?[A-Da-d][)\].:]\s+")
# Such an option is right or wrong by the others, not by the image.
_CATCH_ALL = re.compile(r"\b(all|none|both|neither)\s+of\s+(the\s+)?(above|these|them)\b", re.IGNORECASE)


class DraftForm(AnswerForm):
    """A written question as the model sends it. The number of options is checked apart: its fault is a refusal."""

    question: Text
    options: list[str] = Field(json_schema_extra={"minItems": NUM_OPTIONS, "maxItems": NUM_OPTIONS})
    correct_answer: Literal["A", "B", "C", "D"]
    difficulty: Literal["easy", "medium", "hard"]
    explanation: Text


SCHEMA = json_schema(DraftForm)


@dataclass(frozen=True)
class Draft:
    """A question as a model wrote it, checked by its text; `answer` is a letter of `options`."""

    question: str
    options: list[str]
    answer: str
    difficulty: str
    explanation: str


def draft(reply: str) -> Draft:
    """A model's reply as a question, its options dealt anew.

    Raises `RowError` question_reply, question_options or question_leak, with the fault in words that the model reads.
    """
    form = parse(reply, DraftForm, "question_reply")
    question = one_line(well_formed(form.question))
    # Letters go with the places, and these are dealt anew below.
    options: list[str] = []
    for option in form.options:
        text = one_line(well_formed(option))
        options.append(_LETTERED.sub("", text))
    if len(question.split()) < 4:
        raise RowError("question_reply", f"the question {question!r} is too short to be one")
    right = LETTERS.index(form.correct_answer)
    _check_options(options, right)
    _check_stem(question, options, right)
    # By a hash, so that the right option is anywhere, and in the same place in every run.
    order = sorted(range(NUM_OPTIONS), key=lambda i: digest(question, options[i]))
    return Draft(
        question=question,
        options=[options[i] for i in order],
        answer=LETTERS[order.index(right)],
        difficulty=form.difficulty,
        explanation=one_line(well_formed(form.explanation)),
    )


def _check_options(options: Sequence[str], right: int) -> None:
    if len(options) != NUM_OPTIONS:
        raise RowError("question_options", f"there are {len(options)} options, not {NUM_OPTIONS}")
    plain = list(map(normalise, options))
    if not all(plain):
        empty = LETTERS[plain.index("")]
        raise RowError("question_options", f"option {empty} is empty")
    if len(set(plain)) < NUM_OPTIONS:
        raise RowError("question_options", f"two options say the same: {'; '.join(options)}")
    for option in options:
        if _CATCH_ALL.search(option):
            raise RowError("question_options", f"the option {option!r} is no finding")
    wrong_lengths = [len(option) for i, option in enumerate(options) if i != right]
    mean_length = LONGEST_SHARE * sum(wrong_lengths) / len(wrong_lengths)
    # A few words more than the longest wrong option tell nothing, however short the others are.
    if len(options[right]) > max(mean_length, max(wrong_lengths) + 20):
        raise RowError("question_leak", "the right option is far longer than the others and gives itself away")


def _check_stem(question: str, options: Sequence[str], right: int) -> None:
    """The stem may name the answer only if it names every option."""
    stem = f" {normalise(question)} "
    named: list[bool] = []
    for option in options:
        words = f" {normalise(option)} "
        named.append(words in stem)
    if named[right] and not all(named):
        raise RowError("question_leak", f"the question names its answer: {options[right]!r}")


def repeats(question: str, earlier: Sequence[str]) -> bool:
    """Whether one of the `earlier` questions on the same image asks the same: the same words for the most part."""
    words = _words(question)
    for earlier_question in earlier:
        earlier_words = _words(earlier_question)
        num_shared = len(words & earlier_words)
        if num_shared >= ALIKE * len(words | earlier_words):
            return True
    return False


def _words(text: str) -> set[str]:
    return set(normalise(text).split())
