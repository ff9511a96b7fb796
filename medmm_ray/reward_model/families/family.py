"""What a family of process reward models is, and what the families share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, Protocol

from torch import Tensor

from medmm_ray.engines.chat_template import ChatTemplate
from medmm_ray.reward_model.full_sequence import FullSequence, QuestionContext, Solution, common_prefix
from medmm_ray.reward_model.shared_text import tokenize_sharing
from medmm_ray.text import cut_steps, is_tagged, without_tags

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

    @property
    def template(self) -> ChatTemplate | None:
        """The chat template, where the format has one."""

    def sequences(
        self, context: QuestionContext, solutions: Mapping[int, Solution]
    ) -> tuple[list[FullSequence], dict[int, str]]:
        """Full sequences of solutions, by their numbers, and the errors of those that cannot be written."""

    def log_odds(self, text_model: Any, states_TD: Tensor) -> Tensor:
        """Log-odds [T, fp32] of right against wrong from the states after the final norm."""


# How log-odds are made of a state


class TokenPairHead:
    """Log-odds of a language model's head: the logit of the token + less that of −."""

    additive = True
    ids: Mapping[str, int]

    def log_odds(self, text_model: Any, states_TD: Tensor) -> Tensor:
        """Linear in the states: of a sum of states it is the sum of theirs."""
        head_VD: Tensor = text_model.get_output_embeddings().weight
        direction_D = head_VD[self.ids["plus"]].float() - head_VD[self.ids["minus"]].float()
        return states_TD.float() @ direction_D


class ClassifierHead:
    """Log-odds of a classifier `score`: the logit of the second class less that of the first."""

    additive = False

    def log_odds(self, text_model: Any, states_TD: Tensor) -> Tensor:
        """Not linear in the states: the head may be an MLP, or have a constant."""
        dtype = next(text_model.score.parameters()).dtype
        logits_T2 = text_model.score(states_TD.to(dtype))
        difference_T: Tensor = logits_T2[:, 1].float() - logits_T2[:, 0].float()
        return difference_T


# How a solution is written


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text by itself, without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def steps_of(solution: Solution) -> list[str]:
    """The steps as they are, without tags: a list's, or those that raw text is cut into, with their marks, stripped."""
    if isinstance(solution, str):
        return [step.strip() for step in cut_steps(solution)]
    return without_tags(solution)


def with_separators(solution: Solution, steps: Sequence[str], separator: str) -> list[str]:
    """Steps with the `separator` that parts each from the one before; a text with tags keeps its own."""
    if isinstance(solution, str) and is_tagged(solution):
        return cut_steps(solution)
    return [f"{separator}{step}" if number else step for number, step in enumerate(steps)]


def tokenize_tagged(
    tokenizer: Any, tag: str, tag_id: int, solutions: Mapping[int, Sequence[str]], render: Callable[[str], str]
) -> tuple[list[FullSequence], dict[int, str]]:
    """Whole texts, tokenised as one, whose steps are read at the tags that end them.

    `solutions` are lists of steps that stand one behind the other, each followed by its tag; `render` writes the whole
    text around such a solution. Tags are found by id and counted in the text: one in the question, in a document, or
    inside a step ends no step.
    """
    solution_texts: list[str] = []
    for steps in solutions.values():
        solution_texts.append("".join(f"{step}{tag}" for step in steps))
    texts = [render(solution) for solution in solution_texts]
    head_text = _text_before(texts[0], solution_texts[0], render)
    head_ids, *rows = tokenize_sharing(tokenizer, head_text, [head_text, *texts])
    sequences: list[FullSequence] = []
    faults: dict[int, str] = {}
    for (number, steps), text, ids in zip(solutions.items(), texts, rows, strict=True):
        tags = places_of([tag_id], ids)
        if len(tags) != text.count(tag):
            faults[number] = f"tags: {len(tags)} tag tokens for {text.count(tag)} tags in the text; expected as many"
            continue
        # The solution's tags are the text's last ones; a step that holds tags itself ends at the last of its own.
        num_tags = [f"{step}{tag}".count(tag) for step in steps]
        first = len(tags) - sum(num_tags)
        ends = [tags[first + count - 1] for count in accumulate(num_tags)]
        sequences.append(FullSequence(number, ids[: ends[-1] + 1], ends, common_prefix([head_ids, ids])))
    return sequences, faults


