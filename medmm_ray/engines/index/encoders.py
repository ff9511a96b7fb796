"""What made the vectors of an index, and whether those of a query may be compared with them.

Two models of one width give vectors that nobody can tell apart, and neighbours that mean nothing: so the index records
what made its vectors, and every search compares.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from medmm_ray.config import ConfigError
from medmm_ray.data.artifacts import read_json
from medmm_ray.engines.encoder_identity import EncoderIdentity

ENCODERS = "encoders.json"
Vectors = Literal["images", "passages", "queries"]
log = logging.getLogger("medmm_ray")


@dataclass(frozen=True)
class IndexEncoders:
    """What made an index's vectors; None where it has none, or does not know.

    `queries` is what its passages are looked for with: their own encoder, or its partner (MedCPT has one for each).
    """

    images: EncoderIdentity | None = None
    passages: EncoderIdentity | None = None
    queries: EncoderIdentity | None = None

    @classmethod
    def load(cls, index: str | Path) -> "IndexEncoders":
        """What an index folder, local or a URI, says; of one of an earlier version nothing, with a warning."""
        recorded = read_json(f"{index}/{ENCODERS}")
        # Not refused: a run of weeks ago is no worse than it was.
        if recorded is None:
            log.warning(
                "index %s does not say which models made its vectors, as it is of an earlier version: that queries are "
                "made by the same ones is not checked. Embed and index in a new run to have it recorded",
                index,
            )
            return cls()
        identities = {name: EncoderIdentity(**values) for name, values in recorded.items() if values is not None}
        return cls(**identities)

    def to_json(self) -> str:
        """As it lies in the index folder."""
        return json.dumps(asdict(self), indent=2)

    def check(self, of: Vectors, encoder: EncoderIdentity | None, index: str, advice: str) -> None:
        """Raise `ConfigError` where the index knows what made these vectors and `encoder` is another one.

        `index` is what the message calls it, `advice` what to do.
        """
        expected: EncoderIdentity | None = getattr(self, of)
        # What one of the two does not know of itself cannot differ.
        if encoder is None or expected is None:
            return
        if differences := encoder.differences(expected):
            raise ConfigError(
                f"index {index}: {_MADE[of]} {expected.source}, and this is {encoder.source}: "
                f"{', '.join(differences)}. {advice}"
            )


_MADE = {
    "images": "its images' vectors were made by",
    "passages": "its passages' vectors were made by",
    "queries": "its passages are looked for with queries by",
}
