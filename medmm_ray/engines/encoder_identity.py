"""What made vectors: those of two encoders may be compared where the encoders' identities agree.

Enters: what a loaded encoder was read from and how it is used. Leaves: an `EncoderIdentity`, which rows with vectors
carry as JSON.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from medmm_ray.data.artifacts import follow
from medmm_ray.engines.checkpoints import HUB_PREFIX, PACKAGE_PREFIX, is_hub_id


@dataclass(frozen=True)
class EncoderIdentity:
    """`source` is what the model was called, for people alone; `weights` a hash of the files that it was read from,
    the same for a hub's copy and a folder's. The rest is how it is used, "" or 0 where it has no such thing."""

    source: str
    weights: str
    width: int
    pooling: str = ""
    normalize: bool = True
    title: str = ""
    """How a document's title comes in."""
    prompt: str = ""
    """What the model puts before a text of this kind."""
    max_tokens: int = 0
    """Tokens of a text that are read."""

    @classmethod
    def parse(cls, text: str) -> "EncoderIdentity":
        """What `to_json` wrote."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """As rows carry it: equal identities are equal texts."""
        # In one order: a column's values are compared as texts.
        return json.dumps(asdict(self), sort_keys=True)

    def differences(self, expected: "EncoderIdentity") -> list[str]:
        """In words, what of it is other than in `expected`; empty where vectors of both may be compared."""
        values, expected_values = asdict(self), asdict(expected)
        words = []
        for name, value in values.items():
            # The same weights in another folder are the same model.
            if name != "source" and value != expected_values[name]:
                words.append(f"{name} {value!r} instead of {expected_values[name]!r}")
        return words


def source_of(name: str) -> str:
    """A model's name without the folders above it, as paths are nobody's business; ids and packages as they are."""
    if name.startswith((HUB_PREFIX, PACKAGE_PREFIX)) or (is_hub_id(name) and not Path(name).is_dir()):
        return name
    return follow(name).rstrip("/").rpartition("/")[2]
