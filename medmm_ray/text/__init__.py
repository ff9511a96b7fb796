"""Steps and answers in text, pure: a solution's steps, the form a reward model reads, the answer it states."""

from medmm_ray.text.answers import extract_answer
from medmm_ray.text.matching import answer_key, equal_key, is_correct, normalise
from medmm_ray.text.mirage import mirage_answer
from medmm_ray.text.steps import (
    LETTERS,
    TAG,
    join_steps,
    one_line,
    question_with_options,
    split_steps,
    step_numbers,
    tag_steps,
    well_formed,
)

__all__ = [
    "LETTERS",
    "TAG",
    "answer_key",
    "equal_key",
    "extract_answer",
    "is_correct",
    "join_steps",
    "mirage_answer",
    "normalise",
    "one_line",
    "question_with_options",
    "split_steps",
    "step_numbers",
    "tag_steps",
    "well_formed",
]
