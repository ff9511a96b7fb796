"""Questions about phantom cases, with worked solutions.

A question is drawn before its case: four options, then which of them is true, then a case that makes it so. So its
text says nothing of the answer beyond prevalence: in each question two options are common findings (`COMMON` of the
probability each) and two are rare, which is what a reader without the picture can know. Letters come out even: dealt
in three templates; in the two whose options have a fixed order, by the choice of the orders.
"""

from dataclasses import dataclass

import numpy as np

from medmm_ray.sources.phantom.case import KINDS, LUNG_KINDS, NAMES, SIDES, Case, generator, make_case, pick

COMMON = 0.38  # the probability of each of the two common options; the two rare ones share the rest
LETTERS = "ABCD"

COMMON_KINDS = ("effusion", "pneumothorax", "consolidation")
RARE_KINDS = ("nodule", "cardiomegaly", "normal")
SIGNS = {
    "effusion": "blunted costophrenic angle",
    "pneumothorax": "visible lung edge",
    "consolidation": "patchy opacity",
    "nodule": "round opacity",
    "cardiomegaly": "enlarged heart",
    "normal": "no abnormal sign",
}
COMPLAINTS = (
    "cough", "chest pain", "fever", "breathlessness", "weight loss", "a fall", "fatigue", "a wheeze", "back pain",
    "a fever at night", "a cough for weeks", "sudden breathlessness",
)  # fmt: skip
CONTEXTS = (
    "A patient has {}.",
    "An adult comes with {}.",
    "A chest radiograph is taken for {}.",
    "The referral says {}.",
    "An older patient reports {}.",
)
STEMS = {
    "finding": ("What does the radiograph show?", "Which finding is present?", "What is the diagnosis?"),
    "finding_side": ("Which finding is present, and on which side?", "What does the radiograph show, and where?"),
    "zone": ("Where is the abnormality?", "Which zone is abnormal?", "In which zone is the lesion?"),
    "structure": ("Which structure is abnormal?", "What looks abnormal?"),
    "sign": ("Which sign is visible?", "Which sign does the radiograph show?"),
}
# The templates with a fixed order have two common letters each, B and D, A and C: over both, letters are even.
FIXED_ORDER = {"zone": (3, 0, 2, 1), "structure": (0, 2, 1, 3)}
TEMPLATES = ("zone", "zone", "structure", "structure", "finding", "finding_side", "finding_side", "sign")
# The option comes first and what is seen of it after: a small language model that must find the letter of a text it
# wrote earlier learns that too slowly; copying "(B) left lung" from the options, word for word, it learns early.
TESTS = (
    "Consider ({}) {}.",
    "Test ({}) {}.",
    "Look for ({}) {}.",
    "Check ({}) {}.",
    "Suppose ({}) {}.",
)
FINAL = ("So the answer is ({}).", "Therefore the answer is ({}).", "Hence the answer is ({}).")


