"""A chat template as it is used here: the same bytes on any day, no instruction lost, what it alters known.

Enters: what renders a chat (`apply_chat_template` of a tokenizer or processor). A few probes are rendered when a model
is loaded: a template that writes the day's date is given a fixed one, and where it has no system role, the instruction
becomes the beginning of the user's turn. Leaves: a `ChatTemplate`, and `TemplateUse`, what was decided, which a
checkpoint keeps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from typing import Any

FIXED_DATE = "2024-07-26"  # what Llama 3.1's own template writes where it is told no date
_OTHER_DATE = "1999-01-02"

Messages = Sequence[Mapping[str, Any]]

# Texts that a template may alter, by what it would alter; letters that no template holds.
_PROBES = {
    "outer white space": "  xqzv kwj  ",
    "runs of white space": "xqzv  kwj\t xw",
    "line breaks": "xqzv\nkwj\n\nxw",
    "letter case": "xQzV kWj",
    "other characters": "xqzv <b>kwj</b> & “xw”",
}
_SYSTEM, _USER = "xqsys vzk.", "xqusr vzk."


@dataclass(frozen=True)
class TemplateUse:
    """How a chat template is used.

    `date` (ISO) is what it writes as the day's, None where it writes none. `folds_system`: it has no place for a system
    message, so the instruction stands at the beginning of the user's turn. `alters` names what it changes in a text
    (keys of the probes, for people to read): the models' own code goes through the template too, so that is their
    format.
    """

    date: str | None = None
    folds_system: bool = False
    alters: tuple[str, ...] = ()


class ChatTemplate:
    """The chat template behind `apply`, whose text is `source`.

    Raises `ValueError` where it renders no chat of one user's turn, or leaves the user's text out.
    """

    def __init__(self, apply: Callable[..., Any], source: Any, in_parts: bool = False) -> None:
        self._apply, self._source, self._in_parts = apply, str(source), in_parts
        self.use = TemplateUse()
        self.use = self._probed()

    def render(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """A chat as text."""
        if self.use.folds_system:
            messages = folded(messages)
        return self._rendered(messages, add_generation_prompt, self.use.date)

    def _rendered(self, messages: Messages, add_generation_prompt: bool, date: str | None) -> str:
        clock: dict[str, Any] = {} if date is None else self._clock(date)
        return str(
            self._apply(
                [dict(message) for message in messages],
                tokenize=False, add_generation_prompt=add_generation_prompt, **clock,
            )
        )  # fmt: skip

    def _clock(self, date: str) -> dict[str, Any]:
        """The clock of transformers' templates, stopped, for one that looks at it. A `date_string` stays the template's
        own default, as it is for everybody else."""
        return {"strftime_now": datetime.fromisoformat(date).strftime} if "strftime_now" in self._source else {}

    def _probed(self) -> TemplateUse:
        errors = _template_errors()
        user = self._message("user", _USER)
        try:
            alone = self._rendered([user], True, FIXED_DATE)
        except errors as error:
            raise ValueError(
                f"the chat template renders no chat of one user's turn: {error}. Give the tokenizer a template that "
                "does (tokenizer.chat_template), or take another checkpoint"
            ) from None
        if _USER.casefold() not in alone.casefold():
            raise ValueError(
                f"the chat template leaves the user's text out: of {_USER!r} it makes {alone!r}. Give the tokenizer a "
                "template that writes it (tokenizer.chat_template), or take another checkpoint"
            )
        chat = [self._message("system", _SYSTEM), user]
        try:
            folds_system = _SYSTEM.casefold() not in self._rendered(chat, True, FIXED_DATE).casefold()
        except errors:  # "System role not supported"
            folds_system = True
        if folds_system:
            chat = folded(chat)
        days = [self._rendered(chat, True, day) for day in (FIXED_DATE, _OTHER_DATE)]
        use = TemplateUse(FIXED_DATE if days[0] != days[1] else None, folds_system)
        return replace(use, alters=tuple(name for name, text in _PROBES.items() if not self._keeps(text)))

    def _keeps(self, text: str) -> bool:
        return text in self._rendered([self._message("user", text)], True, FIXED_DATE)

    def _message(self, role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}] if self._in_parts else text}


def template_of(tokenizer: Any) -> ChatTemplate:
    """The chat template of a tokenizer, probed once; raises `ValueError` as `ChatTemplate` does."""
    return _template(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _template(tokenizer: Any, source: str) -> ChatTemplate:
    return ChatTemplate(tokenizer.apply_chat_template, source)


def folded(messages: Messages) -> list[dict[str, Any]]:
    """A chat whose system message has become the beginning of the first user's turn, an empty line between."""
    first, *others = (dict(message) for message in messages)
    if first["role"] != "system":
        return [first, *others]
    user = next(message for message in others if message["role"] == "user")
    instruction, content = first["content"], user["content"]
    if isinstance(content, str):
        user["content"] = f"{instruction}\n\n{content}"
    else:
        said = "".join(part["text"] for part in instruction)
        text = next(number for number, part in enumerate(content) if part["type"] == "text")
        whole = {"type": "text", "text": f"{said}\n\n{content[text]['text']}"}
        user["content"] = [*content[:text], whole, *content[text + 1 :]]
    return others


def _template_errors() -> tuple[type[Exception], ...]:
    """What a template raises: its own refusals, and what its expressions run into."""
    from jinja2.exceptions import TemplateError

    return TemplateError, TypeError, ValueError
