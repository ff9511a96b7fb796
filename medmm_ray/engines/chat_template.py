"""A chat template as it is used here: the same bytes on any day, no instruction lost, and a list of what it alters.

Enters: what renders a chat (`apply_chat_template` of a tokenizer or processor). A few probes are rendered when a model
is loaded: a template that writes the day's date is given a fixed one, and where it has no system role, the instruction
becomes the beginning of the user's turn. Leaves: a `ChatTemplate`, and `TemplateUse`, what was decided, which a
checkpoint keeps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

FIXED_DATE = "2024-07-26"  # what Llama 3.1's own template writes where it gets no date
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
        self.use = self._probe()

    def render(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """A chat as text."""
        if self.use.folds_system:
            messages = folded(messages)
        return self._render(messages, add_generation_prompt, self.use.date)

    def _render(self, messages: Messages, add_generation_prompt: bool, date: str | None) -> str:
        clock: dict[str, Any] = {} if date is None else self._clock(date)
        chat = [dict(message) for message in messages]
        return str(self._apply(chat, tokenize=False, add_generation_prompt=add_generation_prompt, **clock))

    def _clock(self, date: str) -> dict[str, Any]:
        """The clock of transformers' templates, stopped, for one that looks at it. A `date_string` stays the template's
        own default, as it is for everybody else."""
        return {"strftime_now": datetime.fromisoformat(date).strftime} if "strftime_now" in self._source else {}

    def _probe(self) -> TemplateUse:
        """How this template is to be used, from what it makes of a few chats."""
        errors = _template_errors()
        user = self._message("user", _USER)
        try:
            user_alone = self._render([user], True, FIXED_DATE)
        except errors as error:
            raise ValueError(
                f"the chat template renders no chat of one user's turn: {error}. Give the tokenizer a template that "
                "does (tokenizer.chat_template), or take another checkpoint"
            ) from None
        if _USER.casefold() not in user_alone.casefold():
            raise ValueError(
                f"the chat template leaves the user's text out: of {_USER!r} it makes {user_alone!r}. Give the "
                "tokenizer a template that writes it (tokenizer.chat_template), or take another checkpoint"
            )
        chat = [self._message("system", _SYSTEM), user]
        try:
            # A template may drop a system message without a word.
            folds_system = _SYSTEM.casefold() not in self._render(chat, True, FIXED_DATE).casefold()
        except errors:  # "System role not supported"
            folds_system = True
        if folds_system:
            chat = folded(chat)
        # A prompt that differed by day would have another cache key, and another answer, each day.
        writes_date = self._render(chat, True, FIXED_DATE) != self._render(chat, True, _OTHER_DATE)
        altered = [name for name, text in _PROBES.items() if not self._keeps(text)]
        return TemplateUse(FIXED_DATE if writes_date else None, folds_system, tuple(altered))

    def _keeps(self, text: str) -> bool:
        """Whether a user's text stands in the rendered chat as it is."""
        return text in self._render([self._message("user", text)], True, FIXED_DATE)

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
    first, *rest = [dict(message) for message in messages]
    if first["role"] != "system":
        return [first, *rest]
    user = next(message for message in rest if message["role"] == "user")
    instruction, content = first["content"], user["content"]
    if isinstance(content, str):
        user["content"] = f"{instruction}\n\n{content}"
        return rest
    # In parts, as processors want it: the instruction joins the first part that is text.
    instruction_text = "".join(part["text"] for part in instruction)
    place = next(number for number, part in enumerate(content) if part["type"] == "text")
    joined = {"type": "text", "text": f"{instruction_text}\n\n{content[place]['text']}"}
    user["content"] = [*content[:place], joined, *content[place + 1 :]]
    return rest


def _template_errors() -> tuple[type[Exception], ...]:
    """What a template raises: its own refusals, and what its expressions run into."""
    from jinja2.exceptions import TemplateError

    return TemplateError, TypeError, ValueError
