"""Paths that take bodies of two shapes, told apart by their fields."""

from collections.abc import Callable, Mapping
from typing import Any

SHAPE = "shape:"
"""What the tag of a shape begins with: no key of a body does, so that an error's place can do without it."""


def tag(model: type) -> str:
    """The tag of a shape."""
    return SHAPE + model.__name__


def told_by(names: set[str], with_names: type, without: type) -> Callable[[Any], str]:
    """A function from a body to the tag of its shape: `with_names` where it has any of `names`, else `without`."""

    def shape_of(body: Any) -> str:
        """The tag; of what is no object the one without, whose error then says so."""
        has_any = isinstance(body, Mapping) and not names.isdisjoint(body)
        return tag(with_names if has_any else without)

    return shape_of
