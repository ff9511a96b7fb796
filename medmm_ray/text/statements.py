"""Where a text states its answer: the leads before a statement, and whether the statement holds.

Enters: a text without markup. Leaves: what stands behind each lead, in the order of the text, each with whether it
holds in another case than the question's only. Every pattern is linear in the text (what repeats is bounded or
possessive).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from medmm_ray.text.steps import LETTERS

REACH = 300
"""Characters behind a lead in which its statement is read."""

_IS = r"(?:is|was|(?:would|should|must|will|(?:seems|appears|has)\s++to)\s++be|remains|becomes)\b(?!n't)"
_BEST = (
    r"(?:correct|right|best|(?:most|least)\s++(?!common)\w++|(?:final\s++)?(?:answer|choice(?!\s++of\b))|exception)\b"
)


@dataclass(frozen=True)
class Leads:
    """What stands before a statement, `strong` or `weak`; a `mention` of a letter; what stands between ``not A``, and
    the letter that is right `instead`."""

    strong: re.Pattern[str]
    weak: re.Pattern[str]
    mention: re.Pattern[str]
    instead: re.Pattern[str]


@cache
def leads_of(num_options: int) -> Leads:
    """The leads of a question with so many options.

    They know the letters up to J whether or not an option has them, since one that no option has states nothing; of the
    others only those of options, and neither ``so K is low`` nor ``it is S. aureus`` is a lead.
    """
    last = max("J", LETTERS[:num_options][-1:])
    letter = f"[A-{last}]"
    named = rf"(?:option|choice)\s++[(\[\"']?{letter}[)\]\"']?"
    far = rf"|\(?[K-{last}](?!\.\s++(?-i:[a-z]))(?:[).,:;]|\s*+$)" if last > "J" else ""
    return Leads(
        strong=re.compile(
            rf"\banswer\b(?!\s++(?:choices|options)\b)(?:[^.\n:;?!=]{{0,80}}?(?:\b{_IS}|'s\b|=>|[:=]|-+>|[→⇒]"
            rf"|\b(?:corresponds\s++to|matches|remains)\s++(?={named}))"
            rf"|\s++(?=[(\[]|{letter}\s*+(?:$|\.))|\s*+[-–—]++\s*+(?=[(\[]|{named}))"
            # ``Answer - B`` may as well head a list of options; what calls itself the final answer does not.
            rf"|\b(?:final|correct|best|right|my)\s++answer\s*+[-–—]++\s*+(?=(?-i:{letter})(?![\w'’-]))"
            r"|\bans\s?[.:]",
            re.IGNORECASE,
        ),
        weak=re.compile(
            r"\b(?:correct|right|best|true|false|incorrect|wrong|final|(?:most|least)\s++\w++)\b[^.\n:;?!]{0,90}?"
            rf"(?:\b{_IS}|:)"
            r"|\b(?:choose|chose|select|selected|pick|picked|(?:go|went|going)\s++(?:with|for)|opt(?:ed)?\s++for)\b"
            r"|\b(?:therefore|thus|hence|so|conclude\s++that|conclusion)[,:]?\s++"
            rf"(?=\(?[A-J][).,:\s]{far}|{named}\s*+(?:[.;]|$))(?:it\s++is\s++)?"
            rf"|\b(?:it|which|this|that)\s++(?:corresponds\s++to|matches|points\s++to)\s++(?={named}\s*+(?:[.,;]|$))"
            rf"|\b(?:makes|making|leaves|leaving)\s++(?={named}\s++(?:as\s++)?(?:the\s++)?{_BEST})"
            rf"|\b(?:makes|making|leaves|leaving)\s++(?=[(\[]?(?-i:{letter})[)\]]?\s++(?:as\s++)?the\s++{_BEST})"
            rf"|\b(?:it|which|this|that)(?:\s++is|'s)\s++(?=[(\[]{letter}[)\]]|(?:option|choice)\s"
            rf"|[A-J](?:[.,;]|\s*+$){far})"
            r"|^(?:option|choice)\s?:",
            re.IGNORECASE | re.MULTILINE,
        ),
        mention=re.compile(
            r"(?:\b(?P<noun>(?i:option|choice|answer|statement|alternative))\s++)?(?<![\w'+-])(?P<open>[(\[{\"']?)"
            rf"(?P<letter>{letter}|[a-{last.lower()}](?=\s++(?i:is|would|must|best)\b|[)\]}}\"']))"
            r"(?P<close>[)\].}\"']?)(?![\w'+-])"
        ),
        instead=re.compile(
            r"[^.\n]{0,80}?\b(?:but|rather|instead|it\s++is|it's|is)\b[\s,]*+(?:rather\s++|instead\s++|in\s++fact\s++)?"
            rf"(?:(?:option|choice)\s++)?(?=[(\[]?{letter}\b)",
            re.IGNORECASE,
        ),
    )


_RIGHT = re.compile(
    rf"(?P<gap>[^.;:?!\n]{{0,120}}?)\b(?:{_IS}\s++(?:(?:therefore|thus|clearly|likely|also|indeed)\s++)?"
    rf"(?:(?:the|my|our)\s++)?(?:only\s++)?{_BEST}"
    r"|best\s++(?:fits|explains|matches|describes|answers|represents)\b|(?:fits|explains|matches|answers)\s++(?:it\s++)?best\b)",
    re.IGNORECASE,
)
_DENIAL = re.compile(r"\bnot\b|n't\b|\bnever\b|\bneither\b", re.IGNORECASE)
_NEITHER = re.compile(r"\b(?:neither|nor|not|no)\s++(?:the\s++)?$", re.IGNORECASE)
_CLAUSE_START = re.compile(r"(?:^|[.;:,\n]\s{0,3}|\b(?:therefore|thus|so|hence|that|and)\s)$", re.IGNORECASE)
_IF = re.compile(r"\b(?:if|whether|suppose|assuming)\s(?:\w{1,15}\s){0,4}$", re.IGNORECASE)
_ASKED = re.compile(r"[^.!\n]{0,200}?\?")

# When a statement holds under another condition only

_SENTENCE_START = re.compile(r"[.!?]\s|[;\n]")
_CONDITIONAL = re.compile(r"\b(?:would|might|could|may)\b|'d\b", re.IGNORECASE)
_CONDITION = re.compile(
    r"\b(?:if|unless|suppos(?:e|ed|ing)|assuming|imagin(?:e|ing)|otherwise|provided|in\s++case)\b"
    r"|^\W*+(?:(?:but|and|however|conversely|by\s++contrast|in\s++contrast|instead)\b\W*+)?"
    r"(?:had|were|should|without|(?:in|for)\s++(?:an?|another|other|the\s++absence)\s)",
    re.IGNORECASE,
)
_SUPPOSED = re.compile(r"\b(?:if|unless|suppos(?:e|ing)|imagine)\b|^\W*+(?=(?:had|were)\b)", re.IGNORECASE)
_CONTRARY = re.compile(r"\b(?:were|had|weren't|hadn't|did|didn't)\b", re.IGNORECASE)
_LATER_CONDITION = re.compile(
    r"(?:(?!\b(?:because|since|as|due|given)\b)[^.;?!\n]){0,120}?\b(?:if|unless|had|assuming|otherwise|in\s++case)\b",
    re.IGNORECASE,
)
_OTHERS = re.compile(
    r"\b(?:some(?:one|body)?|one|many|others|you|people)\s++(?:\w++\s++)?(?:might|may|could|would|will)\s++(?:\w++\s++){0,3}"
    r"(?:say|think|argue|believe|suspect|assume|answer)\s++(?:that\s++)?(?:the\s++)?(?:\w++\s++)?$",
    re.IGNORECASE,
)


class Statement(NamedTuple):
    """What stands behind a lead, and whether it holds in another case than the question's, or in another's view."""

    start: int
    words: str
    hypothetical: bool


def behind_leads(text: str, pattern: re.Pattern[str]) -> list[Statement]:
    """What stands behind each lead of one kind."""
    statements = []
    for lead in pattern.finditer(text):
        start, end = lead.span()
        if _is_statement(text, start, end):
            statements.append(
                Statement(
                    start,
                    text[end : end + REACH],
                    _is_hypothetical(text, start, end),
                )
            )
    return statements


def _is_statement(text: str, start: int, end: int) -> bool:
    """Whether a lead is neither part of a question nor of a supposition."""
    before = text[max(0, start - 60) : start]
    return not _ASKED.match(text, end) and not _IF.search(before)


def _is_hypothetical(text: str, start: int, end: int) -> bool:
    """Whether the sentence of a lead (or of a mention with its verdict) speaks of another case or another's view."""
    before = text[max(0, start - 200) : start]
    for sentence_start in _SENTENCE_START.finditer(before):
        before = text[max(0, start - 200) + sentence_start.end() : start]
    if _OTHERS.search(before):
        return True
    supposed = _SUPPOSED.search(before)
    if supposed and _CONTRARY.search(before, supposed.end()):
        return True
    if not _CONDITIONAL.search(text, start, end):
        return False
    has_condition_before = _CONDITION.search(before) or _CONDITION.search(text[start:end])
    return bool(has_condition_before or _LATER_CONDITION.match(text, end))


def mentions(text: str, mention: re.Pattern[str]) -> Iterator[Statement]:
    """``Option D … is correct``, ``(B) is the best answer``, ``C is right``: the letter, as a statement."""
    for match in mention.finditer(text):
        start = match.start()
        verdict = _RIGHT.match(text, match.end())
        if verdict is None or _DENIAL.search(verdict[0]) or not _is_statement(text, start, verdict.end()):
            continue
        is_marked = bool(match["noun"] or match["open"] or match["close"])
        is_direct = not verdict["gap"].strip()
        if match["letter"].islower() and not (is_marked and is_direct):  # "a fracture is most likely"
            continue
        before = text[max(0, start - 12) : start]
        is_named = match["noun"] and not _NEITHER.search(before)
        if is_named or (_CLAUSE_START.search(before) and (is_marked or is_direct)):
            yield Statement(start, match["letter"].upper(), _is_hypothetical(text, start, verdict.end()))
