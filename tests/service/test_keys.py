"""Who may ask for what: keys, their scopes, limits and end; guesses; what is noted of a request, and what is not."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from jobs.keys import main
from medmm_ray.config import ConfigError
from medmm_ray.service import examples
from medmm_ray.service.keys import Key, Keyring, new_key, read_keys, sha256
from medmm_ray.service.quotas import GUESSES, Guesses, Quotas
from tests.service.web import FakeModel, body, client

S3CRET = "1ec1c26b50d5d3c58d9583181af8076655fe00756bf7285940ba3670f99fcba0"  # SHA-256 of s3cret


def served(*keys: Key, path: Path | None = None, quotas: Quotas | None = None) -> TestClient:
    return client(FakeModel(), keyring=Keyring(keys, path), quotas=quotas)


def asked(web: TestClient, key: str, path: str = "/v1/rerank", **headers: str) -> Any:
    bearer = {"Authorization": f"Bearer {key}", **headers}
    return web.post(path, json=body(), headers=bearer) if path == "/v1/rerank" else web.get(path, headers=bearer)


@pytest.fixture
def seconds() -> Any:
    """A clock that tests set."""

    class Clock:
        now = 1000.0

        def __call__(self) -> float:
            return self.now

    return Clock()


# Keys


def test_a_file_of_keys_is_read_strictly_and_its_faults_quote_no_key() -> None:
    (key,) = read_keys(f"keys: [{{name: ward-7, sha256: {S3CRET}, expires: 2027-12-31}}]", "f")
    assert (key.name, key.scopes, key.expires, key.tokens_per_day) == ("ward-7", ("score",), "2027-12-31", None)
    for text, words in (
        (f"keys: [{{name: a, sha256: {S3CRET}}}, {{name: a, sha256: {S3CRET}}}]", "a stands there twice"),
        ("keys: [{name: a, sha256: abc}]", "'keys.0.sha256' is 'abc'"),
        (f"keys: [{{name: a, sha256: {S3CRET}, scope: [score]}}]", "unknown name 'keys.0.scope'"),
        (f"keys: [{{name: a, sha256: {S3CRET}, expires: never}}]", "keys.0.expires"),
        ("s3cret", "f must hold 'keys: \\[...\\]', got str"),
        ("keys: [s3cret", "f is not valid YAML"),
    ):
        with pytest.raises(ConfigError, match=words) as fault:
            read_keys(text, "f")
        assert "s3cret" not in str(fault.value)


def test_a_new_key_is_long_random_and_kept_as_its_hash() -> None:
    first, second = new_key(), new_key()
    assert first != second
    assert first.startswith("medmm_")
    assert len(first) == 6 + 43  # 256 bits in base64
    assert sha256("s3cret") == S3CRET


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, 200),
        ({"revoked": True}, 401),
        ({"expires": "2020-01-01"}, 401),
        ({"expires": "2999-01-01"}, 200),
        ({"scopes": ("metrics",)}, 403),
        ({"scopes": ("admin",)}, 200),
    ],
)
def test_a_key_counts_while_it_is_valid_and_for_what_it_may_ask(changes: dict[str, Any], status: int) -> None:
    web = served(Key(name="ward-7", sha256=S3CRET, **changes), Key(name="other", sha256=sha256("x")))
    assert asked(web, "s3cret").status_code == status


@pytest.mark.parametrize(("scope", "paths"), [("metrics", {"/metrics"}), ("score", {"/v1/models"}),
                                              ("admin", {"/metrics", "/v1/models"}), ("best_of_n", set())])  # fmt: skip
def test_each_scope_opens_its_paths_alone(scope: Any, paths: set[str]) -> None:
    web = served(Key(name="k", sha256=S3CRET, scopes=(scope,)))
    allowed = {path for path in ("/metrics", "/v1/models") if asked(web, "s3cret", path).status_code == 200}
    assert allowed == paths
    if not paths:
        assert (
            asked(web, "s3cret", "/metrics").json()["detail"]
            == "the key k has the scopes best_of_n; this needs metrics"
        )


def test_the_file_is_read_again_without_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medmm_ray.service.keys.RELOAD_S", -1.0)  # looked at each time
    path = tmp_path / "keys.yaml"
    assert main(["make", str(path), "ward-7"]) == 0
    web = served(path=path)
    assert asked(web, "s3cret").status_code == 401
    path.write_text(f"keys: [{{name: a, sha256: {S3CRET}}}]")
    assert asked(web, "s3cret").status_code == 200
    path.write_text("keys: [{name")
    assert asked(web, "s3cret").status_code == 200, "a broken file leaves the keys as they were"
    path.write_text(f"keys: [{{name: a, sha256: {S3CRET}, revoked: true}}]")
    assert asked(web, "s3cret").status_code == 401


def test_the_job_makes_lists_and_revokes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.yaml"
    words = ["make", str(path), "ward-7", "--scopes", "score", "metrics", "--requests-per-minute", "600"]
    assert main(words) == 0
    secret = capsys.readouterr().out.strip()
    assert path.stat().st_mode & 0o777 == 0o600
    assert secret not in path.read_text()
    assert asked(served(path=path), secret).status_code == 200
    assert main(words) == 2
    assert "has a key 'ward-7' already" in capsys.readouterr().err
    assert main(["revoke", str(path), "ward-8"]) == 2
    assert "has no key 'ward-8'; it has ward-7" in capsys.readouterr().err
    assert main(["revoke", str(path), "ward-7"]) == 0
    assert asked(served(path=path), secret).status_code == 401
    assert main(["list", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["ward-7", "score,", "metrics", "600", "yes"]
    assert main(["list", str(tmp_path / "none.yaml")]) == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["keys.yaml", "keys.yaml.lock"]


# Limits


def test_requests_a_minute_are_a_bucket_that_refills(seconds: Callable[[], float]) -> None:
    quotas, key = Quotas(clock=seconds), Key(name="k", sha256=S3CRET, requests_per_minute=2)
    assert [quotas.wait_s(key) for _ in range(3)] == [0.0, 0.0, 30.0]
    seconds.now += 29  # type: ignore[attr-defined]
    assert quotas.wait_s(key) == pytest.approx(1.0)
    seconds.now += 1  # type: ignore[attr-defined]
    assert quotas.wait_s(key) == 0.0


def test_replicas_share_a_limit(seconds: Callable[[], float]) -> None:
    key = Key(name="k", sha256=S3CRET, requests_per_minute=4, tokens_per_day=100)
    replicas = [Quotas(lambda: 2, clock=seconds, today=lambda: 86_400.0) for _ in range(2)]
    granted = [[quotas.wait_s(key) == 0 for _ in range(3)] for quotas in replicas]
    assert granted == [[True, True, False]] * 2
    replicas[0].add_tokens(key, 50)
    assert replicas[0].wait_s(key) == 86_400.0


def test_tokens_of_a_day_are_counted_and_end_with_it() -> None:
    now = [10 * 86_400.0 + 86_000]
    quotas, key = Quotas(today=lambda: now[0]), Key(name="k", sha256=S3CRET, tokens_per_day=20)
    web = served(key, quotas=quotas)
    assert [asked(web, "s3cret").status_code for _ in range(4)] == [200, 200, 200, 429], "7 tokens each"
    refusal = asked(web, "s3cret")
    assert (refusal.json()["type"], refusal.headers["retry-after"]) == ("/problems/rate_limited", "400")
    now[0] += 400
    assert asked(web, "s3cret").status_code == 200


BODIES = {
    "/v1/rerank": examples.RERANK,
    "/v1/score": examples.SCORE,
    "/v1/rewards": examples.REWARDS,
    "/v1/best_of_n": examples.BEST_OF_N,
    "/v1/tile_maps": examples.TILE_MAPS,
}


@pytest.mark.parametrize(("path", "example"), [(path, name) for path, bodies in BODIES.items() for name in bodies])
def test_every_route_counts_its_tokens_for_the_keys_day(path: str, example: str) -> None:
    web = served(Key(name="k", sha256=S3CRET, scopes=("admin",), tokens_per_day=1))
    body = BODIES[path][example]["value"]
    answers = [web.post(path, json=body, headers={"Authorization": "Bearer s3cret"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    # Of the others OpenRLHF's shape and a stream's have no place for it; the first is in `test_cost_is_counted_apart`.
    if path in ("/v1/rerank", "/v1/score") or example == "completions":
        assert answers[0].json()["usage"]["total_tokens"] == 7


def test_who_guesses_has_to_wait_and_others_do_not(seconds: Callable[[], float]) -> None:
    guesses = Guesses(seconds)
    for _ in range(GUESSES):
        assert guesses.wait_s("10.0.0.9") == 0
        guesses.add("10.0.0.9")
    assert guesses.wait_s("10.0.0.9") == pytest.approx(6.0)
    assert guesses.wait_s("10.0.0.8") == 0
    seconds.now += 6  # type: ignore[attr-defined]
    assert guesses.wait_s("10.0.0.9") == 0


def test_after_some_wrong_keys_none_is_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    web = served(Key(name="k", sha256=S3CRET))
    statuses = [asked(web, f"guess {number}").status_code for number in range(GUESSES + 5)]
    assert statuses == [401] * GUESSES + [429] * 5
    refusal = asked(web, "s3cret")
    assert (refusal.status_code, refusal.json()["detail"]) == (429, "too many wrong keys from this address; wait")
    assert 1 <= int(refusal.headers["retry-after"]) <= 6
    no_key = [web.get("/v1/models").status_code for _ in range(GUESSES + 5)]
    assert 401 not in no_key


# What is noted, and what browsers may do


def audit_lines(web: Callable[[], object], caplog: pytest.LogCaptureFixture) -> list[str]:
    service = logging.getLogger("ray.serve")
    service.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO), caplog.at_level(logging.INFO, service.name):
            web()
    finally:
        service.removeHandler(caplog.handler)
    lines = {id(record): record.getMessage() for record in caplog.records if record.name == service.name}
    return [line for line in lines.values() if line.startswith("audit: ")]


def test_a_request_leaves_a_line_without_content(caplog: pytest.LogCaptureFixture) -> None:
    web = served(Key(name="ward-7", sha256=S3CRET))

    def requests() -> None:
        asked(web, "s3cret", **{"X-Request-Id": "r-1"})
        asked(web, "wrong")
        web.get("/health")

    line, refused = audit_lines(requests, caplog)
    assert " key=- route=none status=401 model=f00d cases=- " in refused
    words = dict(word.split("=", 1) for word in line.removeprefix("audit: ").split())
    assert float(words.pop("seconds")) < 60
    case = words.pop("cases")
    assert len(case) == 16
    assert words == {
        "id": "r-1", "key": "ward-7", "route": "/v1/rerank", "status": "200", "model": "f00d", "solutions": "2",
        "unscored": "0", "tokens": "7",
    }  # fmt: skip
    for secret in ("s3cret", S3CRET, "effusion", "angle"):
        assert secret not in caplog.text


def test_no_answer_opens_itself_to_another_origin() -> None:
    web = served(Key(name="k", sha256=S3CRET, scopes=("admin",)))
    origin = {"Origin": "https://evil.example.org"}
    replies = [asked(web, "s3cret", **origin), asked(web, "wrong", **origin), web.get("/health", headers=origin)]
    preflight = {**origin, "Access-Control-Request-Method": "POST", "Authorization": "Bearer s3cret"}
    replies.append(web.options("/v1/rerank", headers=preflight))
    assert [reply.status_code for reply in replies] == [200, 401, 200, 405]
    for reply in replies:
        assert not [name for name in reply.headers if name.startswith("access-control-")]
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cache-control"] == "no-store"
        assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert "content-security-policy" not in web.get("/docs").headers
