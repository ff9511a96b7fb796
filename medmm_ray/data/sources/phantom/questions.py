"""Questions about phantom cases, with worked solutions.

A question is drawn before its case: a template, then which of its four options is true, then a case that makes it so.
So its text says nothing of the answer beyond prevalence: two options of each template are common (`COMMON` of the
probability each), two are rare, which is what a reader without the picture can know. Over the templates the common
options stand evenly on A, B, C and D.

A template's options keep their order. A language model of a few million parameters learns within a few hundred updates
what (B) means in each of ten templates; to look it up in shuffled options takes it many thousands.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from medmm_ray.data.sources import Hardness
from medmm_ray.data.sources.phantom.case import (
    KINDS,
    LUNG_KINDS,
    NAMES,
    PLAIN,
    Finding,
    PhantomCase,
    generator,
    make_case,
    pick,
)
from medmm_ray.data.sources.phantom.truth import truth

COMMON = 0.38  # the probability of each of the two common options; the two rare ones share the rest
LETTERS = "ABCD"

SIGNS = {
    "effusion": "blunted costophrenic angle",
    "pneumothorax": "visible lung edge",
    "consolidation": "patchy opacity",
    "nodule": "round opacity",
    "cardiomegaly": "enlarged heart",
    "normal": "no abnormal sign",
}
COMPLAINTS = (
    "cough",
    "chest pain",
    "fever",
    "breathlessness",
    "weight loss",
    "a fall",
    "fatigue",
    "a wheeze",
    "back pain",
    "a fever at night",
    "a cough for weeks",
    "sudden breathlessness",
)
CONTEXTS = (
    "A patient has {}.",
    "An adult comes with {}.",
    "A chest radiograph is taken for {}.",
    "The referral says {}.",
    "An older patient reports {}.",
)
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

    def holds(self, case: PhantomCase) -> bool:
        """Whether the option is true of a case."""
        if self.kinds == ("normal",):
            return not case.findings
        for finding in case.findings:
            if finding.kind in self.kinds and self.side in ("", finding.side) and self.zone in ("", finding.zone):
                return True
        return False


@dataclass(frozen=True, kw_only=True)
class Template:
    """A way to ask. `common` are the letters of its two common options."""

    name: str
    stems: tuple[str, ...]
    options: tuple[Option, Option, Option, Option]
    common: str

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of the options, in the order of their letters."""
        return tuple(option.text for option in self.options)


def _named(kind: str, side: str = "") -> Option:
    text = "normal chest" if kind == "normal" else f"{side} {NAMES[kind]}".strip()
    return Option(text=text, kinds=(kind,), side=side)


def _sign(kind: str) -> Option:
    return Option(text=SIGNS[kind], kinds=(kind,))


def _zone(side: str, zone: str) -> Option:
    return Option(
        text=f"{side} {zone} zone",
        kinds=LUNG_KINDS,
        side=side,
        zone=zone,
    )


