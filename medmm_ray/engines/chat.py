"""A prompt as a model's tokens: by its tokenizer's chat template, or its processor's where it sees images.

Enters: chat messages, opened images, the beginning of the assistant's turn. Leaves: token ids with one mark an image. A
message's text stands before its images, so that prompts that share the text share its prefix too, where the template
agrees.
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
class ChatPrompt:
    """What an engine continues: a chat and its opened images; `prefix` begins the assistant's turn.

    `num_documents` stand in the chat, of those that were retrieved.
    """

    messages: Sequence[Message]
    images: Sequence[Image.Image] = ()
    prefix: str = ""
    num_documents: int = 0


class Chat:
    """The chat template, tokenizer and image processor of a checkpoint.

    `template.use` says how the template is used: with a fixed date where it would write the day's, with the instruction
    in the user's turn where it has no system role. Raises `ChatError` where it cannot be used.
    """

    def __init__(self, model: str) -> None:
        from transformers import AutoProcessor, ProcessorMixin

        auto_class: Any = AutoProcessor
        loaded = auto_class.from_pretrained(model)  # of a model that reads text alone: its tokenizer
        self._processor = loaded if isinstance(loaded, ProcessorMixin) else None
        self.tokenizer: Any = loaded if self._processor is None else loaded.tokenizer
        renderer = self._processor or self.tokenizer
        if renderer.chat_template is None:
            raise ChatError(f"the tokenizer of {model} has no chat template; a policy needs one")
        has_images = self._processor is not None
        try:
            self.template = ChatTemplate(renderer.apply_chat_template, renderer.chat_template, has_images)
        except ValueError as error:
            raise ChatError(f"{model} cannot be asked as a policy: {error}") from None
        self._model = model
        # Processing an image takes longer than counting: the count depends on the sizes alone.
        self._image_tokens: dict[tuple[tuple[int, int], ...], int] = {}

    def token_ids(self, prompt: ChatPrompt) -> list[int]:
        """The chat with the assistant's turn opened, an image as its mark alone, then the prompt's prefix."""
        if self._processor is None:
            if prompt.images:
                raise ChatError(f"{self._model} reads text alone; set num_images=0, or name a model that sees")
            ids = self.tokenizer.encode(self.template.render(prompt.messages), add_special_tokens=False)
        else:
            ids = self._encode(self.template.render(_with_images(prompt)))
        if prompt.prefix:
            # Encoded by itself, so that prompts that differ in the prefix alone share all tokens before it.
            ids = [*ids, *self.tokenizer.encode(prompt.prefix, add_special_tokens=False)]
        return list(ids)

    def count(self, prompt: ChatPrompt) -> int:
        """Tokens of a prompt, those of its images among them."""
        return len(self.token_ids(prompt)) + self.image_tokens(prompt.images)

    def image_tokens(self, images: Sequence[Image.Image]) -> int:
        """Tokens that images take besides their marks; `RowError` where the model cannot look at one."""
        sizes = tuple(image.size for image in images)
        if not sizes:
            return 0
        if sizes not in self._image_tokens:
            content = [{"type": "image"} for _ in sizes]
            text = self.template.render([{"role": "user", "content": content}])
            blank_images = [Image.new("RGB", size) for size in sizes]
            try:
                with_images = cast(Any, self._processor)(text=text, images=blank_images)["input_ids"][0]
            except ValueError as error:  # what image processors raise on extreme sizes
                raise RowError("image_size", f"the model's image processor refuses {list(sizes)}: {error}") from error
            self._image_tokens[sizes] = len(with_images) - len(self.tokenizer(text)["input_ids"])
        return self._image_tokens[sizes]

    def _encode(self, text: str) -> list[int]:
        """Token ids of rendered text, with one BOS whether or not the template has written it."""
        has_bos = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        return cast(list[int], self.tokenizer.encode(text, add_special_tokens=not has_bos))


def _with_images(prompt: ChatPrompt) -> list[dict[str, Any]]:
    """Messages in parts, the images after the text of the user's last turn."""
    messages: list[dict[str, Any]] = []
    for message in prompt.messages:
        parts = [{"type": "text", "text": message["content"]}]
        messages.append({"role": message["role"], "content": parts})
    last_user = next(message for message in reversed(messages) if message["role"] == "user")
    last_user["content"] += [{"type": "image"} for _ in prompt.images]
    return messages
