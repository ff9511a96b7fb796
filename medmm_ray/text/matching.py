"""When two answers are the same: a letter exactly, any other text by its normal form, never by substring."""

import re
import unicodedata
from collections.abc import Sequence

from medmm_ray.text.steps import one_line

_NUMBER_WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
_WORDS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)} | {
    "percent": "%",
    "milligram": "mg",
    "gram": "g",
    "gm": "g",
    "kilogram": "kg",
    "microgram": "mcg",
    "ug": "mcg",
    "milliliter": "ml",
    "millilitre": "ml",
    "cc": "ml",
    "liter": "l",
    "litre": "l",
    "millimeter": "mm",
    "millimetre": "mm",
    "centimeter": "cm",
    "centimetre": "cm",
    "minute": "min",
    "hour": "h",
    "hr": "h",
    "per": "/",
    "and": "",
}
YES = frozenset({"yes", "true", "correct", "affirmative", "yeah", "yep"})
NO = frozenset({"no", "false", "incorrect", "negative", "nope"})

_TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|[^\W\d_]+|[<>=%/+]|(?<!\w)-(?=[\d.])")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
# "hepatitis A", "A. fumigatus" and "A and B" have no article.
_ARTICLE = re.compile(r"\b(?:a|[Aa]n|[Tt]he)\s+(?=\w)|^\W*A\s+(?!and\b|or\b)(?=[a-z])")
_APOSTROPHE = re.compile(r"['’`´](?=\w)|(?<=s)['’]")
_SIGNS = str.maketrans(
    {
        "µ": "u",
        "μ": "u",
        "−": "-",
        "≤": "<=",
        "≥": ">=",
    }
)


def normalise(text: str) -> str:
    """For comparing texts: lower case, no articles, no punctuation, single spaces, accents decomposed away."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode() or text
    plain = re.sub(r"[^\w\s]", " ", plain.lower())
    return one_line(re.sub(r"\b(a|an|the)\b", " ", plain))


def answer_key(text: str) -> str:
    """The normal form of an answer: two answers are the same where their keys are equal.

    Beyond `normalise`: plurals become singular, numbers lose thousands commas and trailing zeros, small number words
    become digits, units their short form; signs that change the meaning (<, >, %, /, +, a minus) stay. An answer that
    is only a synonym of yes or no becomes ``yes`` or ``no``.

    >>> answer_key("The Lungs"), answer_key("1,000.0 milligrams"), answer_key("25mg/kg") == answer_key("25 mg per kg")
    ('lung', '1000 mg', True)
    """
    return joined(key_words(text))


def key_words(text: str) -> list[str]:
    """The words of `answer_key`: those of two pieces of text are those of the whole."""
    plain = _ARTICLE.sub("", text.translate(_SIGNS))
    # Accents go, so that "Crohn's" and "Sjögren" are found however they are typed.
    decomposed = unicodedata.normalize("NFKD", plain)
    plain = "".join(c for c in decomposed if not unicodedata.combining(c)).lower()
    plain = _APOSTROPHE.sub("", _THOUSANDS.sub("", plain))
    return list(filter(None, map(_word, _TOKEN.findall(plain))))


def joined(words: Sequence[str]) -> str:
    """The key of `key_words`."""
    key = " ".join(words)
    if key in YES:
        return "yes"
    if key in NO:
        return "no"
    return key


def _word(token: str) -> str:
    """One token's normal form; "" for a word that says nothing."""
    if token[0].isdigit() or token[0] == ".":
        whole, _, fraction = token.partition(".")
        fraction = fraction.rstrip("0")
        whole = whole.lstrip("0") or "0"
        return f"{whole}.{fraction}" if fraction else whole
    if token in _WORDS:
        return _WORDS[token]
    singular = _singular(token)
    return _WORDS.get(singular, singular)


def _singular(word: str) -> str:
    """``lungs`` -> ``lung``, ``arteries`` -> ``artery``; words on -ss, -us, -is and short ones stay."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def equal_key(answer: str) -> str:
    """What equal answers have in common: the one equality of grading, of voting and of the rerank service.

    `answer_key`, or, of an answer without a word or number, itself; of a letter the letter, in lower case. Empty for an
    empty answer alone.
    """
    return answer_key(answer) or answer.strip()


def is_correct(answer: str | None, gold: str, answer_type: str) -> bool | None:
    """Whether an extracted answer equals the gold one: the letter of a choice, else by `equal_key`; None where there
    is no answer."""
    if answer is None:
        return None
    return answer == gold if answer_type == "choice" else equal_key(answer) == equal_key(gold)
