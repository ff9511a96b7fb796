"""engines/chat.py: prompts as tokens, for models that read and models that see."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from medmm_ray.data.tables import RowError
from medmm_ray.engines.chat import Chat, ChatError, ChatPrompt
from medmm_ray.prompts import policy_messages
from tests.doubles.fake_generator import make_tiny_policy, make_tiny_seeing_policy
from tests.doubles.tiny_vision import picture

MESSAGES = policy_messages("What is it?")


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return Chat(make_tiny_seeing_policy(tmp_path_factory.mktemp("seeing")))


def test_a_model_that_reads_text_alone(tmp_path: Path) -> None:
    folder = make_tiny_policy(tmp_path)
    chat = Chat(folder)
    ids = chat.token_ids(ChatPrompt(MESSAGES, prefix="Step 1:"))
    text = chat.tokenizer.decode(ids)
    assert text.startswith("<|system|>")
    assert text.endswith("Question: What is it?<|end|><|assistant|>Step 1:")
    assert chat.count(ChatPrompt(MESSAGES, prefix="Step 1:")) == len(ids)
    with pytest.raises(ChatError, match="reads text alone; set num_images=0, or name a model that sees"):
        chat.token_ids(ChatPrompt(MESSAGES, [picture(0)]))


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_policy(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    with pytest.raises(ChatError, match="has no chat template; a policy needs one"):
        Chat(folder)


def test_images_stand_after_the_text_and_their_tokens_count(seeing: Chat) -> None:
    prompt = ChatPrompt(MESSAGES, [picture(0), picture(1, 60, 20)], prefix="Step 1:")
    text = seeing.tokenizer.decode(seeing.token_ids(prompt))
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text.startswith("<|bos|><|system|>")
    assert text.endswith(f"What is it?{mark}{mark}<|end|>\n<|assistant|>Step 1:")
    # In patches of 4 pixels, 2 x 2 of them a token: 40 x 32 is shrunk to 32 x 24, 60 x 20 becomes 64 x 16.
    assert seeing.count(prompt) - len(seeing.token_ids(prompt)) == (12 - 1) + (16 - 1)
    assert seeing.count(ChatPrompt(MESSAGES)) == len(seeing.token_ids(ChatPrompt(MESSAGES)))


def test_texts_share_their_prefix_whatever_the_image(seeing: Chat) -> None:
    one, none = seeing.token_ids(ChatPrompt(MESSAGES, [picture(0)])), seeing.token_ids(ChatPrompt(MESSAGES))
    assert one[: len(none) - 6] == none[:-6]


def test_an_image_that_the_model_cannot_look_at_is_the_rows_fault(seeing: Chat) -> None:
    with pytest.raises(RowError, match=r"image_size: the model's image processor refuses \[\(900, 2\)\]"):
        seeing.count(ChatPrompt(MESSAGES, [picture(0, 900, 2)]))
