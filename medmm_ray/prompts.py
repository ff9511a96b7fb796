"""Every prompt that a policy or a reward model reads. They are part of the models: a changed byte changes a score."""

import re
from collections.abc import Sequence

from medmm_ray.text.steps import STEP_MARK

Message = dict[str, str]

_POLICY = (
    "You are a medical expert. Reason step by step from the image and the clinical context. Start each step with "
    f'"{STEP_MARK}". '
)
POLICY_SYSTEM = _POLICY + 'End with "the answer is (option letter)."'
POLICY_SYSTEM_OPEN = _POLICY + 'End with "the answer is (short answer)."'

# Med-PRM's own wording (arXiv 2506.11474): the published weights were trained on exactly these bytes.
_PRM_TASK = (
    "You are an evaluator assessing the logicality and validity of the reasoning in each step of the given "
    "explanation. "
)
_PRM_WITH_DOCUMENTS = (
    "In order to support the evaluation, the relevant documents, the question, and the explanation are provided "
    "sequentially. "
)
_PRM_WITHOUT_DOCUMENTS = "In order to support the evaluation, the question and the explanation are provided. "
_PRM_RULE = (
    "If the reasoning contains errors, output - after that step. If the reasoning in a step is logical and valid, "
    "output + after that step."
)


# A label that a document brings along.
_DOCUMENT = re.compile(r"Document \d+: ")


def document_block(documents: Sequence[str]) -> str:
    """``Document 1: …\\n\\nDocument 2: …\\n\\n``, empty without documents.

    Documents that all bring their label along, as in the example of Med-PRM's model card, keep it and get no other.
    """
    if not all(_DOCUMENT.match(text) for text in documents):
        documents = [f"Document {number}: {text}" for number, text in enumerate(documents, 1)]
    blocks = [f"{text}\n\n" for text in documents]
    return "".join(blocks)


def policy_messages(question: str, documents: Sequence[str] = (), answer_type: str = "choice") -> list[Message]:
    """The policy's prompt; `question` carries its options. Shared text stands first, for the prefix cache."""
    system = POLICY_SYSTEM if answer_type == "choice" else POLICY_SYSTEM_OPEN
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": f"{document_block(documents)}Question: {question}"},
    ]


def prm_messages(
    question: str,
    tagged_solution: str,
    documents: Sequence[str] = (),
    training: bool = False,
    system: str | None = None,
) -> list[Message]:
    """Med-PRM's input: `question` carries its options, `tagged_solution` its tags (`text.tag_steps`).

    With documents the system prompt ends in a space when scoring and in none when training, as in the reference.
    `system`: another one in its place.
    """
    if system is None:
        inputs = _PRM_WITH_DOCUMENTS if documents else _PRM_WITHOUT_DOCUMENTS
        ending = " " if documents and not training else ""
        system = _PRM_TASK + inputs + _PRM_RULE + ending
    user = f"{document_block(documents)}Question: {question}\n\nExplanation: {tagged_solution}"
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]
