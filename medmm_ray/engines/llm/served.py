"""Who really served a request: whether the model that answered is the one that was asked.

Enters: the name that was asked for, and the one in the answer (``model`` of a chat completion, ``model_version`` of
Gemini's). Leaves: whether they name the same model. Providers answer an alias by its dated snapshot, proxies put the
provider's name before it; a model that is retired may be answered by its successor, at the successor's price.
"""

import re
from collections.abc import Iterable

from medmm_ray.engines.llm.endpoint import EndpointError

# What may stand behind a model's name without making it another model: a stage, a date or a number of a snapshot.
_SNAPSHOT = re.compile(
    r"""(-(preview|exp|experimental|latest|stable|ga))?
        (-\d{4}-\d{2}-\d{2} | -\d{8} | -\d{6} | -\d{2}-\d{4} | -\d{3,4})?""",
    re.VERBOSE,
)
_PREVIEW_OF_A_DAY = re.compile(r"-(preview|exp)-\d{2}-\d{2}")


class OtherModelError(EndpointError):
    """Another model answered than the one that was asked; the message names both and what to do."""


def is_same_model(asked: str, answered: str) -> bool:
    """Whether `answered` names the model `asked`, or a snapshot of it.

    ``gpt-4o`` is answered by ``gpt-4o-2024-08-06`` and ``google/gemini-3.5-flash-lite`` by
    ``gemini-3.5-flash-lite-001``, but ``gemini-2.5-flash`` not by ``gemini-3-flash`` or ``gemini-2.5-flash-lite``, and
    one snapshot not by another. A name that only says less (the alias of the asked snapshot) is the same model.
    """
    asked_name, answered_name = _bare(asked).removesuffix("-latest"), _bare(answered)
    return _is_snapshot(asked_name, answered_name) or _is_snapshot(answered_name, asked_name)


def _bare(name: str) -> str:
    """A name without its provider (``google/``, ``models/``) and without a route (``:free``, ``:latest``).

    Of a name such as ``llama3:70b`` the part behind the colon is its size, and stays.
    """
    last = name.strip().lower().rpartition("/")[2]
    stem, colon, variant = last.partition(":")
    return last if colon and re.search(r"\d", variant) else stem


def _is_snapshot(model: str, name: str) -> bool:
    if not model or not name.startswith(model):
        return False
    rest = name[len(model) :]
    return bool(_SNAPSHOT.fullmatch(rest) or _PREVIEW_OF_A_DAY.fullmatch(rest))


def names_a_model(name: str) -> bool:
    """Whether a name can be that of a model, which has a size or a version; a bare word is a label of the address.

    Servers of one model say ``default`` or ``local`` whatever was asked.
    """
    return not re.fullmatch(r"[a-z]+", name.strip(), re.IGNORECASE)


def other_model_message(identity: str, answered: str) -> str:
    """What to tell where another model answered."""
    return (
        f"{identity} was asked and {answered!r} answered: the model is retired, or routed to another. Its answers are "
        f"kept with that name, and paid for. Name a model that is served (by {answered} itself, if you want it); set "
        f"answers_as={answered} where that is only what this address calls the asked model; or set on_other_model=warn "
        "to take these answers"
    )


def joined_names(models: Iterable[str | None]) -> str | None:
    """The distinct names of the models that answered, joined by commas; None where none is known."""
    names = {model for model in models if model}
    return ", ".join(sorted(names)) or None
