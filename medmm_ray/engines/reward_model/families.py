"""The published formats of process reward models: how a solution is written, and where and how its steps are read.

medprm               Med-PRM (arXiv 2506.11474): chat template, " ки" after each step, " +" against " -" there
math_shepherd        Math-Shepherd (arXiv 2312.08935): plain text, "ки" after each step, "+" against "-" there
qwen_prm             Qwen2.5-Math-PRM (arXiv 2501.07301): "<extra_0>" after each step of the assistant's turn, an MLP
token_classification TRL's: two classes at the last token of each step

A family gives full sequences of ids with the places at which the steps are read, and log-odds of the states there.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, get_args

from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2Model

from medmm_ray.engines.reward_model.packing import FullSequence, Read, common, single_id
from medmm_ray.prompts import document_block, prm_messages
from medmm_ray.text import TAG, one_line, tag_steps

FamilyName = Literal["medprm", "math_shepherd", "qwen_prm", "token_classification"]
NAMES: tuple[FamilyName, ...] = get_args(FamilyName)


class Family(Protocol):
    """What `RewardModel` needs of a format."""

    name: FamilyName
    tokenizer: Any
    ids: Mapping[str, int]
    """The token ids that the format rests on."""
    additive: bool
    """Whether the log-odds are linear in the state, without a constant: what an image part needs."""

    def sequences(
        self, question: str, solutions: Mapping[int, Read], documents: Sequence[str], training: bool
    ) -> tuple[list[FullSequence], dict[int, str]]:
        """Full sequences of solutions, by their numbers, and the errors of those that cannot be written."""

    def log_odds(self, text_model: Any, states_TD: Tensor) -> Tensor:
        """Log-odds [T, fp32] of right against wrong from the states after the final norm."""


class _Signs:
    """What the families share that set one token of a language model's head against another."""

    additive = True
    ids: Mapping[str, int]

    def log_odds(self, text_model: Any, states_TD: Tensor) -> Tensor:
        """logit(+) − logit(-): linear, so that of a sum of states it is the sum of theirs."""
        head_VD: Tensor = text_model.get_output_embeddings().weight
        return states_TD.float() @ (head_VD[self.ids["plus"]].float() - head_VD[self.ids["minus"]].float())


class MedPrm(_Signs):
    """Med-PRM's format; " ки", " +" and " -" must each be one token."""

    name: FamilyName = "medprm"

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; a reward model's input is written with one")
        self.tokenizer = tokenizer
        self.ids: Mapping[str, int] = {"tag": single_id(tokenizer, TAG), "plus": single_id(tokenizer, " +"),
                    "minus": single_id(tokenizer, " -")}  # fmt: skip

    def sequences(
        self, question: str, solutions: Mapping[int, Read], documents: Sequence[str], training: bool
    ) -> tuple[list[FullSequence], dict[int, str]]:
        def write(tagged: str) -> str:
            messages = prm_messages(question, tagged, documents, training=training)
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

        return _tagged(self.tokenizer, TAG, self.ids["tag"], solutions, write, _steps_in_a_line)


class MathShepherd(_Signs):
    """Math-Shepherd's format: question, a space, "Step 1: … ки" a line a step. Documents stand before the question."""

    name: FamilyName = "math_shepherd"

    def __init__(self, tokenizer: Any) -> None:
        # Its own code takes the last token of " ки" and of " +", " -": a sentencepiece vocabulary has one for each.
        self.tokenizer = tokenizer
        self.ids: Mapping[str, int] = {
            name: single_id(tokenizer, sign) for name, sign in (("tag", "ки"), ("plus", "+"), ("minus", "-"))
        }

    def sequences(
        self,
        question: str,
        solutions: Mapping[int, Read],
        documents: Sequence[str],
        training: bool,  # noqa: ARG002
    ) -> tuple[list[FullSequence], dict[int, str]]:
        def write(tagged: str) -> str:
            return f"{document_block(documents)}{question} {tagged}"

        return _tagged(self.tokenizer, TAG, self.ids["tag"], solutions, write, _steps_in_lines)


class QwenPrm:
    """Qwen2.5-Math-PRM's format: the steps in the assistant's turn, each followed by "<extra_0>"."""

    name: FamilyName = "qwen_prm"
    additive = False
    tag: ClassVar[str] = "<extra_0>"
    system: ClassVar[str] = "Please reason step by step, and put your final answer within \\boxed{}."

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; Qwen's reward model is asked with one")
        self.tokenizer = tokenizer
        self.ids: Mapping[str, int] = {"tag": single_id(tokenizer, self.tag)}

    def sequences(
        self,
        question: str,
        solutions: Mapping[int, Read],
        documents: Sequence[str],
        training: bool,  # noqa: ARG002
    ) -> tuple[list[FullSequence], dict[int, str]]:
        def write(tagged: str) -> str:
            messages = [
                {"role": "system", "content": self.system},
                {"role": "user", "content": f"{document_block(documents)}{question}"},
                {"role": "assistant", "content": tagged},
            ]
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))

        return _tagged(self.tokenizer, self.tag, self.ids["tag"], solutions, write, _steps_joined)

    def log_odds(self, text_model: Any, states_TD: Tensor) -> Tensor:
        return _second(text_model.score(states_TD.to(text_model.score[0].weight.dtype)))


