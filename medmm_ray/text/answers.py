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
from functools import cache, lru_cache
from typing import NamedTuple, Protocol

from medmm_ray.text.markup import plain_text
from medmm_ray.text.matching import NO, YES, answer_key, joined, key_words
from medmm_ray.text.steps import LETTERS

REACH = 300  # characters behind a lead in which its statement is read

# Where statements begin

_IS = r"(?:is|was|(?:would|should|must|will|(?:seems|appears|has)\s++to)\s++be|remains|becomes)\b(?!n't)"
_BEST = (
    r"(?:correct|right|best|(?:most|least)\s++(?!common)\w++|(?:final\s++)?(?:answer|choice(?!\s++of\b))|exception)\b"
)


@dataclass(frozen=True)
class _Leads:
    """What stands before a statement, `strong` or `weak`; a `mention` of a letter; what stands between ``not A``, and
    the letter that is right `instead`."""

    strong: re.Pattern[str]
    weak: re.Pattern[str]
    mention: re.Pattern[str]
    instead: re.Pattern[str]


@cache
def _leads(num_options: int) -> _Leads:
    """The leads of a question with so many options.

    They know the letters up to J whether or not an option has them, since one that no option has states nothing; of the
    others only those of options, and neither ``so K is low`` nor ``it is S. aureus`` is a lead.
    """
    last = max("J", LETTERS[:num_options][-1:])
    letter = f"[A-{last}]"
    named = rf"(?:option|choice)\s++[(\[\"']?{letter}[)\]\"']?"
    far = rf"|\(?[K-{last}](?!\.\s++(?-i:[a-z]))(?:[).,:;]|\s*+$)" if last > "J" else ""
    return _Leads(
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
_FIELD = re.compile(
    r"\b(?:final|correct|model|predicted)?[_ ]?(?:answer|choice|option|letter)"
    r"(?:[_ ]?(?:choice|letter|option|idx|key))?[\"']"
    r"\s*+:\s*+\[?\s*+(?:\"((?:[^\"\\\n]|\\.)*+)|'([^'\n]*+)|([^,{}\]\n]*+))",
    re.IGNORECASE,
)
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

# How a statement reads

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
    """How one kind of question reads a statement, and which last lines are statements without a lead."""

    leads: _Leads

    def read(self, statement: str) -> _ParsedAnswer: ...

    def last_line(self, text: str, /) -> list[str]: ...


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


def _extract(text: str, reader: "_AnswerParser") -> str | None:
    fields = [m for m in _FIELD.finditer(text) if _value(m)]
    if fields:
        value = _value(fields[-1])
        read = reader.read(value)
        return read.answer if read != _NOTHING else _last(next(_by_weight(value, reader)), reader) or None
    for statements in _by_weight(text, reader):
        found = _last(statements, reader)
        if found is not None:
            return found or None
    return None


def _value(field: re.Match[str]) -> str:
    return (field[1] or field[2] or field[3] or "").strip()


def _last(statements: Sequence[str], reader: "_AnswerParser") -> str | None:
    """The last statement that is not taken back; "" where one says that there is no answer; None where none is."""
    denied: set[str] = set()
    for statement in reversed(statements):
        read = reader.read(statement)
        if read.rejected:
            denied.add(read.rejected)
        if read.answer and read.answer not in denied:
            return read.answer
        if read.abstains:
            return ""
    return "" if denied else None


def _by_weight(text: str, reader: "_AnswerParser") -> Iterator[list[str]]:
    """The statements, those that weigh most first: strong ones, weak ones, then those under another condition."""
    strong = _statements(text, reader, strong=True)
    yield [statement.words for statement in strong if not statement.hypothetical]
    weak = _statements(text, reader, strong=False)
    yield [statement.words for statement in weak if not statement.hypothetical]
    yield [statement.words for statement in strong if statement.hypothetical]
    yield [statement.words for statement in weak if statement.hypothetical]


class _Statement(NamedTuple):
    """What stands behind a lead, and whether it holds in another case than the question's, or in another's view."""

    start: int
    words: str
    hypothetical: bool


def _statements(text: str, reader: "_AnswerParser", strong: bool) -> list[_Statement]:
    """What stands behind each lead of one kind, in the order of the text."""
    lead = reader.leads.strong if strong else reader.leads.weak
    found = [
        _Statement(m.start(), text[m.end() : m.end() + REACH], _is_hypothetical(text, m.start(), m.end()))
        for m in lead.finditer(text)
        if _is_statement(text, m.start(), m.end())
    ]
    if strong:
        found += [_Statement(len(text), line, hypothetical=False) for line in reader.last_line(text)]
    elif isinstance(reader, _ChoiceParser):
        found += _mentions(text, reader.leads.mention)
    return sorted(found, key=lambda statement: statement.start)


def _is_statement(text: str, start: int, end: int) -> bool:
    return not _ASKED.match(text, end) and not _IF.search(text[max(0, start - 60) : start])


def _is_hypothetical(text: str, start: int, end: int) -> bool:
    """Whether the sentence of a lead (or of a mention with its verdict) speaks of another case or another's view."""
    before = text[max(0, start - 200) : start]
    ends = [m.end() for m in _SENTENCE_START.finditer(before)]
    before = before[ends[-1] :] if ends else before
    supposed = _SUPPOSED.search(before)
    if _OTHERS.search(before) or (supposed and _CONTRARY.search(before, supposed.end())):
        return True
    if not _CONDITIONAL.search(text, start, end):
        return False
    return bool(_CONDITION.search(before) or _CONDITION.search(text[start:end]) or _LATER_CONDITION.match(text, end))


def _mentions(text: str, mention: re.Pattern[str]) -> Iterator[_Statement]:
    """``Option D … is correct``, ``(B) is the best answer``, ``C is right``: the letter, as a statement."""
    for m in mention.finditer(text):
        verdict = _RIGHT.match(text, m.end())
        if verdict is None or _DENIAL.search(verdict[0]) or not _is_statement(text, m.start(), verdict.end()):
            continue
        marked = bool(m["noun"] or m["open"] or m["close"])
        direct = not verdict["gap"].strip()
        if m["letter"].islower() and not (marked and direct):
            continue
        ahead = text[max(0, m.start() - 12) : m.start()]
        if (m["noun"] and not _NEITHER.search(ahead)) or (_CLAUSE_START.search(ahead) and (marked or direct)):
            hypothetical = _is_hypothetical(text, m.start(), verdict.end())
            yield _Statement(m.start(), m["letter"].upper(), hypothetical)


def _lines(text: str) -> list[str]:
    """The last two lines of `text` that are not empty."""
    return [line.strip() for line in text[-2 * REACH :].split("\n") if line.strip()][-2:]


@lru_cache(maxsize=256)
def _keys(options: tuple[str, ...]) -> dict[str, str]:
    """Each option's normal form -> its letter. Forms that two options share are left out, and single letters: who
    answers B of the blood groups A, B, AB and O means the second option."""
    keys = [answer_key(option) for option in options]
    return {
        key: letter
        for key, letter in zip(keys, LETTERS, strict=False)
        if keys.count(key) == 1 and not (len(key) <= 1 and key.upper() in LETTERS)
    }


class _ChoiceParser:
    def __init__(self, options: tuple[str, ...]) -> None:
        self.leads = _leads(len(options))
        self.letters = LETTERS[: len(options)]
        self.keys = _keys(options)
        self.longest = max(len(key.split()) for key in ("", *self.keys))

    def read(self, statement: str) -> _ParsedAnswer:
        rest = statement[_FILLER.match(statement).end() :]  # type: ignore[union-attr]
        if letter := self._option_text(rest):
            return _ParsedAnswer(answer=letter)
        if (lone := _LONE.match(rest)) and lone[1] in self.letters and not _SEVERAL.match(rest):
            return _ParsedAnswer(answer=lone[1])
        if negation := _NOT.match(rest):
            return self._denied(rest, negation.end())
        if _SEVERAL.match(rest) or _ABSTAINS.match(rest):
            return _ParsedAnswer(abstains=True)
        found = _BRACKETED.match(rest) or _LOWER.match(rest) or _RUN_ON.match(rest)
        if found is None and rest[:1] in self.letters and rest[1:2] == " " and self._option_text(rest[2:]) == rest[0]:
            return _ParsedAnswer(answer=rest[0])
        if found is None:
            found = _LATER_BRACKET.match(rest)
        if found is None:
            return _NOTHING
        letter = found[1].upper()
        return _ParsedAnswer(answer=letter) if letter in self.letters else _ParsedAnswer(abstains=True)

    def _denied(self, rest: str, end: int) -> _ParsedAnswer:
        """``not A``, maybe followed by ``but B``."""
        if _ABSTAINS.match(rest):
            return _ParsedAnswer(abstains=True)
        letter = rest[end:].lstrip("([\"'")[:1]
        if letter not in self.letters or not letter:
            letter = self._option_text(rest[end:]) or ""
        instead = self.leads.instead.match(rest, end)
        stated = self.read(rest[instead.end() :]).answer if instead else None
        return _ParsedAnswer(answer=stated, rejected=letter or None)

    def _option_text(self, rest: str) -> str | None:
        """The letter of the option whose text all of a statement is; the longest cut of it that is one."""
        words: list[str] = []
        found, start = None, 0
        for end in (*(m.start() for m in _CUT.finditer(rest)), len(rest)):
            words += key_words(rest[start:end])
            if len(words) > self.longest:
                break
            found = self.keys.get(joined(words), found)
            start = end
        return found

    def last_line(self, text: str) -> list[str]:
        """The last line, if it is a letter, or a letter with its option's text outside a list of options; a text of
        one line may also be an option's text."""
        lines = _lines(text)
        if not lines:
            return []
        line = lines[-1].strip("\"'")
        if re.fullmatch(r"[(\[{\"']*([A-Z])[)\]}\"'.:]*|[(\[][a-z][)\]]", line):
            return [line]
        if text.count("\n") == 0 and len(text) < REACH and (self.keys.get(answer_key(line)) or self._labelled(line)):
            return [line]
        return [line] if self._labelled(line) and not self._labelled(lines[0]) else []

    def _labelled(self, line: str) -> bool:
        label = _LABEL.match(line)
        letter = line.lstrip("([")[:1].upper()
        return label is not None and self.keys.get(answer_key(line[label.end() :])) == letter


class _YesNoParser:
    _FIRST = re.compile(r"[(\[\"']*+([A-Za-z]++)")
    _WHOLE = re.compile(r"\W*+(yes|no)\b(?:[.,;:!)]|\s*+$)", re.IGNORECASE)

    def __init__(self, options: tuple[str, ...]) -> None:
        self.leads = _leads(len(options))
        self.choice = _ChoiceParser(options) if options else None
        self.options = options

    def read(self, statement: str) -> _ParsedAnswer:
        rest = statement[_FILLER.match(statement).end() :]  # type: ignore[union-attr]
        first = self._FIRST.match(rest)
        word = first[1].lower() if first else ""
        if word in YES or word in NO:
            return _ParsedAnswer(answer="yes" if word in YES else "no")
        if _NOT.match(rest) or _ABSTAINS.match(rest):
            return _ParsedAnswer(abstains=True)
        letter = self.choice.read(statement).answer if self.choice else None
        stated = answer_key(self.options[LETTERS.index(letter)]) if letter else ""
        return _ParsedAnswer(answer=stated) if stated in ("yes", "no") else _NOTHING

    def last_line(self, text: str) -> list[str]:
        """The last line where it is a mere yes or no; the first words of a text that begins ``Yes,`` or ``No.``"""
        whole = self._WHOLE.match(text)
        last = [line for line in _lines(text)[-1:] if answer_key(line) in ("yes", "no")]
        return last or ([whole[1]] if whole else [])


class _OpenParser:
    leads = _leads(0)

    def read(self, statement: str) -> _ParsedAnswer:
        rest = statement[_FILLER.match(statement).end() :]  # type: ignore[union-attr]
        if _ABSTAINS.match(rest) and not rest.lower().startswith("none"):
            return _ParsedAnswer(abstains=True)
        end = _SENTENCE_END.search(rest)
        stated = rest[: end.start() if end else len(rest)].strip(_EDGES)
        return _ParsedAnswer(answer=stated) if stated else _NOTHING

    def last_line(self, _: str) -> list[str]:
        """Nothing: an open answer is stated by a lead."""
        return []
