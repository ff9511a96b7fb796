"""The page where experts read the queue: its settings, and the names of its parts.

Enters: the run's review queue (or a table of questions), with what belongs to it. Leaves: verdicts, appended durably
below ``<run>/reader_verdicts/``, and their export: labels of source "expert", or `QuestionReview` rows.

`verdicts` is the log of verdicts, `assigner` assigns items to readers and knows what is decided, `accounts` is the file
of readers, `sessions` and `login` let them in, `item_views` is what is shown of an item, `export` turns verdicts into
records, `app` is the page itself. Only `app` loads Gradio.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medmm_ray.config import Config, execution

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ReviewPageConfig(Config):
    """What is reviewed, by whom, and where the page listens."""

    what: Literal["steps", "questions"] = execution("steps")
    """steps: the run's review queue; questions: questions themselves (keep, answer, difficulty)."""
    questions: str | None = execution(None)
    """questions: a table of the run (new_questions: those that a model wrote) or its folder; null: the run's own."""
    readers: str | None = execution(None)
    """File of readers and their hashed passwords; null: readers.json in the run's folder."""
    second_reader_share: Annotated[float, Field(ge=0, le=1)] = execution(0.1)
    """Share of questions whose items two readers read, each blind to the other."""
    seed: int = execution(0)
    """Start of the choice of questions for a second reader."""
    lease_minutes: Annotated[float, Field(gt=0)] = execution(30.0)
    """A reader who is silent for so long gives the question in hand back to the others, minutes."""
    session_hours: Annotated[float, Field(gt=0)] = execution(12.0)
    """A login holds so long, hours."""
    host: str = execution("127.0.0.1")
    """Address to listen on; any other than loopback needs `certificate` and `private_key`."""
    port: Annotated[int, Field(ge=0, le=65535)] = execution(7870)
    """TCP port to listen on; 0 takes a free one."""
    certificate: str | None = execution(None)
    """TLS certificate (PEM file)."""
    private_key: str | None = execution(None)
    """TLS private key (PEM file)."""

    @model_validator(mode="after")
    def _passwords_travel_encrypted(self) -> "ReviewPageConfig":
        if self.host not in LOOPBACK and not (self.certificate and self.private_key):
            raise ValueError(
                f"review_page.host is {self.host!r}: passwords and images would cross the network in clear. Set "
                "certificate and private_key, or keep 127.0.0.1 and reach it through a tunnel"
            )
        return self
