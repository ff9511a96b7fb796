"""Evidence for a request: passages and reference images from the index of a run, put behind what the request has.

Enters: a question, its image, and how much is asked for. Leaves: texts and image files for the model, and for the
answer the ids and scores of what was found.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from pydantic import Field

from medmm_ray.data.records import RetrievedDocument, RetrievedImage
from medmm_ray.service.messages import Answer, Message


class EvidenceRequest(Message):
    """How much evidence to look up."""

    documents: int = Field(default=0, ge=0)
    """Passages, best first."""
    images: int = Field(default=0, ge=0)
    """Similar training images, most similar first; they need the question's image."""
    modality: str = ""
    """The question's modality, where the index is searched by it (`retrieve.same_modality`)."""


class PassageOfAnswer(Answer):
    """A passage that was found."""

    passage_id: str
    document_id: str
    corpus: str
    title: str
    text: str
    score: float
    """What the last ranker that ordered it says; higher is better."""


class ImageOfAnswer(Answer):
    """A reference image that was found."""

    image_id: str
    diagnosis: str
    similarity: float
    """Cosine similarity to the question's image."""


class RetrievedEvidence(Answer):
    """What was found, best first."""

    documents: list[PassageOfAnswer]
    images: list[ImageOfAnswer]


@dataclass(frozen=True)
class Found:
    """What an index holds for a question; `contents` are the files of the images."""

    documents: Sequence[RetrievedDocument]
    images: Sequence[RetrievedImage]
    contents: Sequence[bytes]

    def answer(self) -> RetrievedEvidence:
        """What the client is told of it."""
        documents: list[PassageOfAnswer] = []
        for document in self.documents:
            documents.append(
                PassageOfAnswer(
                    passage_id=document.passage_id,
                    document_id=document.document_id,
                    corpus=document.corpus,
                    title=document.title,
                    text=document.text,
                    score=document.score,
                )
            )
        images: list[ImageOfAnswer] = []
        for image in self.images:
            # Not its address: where the run's files lie is nobody's business.
            images.append(
                ImageOfAnswer(
                    image_id=image.image_id,
                    diagnosis=image.diagnosis,
                    similarity=image.similarity,
                )
            )
        return RetrievedEvidence(documents=documents, images=images)


@dataclass(frozen=True)
class EvidenceQuery:
    """What is looked up: the question as the encoder of queries reads it, and the bytes of its image."""

    question: str
    options: Sequence[str]
    image: bytes | None
    num_documents: int
    num_images: int
    modality: str


EvidenceSource = Callable[[EvidenceQuery], Awaitable[Found]]
"""From a query to what an index holds for it."""
