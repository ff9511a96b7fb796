"""Who may come in, and how often one may guess."""

import stat
from pathlib import Path

import pytest

from medmm_ray.config import ConfigError
from medmm_ray.pages.review_page.accounts import add_reader, read_readers
from medmm_ray.pages.review_page.sessions import Sessions, TooManyTriesError

GOOD, BAD = "correct horse battery", "wrong horse battery"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    add_reader(tmp_path / "readers.json", "anna", GOOD)
    add_reader(tmp_path / "readers.json", "cora", GOOD, "adjudicator")
    return Sessions(read_readers(tmp_path / "readers.json"), 2.0, Clock())


def tick(sessions: Sessions, seconds: float) -> None:
    assert isinstance(sessions.clock, Clock)
    sessions.clock.now += seconds


def test_the_file_holds_no_password_and_is_the_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "more" / "readers.json"
    add_reader(path, "anna", GOOD)
    add_reader(path, "ben", GOOD)
    first = read_readers(path)
    assert GOOD not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert first["anna"].hash != first["ben"].hash
    add_reader(path, "anna", BAD, "adjudicator")
    again = read_readers(path)
    assert (again["anna"].role, again["ben"]) == ("adjudicator", first["ben"])
    assert Sessions(again, 1.0).log_in("anna", GOOD, "") is None
    assert Sessions(again, 1.0).log_in("anna", BAD, "") is not None


@pytest.mark.parametrize(
    ("name", "password", "role", "message"),
    [
        ("../anna", GOOD, "reader", "reader '../anna': a name has 1 to 32 of a-z"),
        ("adjudicator", GOOD, "reader", "is not 'adjudicator'"),
        ("anna", "short", "reader", "has 5 characters; at least 10"),
        ("anna", GOOD, "chief", "role 'chief': it must be reader or adjudicator"),
    ],
)
def test_bad_readers_are_refused(name: str, password: str, role: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        add_reader(tmp_path / "r.json", name, password, role)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"anna": 3}', '{"anna": {"role": "reader"}}'])
def test_a_file_that_is_none_says_so(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "readers.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match="--add-reader NAME"):
        read_readers(path)


def test_a_session_ends_by_leaving_and_by_time(sessions: Sessions) -> None:
    first, second = sessions.log_in("anna", GOOD, "1.2.3.4"), sessions.log_in("anna", GOOD, "1.2.3.4")
    assert first != second
    tokens = (first, second, "made up", None)
    assert [sessions.reader_of(token) for token in tokens] == ["anna", "anna", None, None]
    sessions.log_out(first)
    assert (sessions.reader_of(first), sessions.reader_of(second)) == (None, "anna")
    tick(sessions, 7199)
    assert sessions.reader_of(second) == "anna"
    tick(sessions, 1)
    assert sessions.reader_of(second) is None


def test_guessing_is_stopped_for_a_name(sessions: Sessions) -> None:
    for _ in range(5):
        assert sessions.log_in("anna", BAD, "1.1.1.1") is None
        tick(sessions, 10)
    with pytest.raises(TooManyTriesError, match="Try again in 4 min") as barred:
        sessions.log_in("anna", GOOD, "2.2.2.2")
    assert barred.value.seconds == 250
    assert sessions.log_in("cora", GOOD, "1.1.1.1") is not None
    tick(sessions, 250)
    assert sessions.log_in("anna", GOOD, "2.2.2.2") is not None


def test_guessing_names_is_stopped_for_an_address(sessions: Sessions) -> None:
    for number in range(20):
        assert sessions.log_in(f"name{number}", BAD, "1.1.1.1") is None
    with pytest.raises(TooManyTriesError):
        sessions.log_in("anna", GOOD, "1.1.1.1")
    assert sessions.log_in("anna", GOOD, "2.2.2.2") is not None
