"""What models wrap around an answer, taken off: markdown, LaTeX, tags, typographic and fullwidth characters.

Each pattern is linear in the text: what repeats is possessive, or ends at a character that it excludes.
"""

import re

_FULLWIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_CHARACTERS = str.maketrans(
    _FULLWIDTH
    | dict.fromkeys(map(ord, "„“”«»‟"), '"')
    | dict.fromkeys(map(ord, "‚‘’‹›"), "'")
    | dict.fromkeys(map(ord, "【「〔"), "[")
    | dict.fromkeys(map(ord, "】」〕"), "]")
    | {0x3000: " ", 0xA0: " ", 0x202F: " ", ord("。"): ".", ord("、"): ","}
)
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathsf|mathit)\s*+\{([^{}]*+)\}")
_BOXED = re.compile(r"\\f?boxed\s*+\{((?:[^{}]++|\{[^{}]*+\})*+)\}")
_ANSWER_TAG = re.compile(r"<\s?(?:final[_ ])?answer\s?>", re.IGNORECASE)
_TAG = re.compile(r"</?[A-Za-z][\w -]{0,20}/?>")
_MATHS = re.compile(r"\\[()\[\]]|\$")
_EMPHASISED = re.compile(r"([*_`~]{1,3})\s?[(\[]?([A-Z])[)\]]?[.:]?\s?\1(?!\w)")
_MARKS = re.compile(r"\*+|`+|__+|~~|^[ \t]*#{1,6}[ \t]", re.MULTILINE)

ANSWER = "\nFinal answer: "  # what a box or an answer tag says in words


def plain_text(text: str) -> str:
    """`text` without its markup; a letter that stood alone in emphasis is in brackets, a box says `ANSWER`.

    >>> plain_text(r"It is **C**, so $\\boxed{\\text{C}}$")
    'It is (C), so \\nFinal answer: C\\n'
    """
    text = text.translate(_CHARACTERS)
    # Most replies have neither LaTeX nor tags.
    if "\\" in text:
        text = _BOXED.sub(
            rf"{ANSWER}\1\n",
            _LATEX_TEXT.sub(r"\1", text),
        )
    if "<" in text:
        text = _TAG.sub("\n", _ANSWER_TAG.sub(ANSWER, text))
    text = _MATHS.sub("", text)
    return _MARKS.sub("", _EMPHASISED.sub(r"(\2)", text))
