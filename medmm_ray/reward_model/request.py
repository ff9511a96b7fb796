"""A question to score, as it enters: checked once, so that what reads it can trust it.

What has the wrong type is a `TypeError`, what no model can read a `ValueError`, each with the place. What is wrong with
one solution alone (no step, too long) is not said here: it becomes that solution's error entry.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medmm_ray.reward_model.full_sequence import Solution

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ScoreRequest:
    """A question to score: see `RewardModel.score` for the fields."""

    question: str
    solutions: Sequence[Solution]
    documents: Sequence[str] = ()
    image: "Image | Sequence[Image] | None" = None
    reference_images: Sequence["Image"] = ()

    def __post_init__(self) -> None:
        _check_text("question", self.question)
        if not self.question.strip():
            raise ValueError(f"question is {self.question!r}; expected the question's text, with its options")
        _check_texts("documents", self.documents)
        _check_list("solutions", self.solutions, "solutions")
        for i, solution in enumerate(self.solutions):
            if isinstance(solution, str):
                _check_text(f"solutions[{i}]", solution)
            else:
                _check_texts(f"solutions[{i}]", solution, "a text, or a list of steps")
        _check_list("reference_images", self.reference_images, "images")
        if isinstance(self.image, (str, bytes)):
            raise TypeError(f"image is a {type(self.image).__name__}; expected a PIL image (PIL.Image.open reads one)")

    @property
    def images(self) -> "list[Image]":
        """The question's own images, none or several."""
        if self.image is None:
            return []
        return list(self.image) if isinstance(self.image, Sequence) else [self.image]


def _check_list(name: str, value: Any, items: str) -> None:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} is {_shown(value)}; expected a list of {items}")


def _check_texts(name: str, value: Any, expected: str = "a list of texts") -> None:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} is {_shown(value)}; expected {expected}")
    for i, text in enumerate(value):
        _check_text(f"{name}[{i}]", text)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {_shown(value)}; expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds half of a character ({value[error.start]!a}, a lone surrogate) at {error.start}; no "
            "tokenizer can read it: decode the text anew, or take it out"
        ) from None


def _shown(value: Any) -> str:
    text = repr(value)
    if len(text) > 40:
        text = text[:40] + "…"
    return f"{text} ({type(value).__name__})"
