"""A prompt as a model's tokens: by its tokenizer's chat template, or its processor's where it sees images.

Enters: chat messages, opened images, what the assistant has said. Leaves: token ids with one mark an image. A message's
text stands before its images, so that prompts that share the text share its prefix too, where the template agrees.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from PIL import Image

from medmm_ray.config import ConfigError
from medmm_ray.data.tables import RowError
from medmm_ray.engines.chat_template import ChatTemplate
from medmm_ray.prompts import Message


class ChatError(ConfigError):
    """A model that cannot be talked to as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Prompt:
    """What an engine continues: a chat and its opened images; `said` is what the assistant has said already.

    `num_documents` stand in the chat, of those that were retrieved.
    """

    messages: Sequence[Message]
    images: Sequence[Image.Image] = ()
    said: str = ""
    num_documents: int = 0


class Chat:
    """The chat template, tokenizer and image processor of a checkpoint.

    `template.use` says how the template is used: with a fixed date where it would write the day's, with the instruction
    in the user's turn where it has no system role. Raises `ChatError` where it cannot be used.
    """

    def __init__(self, model: str) -> None:
        from transformers import AutoProcessor, ProcessorMixin

        auto: Any = AutoProcessor
        found = auto.from_pretrained(model)  # of a model that reads text alone: its tokenizer
        self._processor = found if isinstance(found, ProcessorMixin) else None
        self.tokenizer: Any = found if self._processor is None else found.tokenizer
        talks = self._processor or self.tokenizer
        if talks.chat_template is None:
            raise ChatError(f"the tokenizer of {model} has no chat template; a policy needs one")
        try:
            self.template = ChatTemplate(talks.apply_chat_template, talks.chat_template, self._processor is not None)
        except ValueError as error:
            raise ChatError(f"{model} cannot be asked as a policy: {error}") from None
        self._model = model
        self._image_tokens: dict[tuple[tuple[int, int], ...], int] = {}

    def token_ids(self, prompt: Prompt) -> list[int]:
        """The chat with the assistant's turn opened, an image as its mark alone, then what the assistant has said."""
        if self._processor is None:
            if prompt.images:
                raise ChatError(f"{self._model} reads text alone; set num_images=0, or name a model that sees")
            ids = self.tokenizer.encode(self.template.render(prompt.messages), add_special_tokens=False)
        else:
            ids = self._ids(self.template.render(_with_images(prompt)))
        said = self.tokenizer.encode(prompt.said, add_special_tokens=False) if prompt.said else []
        return [*ids, *said]

    def count(self, prompt: Prompt) -> int:
        """Tokens of a prompt, those of its images among them."""
        return len(self.token_ids(prompt)) + self.image_tokens(prompt.images)

    def image_tokens(self, images: Sequence[Image.Image]) -> int:
        """Tokens that images take besides their marks; `RowError` where the model cannot look at one."""
        sizes = tuple(image.size for image in images)
        if sizes and sizes not in self._image_tokens:
            text = self.template.render([{"role": "user", "content": [{"type": "image"} for _ in sizes]}])
            blank = [Image.new("RGB", size) for size in sizes]
            try:
                seen = cast(Any, self._processor)(text=text, images=blank)["input_ids"][0]
            except ValueError as error:  # what image processors raise on extreme sizes
                raise RowError("image_size", f"the model's image processor refuses {list(sizes)}: {error}") from error
            self._image_tokens[sizes] = len(seen) - len(self.tokenizer(text)["input_ids"])
        return self._image_tokens[sizes] if sizes else 0

    def _ids(self, text: str) -> list[int]:
        begun = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        return cast(list[int], self.tokenizer.encode(text, add_special_tokens=not begun))


def _with_images(prompt: Prompt) -> list[dict[str, Any]]:
    """Messages in parts, the images after the text of the user's last turn."""
    messages: list[dict[str, Any]] = [
        {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in prompt.messages
    ]
    last = next(m for m in reversed(messages) if m["role"] == "user")
    last["content"] += [{"type": "image"} for _ in prompt.images]
    return messages
