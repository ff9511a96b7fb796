"""Steps and answers in text, pure: a solution's steps, the form a reward model reads, the answer it states."""

from medmm_ray.text.answers import extract_answer
from medmm_ray.text.matching import answer_key, equal_key, is_correct, normalise
from medmm_ray.text.mirage import mirage_answer
from medmm_ray.text.steps import (
    LETTERS,
    TAG,
    cut_steps,
    have_marks,
    is_tagged,
    join_steps,
    one_line,
    question_with_options,
    reference_steps,
    split_steps,
    step_numbers,
    tag_steps,
    well_formed,
    without_mark,
    without_tags,
)

__all__ = [
    "LETTERS",
    "TAG",
    "answer_key",
    "cut_steps",
    "equal_key",
    "extract_answer",
    "have_marks",
    "is_correct",
    "is_tagged",
    "join_steps",
    "mirage_answer",
    "normalise",
    "one_line",
    "question_with_options",
    "reference_steps",
    "split_steps",
    "step_numbers",
    "tag_steps",
    "well_formed",
    "without_mark",
    "without_tags",
]
