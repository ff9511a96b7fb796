"""Steps and answers in text, pure: a solution's steps, the form a reward model reads, the answer it states."""

from medmm_ray.text.answers import extract_answer
from medmm_ray.text.matching import answer_key, equal_key, is_correct, normalise
from medmm_ray.text.mirage import mirage_answer
from medmm_ray.text.options import lettered_options
from medmm_ray.text.steps import (
    LETTERS,
    STEP_MARK,
    TAG,
    cut_steps,
    have_marks,
    is_tagged,
    join_steps,
    numbered_steps,
    one_line,
    question_with_options,
    reference_steps,
    solution_prefix,
    solution_text,
    split_steps,
    step_mark,
    step_numbers,
    tag_steps,
    well_formed,
    without_mark,
    without_tags,
)

__all__ = [
    "LETTERS",
    "STEP_MARK",
    "TAG",
    "answer_key",
    "cut_steps",
    "equal_key",
    "extract_answer",
    "have_marks",
    "is_correct",
    "is_tagged",
    "join_steps",
    "lettered_options",
    "mirage_answer",
    "normalise",
    "numbered_steps",
    "one_line",
    "question_with_options",
    "reference_steps",
    "solution_prefix",
    "solution_text",
    "split_steps",
    "step_mark",
    "step_numbers",
    "tag_steps",
    "well_formed",
    "without_mark",
    "without_tags",
]
