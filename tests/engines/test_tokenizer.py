"""The small tokenizer: single ids, a template without BOS, the same whatever the order."""

import pytest

from medmm_ray.engines.tokenizer import build_tokenizer

TEXTS = [
    *(f"Step {i}: The {side} lung is clear.\nStep {i + 1}: So the answer is (B)." for i in range(9) for side in "ab"),
    "A meniscus at the base, π ≈ 3 and an é.",
]


def test_tag_and_verdicts_are_single_ids_and_text_survives() -> None:
    tokenizer = build_tokenizer(TEXTS, 600)
    assert len(tokenizer) <= 600
    ids = tokenizer("Step 1: It is clear. ки Step 2: + -")["input_ids"]
    for token in (" ки", " +", " -"):
        (single,) = tokenizer(token)["input_ids"]
        assert ids.count(single) == 1
    assert tokenizer.decode(tokenizer(TEXTS[-1])["input_ids"]) == TEXTS[-1]


def test_template_writes_turns_and_no_bos_with_and_without_special_tokens() -> None:
    tokenizer = build_tokenizer(TEXTS, 600)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>Be brief.<|end|><|user|>Why?<|end|><|assistant|>"
    ids = tokenizer(text)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens([ids[0], ids[-1]]) == ["<|system|>", "<|assistant|>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|end|>"


def test_the_order_of_the_texts_does_not_matter() -> None:
    one, other = build_tokenizer(TEXTS, 600), build_tokenizer(reversed(TEXTS), 600)
    assert one.get_vocab() == other.get_vocab()
    assert one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()


def test_texts_can_be_ended_for_a_clip() -> None:
    tokenizer = build_tokenizer(TEXTS, 600, ends_texts=True)
    ids = tokenizer(TEXTS[0], truncation=True, max_length=5)["input_ids"]
    assert len(ids) == 5
    assert ids[-1] == tokenizer.eos_token_id


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size is 200; a byte-level tokenizer needs 512"):
        build_tokenizer(TEXTS, 200)