TEMPLATES = (
    Template(
        name="zone",
        stems=("Which zone is abnormal?", "In which zone is the lesion?"),
        options=(_zone("right", "lower"), _zone("right", "upper"), _zone("left", "lower"), _zone("left", "upper")),
        common="AC",
    ),
    Template(
        name="structure",
        stems=("Which structure is abnormal?", "What looks abnormal?"),
        options=(
            Option(text="heart", kinds=("cardiomegaly",)),
            Option(text="right lung", kinds=LUNG_KINDS, side="right"),
            Option(text="no structure", kinds=("normal",)),
            Option(text="left lung", kinds=LUNG_KINDS, side="left"),
        ),
        common="BD",
    ),
    Template(
        name="finding",
        stems=("Which finding is present?", "Which finding do you see?"),
        options=(_named("effusion"), _named("pneumothorax"), _named("cardiomegaly"), _named("normal")),
        common="AB",
    ),
    Template(
        name="finding",
        stems=("What is the diagnosis?", "Name the diagnosis."),
        options=(_named("nodule"), _named("normal"), _named("consolidation"), _named("effusion")),
        common="CD",
    ),
    Template(
        name="finding_side",
        stems=("Which finding is present, and on which side?", "Name the finding and its side."),
        options=(
            _named("effusion", "left"),
            _named("nodule", "right"),
            _named("nodule", "left"),
            _named("effusion", "right"),
        ),
        common="AD",
    ),
    Template(
        name="finding_side",
        stems=("What does the radiograph show, and where?", "What is seen, and where?"),
        options=(
            _named("consolidation", "left"),
            _named("pneumothorax", "right"),
            _named("pneumothorax", "left"),
            _named("consolidation", "right"),
        ),
        common="BC",
    ),
    Template(
        name="sign",
        stems=("Which sign is visible?", "Which sign is there?"),
        options=(_sign("effusion"), _sign("nodule"), _sign("pneumothorax"), _sign("cardiomegaly")),
        common="AC",
    ),
    Template(
        name="sign",
        stems=("Which sign does the radiograph show?", "Name the sign on the radiograph."),
        options=(_sign("normal"), _sign("consolidation"), _sign("cardiomegaly"), _sign("effusion")),
        common="BD",
    ),
    Template(
        name="finding_side",
        stems=("What explains the symptoms?", "What is the cause of the symptoms?"),
        options=(
            _named("consolidation", "right"),
            _named("effusion", "right"),
            _named("effusion", "left"),
            _named("consolidation", "left"),
        ),
        common="AD",
    ),
    Template(
        name="finding",
        stems=("What should be reported first?", "What does the report say first?"),
        options=(_named("cardiomegaly"), _named("pneumothorax"), _named("consolidation"), _named("nodule")),
        common="BC",
    ),
)


@dataclass(frozen=True, kw_only=True)
class PhantomQuestion:
    """A question with its case. `options` are texts in the order of their letters; `answer` is the true one's letter.

    `worked` holds worked solutions, each a list of steps.
    """

    template: str
    question: str
    options: tuple[str, ...]
    answer: str
    case: PhantomCase
    worked: tuple[tuple[str, ...], ...]


def make_questions(
    seed: int,
    split: str,
    number: int,
    num_worked: int = 1,
    hardness: Hardness = PLAIN,
) -> list[PhantomQuestion]:
    """`number` questions, each about a case of its own; the same arguments give the same questions.

    A question depends on its place alone, so that a larger number leaves the first ones as they are. Of several
    findings in a picture one makes an option true, the others none.
    """
    return [_make_question(seed, split, index, num_worked, hardness) for index in range(number)]


def report(case: PhantomCase) -> str:
    """A case's picture told in words: all that the steps of its worked solutions may say of it, and the diagnosis."""
    sentences: list[str] = []
    for finding in case.findings or (case,):
        sentences += _observations(finding)
    sentences += _true_negatives(case)
    impression = ", ".join(map(_impression, case.findings)) or "normal chest"
    return " ".join([*sentences, f"Impression: {impression}."])


def _impression(finding: Finding) -> str:
    return f"{finding.name} ({finding.side} {finding.zone} zone)" if finding.zone else finding.name


def _make_question(seed: int, split: str, index: int, num_worked: int, hardness: Hardness) -> PhantomQuestion:
    rng = generator("question", seed, split, index)
    template = TEMPLATES[int(rng.integers(len(TEMPLATES)))]
    place = _guess(template, rng)
    gold = template.options[place]

    # A further finding must not make a second option true.
    def admits(case: PhantomCase) -> bool:
        true_options = [option for option in template.options if option.holds(case)]
        return true_options == [gold]

    # The order of the draws is part of every seed's question.
    case = make_case(
        rng,
        gold.kinds,
        gold.side,
        gold.zone,
        hardness,
        admits,
    )
    context = pick(rng, CONTEXTS).format(pick(rng, COMPLAINTS))
    stem = pick(rng, template.stems)
    worked = []
    for _ in range(num_worked):
        worked.append(tuple(_worked_solution(template.name, case, gold.text, LETTERS[place], rng)))
    return PhantomQuestion(
        template=template.name,
        question=f"{context} {stem}",
        options=template.texts,
        answer=LETTERS[place],
        case=case,
        worked=tuple(worked),
    )


