"""Questions on pictures that say nothing of a diagnosis: they count, name the kind of picture, or need no picture."""

import re
from collections import Counter
from collections.abc import Collection, Sequence

from medmm_ray.data.records import Question

_PICTURE = r"(?:imag\w*|picture|scan|film|photo\w*|radiograph|study|slide|section)"
_KIND = r"(?:modality|plane|view|sequence|projection|stain\w*|magnification|contrast|weighting|weighted)"
PATTERNS = {
    "counts": re.compile(r"^(?:how many|count|what (?:is|are) the (?:total )?number of)\b", re.IGNORECASE),
    "names_the_kind": re.compile(
        rf"^(?:what|which|in what|in which|how)\b[^?]*\b(?:{_KIND}|(?:type|kind) of {_PICTURE}|{_PICTURE} (?:technique|"
        rf"method)|{_PICTURE}\b[^?]*\b(?:taken|acquired|obtained|performed))\b"
        r"|^(?:is|was|are) (?:this|it|the \w+|these) (?:\w+ ){0,3}?(?:an? )?(?:mri|mr|ct|x-?ray|ultrasound|pet|axial"
        rf"|coronal|sagittal|t1|t2|flair|{_PICTURE})\b[^?]*\??$",
        re.IGNORECASE,
    ),
    "needs_no_picture": re.compile(
        r"^(?:what (?:is|are) the (?:function|treatment|cause|definition|prevention)s? of (?:an? |the )?\w+"
        r"|how (?:to|can|do you|should) (?:\w+ )?(?:treat|prevent|cure|diagnose)|what (?:causes|treats|prevents)"
        r"|which (?:drug|medicine|treatment))\b(?!.*\b(?:this|shown|seen|image|picture|here)\b)",
        re.IGNORECASE,
    ),
}
"""Why a question is no diagnostic one, by the words that it begins with."""


def reason(question: str) -> str | None:
    """Why a question is no diagnostic one: a key of `PATTERNS`, or None for one that is.

    >>> reason("How many ribs are visible?"), reason("Is there a pneumothorax?")
    ('counts', None)
    """
    text = question.strip()
    for name, pattern in PATTERNS.items():
        if pattern.search(text):
            return name
    return None


def diagnostic_questions(
    questions: Sequence[Question],
    official_ids: Collection[str],
    figures: Counter[str],
) -> list[Question]:
    """The questions without those on pictures that say nothing of a diagnosis; official tests stay as they are."""
    diagnostic = []
    for question in questions:
        # Of a question in words alone all of this may be asked.
        why = reason(question.question) if question.image_ids else None
        if why and question.question_id not in official_ids:
            figures[f"questions_not_diagnostic_{why}"] += 1
        else:
            diagnostic.append(question)
    return diagnostic
