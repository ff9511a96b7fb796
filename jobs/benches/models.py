"""Reward models with random weights, texts of exact lengths, and what both cost: shared by the benchmarks."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, Literal

import torch

from medmm_ray.config import Config
from medmm_ray.text import TAG

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from medmm_ray.reward_model import RewardModel

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end>{% endfor %}"


class Shape(Config):
    """A Llama with random weights."""

    hidden_size: int = 576
    """Width."""
    num_layers: int = 8
    """Blocks."""
    num_heads: int = 9
    """Attention heads."""
    num_key_value_heads: int = 3
    """Heads of keys and values."""
    intermediate_size: int = 1536
    """Width inside the MLP."""
    vocab_size: int = 49152
    """Entries of the vocabulary."""


SHAPES = {
    "smollm2": Shape(),
    "wide": Shape(
        hidden_size=1536,
        num_layers=2,
        num_heads=12,
        num_key_value_heads=4,
        intermediate_size=4096,
        vocab_size=32000,
    ),
    "8b": Shape(
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128256,
    ),
}
# Small enough that a replica of one core answers within a second.
SERVED = Shape(
    hidden_size=256,
    num_layers=4,
    num_heads=4,
    num_key_value_heads=2,
    intermediate_size=768,
    vocab_size=4096,
)


class ModelConfig(Config):
    """What every benchmark of the reward model asks: how it computes, and how long the texts are."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format on both sides."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int = 2
    """Torch threads on both sides."""
    repeats: int = 3
    """Ours is the median of so many runs."""
    question: int = 185
    """Tokens of the question."""
    solution: int = 350
    """Mean tokens of a solution."""


def tokenizer(vocab_size: int) -> "PreTrainedTokenizerFast":
    """One token a word: ``w0 w1 ...``, so that a text of n words has n tokens."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "+", "-", "<end>", "<system>", "<user>", "Step"]
    words += [f"{number}:" for number in range(1, 100)]  # as in "Step 1:"
    words += [f"w{number}" for number in range(vocab_size - 1 - len(words))]
    vocabulary = {word: token for token, word in enumerate(words)}
    word_level = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=word_level, eos_token="<end>")  # type: ignore[no-untyped-call] # noqa: S106
    fast.chat_template = TEMPLATE
    fast.add_tokens([AddedToken(TAG, special=True, normalized=False)], special_tokens=True)
    return fast


def reward_model(shape: Shape, dtype: str, device: str, context: int) -> "RewardModel":
    """The same shape always has the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from medmm_ray.engines.onednn_linear import use_onednn
    from medmm_ray.reward_model import RewardModel
    from medmm_ray.reward_model.attention import NAME

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=context,
        tie_word_embeddings=False,
    )
    config._attn_implementation = NAME
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            model = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
        finally:
            torch.set_default_dtype(default)
    use_onednn(model)
    return RewardModel(model, tokenizer(shape.vocab_size), max_length=context).eval()


@dataclass(frozen=True)
class BenchQuestion:
    """One question with its documents and solutions (lists of steps)."""

    question: str
    documents: list[str]
    solutions: list[list[str]]


