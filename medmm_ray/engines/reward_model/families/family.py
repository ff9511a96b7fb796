"""What a family of process reward models is, and what the families share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from medmm_ray.engines.reward_model.packing import FullSequence, Prompt, Read, common
from medmm_ray.text import one_line, tag_steps

FamilyName = Literal[
    "medprm", "math_shepherd", "qwen_prm", "token_classification", "meds3", "medprm_vision", "visualprm"
]


class Family(Protocol):
    """What `RewardModel` needs of a format."""

    name: FamilyName
    tokenizer: Any
    ids: Mapping[str, int]
    """The token ids that the format rests on."""
    additive: bool
    """Whether the log-odds are linear in the state, without a constant: what an image part needs."""

    def sequences(self, prompt: Prompt, solutions: Mapping[int, Read]) -> tuple[list[FullSequence], dict[int, str]]:
        """Full sequences of solutions, by their numbers, and the errors of those that cannot be written."""

    def log_odds(self, text_model: Any, states_TD: Tensor) -> Tensor:
        """Log-odds [T, fp32] of right against wrong from the states after the final norm."""


# How a state is read


class Signs:
    """Reads one token of a language model's head against another."""

    additive = True
    ids: Mapping[str, int]

    def log_odds(self, text_model: Any, states_TD: Tensor) -> Tensor:
        """logit(+) − logit(-): linear, so that of a sum of states it is the sum of theirs."""
        head_VD: Tensor = text_model.get_output_embeddings().weight
        return states_TD.float() @ (head_VD[self.ids["plus"]].float() - head_VD[self.ids["minus"]].float())


class TwoClasses:
    """Reads the second class of a head `score` against the first."""

    additive = False

    def log_odds(self, text_model: Any, states_TD: Tensor) -> Tensor:
        logits_T2 = text_model.score(states_TD.to(next(text_model.score.parameters()).dtype))
        difference_T: Tensor = logits_T2[:, 1].float() - logits_T2[:, 0].float()
        return difference_T


# How a solution is written: its steps with what stands before them


def ids_of(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def with_preamble(preamble: str, steps: Sequence[str]) -> list[str]:
    """The steps, for a format that knows nothing before the first: the preamble becomes that one's beginning."""
    return [f"{preamble} {steps[0]}" if preamble else steps[0], *steps[1:]]


def steps_in_a_line(steps: Sequence[str], preamble: str, tag: str) -> str:
    return tag_steps(steps, preamble, tag)


def steps_in_lines(steps: Sequence[str], preamble: str, tag: str) -> str:
    lines = [f"Step {i}: {one_line(step)}{tag}" for i, step in enumerate(steps, 1)]
    return "\n".join([one_line(preamble), *lines] if preamble.strip() else lines)


def steps_joined(steps: Sequence[str], preamble: str, tag: str) -> str:
    return "".join(f"{one_line(step)}{tag}" for step in ([preamble] if preamble.strip() else []) + list(steps))


def tagged(
    tokenizer: Any,
    tag: str,
    tag_id: int,
    solutions: Mapping[int, Read],
    write: Callable[[str], str],
    join: Callable[[Sequence[str], str, str], str],
) -> tuple[list[FullSequence], dict[int, str]]:
    """Whole texts, tokenised as one, whose steps are read at the tags that end them.

    Tags are found by id and counted in the text: one in the question, in a document, or inside a step ends no step.
    """
    own_texts = [join(steps, preamble, tag) for preamble, steps in solutions.values()]
    texts = [write(text) for text in own_texts]
    cuts = [text.rfind(own) for text, own in zip(texts, own_texts, strict=True)]
    if min(cuts) < 0:
        raise ValueError("the tokenizer's chat template alters the solution's text; expected it to be kept as it is")
    rows: list[list[int]] = tokenizer([texts[0][: cuts[0]], *texts], add_special_tokens=True)["input_ids"]
    head, *rows = rows
    made: list[FullSequence] = []
    faults: dict[int, str] = {}
    for (number, (preamble, steps)), text, own, ids in zip(solutions.items(), texts, own_texts, rows, strict=True):
        at = [p for p, token in enumerate(ids) if token == tag_id]
        if len(at) != text.count(tag):
            faults[number] = f"tags: {len(at)} tag tokens for {text.count(tag)} tags in the text; expected as many"
            continue
        at = at[len(at) - own.count(tag) :]
        ends = [at[join(steps[:n], preamble, tag).count(tag) - 1] for n in range(1, len(steps) + 1)]
        made.append(FullSequence(number, ids[: ends[-1] + 1], ends, common([head, ids])))
    return made, faults


# Images in the text


@dataclass(frozen=True)
class Pictures:
    """How images stand in the text of a vision-language model: each as `text`, which holds `token` once.

    The token is repeated among the ids, once for each of the image's rows: quicker than in the text.
    """

    token: str
    token_id: int
    text: str

    def placed(self, text: str, number: int) -> str:
        """`text` with the pictures' own text for the marks that the chat template made of them, the first `number`."""
        pieces = text.split(self.token, number)
        if len(pieces) != number + 1:
            raise ValueError(
                f"the tokenizer's chat template writes {len(pieces) - 1} {self.token!r} for {number} images; "
                "expected one each: a template that takes contents as lists of text and images"
            )
        return self.text.join(pieces)

    def repeated(
        self, prompt: Prompt, sequences: Sequence[FullSequence], faults: dict[int, str]
    ) -> tuple[list[FullSequence], dict[int, str]]:
        """The sequences with as many tokens as images have rows; an error for a text that itself holds the token, where
        the model would look for an image."""
        made, faults = list[FullSequence](), dict(faults)
        for sequence in sequences:
            if sequence.ids.count(self.token_id) == len(prompt.images):
                made.append(self._repeat(sequence, prompt.images))
            else:
                faults[sequence.solution] = (
                    f"image_marks: the text itself holds {self.token!r}, which stands for an image; take it out"
                )
        return made, faults

    def _repeat(self, sequence: FullSequence, rows: Sequence[int]) -> FullSequence:
        """All images stand before the solution's own text."""
        left, ids = iter(rows), list[int]()
        for token in sequence.ids:
            ids += [token] * (next(left) if token == self.token_id else 1)
        more = len(ids) - len(sequence.ids)
        return FullSequence(sequence.solution, ids, [tag + more for tag in sequence.tags], sequence.start + more)
