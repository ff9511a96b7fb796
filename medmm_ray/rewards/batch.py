"""What the adapters share: trainers' rows as prompts with completions, and the rewards back in the rows' order."""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medmm_ray.client import Client, image_text
from medmm_ray.service.rewards import PromptCompletions, Reward, RewardsRequest, RewardTerms

if TYPE_CHECKING:
    from PIL.Image import Image

FIELDS = ("question", "options", "documents", "image", "reference_images", "gold", "answer_type")
"""What a row may say of its prompt, by these names; `image` is a PIL image, a file's bytes, or base64."""


def connect(url: str = "", key: str = "") -> Client:
    """The service at `url`; without one the environment's. Raises ValueError where neither names it."""
    url = url or os.environ.get("MEDMM_URL", "")
    if not url:
        raise ValueError("no service is named; set MEDMM_URL (http://host:port), or give url=")
    return Client(url, key or os.environ.get("MEDMM_TOKEN", ""))


@dataclass(frozen=True)
class Sample:
    """A prompt's fields (`FIELDS`) and one completion."""

    fields: Mapping[str, Any]
    completion: str


def rewards_of(client: Client, samples: Sequence[Sample], terms: RewardTerms | None = None) -> list[Reward]:
    """The reward of each sample, in order; samples of one prompt that follow each other share its reading."""
    prompts: list[dict[str, Any]] = []
    images: dict[int, str] = {}
    for sample in samples:
        fields = _body(sample.fields, images)
        # Trainers repeat a row for each of its completions.
        if prompts and {**prompts[-1], "completions": None} == {**fields, "completions": None}:
            prompts[-1]["completions"].append(sample.completion)
        else:
            prompts.append({**fields, "completions": [sample.completion]})
    request = RewardsRequest(
        prompts=[PromptCompletions(**prompt) for prompt in prompts],
        terms=terms or RewardTerms(),
    )
    return client.rewards(request).rewards


def _body(fields: Mapping[str, Any], images: dict[int, str]) -> dict[str, Any]:
    """A prompt's fields as the request has them; those that a row lacks (None) are left out.

    `images` has the texts of images by their objects' ids: rows repeat them, and to write one takes a while.
    """
    body = {name: value for name, value in fields.items() if value is not None}
    for name in ("options", "documents", "reference_images"):
        if name in body:
            body[name] = list(body[name])  # of a data set it may be an array
    if "image" in body:
        image = body["image"]
        body["image"] = images.get(id(image)) or _image(image)
        images[id(image)] = body["image"]
    if "reference_images" in body:
        body["reference_images"] = [_image(image) for image in body["reference_images"]]
    return body


def _image(image: "Image | bytes | str") -> str:
    if isinstance(image, str):
        return image
    if isinstance(image, bytes):
        return image_text(image)
    sink = io.BytesIO()
    image.save(sink, "PNG")  # loses nothing
    return image_text(sink.getvalue())


def text_of(message: Any) -> str:
    """A prompt or completion as text: a string, or a conversation of which the last message counts.

    A message's content is a text, or parts of which those of type `text` count.
    """
    if isinstance(message, str):
        return message
    content = message[-1]["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")