def bench_question(
    vocab_size: int, question: int, documents: int, solutions: int, tokens: int, seed: int = 0
) -> BenchQuestion:
    """`documents` tokens of documents in pieces of up to 256; solutions of about `tokens` tokens in 6 to 8 steps."""
    rng = Random(seed)

    def words(number: int) -> str:
        return " ".join(f"w{rng.randrange(vocab_size - 200)}" for _ in range(number))

    lengths = [256] * (documents // 256)
    if documents % 256:
        lengths.append(documents % 256)
    all_steps: list[list[str]] = []
    for _ in range(solutions):
        num_steps = rng.randint(6, 8)
        length = round(tokens * rng.uniform(0.8, 1.2))
        # A step's mark and tag are three tokens more.
        step_length = length // num_steps - 3
        all_steps.append([words(step_length) for _ in range(num_steps)])
    question_text = words(question)
    return BenchQuestion(question_text, [words(number) for number in lengths], all_steps)


# Med-PRM's prompt as its own scoring code writes it, apart from the product's: what the product is measured against.
_REFERENCE_SYSTEM = (
    "You are an evaluator assessing the logicality and validity of the reasoning in each step of the given "
    "explanation. In order to support the evaluation, the {given}. If the reasoning contains errors, output - after "
    "that step. If the reasoning in a step is logical and valid, output + after that step."
)


def reference_ids(model: "RewardModel", case: BenchQuestion) -> list[list[int]]:
    """The full sequence of each solution, as the reference tokenises it (up to the end of the chat template)."""
    parts = "question and the explanation are provided"
    if case.documents:
        parts = "relevant documents, the question, and the explanation are provided sequentially"
    system = _REFERENCE_SYSTEM.format(given=parts)
    if case.documents:
        system += " "  # which the reference's own prompt ends with
    documents = "".join(f"Document {number}: {text}\n\n" for number, text in enumerate(case.documents, 1))
    texts: list[str] = []
    for steps in case.solutions:
        tagged = " ".join(f"Step {number}: {step} ки" for number, step in enumerate(steps, 1))
        user = f"{documents}Question: {case.question}\n\nExplanation: {tagged}"
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        text = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        texts.append(str(text))
    ids: list[list[int]] = model.tokenizer(texts, add_special_tokens=True)["input_ids"]
    return ids


def causal_pairs(length: int) -> float:
    """Query-key pairs of a sequence in which each token sees itself and those before it."""
    return length * (length + 1) / 2


@dataclass
class ForwardFlops:
    """Floating-point operations of a forward pass: linear layers, attention pairs, head."""

    shape: Shape

    def linear(self, tokens: int) -> float:
        """The linear layers of all blocks."""
        shape = self.shape
        head_width = shape.hidden_size // shape.num_heads
        # Of attention: queries and output are as wide as the model, keys and values as their heads.
        queries_and_output = 2 * shape.hidden_size
        keys_and_values = 2 * shape.num_key_value_heads * head_width
        attention = shape.hidden_size * (queries_and_output + keys_and_values)
        mlp = 3 * shape.hidden_size * shape.intermediate_size
        return 2.0 * tokens * shape.num_layers * (attention + mlp)

    def pairs(self, pairs: float) -> float:
        """Query-key pairs: a product of keys and one of values each."""
        return 4.0 * pairs * self.shape.num_layers * self.shape.hidden_size

    def head(self, rows: int, entries: int) -> float:
        """`entries` rows of the head at `rows` tokens."""
        return 2.0 * rows * entries * self.shape.hidden_size

    def one_by_one(self, lengths: Sequence[int], rows: int | None = None) -> float:
        """Each sequence alone, the whole vocabulary at every token (or at `rows` tokens in all)."""
        tokens = sum(lengths)
        num_pairs = sum(map(causal_pairs, lengths))
        head = self.head(tokens if rows is None else rows, self.shape.vocab_size)
        return self.linear(tokens) + self.pairs(num_pairs) + head

    def shared(self, prefix: int, branches: Sequence[int], tags: int) -> float:
        """One prefix, branches, two rows of the head at the tags; every layer at every token, as for a gradient."""
        num_pairs = causal_pairs(prefix)
        for length in branches:
            num_pairs += length * prefix + causal_pairs(length)
        linear = self.linear(prefix + sum(branches))
        return linear + self.pairs(num_pairs) + self.head(tags, 2)

    def beyond_tags(self, prefix: int, branches: Sequence[int], tags: int) -> float:
        """What of that no score needs: in the last layer all but keys and values of the tokens that are no tags.

        The tags are taken to see half of their branch, as a token does on average.
        """
        last = ForwardFlops(self.shape.model_copy(update={"num_layers": 1}))
        head = self.shape.hidden_size // self.shape.num_heads
        keys_and_values = 4.0 * self.shape.hidden_size * self.shape.num_key_value_heads * head
        tokens = prefix + sum(branches)
        mean_branch = sum(branches) / len(branches)
        at_tags = last.linear(tags) + last.pairs(tags * (prefix + mean_branch / 2))
        needed = at_tags + keys_and_values * (tokens - tags)
        return last.shared(prefix, branches, 0) - needed


def packed_flops(flops: ForwardFlops, model: "RewardModel", case: BenchQuestion, training: bool = False) -> float:
    """What our way costs; a forward pass for scores alone leaves out what they do not need."""
    total = 0.0
    for group in model.pack(case.question, case.solutions, case.documents, training).groups:
        lengths = [len(branch.ids) for branch in group.branches]
        sizes = len(group.prefix_ids), lengths, len(group.tag_steps)
        total += flops.shared(*sizes)
        if not training:
            total -= flops.beyond_tags(*sizes)
    return total


def set_up_torch(dtype: str, device: str, threads: int) -> str:
    """Set torch up; gives what the figures hold for."""
    from transformers import __version__

    torch.set_num_threads(threads)
    place = torch.cuda.get_device_name() if device != "cpu" else f"CPU, {threads} threads"
    return f"{place}, {dtype}, torch {torch.__version__}, transformers {__version__}"


def no_grad_logits(model: Any, ids: Sequence[int], device: str) -> torch.Tensor:
    """Logits of the whole vocabulary at every token of one sequence."""
    with torch.inference_mode():
        input_ids = torch.tensor([list(ids)], device=device)
        logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits
