"""The answer that a text states: a letter, yes or no, or the words of an open question.

Enters: what a model wrote. Leaves: the last answer that it *states*, or None. Statements come in two kinds. Strong:
``the answer is …``, ``Answer: …``, a box, an answer field of JSON, a last line that is a letter. Weak: ``option D is
correct``, ``the most likely diagnosis is …``, ``I choose …``; they count only where nothing strong can be read.

- A letter stands alone and one of the options has it. Lower case counts in brackets or at the end; a letter that runs
  on into a word does not (``a fracture``, ``B cells``, ``D-dimer``).
- An option's text counts in place of its letter if all of the statement is that text by `answer_key`, never a part.
- ``not A but B`` states B; ``not A`` takes back an earlier A; ``A or B``, ``none of the above`` and a letter that no
  option has take back whatever came before: they say that there is no one answer.
- A question (``is the answer B?``) and a supposition (``if the answer is B``) state nothing. What would be the answer
  under another condition (``if she were pregnant, the answer would be C``) counts only where nothing else is stated,
  wherever it stands.

Every pattern is linear in the text (what repeats is bounded or possessive), so a text of any length is safe.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from medmm_ray.text.markup import plain_text
from medmm_ray.text.matching import NO, YES, answer_key, joined, key_words
from medmm_ray.text.statements import REACH, Leads, Statement, behind_leads, leads_of, mentions
from medmm_ray.text.steps import LETTERS

# An answer field of JSON, whose value is quoted or not.
_FIELD = re.compile(
    r"\b(?:final|correct|model|predicted)?[_ ]?(?:answer|choice|option|letter)"
    r"(?:[_ ]?(?:choice|letter|option|idx|key))?[\"']"
    r"\s*+:\s*+\[?\s*+(?:\"((?:[^\"\\\n]|\\.)*+)|'([^'\n]*+)|([^,{}\]\n]*+))",
    re.IGNORECASE,
)

# How a statement is parsed

_FILLER = re.compile(
    r"(?:[\s:=]++|-+>?\s|(?:therefore|thus|hence|most\s++likely|likely|probably|definitely|clearly|indeed|actually|simply|"
    r"still|option|choice|letter|answer|statement|number|that|it|is|would\s++be|to\s++be)(?![\w'])[\s,:]*+)*+",
    re.IGNORECASE,
)
_NOT = re.compile(
    r"(?:not|neither|never|no\s++longer|hardly|unlikely\s++to\s++be|anything\s++(?:but|except)|other\s++than)\b\s*+"
    r"(?:option\s++|choice\s++|the\s++|necessarily\s++)*+",
    re.IGNORECASE,
)
_BRACKETED = re.compile(r"[(\[{\"']++\s?([A-Za-z])\s?[)\]}\"']")
_LONE = re.compile(r"([A-Z])(?:[ \t]*+(?:\n|$)|[.:,;)\]}\"'!]++(?:[ \t]*+(?:\n|$)|\s++(?![a-z])))")
_LOWER = re.compile(r"([a-z])(?:\.?[ \t]*+(?:\n|$)|\))")
_RUN_ON = re.compile(
    r"([A-Z])(?:[.:,;)\]}\"!]|'(?!\w)|\s++(?:[-–—(\n]|because|as|since|due|given|based|for|which|with|rather|instead|(?:and\s)?not|"
    r"if|unless|in|is|here|so|too|(?:the\s)?(?:correct|right|best))(?!\w))"
)
_SEVERAL = re.compile(
    r"(?:either\s++|both\s++|between\s++)?[(\[]?([A-Z])[)\]]?\s?(?:,|/|&|and\b|or\b|and/or\b)\s?(?:or\s|and\s)?"
    r"(?:option\s++|choice\s++)?[(\[]?([A-Z])[)\]]?(?=\s*+(?:[.,;:)/\n\"'}]|and\b|or\b|are\b|both\b|$))"
)
_ABSTAINS = re.compile(
    r"(?:none\b|neither\b|unknown\b|unclear\b|uncertain\b|inconclusive\b|cannot\b|can't\b|impossible\b|undetermined\b|n/?a\b|"
    r"not\s++(?:listed|provided|available|enough|mentioned|applicable|determin|given|sure|clear|specified|stated|possible|"
    r"among|in\s++the))",
    re.IGNORECASE,
)
_LATER_BRACKET = re.compile(r"[^.\n(]{0,150}?\((?i:option\s++|choice\s++|answer\s++)?([A-Z])\)")
_CUT = re.compile(
    r"[,;:(\n\"]|\.(?=\s|$)|\s[-–—]\s|—|,?\s(?:because|since|as|due\sto|which|given|based|rather|and\snot)\s",
    re.IGNORECASE,
)
_LABEL = re.compile(r"[(\[]?[A-Za-z][)\].:]\s*+")
_SENTENCE_END = re.compile(r"\n|[.!?]+(?=\s+[A-Z\"'(]|\s*$)|,?\s(?i:because|since|given that|based on)\s")
_EDGES = " \t\r\n.,;:!\"'`[]{}"


@dataclass(frozen=True)
class _ParsedAnswer:
    """What one statement says: `answer` states it, `rejected` denies it, neither with `abstains` says there is none."""

    answer: str | None = None
    rejected: str | None = None
    abstains: bool = False


_NOTHING = _ParsedAnswer()


class _AnswerParser(Protocol):
    """How the answer to one kind of question is parsed."""

    leads: Leads

    def parse(self, statement: str) -> _ParsedAnswer:
        """What one statement says."""

    def last_line(self, text: str, /) -> list[str]:
        """The last line of `text` where it is a statement without a lead, else nothing."""


def extract_answer(text: str, options: Sequence[str], answer_type: str = "choice") -> str | None:
    """The last answer that `text` states: a letter (choice), ``yes``/``no`` (yes_no), or the stated words (open).

    A choice without options is read as an open question. None where nothing is stated, or nothing that fits.

    >>> extract_answer("So the answer is **(B)** Crohn's disease.", ["appendicitis", "Crohn's disease"])
    'B'
    """
    plain = plain_text(text)
    if answer_type == "yes_no":
        return _extract(plain, _YesNoParser(tuple(options)))
    if answer_type == "open" or not options:
        return _extract(plain, _OpenParser())
    return _extract(plain, _ChoiceParser(tuple(options)))


def _extract(text: str, parser: "_AnswerParser") -> str | None:
    fields = list(filter(None, map(_value, _FIELD.finditer(text))))
    if fields:  # JSON says more clearly than any sentence what is the answer
        parsed = parser.parse(fields[-1])
        if parsed != _NOTHING:
            return parsed.answer
        strong_statements = next(_by_weight(fields[-1], parser))
        return _last_answer(strong_statements, parser) or None
    for statements in _by_weight(text, parser):
        answer = _last_answer(statements, parser)
        if answer is not None:
            return answer or None
    return None


def _value(field: re.Match[str]) -> str:
    in_double_quotes, in_single_quotes, without_quotes = field[1], field[2], field[3]
    return (in_double_quotes or in_single_quotes or without_quotes or "").strip()


def _last_answer(statements: Sequence[str], parser: "_AnswerParser") -> str | None:
    """The last answer that is not taken back; "" where one says that there is no answer; None where none is."""
    denied: set[str] = set()
    # From the end: the last word counts, and a denial takes back only what was said before it.
    for statement in reversed(statements):
        parsed = parser.parse(statement)
        if parsed.rejected:
            denied.add(parsed.rejected)
        if parsed.answer and parsed.answer not in denied:
            return parsed.answer
        if parsed.abstains:
            return ""
    return "" if denied else None


def _by_weight(text: str, parser: "_AnswerParser") -> Iterator[list[str]]:
    """The statements, those that weigh most first: strong ones, weak ones, then those under another condition."""
    strong = _statements(text, parser, strong=True)
    yield _words(strong, hypothetical=False)
    weak = _statements(text, parser, strong=False)
    yield _words(weak, hypothetical=False)
    yield _words(strong, hypothetical=True)
    yield _words(weak, hypothetical=True)


def _words(statements: Sequence[Statement], hypothetical: bool) -> list[str]:
    return [statement.words for statement in statements if statement.hypothetical == hypothetical]


def _statements(text: str, parser: "_AnswerParser", strong: bool) -> list[Statement]:
    """What stands behind each lead of one kind, in the order of the text."""
    pattern = parser.leads.strong if strong else parser.leads.weak
    statements = behind_leads(text, pattern)
    if strong:
        for line in parser.last_line(text):
            statements.append(
                Statement(
                    len(text),
                    line,
                    hypothetical=False,
                )
            )
    elif isinstance(parser, _ChoiceParser):
        statements += mentions(text, parser.leads.mention)
    return sorted(statements, key=lambda statement: statement.start)


def _without_filler(statement: str) -> str:
    filler = _FILLER.match(statement)
    assert filler is not None, "the pattern matches an empty text too"
    return statement[filler.end() :]


def _lines(text: str) -> list[str]:
    """The last two lines of `text` that are not empty."""
    # Only the end is split: a text may be of any length.
    lines = text[-2 * REACH :].split("\n")
    return [line.strip() for line in lines if line.strip()][-2:]


@lru_cache(maxsize=256)
def _keys(options: tuple[str, ...]) -> dict[str, str]:
    """Each option's normal form -> its letter. Forms that two options share are left out, and single letters: who
    answers B of the blood groups A, B, AB and O means the second option."""
    keys = list(map(answer_key, options))
    # Two options with the same words: the words do not say which is meant.
    letter_of_key = {}
    for key, letter in zip(keys, LETTERS, strict=False):
        is_letter = len(key) <= 1 and key.upper() in LETTERS
        if keys.count(key) == 1 and not is_letter:
            letter_of_key[key] = letter
    return letter_of_key


class _ChoiceParser:
    """Letters, and the options' own texts in their place."""

    def __init__(self, options: tuple[str, ...]) -> None:
        self.leads = leads_of(len(options))
        self.letters = LETTERS[: len(options)]
        self.keys = _keys(options)
        self.longest = 0  # words of the longest option: a longer statement is no option's text
        for key in self.keys:
            self.longest = max(self.longest, len(key.split()))

    def parse(self, statement: str) -> _ParsedAnswer:
        """The letter that a statement states, or denies."""
        rest = _without_filler(statement)
        if letter := self._option_text(rest):
            return _ParsedAnswer(answer=letter)
        # In order of weight: a whole option, a letter alone, a denial, several letters, a letter that runs on.
        lone = _LONE.match(rest)
        if lone and lone[1] in self.letters and not _SEVERAL.match(rest):
            return _ParsedAnswer(answer=lone[1])
        if negation := _NOT.match(rest):
            return self._denied(rest, negation.end())
        if _SEVERAL.match(rest) or _ABSTAINS.match(rest):
            return _ParsedAnswer(abstains=True)
        match = _BRACKETED.match(rest) or _LOWER.match(rest) or _RUN_ON.match(rest)
        if match is None and self._has_own_text(rest):
            return _ParsedAnswer(answer=rest[0])
        match = match or _LATER_BRACKET.match(rest)
        if match is None:
            return _NOTHING
        letter = match[1].upper()
        return _ParsedAnswer(answer=letter) if letter in self.letters else _ParsedAnswer(abstains=True)

    def _has_own_text(self, rest: str) -> bool:
        """Whether a statement is a letter followed by its own option's text."""
        return rest[:1] in self.letters and rest[1:2] == " " and self._option_text(rest[2:]) == rest[0]

    def _denied(self, rest: str, end: int) -> _ParsedAnswer:
        """``not A``, maybe followed by ``but B``."""
        if _ABSTAINS.match(rest):
            return _ParsedAnswer(abstains=True)
        denied = rest[end:]
        letter = denied.lstrip("([\"'")[:1]
        if letter not in self.letters or not letter:
            letter = self._option_text(denied) or ""
        instead = self.leads.instead.match(rest, end)
        stated = self.parse(rest[instead.end() :]).answer if instead else None
        return _ParsedAnswer(answer=stated, rejected=letter or None)

    def _option_text(self, rest: str) -> str | None:
        """The letter of the option whose text all of a statement is; the longest cut of it that is one."""
        words: list[str] = []
        letter = None
        start = 0
        cuts = [match.start() for match in _CUT.finditer(rest)]
        # Each cut adds its words: the text is normalised once, whatever the number of cuts.
        for end in (*cuts, len(rest)):
            words += key_words(rest[start:end])
            if len(words) > self.longest:
                break
            letter = self.keys.get(joined(words), letter)
            start = end
        return letter

    def last_line(self, text: str) -> list[str]:
        """The last line, if it is a letter, or a letter with its option's text outside a list of options; a text of
        one line may also be an option's text."""
        lines = _lines(text)
        if not lines:
            return []
        line = lines[-1].strip("\"'")
        if re.fullmatch(r"[(\[{\"']*([A-Z])[)\]}\"'.:]*|[(\[][a-z][)\]]", line):
            return [line]
        is_short = "\n" not in text and len(text) < REACH
        if is_short and (self.keys.get(answer_key(line)) or self._labelled(line)):
            return [line]
        return [line] if self._labelled(line) and not self._labelled(lines[0]) else []

    def _labelled(self, line: str) -> bool:
        """Whether a line is a letter with its option's text."""
        label = _LABEL.match(line)
        letter = line.lstrip("([")[:1].upper()
        return label is not None and self.keys.get(answer_key(line[label.end() :])) == letter


class _YesNoParser:
    """Yes or no in any of their words, and the letters of options that say so."""

    _FIRST = re.compile(r"[(\[\"']*+([A-Za-z]++)")
    _WHOLE = re.compile(r"\W*+(yes|no)\b(?:[.,;:!)]|\s*+$)", re.IGNORECASE)

    def __init__(self, options: tuple[str, ...]) -> None:
        self.leads = leads_of(len(options))
        self.choice = _ChoiceParser(options) if options else None
        self.options = options

    def parse(self, statement: str) -> _ParsedAnswer:
        """Yes or no, where a statement says either."""
        rest = _without_filler(statement)
        # The first word alone decides: "no, although …" is a no.
        first = self._FIRST.match(rest)
        word = first[1].lower() if first else ""
        if word in YES or word in NO:
            return _ParsedAnswer(answer="yes" if word in YES else "no")
        if _NOT.match(rest) or _ABSTAINS.match(rest):
            return _ParsedAnswer(abstains=True)
        letter = self.choice.parse(statement).answer if self.choice else None
        # Options such as "(A) Yes (B) No": the letter stands for its text.
        stated = answer_key(self.options[LETTERS.index(letter)]) if letter else ""
        return _ParsedAnswer(answer=stated) if stated in ("yes", "no") else _NOTHING

    def last_line(self, text: str) -> list[str]:
        """The last line where it is a mere yes or no; the first words of a text that begins ``Yes,`` or ``No.``"""
        last = _lines(text)[-1:]
        if last and answer_key(last[0]) in ("yes", "no"):
            return last
        first_words = self._WHOLE.match(text)
        return [first_words[1]] if first_words else []


class _OpenParser:
    """The words of a statement up to the end of its sentence."""

    leads = leads_of(0)

    def parse(self, statement: str) -> _ParsedAnswer:
        """The words that a statement states."""
        rest = _without_filler(statement)
        if _ABSTAINS.match(rest) and not rest.lower().startswith("none"):
            return _ParsedAnswer(abstains=True)
        end = _SENTENCE_END.search(rest)
        stated = rest[: end.start() if end else len(rest)].strip(_EDGES)
        return _ParsedAnswer(answer=stated) if stated else _NOTHING

    def last_line(self, _: str) -> list[str]:
        """Nothing: an open answer is stated by a lead."""
        return []
