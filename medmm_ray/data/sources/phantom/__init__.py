"""The phantom source: chest radiographs that are drawn, so that the truth of every possible step is known.

Enters: numbers and a seed. Leaves: cases with pictures to be drawn, questions whose answer only the picture tells,
worked solutions, guideline documents. ``python -m medmm_ray.data.sources.phantom sheet.png`` draws a contact sheet.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import PIL.Image

from medmm_ray.config import digest
from medmm_ray.data.sources import (
    AnsweredQuestion,
    Hardness,
    SourceData,
    SourceImage,
    SourceQuestion,
    SourceRequest,
)
from medmm_ray.data.sources.phantom.captions import captions
from medmm_ray.data.sources.phantom.case import HARD, PLAIN, PhantomCase, generator, make_case
from medmm_ray.data.sources.phantom.documents import DOCUMENTS
from medmm_ray.data.sources.phantom.questions import PhantomQuestion, blind_solution, make_questions, report
from medmm_ray.data.sources.phantom.render import contact_sheet, render
from medmm_ray.data.sources.phantom.truth import truth
from medmm_ray.text import join_steps, question_with_options

__all__ = [
    "DOCUMENTS",
    "HARD",
    "PLAIN",
    "Hardness",
    "PhantomCase",
    "PhantomQuestion",
    "blind_solution",
    "captions",
    "contact_sheet",
    "corpus",
    "drawn_picture",
    "generator",
    "make_case",
    "make_questions",
    "read",
    "render",
    "report",
    "truth",
]

NUM_TRAIN, NUM_TEST = 800, 250


def read(request: SourceRequest) -> SourceData:
    """Cases, questions and documents; `request.num_extra_images` more training cases come without a question."""
    num_questions = {
        "train": NUM_TRAIN if request.num_train is None else request.num_train,
        "test": NUM_TEST if request.num_test is None else request.num_test,
    }
    hardness = request.hardness or PLAIN
    images: list[SourceImage] = []
    questions: list[SourceQuestion] = []
    for split, number in num_questions.items():
        split_questions = make_questions(
            request.seed,
            split,
            number,
            request.num_worked,
            hardness,
        )
        for index, question in enumerate(split_questions):
            image = _image(question.case, split)
            images.append(image)
            questions.append(
                _source_question(
                    question,
                    image,
                    split,
                    f"{split}-{index}",
                )
            )
    images += [_image(case, "train") for case in _extra_cases(request.seed, request.num_extra_images, hardness)]
    return SourceData(images=images, questions=questions, documents=DOCUMENTS, draw=draw)


def draw(annotation: str, size: int) -> PIL.Image.Image:
    """The picture of the case that `annotation` describes."""
    return render(PhantomCase.from_annotation(annotation), size)


@dataclass(frozen=True)
class PhantomPicture:
    """A drawn picture of a case: what steps say of it is checked, and what it shows is told."""

    case: PhantomCase

    def truth(self, step: str, question: AnsweredQuestion | None = None) -> bool | None:
        """Whether a step is right about the case; None where it says nothing that can be checked."""
        return truth(step, self.case, question)

    def captions(self) -> tuple[str, ...]:
        """Ways to say what the picture shows."""
        return captions(self.case)


def drawn_picture(annotation: str) -> PhantomPicture:
    """The picture of the case that `annotation` describes; raises `ValueError` where that is of something else."""
    return PhantomPicture(PhantomCase.from_annotation(annotation))


def corpus(seed: int = 0, number: int = 2000) -> list[str]:
    """Texts of this world to train a tokenizer on: questions, solutions, captions, documents."""
    texts = [f"{document.title}. {document.text}" for document in DOCUMENTS]
    for question in make_questions(seed, "corpus", number):
        texts.append(question_with_options(question.question, question.options))
        texts.append(join_steps(question.worked[0]))
        texts += captions(question.case)
    return texts


def _extra_cases(seed: int, number: int, hardness: Hardness) -> Iterator[PhantomCase]:
    return (make_case(generator("extra", seed, index), hardness=hardness) for index in range(number))


def _image(case: PhantomCase, split: str) -> SourceImage:
    annotation = case.annotation()
    return SourceImage(
        uri=f"{split}/{digest('phantom', annotation)}.png",
        split=split,
        modality="radiology",
        diagnosis=case.diagnosis,
        annotation=annotation,
        drawn=True,
    )


def _source_question(question: PhantomQuestion, image: SourceImage, split: str, name: str) -> SourceQuestion:
    return SourceQuestion(
        name=name,
        split=split,
        modality="radiology",
        difficulty=question.case.difficulty,
        question=question.question,
        options=question.options,
        answer=question.answer,
        answer_type="choice",
        images=(image.uri,),
        worked=question.worked if split == "train" else (),
    )
