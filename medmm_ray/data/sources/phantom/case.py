"""A phantom case: one chest with no finding, one, or (where asked for) several, drawn from a seed.

The side is the patient's: in a picture the patient's right is on the viewer's left (see the R marker).
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from medmm_ray.config import digest
from medmm_ray.data.sources import Hardness

PLAIN = Hardness()
HARD = Hardness(max_findings=3, size=0.6, contrast=0.5, noise=2.0)

LUNG_KINDS = ("effusion", "pneumothorax", "consolidation", "nodule")
KINDS = (*LUNG_KINDS, "cardiomegaly", "normal")
SIDES = ("right", "left")
DIFFICULTIES = ("easy", "medium", "hard")

NAMES = {
    "effusion": "pleural effusion",
    "pneumothorax": "pneumothorax",
    "consolidation": "consolidation",
    "nodule": "lung nodule",
    "cardiomegaly": "cardiomegaly",
    "normal": "normal",
}
ZONES = {
    "effusion": ("lower",),
    "pneumothorax": ("upper",),
    "consolidation": ("upper", "lower"),
}
ZONES["nodule"] = ZONES["consolidation"]


def _places() -> Iterator[tuple[str, str, str]]:
    for kind in LUNG_KINDS:
        for side, zone in product(SIDES, ZONES[kind]):
            yield kind, side, zone
    yield "cardiomegaly", "", ""


PLACES = tuple(_places())
"""Kind, side and zone of every finding that there can be."""

# Ranges of extent (0 smallest, 1 largest) and contrast (a factor on the finding's density) by difficulty.
EXTENT = {
    "easy": (0.7, 1.0),
    "medium": (0.4, 0.75),
    "hard": (0.2, 0.45),
}
CONTRAST = {
    "easy": (0.95, 1.1),
    "medium": (0.8, 1.0),
    "hard": (0.7, 0.85),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`kind` is one of `KINDS` but normal; `side` and `zone` are "" where they mean nothing (cardiomegaly).

    `extent` and `contrast` are its size and density.
    """

    kind: str
    side: str
    zone: str
    extent: float
    contrast: float

    @property
    def name(self) -> str:
        """ "right pleural effusion", "cardiomegaly"."""
        return f"{self.side} {NAMES[self.kind]}".strip()


@dataclass(frozen=True, kw_only=True)
class PhantomCase:
    """`kind` (one of `KINDS`) to `contrast` describe the main finding, "normal" for none; `more` are further ones.

    `seed` decides pose, anatomy and noise; `size` and `noise` are `Hardness`'s.
    """

    seed: int
    kind: str
    side: str
    zone: str
    extent: float
    contrast: float
    difficulty: str
    size: float = 1.0
    noise: float = 1.0
    more: tuple[Finding, ...] = ()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings, the main one first; none of a normal chest."""
        if self.kind == "normal":
            return ()
        main = Finding(
            kind=self.kind,
            side=self.side,
            zone=self.zone,
            extent=self.extent,
            contrast=self.contrast,
        )
        return (main, *self.more)

    @property
    def diagnosis(self) -> str:
        """ "right pleural effusion", "cardiomegaly", "cardiomegaly and left lung nodule", "normal"."""
        return " and ".join(sorted(finding.name for finding in self.findings)) or NAMES["normal"]

    def annotation(self) -> str:
        """JSON, without what is as it is in a plain case."""
        values = dataclasses.asdict(self)
        # Annotations of plain cases, and so the ids of their images, are those from before there were hard ones.
        for field in dataclasses.fields(self):
            if field.default is not dataclasses.MISSING and values[field.name] == field.default:
                del values[field.name]
        return json.dumps(values, sort_keys=True)

    @classmethod
    def from_annotation(cls, annotation: str) -> "PhantomCase":
        """The case of an `annotation`; raises `ValueError` where that is of something else."""
        try:
            values = dict(json.loads(annotation))
            further = tuple(Finding(**finding) for finding in values.get("more", ()))
            return cls(**{**values, "more": further})
        except (ValueError, TypeError):  # no JSON, no object, other names
            raise ValueError(f"an annotation of {len(annotation)} characters is no phantom's") from None


def generator(*parts: object) -> np.random.Generator:
    """A random generator that depends on `parts` alone."""
    return np.random.default_rng(int(digest(*parts), 16))


def pick(rng: np.random.Generator, values: Sequence[str]) -> str:
    """One of `values`, each with the same chance."""
    return values[int(rng.integers(len(values)))]


def make_case(
    rng: np.random.Generator,
    kinds: Sequence[str] = KINDS,
    side: str = "",
    zone: str = "",
    hardness: Hardness = PLAIN,
    admits: Callable[[PhantomCase], bool] = lambda case: True,  # noqa: ARG005
) -> PhantomCase:
    """A case whose main finding is one of `kinds`; `side` and `zone`, where given, are kept, and kinds that cannot have
    them left out. Further findings are those that `admits` allows.
    """
    if side:  # neither the heart nor a normal chest has one
        kinds = [kind for kind in kinds if kind in LUNG_KINDS]
    if zone:
        kinds = [kind for kind in kinds if zone in ZONES.get(kind, ())]
    # The order of the draws is part of every seed's picture.
    kind = pick(rng, kinds)
    difficulty = pick(rng, DIFFICULTIES)
    extent, contrast = _extent_and_contrast(rng, difficulty, hardness)
    in_lung = kind in LUNG_KINDS
    case = PhantomCase(
        seed=int(rng.integers(2**40)),
        kind=kind,
        side=(side or pick(rng, SIDES)) if in_lung else "",
        zone=(zone or pick(rng, ZONES[kind])) if in_lung else "",
        extent=extent,
        contrast=contrast,
        difficulty=difficulty,
        size=hardness.size,
        noise=hardness.noise,
    )
    if hardness.max_findings > 1 and kind != "normal":
        for _ in range(int(rng.integers(hardness.max_findings))):
            case = _with_one_more(rng, case, hardness, admits)
    return case


def _extent_and_contrast(rng: np.random.Generator, difficulty: str, hardness: Hardness) -> tuple[float, float]:
    extent = rng.uniform(*EXTENT[difficulty])
    contrast = rng.uniform(*CONTRAST[difficulty])
    return round(float(extent), 3), round(float(contrast) * hardness.contrast, 3)


def _with_one_more(
    rng: np.random.Generator,
    case: PhantomCase,
    hardness: Hardness,
    admits: Callable[[PhantomCase], bool],
) -> PhantomCase:
    """The case with one more finding, in a lung that has none or of the heart; as it is where `admits` allows none."""
    extent, contrast = _extent_and_contrast(rng, case.difficulty, hardness)
    # At most one finding a lung: a statement about a side then speaks of one.
    taken_sides = {finding.side for finding in case.findings}  # "" is the heart
    allowed = []
    for kind, side, zone in PLACES:
        if side in taken_sides:
            continue
        finding = Finding(kind=kind, side=side, zone=zone, extent=extent, contrast=contrast)
        wider = dataclasses.replace(case, more=(*case.more, finding))
        if admits(wider):
            allowed.append(wider)
    return allowed[int(rng.integers(len(allowed)))] if allowed else case
