"""Decides for any step of plain English whether it is right about a case, wrong, or says nothing checkable.

`truth` reads a step as claims: "some finding of these kinds is (not) present, on this side, in this zone". A step with
a false claim is False; otherwise one with a true claim is True; a step without a claim is None: instructions, textbook
sentences, hedges, questions, and findings that this world does not know. The rules, in order:

- A sentence is cut into clauses at commas and conjunctions that start a new statement; a negation ("no", "not",
  "without", "absent", "neither" ...) holds for its clause.
- A side or zone holds for its clause; "both" sides is false of a one-sided finding; "either", "neither" mean no side.
- "the answer is (B)" is compared with the question's answer, an option's text in its place likewise; without a
  question such a statement is nothing checkable (its other claims count).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from medmm_ray.data.sources import AnsweredQuestion
from medmm_ray.data.sources.phantom.case import LUNG_KINDS, SIDES, PhantomCase
from medmm_ray.text import LETTERS

LUNG = frozenset(LUNG_KINDS)
ANY = LUNG | {"cardiomegaly"}
DENSE = LUNG - {"pneumothorax"}
EFFUSION, PNEUMOTHORAX = frozenset({"effusion"}), frozenset({"pneumothorax"})
CONSOLIDATION, NODULE = frozenset({"consolidation"}), frozenset({"nodule"})
HEART = frozenset({"cardiomegaly"})
NEVER: frozenset[str] = frozenset()  # what no phantom has: a shifted mediastinum, a fracture


@dataclass(frozen=True)
class Claim:
    """That a finding of one of `kinds` is `present`. `side`: "", right, left or both; `zone`: "", upper, lower, mid."""

    kinds: frozenset[str]
    present: bool
    side: str
    zone: str

    def holds(self, case: PhantomCase) -> bool:
        """Whether the claim is true of a case."""
        kinds = self.kinds
        if self.side and kinds != HEART:
            # "An abnormality on the left" does not speak of the heart.
            kinds = kinds - HEART
        findings = [finding for finding in case.findings if finding.kind in kinds]
        if kinds != HEART:  # the heart has neither side nor zone
            findings = [finding for finding in findings if self.zone in ("", finding.zone)]
            if self.side == "both" and self.present:
                return {finding.side for finding in findings} == set(SIDES)
            if self.side in SIDES:
                findings = [finding for finding in findings if finding.side == self.side]
        return bool(findings) == self.present


def truth(step_text: str, case: PhantomCase, question: AnsweredQuestion | None = None) -> bool | None:
    """True where every claim of the step holds for `case`, False where one does not, None where it makes none."""
    verdicts = [claim.holds(case) for claim in claims(step_text)]
    if question is not None:
        verdicts += _answers(step_text, question)
    return all(verdicts) if verdicts else None


_ANSWER = re.compile(
    r"\b(?i:answer|choice|choose|pick|select|option)\b(?:\s+(?:is|must be|should be|would be|are))?\s*:?\s*"
    r"(not\s+)?(?:option\s+|choice\s+|letter\s+)?(?:\(([A-Ja-j])\)|([A-J])(?![A-Za-z]))"
    r"(?P<wrong>\s+is\s+(?:not|wrong|false|incorrect)|\s+(?:does|do|can)\s*not|\s+is\s+(?:ruled\s+out|excluded))?"
)
_VERDICT = re.compile(r"\(([A-J])\)\s+(?:is|fits|must|matches)\b(?P<wrong>\s+(?:not|wrong|false|incorrect))?")
_STATED = re.compile(r"\banswer\s+(?:is|must be|:)\s*:?\s*(?P<text>[^().]+)", re.IGNORECASE)


def _answers(text: str, question: AnsweredQuestion) -> list[bool]:
    """Whether each answer stated in `text` (a letter, or an option's own words) is the question's."""
    statements = []
    for sentence in _SENTENCE.split(text):
        if not _INSTRUCTION.search(sentence.lower()) and "?" not in sentence:
            statements.append(sentence)
    verdicts = []
    for letter, denied in _letters(" ".join(statements), question):
        is_the_answer = letter == question.answer
        verdicts.append(is_the_answer != denied)
    return verdicts


def _letters(text: str, question: AnsweredQuestion) -> list[tuple[str, bool]]:
    """The letters that `text` states as the answer, each with whether it denies it."""
    letters = []
    for match in _ANSWER.finditer(text):
        letter = match[2] or match[3]
        denied = bool(match[1] or match["wrong"])
        letters.append((letter.upper(), denied))
    # "(B) is wrong" and an option's own words count only where no sentence names the answer as such.
    if not letters:
        for match in _VERDICT.finditer(text):
            letters.append((match[1], bool(match["wrong"])))
    stated = _STATED.search(text)
    if not letters and stated:
        words = _plain(stated["text"])
        for letter, option in zip(LETTERS, question.options, strict=False):
            if _plain(option) == words:
                letters.append((letter, False))
    return letters


def _plain(text: str) -> str:
    words = re.findall(r"[a-z]+", text.lower())
    return " ".join(word for word in words if word not in ("a", "an", "the"))


# What a clause may speak of: pattern, kinds, whether the pattern itself says that they are present. Earlier ones win:
# matched text is blanked before the next.
def _w(most: int) -> str:
    """A pattern of up to `most` words between two others."""
    return rf"(?:\W+\w+){{0,{most}}}?\W+"


_ANGLE = r"(?:costophrenic|cp)?\W*(?:angles?|sulcus|recess)"
_HEART = r"(?:heart|cardiac|cardiothoracic)"
_LUNG = r"(?:lungs?|lung fields?|fields?|sides?|zones?|apex|apices|bases?|hemithorax|hemithoraces|lobes?)"
_FILM = r"(?:chest|radiographs?|films?|x-?rays?|study|image|picture|examination|scan|findings|appearance|everything)"
_FINE = r"(?:clear|normal|unremarkable|healthy|well aerated|aerated|fully expanded|expanded)"
_LARGE = r"(?:enlarged|wide|widened|large|larger|big|broad|dilated|enlargement|wider)"

_PATTERNS: tuple[tuple[re.Pattern[str], frozenset[str], bool], ...] = tuple(
    (re.compile(pattern), kinds, present)
    for pattern, kinds, present in (
        (r"markings (?:do|does) not (?:reach|extend|run)\w*", PNEUMOTHORAX, True),
        (r"markings (?:reach|extend|run)\w*", PNEUMOTHORAX, False),
        (r"(?:no|without|absent|missing|loss of|lack of|lacks|lost)(?: \w+){0,2} markings", PNEUMOTHORAX, True),
        (r"markings (?:are |is |end |stop )?(?:absent|missing|lost|not seen|not visible|short)", PNEUMOTHORAX, True),
        (r"markings (?:are |is )?(?:present|seen|visible|preserved|normal)", PNEUMOTHORAX, False),
        (r"pneumothora\w+", PNEUMOTHORAX, True),
        (r"(?:pleural|lung) (?:edge|line)s?|edge of the(?: \w+)? lung", PNEUMOTHORAX, True),
        (r"collapsed(?: \w+)? lung|lung collapse|lung (?:is |has )?(?:\w+ )?collapsed", PNEUMOTHORAX, True),
        (r"(?:free|pleural) air|air in the pleural space|air around", PNEUMOTHORAX, True),
        (rf"(?:{_LUNG}{_w(3)})(?:black|lucent|hyperlucent)", PNEUMOTHORAX, True),
        (rf"(?:blunt\w*|obscur\w+|lost|filled|hazy)(?:\W+\w+){{0,3}}?\W+{_ANGLE}", EFFUSION, True),
        (rf"{_ANGLE}{_w(3)}(?:blunt\w*|obscur\w+|lost|filled|hazy|hidden|dull\w*)", EFFUSION, True),
        (rf"blunting(?: of)?(?: \w+)?{_w(2)}{_ANGLE}|blunting", EFFUSION, True),
        (rf"{_ANGLE}{_w(3)}(?:sharp|clear|normal|preserved|intact|deep|open|free)", EFFUSION, False),
        (rf"(?:sharp|clear|normal|preserved)(?: \w+)?\W+{_ANGLE}", EFFUSION, False),
        (r"effusions?|pleural fluid|fluid|menisc\w+", EFFUSION, True),
        (r"(?:hemi)?diaphragms?(?:\W+\w+){0,3}?\W+(?:obscured|hidden|lost)", EFFUSION, True),
        (r"(?:hemi)?diaphragms?(?:\W+\w+){0,3}?\W+(?:sharp|clear|smooth|normal)", EFFUSION, False),
        (rf"cardiomegaly|{_LARGE} (?:\w+ )?{_HEART}(?: silhouette| shadow)?", HEART, True),
        (rf"{_HEART}(?:\W+\w+){{0,5}}?\W+(?:{_LARGE}|abnormal)", HEART, True),
        (rf"abnormal\w*(?:\W+\w+){{0,5}}?\W+{_HEART}", HEART, True),
        (r"ratio(?:\W+\w+){0,4}?\W+(?:above|over|exceed\w*|more|greater|larger|high|increased|raised)", HEART, True),
        (r"ratio(?:\W+\w+){0,4}?\W+(?:below|under|less|normal|within|smaller|low)", HEART, False),
        (rf"{_HEART}(?:\W+\w+){{0,5}}?\W+(?:normal|unremarkable|small|within|clear)", HEART, False),
        (rf"normal(?:\W+\w+)?\W+{_HEART}", HEART, False),
        (r"nodul\w+|(?:round|rounded|circular|coin)(?:\W+\w+)?\W+(?:opacit\w+|lesion|spot|shadow|density|mass|focus)",
         NODULE, True),
        (r"coin lesion|\bmass(?:es)?\b|\bspots?\b|\bround(?:ed)?\b", NODULE, True),
        (r"consolidat\w+|pneumonia|air\W?bronchograms?|air\W?space(?: disease| opacit\w+)?", CONSOLIDATION, True),
        (r"(?:patchy|hazy|fluffy|cloudy|ill\Wdefined|confluent|lobar)(?:\W+(?:opacit\w+|shadow\w*|densit\w+|area|patch"
         r"|lesion))?|\bpatch\b|\bhaze\b|\bhaziness\b", CONSOLIDATION, True),
        (r"opacit\w+|opaque|densit\w+|\bdense\b|whit(?:e|er|ened)\b|bright(?:er)?\b|shadow\w*", DENSE, True),
        (r"shift\w*|displac\w+|deviat\w+|fractur\w+", NEVER, True),
        (r"(?:mediastin\w+|trachea|bones?|ribs?|clavicles?)(?:\W+\w+){0,3}?\W+"
         r"(?:central|midline|normal|straight|intact|unremarkable)", NEVER, False),
        (r"(?:other|additional|further)(?:\W+\w+){0,2}?\W+abnormal\w*", NEVER, True),
        (r"abnormal\w*|lesions?|patholog\w+", ANY, True),
        (r"(?:nothing|no finding|no disease)\b", ANY, True),
        (rf"{_LUNG}{_w(4)}{_FINE}\b|\b{_FINE}(?:\W+\w+)?\W+{_LUNG}\b", LUNG, False),
        (rf"\b{_FINE}(?:\W+\w+){{0,2}}?\W+{_FILM}\b|\b{_FILM}{_w(3)}{_FINE}\b", ANY, False),
        (r"(?:\b(?:is|are|looks?|appears?|seems?|all|it|this|diagnosis)\W+|^\W*)(?:an? )?(?:normal|unremarkable)\W*$",
         ANY, False),
    )
)  # fmt: skip

_NEGATED = re.compile(
    r"\b(?:no|not|without|never|neither|nor|none|nothing|cannot|absence|absent|excludes?|excluded|unlikely|lacks?"
    r"|free of|ruled out|rules out|isn't|aren't|doesn't|don't|hasn't)\b"
)
# "rather than the left", "not on the left": the other side named only to be denied.
_CONTRAST = re.compile(
    r",?\W+(?:and |but )?(?:not|rather than|instead of)(?: on| in| at)?(?: the)? (?:right|left)\b\w*"
)
_SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n+")
_CLAUSE = re.compile(
    r"[;:]\s*|,?\s*\b(?:but|while|whereas|however|although|though|because|since|therefore|hence|thus)\b,?\s*|,?\s+so\s+"
    r"|,\s*(?=(?:the|this|that|there|it|which|and|an?|both|with|without|no)\b)"
    r"|\s+and\s+(?=(?:the|this|there|it|both|no|an?)\b)|\s+(?=(?:without|with no)\b)"
)
_JOINED = re.compile(r"\s*,?\s*\b(and|or|nor)\b\s*")
_INSTRUCTION = re.compile(
    r"^\W*(?:(?:first|next|then|now|finally|step|please|we|i|let us|let's|one|you)\W+)*"
    r"(?:must |should |need to |will )?"
    r"(?:compare|look|check|inspect|review|examine|assess|consider|search|trace|begin|start|study|follow|evaluate"
    r"|measure|suppose|assume|test|try|verify|count|recall|remember|think|read|decide|choose|use|go|ask|scan)\b"
)
_UNSURE = re.compile(
    r"\?\s*$|\b(?:if|whether|would|may|might|could|should|can|perhaps|possibly|usually|typically|often|generally"
    r"|tends? to|commonly)\b"
)
_TEXTBOOK = re.compile(
    r"\b(?:blunts|causes|produces|raises|displaces|widens|means that|(?:signs?|causes?|features?) of)\b"
)


@lru_cache(maxsize=65536)
def claims(step_text: str) -> tuple[Claim, ...]:
    """The claims of a step about the picture, in order."""
    all_claims: list[Claim] = []
    for sentence in _SENTENCE.split(step_text.lower().replace("’", "'")):
        sentence = re.sub(r"\bcan ?(not )?be\b", lambda m: "is not" if m[1] else "is", sentence).replace("_", " ")
        if _INSTRUCTION.search(sentence) or _UNSURE.search(sentence) or _is_textbook(sentence):
            continue
        for clause in _clauses(sentence):
            all_claims += _clause_claims(clause)
    return tuple(all_claims)


def _is_textbook(sentence: str) -> bool:
    """ "An effusion blunts the angle.", "A meniscus is a sign of effusion.": true of any picture."""
    return bool(_TEXTBOOK.search(sentence)) and not re.search(r"\b(?:right|left|this|there|here)\b", sentence)


def _clauses(sentence: str) -> list[str]:
    """The clauses of a sentence, each with a side of its own where it has one."""
    # "The right answer", "is right": no side.
    sentence = re.sub(r"\bright (?=answer|option|choice|one\b)|\b(?:is|are) right\b(?=\W*$)", " ", sentence)
    clauses = []
    for clause in _CLAUSE.split(sentence):
        if not clause:
            continue
        without_contrast = _CONTRAST.sub(" ", clause)
        names_a_side = re.search(r"\b(?:right|left)\b", without_contrast)
        clauses += _split_sides(without_contrast if names_a_side else clause)
    return clauses


def _split_sides(clause: str) -> list[str]:
    """Cut "a left effusion and a right nodule" in two; "the left and right lungs" stay whole."""
    for joint in _JOINED.finditer(clause):
        first, second = clause[: joint.start()], clause[joint.end() :]
        each_has_a_side = _sides(first) and _sides(second)
        if each_has_a_side and _clause_claims(first) and _clause_claims(second):
            # "No left effusion or right nodule": the negation holds for both halves.
            carried = "no " if joint[1] in ("or", "nor") and _NEGATED.search(first) else ""
            return [first, *_split_sides(carried + second)]
    return [clause]


def _sides(clause: str) -> set[str]:
    return set(re.findall(r"\b(?:right|left|both|bilateral|either|neither)", clause))


def _clause_claims(clause: str) -> list[Claim]:
    zones = [zone for zone, pattern in _ZONES.items() if pattern.search(clause)]
    side = _side(clause)
    zone = zones[0] if len(zones) == 1 else ""  # "upper and lower": no zone in particular
    mentions = []
    rest = clause
    for pattern, kinds, present in _PATTERNS:
        while match := pattern.search(rest):
            rest = rest[: match.start()] + " | " + rest[match.end() :]
            mentions.append((match, kinds, present))
    # A negation inside a pattern that spells it out ("no lung markings") is spent; one left over turns its clause.
    denied = bool(_NEGATED.search(_without_spent(clause, mentions)))
    return [Claim(kinds, present != denied, side, zone) for _, kinds, present in mentions]


_ZONES = {
    "upper": re.compile(r"\b(?:upper|apex|apices|apical|top)\b"),
    "lower": re.compile(r"\b(?:lower|bas(?:e|es|al|ilar)|bottom)\b"),
    "mid": re.compile(r"\b(?:mid|middle)\b"),
}


def _side(clause: str) -> str:
    """The side that a clause speaks of: right, left, both, or "" for none in particular."""
    words = _sides(clause)
    if words & {"either", "neither"}:
        return ""
    if words & {"both", "bilateral"} or {"right", "left"} <= words:
        return "both"
    return next(iter(words), "")


def _without_spent(clause: str, mentions: Sequence[tuple[re.Match[str], frozenset[str], bool]]) -> str:
    for match, kinds, _ in mentions:
        if kinds == PNEUMOTHORAX and "markings" in match[0]:
            clause = clause.replace(match[0], " ")
    return clause
