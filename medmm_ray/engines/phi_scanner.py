"""Protected health information in texts, by Presidio's recognisers and ours: patterns, no model of language.

Enters: a text. Leaves: the kinds of identifiers in it (`KINDS`), never the identifiers themselves. What HIPAA's Safe
Harbor list has and a pattern can tell: names with a mark of a person (a title, a label, "X, a 45-year-old"), dates to
the day, phone numbers, e-mail addresses, record numbers, social security numbers, street addresses, ages above 89.

A bare surname has no such mark and is not found; nor is an eponym (Crohn disease) taken for one. How much of each kind
is found, and how often nothing is there: ``python -m jobs.bench phi``.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from medmm_ray.config import ConfigError

KINDS = ("name", "date", "phone", "email", "record_number", "ssn", "address", "age_over_89")
"""What is looked for."""

_WORD = r"(?:[OD]['’]|Mc|Mac)?[A-ZÀ-ÖØ-Þ][a-zà-öø-ÿ]+(?:['’\-][A-ZÀ-ÖØ-Þ][a-zà-öø-ÿ]+)?"
_NAME = rf"{_WORD}(?: [A-Z]\.)?(?: {_WORD})?"
_FULL_NAME = rf"{_WORD}(?: [A-Z]\.)? {_WORD}"
# What begins a sentence before "is a 45-year-old", and is no name.
_NO_NAME = (
    r"(?!(?:He|She|It|This|That|They|The|There|Patient|Who|Which|What|Here|Case|Today|Examination|History|Mother|Father"
    r"|Man|Woman|Boy|Girl|Child|Infant|Subject|Question|Answer|Figure|Table|United|Young|Right|Left|Generally)\b)"
)
_AGED = r"\d{1,3}[ -](?:year|month|week|day)s?[ -]old"
_MONTH = (
    r"(?:January|February|March|April|May|June|July|August|September|October|November|December"
    r"|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\.?"
)
_DAY, _YEAR = r"(?:0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?", r"(?:19|20)\d{2}"
_STREET = (
    r"(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Place|Pl|Square|Sq|Terrace|Way"
    r"|Parkway)"
)
_RECORD = (
    r"(?:MRN|M\.R\.N\.|[Mm]edical [Rr]ecord(?: (?:[Nn]umber|[Nn]o\.?))?|[Hh]ospital (?:[Nn]umber|[Nn]o\.?)"
    r"|[Pp]atient (?:ID|[Ii]dentifier|[Nn]umber|[Nn]o\.?)|[Aa]ccession(?: (?:[Nn]umber|[Nn]o\.?))?"
    r"|[Aa]cc(?:oun)?t\.?(?: ?#| (?:[Nn]umber|[Nn]o\.?))|CHI|[Cc]ase [Nn]o\.?)"
)
_CALLED = r"(?:[Pp]hone|[Tt]el|[Tt]elephone|[Ff]ax|[Cc]ell|[Mm]obile|[Cc]ontact)(?: (?:[Nn]umber|[Nn]o))?\.?"
_PERSON = r"(?:[ -]?old|[ -]?[Mm]an|[ -]?[Ww]oman|[ -]?[Mm]ale|[ -]?[Ff]emale)"

NAME_PATTERNS = {
    "title": rf"\b(?:Mr|Mrs|Ms|Miss|Mister|Dr|Prof|Professor)\.? {_NAME}\b",
    "label": rf"\b(?:[Pp]atient(?:'s)? [Nn]ame|PATIENT NAME|[Nn]ame of (?:the )?patient|Name|NAME|Patient|PATIENT|Pt)"
    rf" ?[:=] ?{_FULL_NAME}\b",
    "last_first": rf"\b(?:Name|NAME|Patient|PATIENT|Pt)(?: [Nn]ame)? ?[:=] ?{_WORD}, {_WORD}\b",
    "named": rf"\b(?:named|name is|called) {_FULL_NAME}\b",
    "apposition": rf"\b{_NO_NAME}{_FULL_NAME},? (?:\(?an? |aged )?\(?{_AGED}",
    "subject": rf"\b{_NO_NAME}{_WORD} (?:is|was) an? {_AGED}",
    "acts": rf"\b{_NO_NAME}{_FULL_NAME} (?:was (?:admitted|referred|seen|discharged)|presents|presented"
    rf"|complains|complained|denies|denied|underwent)\b",
    "age_in_brackets": rf"\b{_NO_NAME}{_FULL_NAME} \((?:age |aged )?\d{{1,3}}[,)]",
}
DATE_PATTERNS = {
    "day_month_year": rf"\b{_DAY} (?:of )?{_MONTH},? {_YEAR}\b",
    "month_day_year": rf"\b{_MONTH} {_DAY},? {_YEAR}\b",
    "born": rf"\b(?:[Dd]ate of [Bb]irth|DOB|D\.O\.B\.|[Bb]orn on)\b[ :=]{{0,3}}(?:{_DAY}|{_MONTH}|\d{{1,4}})",
}
# Numbers as they are written, valid or not: Presidio's recogniser knows which are, and how they are written abroad.
PHONE_PATTERNS = {
    "in_groups": r"(?<![\d.\-/])(?:\+?\d{1,3}[\-. ])?(?:\(\d{3}\) ?|\d{3}[\-.])\d{3}[\-.]\d{4}(?:x\d+)?\b"
    r"(?![\-/]\d)",
    "labelled": rf"\b{_CALLED}[ :#(]{{0,3}}\+?\(?\d[\d \-.()]{{5,}}\d",
}
RECORD_PATTERNS = {
    "labelled": rf"\b{_RECORD}[ :#=]{{0,3}}(?=[A-Z0-9\-/]*\d)[A-Z0-9][A-Z0-9\-/]{{4,}}\b",
    "nhs": r"\bNHS (?:[Nn]umber|[Nn]o\.?)[ :]{0,2}\d{3}[ \-]?\d{3}[ \-]?\d{4}\b",
}
ADDRESS_PATTERNS = {
    "street": rf"\b\d{{1,5}}[A-Z]?(?: [NSEW]\.?)? {_WORD}(?: {_WORD})? {_STREET}\b(?!\.? [a-z])",
    "lives": rf"\b(?:[Ll]iv(?:es|ing) at|[Rr]esid(?:es|ing) at|[Hh]ome at|[Aa]ddress ?:?) ?\d{{1,5}}[A-Z]? {_WORD}\b",
    "unit": rf"\b\d{{1,5}} {_WORD}(?: {_WORD})?,? (?:Apt|Apartment|Suite|Unit|Flat)\.? ?\d+\b",
    "state_and_code": r"\b[A-Z][a-z]+(?: [A-Z][a-z]+)?, [A-Z]{2} \d{5}(?:-\d{4})?\b",
}
AGE_PATTERNS = {
    "years_old": rf"\b(?:9\d|1[01]\d)[ -](?:years?|yrs?|y/?o)\b(?={_PERSON})",
    "aged": r"\b(?:[Aa]ged?|AGE) ?[:=]? ?(?:9\d|1[01]\d)\b(?! ?(?:%|days|months|weeks|mg))",
}


class PhiScanner:
    """Tells which kinds of identifiers a text has. Loading Presidio takes some seconds, so one lives in each worker."""

    def __init__(self) -> None:
        try:
            from presidio_analyzer.predefined_recognizers import (
                DateRecognizer,
                EmailRecognizer,
                PhoneRecognizer,
                UsSsnRecognizer,
            )
        except ImportError:
            raise ConfigError(
                "curate.phi scans with presidio-analyzer, which is not installed: pip install 'medmm-ray[phi]', or "
                "leave it out with curate.phi=off"
            ) from None

        # Weaker patterns of Presidio's wait for words around them, which need a model of language.
        days = [pattern for pattern in DateRecognizer.PATTERNS if "dd" in pattern.name and "yy" in pattern.name]
        numbers = [pattern for pattern in UsSsnRecognizer.PATTERNS if pattern.score >= 0.5]
        self._recognizers: Mapping[str, Sequence[Any]] = {
            "name": [_by_patterns("name", NAME_PATTERNS)],
            "date": [_by_patterns("date", DATE_PATTERNS), DateRecognizer(patterns=days)],
            # Strict about groups of digits: laboratory values in a row are no phone number.
            "phone": [
                _by_patterns("phone", PHONE_PATTERNS),
                PhoneRecognizer(supported_regions=("US", "GB"), leniency=2),
            ],
            # Its patterns alone: the recogniser itself asks the network for a list of top-level domains.
            "email": [_recognizer("email", EmailRecognizer.PATTERNS)],
            "record_number": [_by_patterns("record_number", RECORD_PATTERNS)],
            "ssn": [UsSsnRecognizer(patterns=numbers)],
            "address": [_by_patterns("address", ADDRESS_PATTERNS)],
            "age_over_89": [_by_patterns("age_over_89", AGE_PATTERNS)],
        }

    def kinds(self, text: str) -> list[str]:
        """The kinds of identifiers in a text, in the order of `KINDS`."""
        return [kind for kind in KINDS if self._has(kind, text)]

    def _has(self, kind: str, text: str) -> bool:
        for recognizer in self._recognizers[kind]:
            if recognizer.analyze(text, recognizer.supported_entities, None):
                return True
        return False


def _by_patterns(kind: str, patterns: Mapping[str, str]) -> Any:
    """A recogniser of our own patterns."""
    from presidio_analyzer import Pattern

    return _recognizer(kind, [Pattern(name, regex, 0.8) for name, regex in patterns.items()])


def _recognizer(kind: str, patterns: Sequence[Any]) -> Any:
    from presidio_analyzer import PatternRecognizer

    # Names are told by their capitals.
    return PatternRecognizer(supported_entity=kind, patterns=list(patterns), global_regex_flags=re.MULTILINE)