def _text_before(text: str, solution: str, render: Callable[[str], str]) -> str:
    """What stands before the solution; where the chat template alters it, what texts with and without it begin with."""
    start = text.rfind(solution)
    if start < 0:
        start = common_prefix([text, render("")])
    return text[:start]


def places_of(part: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Where `part` begins in `ids`."""
    places: list[int] = []
    place = -1
    # By `index`, which looks through thousands of ids in C for the few that matter.
    for _ in range(ids.count(part[0])):
        place = ids.index(part[0], place + 1)
        if ids[place : place + len(part)] == part:
            places.append(place)
    return places


def chat_template(tokenizer: Any, in_parts: bool = False) -> ChatTemplate:
    """The tokenizer's, probed; raises `ValueError` where it has none, or one that writes no text."""
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; a reward model's input is written with one")
    return ChatTemplate(tokenizer.apply_chat_template, tokenizer.chat_template, in_parts)


def check_tags(tag: str, render: Callable[[str], str]) -> None:
    """Raise `ValueError` where the chat template leaves steps unreadable: their tags altered, lost, or out of place."""
    # Words that no template has, in steps long enough that one that cuts them is found out.
    words = ("xqone", "xqtwo", "xqthree")
    steps = [f" {word} kwj" * 100 for word in words]
    text = render("".join(f"{step}{tag}" for step in steps))
    pieces = text.split(tag)[-len(words) - 1 :]  # before them there may be tags in the prompt
    is_read = [word in piece.casefold() for word, piece in zip(words, pieces, strict=False)]
    if text.count(tag) - render("").count(tag) != len(words) or not all(is_read):
        raise ValueError(
            f"the tokenizer's chat template alters the solution's text: of {len(words)} steps, each ended by {tag!r}, "
            f"{text.count(tag)} tags are left in it, and the steps cannot be read. Expected a template that keeps "
            "the tags; set tokenizer.chat_template to one, or take another checkpoint"
        )


# Images in the text


@dataclass(frozen=True)
class ImageTokens:
    """How images stand in the text of a vision-language model: each as `text`, which holds `token` once.

    The token is repeated among the ids, once for each of the image's embeddings: quicker than in the text.
    """

    token: str
    token_id: int
    text: str

    def place(self, text: str, number: int) -> str:
        """`text` with the images' own text for the marks that the chat template made of them, the first `number`."""
        pieces = text.split(self.token, number)
        if len(pieces) != number + 1:
            raise ValueError(
                f"the tokenizer's chat template writes {len(pieces) - 1} {self.token!r} for {number} images; "
                "expected one each: a template that takes contents as lists of text and images"
            )
        return self.text.join(pieces)

    def expand(
        self, context: QuestionContext, sequences: Sequence[FullSequence], faults: Mapping[int, str]
    ) -> tuple[list[FullSequence], dict[int, str]]:
        """The sequences with as many tokens as images have embeddings; an error for a text that itself holds the token,
        where the model would look for an image."""
        expanded: list[FullSequence] = []
        all_faults = dict(faults)
        for sequence in sequences:
            if sequence.ids.count(self.token_id) == len(context.images):
                expanded.append(self._expand(sequence, context.images))
            else:
                all_faults[sequence.solution] = (
                    f"image_marks: the text itself holds {self.token!r}, which stands for an image; take it out"
                )
        return expanded, all_faults

    def _expand(self, sequence: FullSequence, lengths: Sequence[int]) -> FullSequence:
        lengths_left = iter(lengths)
        ids: list[int] = []
        for token in sequence.ids:
            ids += [token] * (next(lengths_left) if token == self.token_id else 1)
        # All images stand before the solution's own text, so that all of its places move alike.
        shift = len(ids) - len(sequence.ids)
        tags = [tag + shift for tag in sequence.tags]
        return FullSequence(sequence.solution, ids, tags, sequence.start + shift)