class TokenClassification:
    """Two classes at the end of each step: prompt, then each step and a line break, each tokenised by itself."""

    name: FamilyName = "token_classification"
    additive = False
    separator: ClassVar[str] = "\n"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: Mapping[str, int] = {}

    def sequences(
        self,
        question: str,
        solutions: Mapping[int, Read],
        documents: Sequence[str],
        training: bool,  # noqa: ARG002
    ) -> tuple[list[FullSequence], dict[int, str]]:
        def ids_of(text: str) -> list[int]:
            found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return found

        begin = self.tokenizer.bos_token_id
        prompt = [*([] if begin is None else [begin]), *ids_of(f"{document_block(documents)}{question}")]
        separator = ids_of(self.separator)
        made = []
        for number, (preamble, steps) in solutions.items():
            ids, ends = list(prompt), []
            for step in [f"{preamble} {steps[0]}" if preamble else steps[0], *steps[1:]]:
                ids += ids_of(one_line(step)) + separator
                ends.append(len(ids) - 1)
            made.append(FullSequence(number, ids, ends, len(prompt)))
        return made, {}

    def log_odds(self, text_model: Any, states_TD: Tensor) -> Tensor:
        return _second(text_model.score(states_TD.to(text_model.score.weight.dtype)))


class QwenProcessRewardModel(PreTrainedModel):
    """The weights of Qwen2.5-Math-PRM, whose own class comes as remote code: a Qwen2 and an MLP with two outputs."""

    config_class = Qwen2Config
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)
        self.model = Qwen2Model(config)
        width = config.hidden_size
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        embed: nn.Module = self.model.embed_tokens
        return embed


def make(name: FamilyName, tokenizer: Any) -> Family:
    """The family of that name; raises `ValueError` where the tokenizer does not fit it."""
    match name:
        case "medprm":
            return MedPrm(tokenizer)
        case "math_shepherd":
            return MathShepherd(tokenizer)
        case "qwen_prm":
            return QwenPrm(tokenizer)
        case "token_classification":
            return TokenClassification(tokenizer)


def detect(architectures: Sequence[str], tokenizer: Any) -> FamilyName | None:
    """The family of a checkpoint by its config's `architectures` and its tokenizer; None where it fits none."""
    names = " ".join(architectures)
    if "ProcessRewardModel" in names:
        return "qwen_prm"
    if "ForTokenClassification" in names:
        return "token_classification"
    if "ForCausalLM" not in names:
        return None
    if tokenizer.chat_template:
        return "medprm"
    return "math_shepherd" if _is_one(tokenizer, "ки") else None


def _is_one(tokenizer: Any, text: str) -> bool:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1


def _second(logits_T2: Tensor) -> Tensor:
    """Log-odds of the second class."""
    return logits_T2[:, 1].float() - logits_T2[:, 0].float()


# Tagged text


def _steps_in_a_line(steps: Sequence[str], preamble: str, tag: str) -> str:
    return tag_steps(steps, preamble, tag)


def _steps_in_lines(steps: Sequence[str], preamble: str, tag: str) -> str:
    lines = [f"Step {i}: {one_line(step)}{tag}" for i, step in enumerate(steps, 1)]
    return "\n".join([one_line(preamble), *lines] if preamble.strip() else lines)


def _steps_joined(steps: Sequence[str], preamble: str, tag: str) -> str:
    return "".join(f"{one_line(step)}{tag}" for step in ([preamble] if preamble.strip() else []) + list(steps))


def _tagged(
    tokenizer: Any, tag: str, tag_id: int, solutions: Mapping[int, Read], write: Any, join: Any
) -> tuple[list[FullSequence], dict[int, str]]:
    """Whole texts, tokenised as one, whose steps are read at the tags that end them.

    Tags are found by id and counted in the text: one in the question, in a document, or inside a step ends no step.
    """
    tagged = [join(steps, preamble, tag) for preamble, steps in solutions.values()]
    texts = [write(text) for text in tagged]
    cuts = [text.rfind(t) for text, t in zip(texts, tagged, strict=True)]
    if min(cuts) < 0:
        raise ValueError("the tokenizer's chat template alters the solution's text; expected it to be kept as it is")
    rows: list[list[int]] = tokenizer([texts[0][: cuts[0]], *texts], add_special_tokens=True)["input_ids"]
    head, *rows = rows
    made: list[FullSequence] = []
    faults: dict[int, str] = {}
    for (number, (preamble, steps)), text, own, ids in zip(solutions.items(), texts, tagged, rows, strict=True):
        at = [p for p, token in enumerate(ids) if token == tag_id]
        if len(at) != text.count(tag):
            faults[number] = f"tags: {len(at)} tag tokens for {text.count(tag)} tags in the text; expected as many"
            continue
        at = at[len(at) - own.count(tag) :]
        ends = [at[join(steps[:n], preamble, tag).count(tag) - 1] for n in range(1, len(steps) + 1)]
        made.append(FullSequence(number, ids[: ends[-1] + 1], ends, common([head, ids])))
    return made, faults
