"""What every request and every answer of the service is made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Words = Annotated[str, Field(pattern=r"\S")]  # text that is more than white space


class Message(BaseModel):
    """Base of what is sent: unknown names and wrong types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Answer(BaseModel):
    """Base of what is answered: a client passes over names that a later service may add."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, use_attribute_docstrings=True)
