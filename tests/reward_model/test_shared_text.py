"""What texts share is tokenised once, and every id is the tokenizer's own."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from medmm_ray.reward_model.full_sequence import common_prefix
from medmm_ray.reward_model.shared_text import tokenize_sharing

PROSE = (
    "The chest radiograph shows a small pleural effusion, so the answer is (B). It's 12.5 mm wide!\n\n"
    "Question: Which side is it on?  (A) left (B) right\r\n\tExplanation: The angle's blunted; the heart isn't. "
) * 20
# The rules by which published tokenizers cut a text into words.
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA.replace(r"\p{N}{1,3}", r"\p{N}")


def byte_level(rule: str | None) -> Any:
    """A byte-level pre-tokenizer with GPT-2's rule, or another."""
    if rule is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(Regex(rule), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def trained(pre_tokenizer: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that writes a mark before and one behind each text, as some do."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))  # noqa: S106  # no password
    tokenizer.pre_tokenizer = pre_tokenizer
    special = ["<unk>", "<s>", "</s>", "<|turn|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([PROSE], trainer)
    marks = [(mark, tokenizer.token_to_id(mark)) for mark in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]


TOKENIZERS = {
    "gpt-2": trained(byte_level(None)),
    "llama-3": trained(byte_level(LLAMA)),
    "qwen-2": trained(byte_level(QWEN)),
    "words with a mark": trained(pre_tokenizers.Metaspace()),
    "no words": trained(pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
}
WORDS = [
    "the",
    " the",
    " effusion",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "'s",
    ".",
    "(B)",
    " ки",
    "é",
    "<|turn|>",
    "12",
    " A",
    "—",
]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=12).map("".join)


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.num_chars = 0

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.num_chars += sum(map(len, texts))
        return self.tokenizer(texts, **options)


@settings(max_examples=400, deadline=None)
@given(name=st.sampled_from(sorted(TOKENIZERS)), head=TEXTS, tails=st.lists(TEXTS, min_size=1, max_size=4))
def test_ids_are_the_tokenizers_own(name: str, head: str, tails: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    head = f"Which of these is seen in the image {head}"
    texts = [head + tail for tail in tails]
    assert tokenize_sharing(tokenizer, head, texts) == tokenizer(texts)["input_ids"]


@pytest.mark.parametrize("name", ["gpt-2", "llama-3", "qwen-2"])
def test_the_beginning_is_read_twice_however_many_texts(name: str) -> None:
    counting = Counting(TOKENIZERS[name])
    texts = [f"{PROSE} Step {number}: so." for number in range(64)]
    assert tokenize_sharing(counting, PROSE, texts) == TOKENIZERS[name](texts)["input_ids"]
    # Once in the first text, whole, and once by itself; some words of it stand in every tail.
    assert counting.num_chars < 2 * len(PROSE) + 64 * 200


def test_texts_that_do_not_begin_with_the_head_are_read_whole() -> None:
    texts = ["the image shows it here", "another text"]
    expected = TOKENIZERS["gpt-2"](texts)["input_ids"]
    assert tokenize_sharing(TOKENIZERS["gpt-2"], "the image shows it ", texts) == expected


@given(st.lists(st.text("ab", max_size=20), min_size=1, max_size=5))
def test_common_prefix_is_the_longest(texts: list[str]) -> None:
    length = common_prefix(texts)
    shorter = min(map(len, texts))
    assert len({text[:length] for text in texts}) == 1
    assert length == shorter or len({text[: length + 1] for text in texts}) > 1