@dataclass(frozen=True, kw_only=True)
class Option:
    """What an option says, and what a case must be for it to be true."""

    text: str
    kinds: tuple[str, ...]
    side: str = ""
    zone: str = ""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A question with its case. `options` are texts in the order of their letters; `answer` is the true one's letter.

    `worked` holds worked solutions, each a list of steps.
    """

    template: str
    question: str
    options: tuple[str, ...]
    answer: str
    case: Case
    worked: tuple[tuple[str, ...], ...]


def make_items(seed: int, split: str, number: int, num_worked: int = 1) -> list[Item]:
    """`number` questions, each about a case of its own; the same arguments give the same questions.

    An item depends on its place alone, so that asking for more leaves the first ones as they are.
    """
    return [_make_item(seed, split, index, num_worked) for index in range(number)]


def _make_item(seed: int, split: str, index: int, num_worked: int) -> Item:
    rng = generator("question", seed, split, index)
    template = pick(rng, TEMPLATES)
    options = _options(template, rng)
    gold = options[int(rng.choice(4, p=[COMMON, COMMON, 0.5 - COMMON, 0.5 - COMMON]))]
    if template in FIXED_ORDER:
        options = [options[i] for i in FIXED_ORDER[template]]
    else:
        deck = generator("letters", seed, split, index // 4).permutation(4)
        others = [options[i] for i in rng.permutation(4) if options[i] is not gold]
        options = [*others[: deck[index % 4]], gold, *others[deck[index % 4] :]]
    letter = LETTERS[options.index(gold)]
    case = make_case(rng, gold.kinds, gold.side, gold.zone)
    context = pick(rng, CONTEXTS).format(pick(rng, COMPLAINTS))
    return Item(
        template=template,
        question=f"{context} {pick(rng, STEMS[template])}",
        options=tuple(option.text for option in options),
        answer=letter,
        case=case,
        worked=tuple(tuple(_work(template, case, gold.text, letter, rng)) for _ in range(num_worked)),
    )


def _options(template: str, rng: np.random.Generator) -> list[Option]:
    """Four options, the two common ones first."""
    match template:
        case "finding" | "sign":
            names = SIGNS if template == "sign" else {**NAMES, "normal": "normal chest"}
            common = [str(k) for k in rng.permutation(COMMON_KINDS)[:2]]
            rare = [str(k) for k in rng.permutation(RARE_KINDS)[:2]]
            return [Option(text=names[kind], kinds=(kind,)) for kind in (*common, *rare)]
        case "finding_side":
            common_kind = pick(rng, COMMON_KINDS)
            rare_kind = pick(rng, [kind for kind in LUNG_KINDS if kind != common_kind])
            return [
                Option(text=f"{side} {NAMES[kind]}", kinds=(kind,), side=side)
                for kind in (common_kind, rare_kind)
                for side in SIDES
            ]
        case "zone":
            return [
                Option(text=f"{side} {zone} zone", kinds=LUNG_KINDS, side=side, zone=zone)
                for zone in ("lower", "upper")
                for side in SIDES
            ]
    lungs = [Option(text=f"{side} lung", kinds=LUNG_KINDS, side=side) for side in SIDES]
    return [*lungs, Option(text="heart", kinds=("cardiomegaly",)), Option(text="no structure", kinds=("normal",))]


def _work(template: str, case: Case, option: str, letter: str, rng: np.random.Generator) -> list[str]:
    """Four or five steps: which option is tested, what is seen (and what is not), what it means, the letter."""
    seen = [pick(rng, _observations(case))]
    if rng.random() < 0.45:
        seen.insert(int(rng.integers(2)), pick(rng, _negatives(case)))
    tested, meant = pick(rng, TESTS).format(letter, option), pick(rng, _conclusions(template, case, option))
    return [tested, *seen, meant, pick(rng, FINAL).format(letter)]


def _observations(case: Case) -> tuple[str, ...]:
    side, zone = case.side, f"{case.side} {case.zone} zone"
    match case.kind:
        case "effusion":
            return (
                f"The {side} costophrenic angle is blunted.",
                f"A meniscus is seen at the {side} base.",
                f"Fluid fills the {zone}.",
            )
        case "pneumothorax":
            return (
                f"A lung edge is seen at the {side} apex.",
                f"The {zone} has no lung markings.",
                f"A pleural line is seen in the {zone}.",
            )
        case "consolidation":
            return (
                f"A patchy opacity is seen in the {zone}.",
                f"The {zone} is hazy.",
                f"Airspace opacity fills the {zone}.",
            )
        case "nodule":
            return (
                f"A round opacity is seen in the {zone}.",
                f"A small round spot lies in the {zone}.",
            )
        case "cardiomegaly":
            return ("The heart is wide.", "The cardiac silhouette is enlarged.", "The heart ratio is above half.")
    return ("Both lungs are clear.", "Both costophrenic angles are sharp.", "No opacity is seen in either lung.")


def _negatives(case: Case) -> tuple[str, ...]:
    if case.kind in LUNG_KINDS:
        other = "left" if case.side == "right" else "right"
        return ("The heart size is normal.", f"The {other} lung is clear.")
    if case.kind == "cardiomegaly":
        return ("Both lungs are clear.", "No pneumothorax is seen.")
    return ("The heart size is normal.", "No pneumothorax is seen.")


def _conclusions(template: str, case: Case, option: str) -> tuple[str, ...]:
    """What the observation means, in the option's own words, and in full: a side that the option leaves out is said."""
    name = "normal chest" if case.kind == "normal" else f"{case.side} {NAMES[case.kind]}".strip()
    match template:
        case "zone":
            return (f"The abnormality is in the {option}.", f"The {option} is abnormal.")
        case "structure" if case.kind == "normal":
            return ("So no structure is abnormal.", "There is no structure that is abnormal.")
        case "structure":
            return (f"The {option} is abnormal.", f"So the abnormal structure is the {option}.")
        case "sign" if case.kind == "normal":
            return (f"There is {option}.",)
        case "sign":
            return (f"The sign is {_with_article(option)}.", f"This is the sign of {_with_article(option)}.")
    return (f"This is {_with_article(name)}.", f"The diagnosis is {_with_article(name)}.")


def _with_article(name: str) -> str:
    if name == "cardiomegaly":
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


assert set(SIGNS) == set(KINDS) == set(COMMON_KINDS) | set(RARE_KINDS)
