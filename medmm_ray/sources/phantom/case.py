"""A phantom case: one chest with at most one finding, drawn from a seed.

The side is the patient's: in a picture the patient's right is on the viewer's left (see the R marker).
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medmm_ray.config import digest

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
ZONES = {"effusion": ("lower",), "pneumothorax": ("upper",), "consolidation": ("upper", "lower")}
ZONES["nodule"] = ZONES["consolidation"]

# Ranges of extent (0 smallest, 1 largest) and contrast (a factor on the finding's density) by difficulty.
EXTENT = {"easy": (0.7, 1.0), "medium": (0.4, 0.75), "hard": (0.2, 0.45)}
CONTRAST = {"easy": (0.95, 1.1), "medium": (0.8, 1.0), "hard": (0.7, 0.85)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """`kind` is one of `KINDS`; `side` and `zone` are "" where they mean nothing (cardiomegaly, normal).

    `seed` decides pose, anatomy and noise; `extent` and `contrast` the finding's size and density.
    """

    seed: int
    kind: str
    side: str
    zone: str
    extent: float
    contrast: float
    difficulty: str

    @property
    def diagnosis(self) -> str:
        """The main finding: "right pleural effusion", "cardiomegaly", "normal"."""
        return f"{self.side} {NAMES[self.kind]}".strip()

    def annotation(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_annotation(cls, annotation: str) -> "Case":
        return cls(**json.loads(annotation))


def generator(*parts: object) -> np.random.Generator:
    """A random generator that depends on `parts` alone."""
    return np.random.default_rng(int(digest(*parts), 16))


def pick(rng: np.random.Generator, values: Sequence[str]) -> str:
    return values[int(rng.integers(len(values)))]


def make_case(rng: np.random.Generator, kinds: Sequence[str] = KINDS, side: str = "", zone: str = "") -> Case:
    """A case of one of `kinds`; `side` and `zone`, where given, are kept, and kinds that cannot have them left out."""
    kinds = [k for k in kinds if (not side or k in LUNG_KINDS) and (not zone or zone in ZONES.get(k, ()))]
    kind = pick(rng, kinds)
    difficulty = pick(rng, DIFFICULTIES)
    extent, contrast = rng.uniform(*EXTENT[difficulty]), rng.uniform(*CONTRAST[difficulty])
    in_lung = kind in LUNG_KINDS
    return Case(
        seed=int(rng.integers(2**40)),
        kind=kind,
        side=(side or pick(rng, SIDES)) if in_lung else "",
        zone=(zone or pick(rng, ZONES[kind])) if in_lung else "",
        extent=round(float(extent), 3),
        contrast=round(float(contrast), 3),
        difficulty=difficulty,
    )


def captions(case: Case) -> tuple[str, ...]:
    """Ways to say what the picture shows, for contrastive training of the image tower (training cases only)."""
    side, place = case.side, f"{case.side} {case.zone} zone"
    match case.kind:
        case "effusion":
            return (
                f"Chest radiograph with a {side} pleural effusion.",
                f"The {side} costophrenic angle is blunted by a {side} pleural effusion.",
                f"{side.capitalize()} pleural effusion, fluid in the {place}.",
                f"Fluid with a meniscus at the {side} lung base. The heart size is normal.",
            )
        case "pneumothorax":
            return (
                f"Chest radiograph with a {side} pneumothorax.",
                f"A lung edge at the {side} apex, a {side} pneumothorax.",
                f"{side.capitalize()} pneumothorax, no lung markings in the {place}.",
                f"Air around the {side} lung with a pleural edge. The heart size is normal.",
            )
        case "consolidation":
            return (
                f"Chest radiograph with a {side} consolidation.",
                f"A patchy opacity in the {place}, a {side} consolidation.",
                f"{side.capitalize()} consolidation in the {place}.",
                f"Airspace opacity in the {place}. The heart size is normal.",
            )
        case "nodule":
            return (
                f"Chest radiograph with a {side} lung nodule.",
                f"A round opacity in the {place}, a {side} lung nodule.",
                f"{side.capitalize()} lung nodule in the {place}.",
                f"A round spot in the {place}. The heart size is normal.",
            )
        case "cardiomegaly":
            return (
                "Chest radiograph with cardiomegaly.",
                "The heart is enlarged and both lungs are clear.",
                "Cardiomegaly, the cardiothoracic ratio is above half.",
                "Wide cardiac silhouette, cardiomegaly.",
            )
    return (
        "Normal chest radiograph.",
        "Both lungs are clear and the heart size is normal.",
        "Normal chest, both costophrenic angles are sharp.",
        "No abnormality is seen in the chest.",
    )