def _guess(template: Template, rng: np.random.Generator) -> int:
    """The place of an option, by its prevalence."""
    # Two common options and two rare ones: the four add up to 1.
    prevalence = [COMMON if letter in template.common else 0.5 - COMMON for letter in LETTERS]
    return int(rng.choice(4, p=prevalence))


def blind_solution(question: PhantomQuestion, rng: np.random.Generator, slip: float = 0.0) -> tuple[list[str], str]:
    """The steps and the letter of somebody who has not seen the picture: an option by its prevalence, and a worked
    solution of a made-up case for it. With the chance `slip` one step comes from a case for another option, so that
    right answers have wrong steps too.
    """
    template = next(template for template in TEMPLATES if template.texts == question.options)
    # Both are drawn even without a slip: the draws behind them stay the same whatever its chance.
    place = _guess(template, rng)
    slip_place = _guess(template, rng)
    steps = _solution_for(template, place, rng)
    slip_steps = _solution_for(template, slip_place, rng)
    if rng.random() < slip:
        steps[1] = slip_steps[1]
    return steps, LETTERS[place]


def _solution_for(template: Template, place: int, rng: np.random.Generator) -> list[str]:
    """A worked solution of a made-up case for an option."""
    option = template.options[place]
    case = make_case(
        rng,
        option.kinds,
        option.side,
        option.zone,
    )
    return _worked_solution(
        template.name,
        case,
        option.text,
        LETTERS[place],
        rng,
    )


def _worked_solution(template: str, case: PhantomCase, option: str, letter: str, rng: np.random.Generator) -> list[str]:
    """Four or five steps: which option is tested, what is seen (and what is not), what it means, the letter."""
    observations = [pick(rng, _observations(case))]
    if rng.random() < 0.45:
        observations.insert(
            int(rng.integers(2)),
            pick(rng, _asides(case)),
        )
    test = pick(rng, TESTS).format(letter, option)
    conclusion = pick(rng, _conclusions(template, case, option))
    return [
        test,
        *observations,
        conclusion,
        pick(rng, FINAL).format(letter),
    ]


def _asides(case: PhantomCase) -> tuple[str, ...]:
    """What else may be said: what is not seen, and what is seen of further findings."""
    sentences = _true_negatives(case)
    for finding in case.more:
        sentences += _observations(finding)
    return tuple(sentences)


def _true_negatives(case: PhantomCase) -> list[str]:
    return [sentence for sentence in _negatives(case) if truth(sentence, case)]


def _observations(case: PhantomCase | Finding) -> tuple[str, ...]:
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


def _negatives(case: PhantomCase) -> tuple[str, ...]:
    if case.kind in LUNG_KINDS:
        # Candidates only: with further findings some are false, and are left out.
        other_side = "left" if case.side == "right" else "right"
        return ("The heart size is normal.", f"The {other_side} lung is clear.")
    if case.kind == "cardiomegaly":
        return ("Both lungs are clear.", "No pneumothorax is seen.")
    return ("The heart size is normal.", "No pneumothorax is seen.")


def _conclusions(template: str, case: PhantomCase, option: str) -> tuple[str, ...]:
    """What the observation means, in the option's own words, and in full: a side that the option leaves out is said."""
    name = case.findings[0].name if case.findings else "normal chest"
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


assert set(SIGNS) == set(KINDS)
assert Counter("".join(t.common for t in TEMPLATES)) == dict.fromkeys(LETTERS, 5)
