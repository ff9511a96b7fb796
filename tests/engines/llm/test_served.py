"""engines/llm/served.py: whether the model that answered is the asked one, and what a client does where it is not."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from jobs.benches.model_server import Answer
from medmm_ray.config import ConfigError
from medmm_ray.data.tables import RowError
from medmm_ray.engines.llm.access import connect
from medmm_ray.engines.llm.budget import ApiBudget
from medmm_ray.engines.llm.client import ApiConfig, ApiEngine, Client
from medmm_ray.engines.llm.endpoint import ChatRequest, EndpointError, Turn
from medmm_ray.engines.llm.served import OtherModelError, is_same_model, joined_names
from medmm_ray.engines.llm.store import stored_answers
from tests.doubles.api_server import AS_ASKED, Server, chat_said, gemini_said, serving

QUESTION = ChatRequest("s", (Turn("user", ("a",)),), max_tokens=10)


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("gpt-4o", "gpt-4o"),
        ("gpt-4o", "gpt-4o-2024-08-06"),
        ("gpt-4o-2024-08-06", "gpt-4o"),
        ("gpt-4", "gpt-4-0613"),
        ("gemini-2.5-flash", "gemini-2.5-flash-001"),
        ("gemini-2.5-flash", "gemini-2.5-flash-preview-09-2025"),
        ("gemini-2.5-flash", "gemini-2.5-flash-preview-05-20"),
        ("gemini-2.5-flash", "models/gemini-2.5-flash"),
        ("google/gemini-3.5-flash-lite", "gemini-3.5-flash-lite"),
        ("gemini-3.5-flash-lite", "google/gemini-3.5-flash-lite-001"),
        ("gemini/gemini-3.5-flash-lite", "gemini-3.5-flash-lite"),
        ("mistral-large-latest", "mistral-large-2411"),
        ("mistral-large-latest", "mistral-large-latest"),
        ("claude-sonnet-4", "claude-sonnet-4-20250514"),
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("deepseek/deepseek-r1:free", "deepseek/deepseek-r1"),
        ("llama3", "llama3:latest"),
        ("llama3:70b", "llama3:70b"),
    ],
)
def test_snapshots_aliases_and_providers_prefixes_are_the_asked_model(asked: str, answered: str) -> None:
    assert is_same_model(asked, answered)


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("gemini-2.5-flash", "gemini-3-flash"),
        ("gemini-2.5-flash", "gemini-3.5-flash-lite"),
        ("gemini-2.5-flash", "gemini-2.5-flash-lite"),
        ("gemini-2.5-flash-lite", "gemini-2.5-flash"),
        ("gemini-2.5-pro", "gemini-3.8-flash"),
        ("gpt-4o", "gpt-4o-mini"),
        ("gpt-4o", "gpt-4o-mini-2024-07-18"),
        ("gpt-4o-2024-08-06", "gpt-4o-2024-11-20"),
        ("gpt-4", "gpt-4.1"),
        ("gpt-4", "gpt-4-32k"),
        ("claude-3", "claude-3-5"),
        ("llama3:70b", "llama3:8b"),
        ("my-deployment", "gpt-4o-2024-08-06"),
        ("m", ""),
    ],
)
def test_another_model_is_another_model(asked: str, answered: str) -> None:
    assert not is_same_model(asked, answered)


def test_names_of_several_models_are_joined() -> None:
    assert joined_names(["b", None, "a", "b"]) == "a, b"
    assert joined_names([None]) is None


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    with serving() as running:
        yield running


def client(server: Server, folder: Path, model: str = "gpt-4o", kind: Any = "openai", **settings: Any) -> Client:
    address = server.address if kind == "gemini" else f"{server.address}/v1"
    config = ApiConfig(endpoint=address, pause_s=0.001, input_price=1.0, output_price=2.0, **settings)
    return connect(ApiEngine(kind=kind), model, config, ApiBudget(str(folder), config.limits), str(folder))


def ask(server: Server, folder: Path, **how: Any) -> Any:
    return asyncio.run(client(server, folder, **how).ask(QUESTION, "q"))


def spent(folder: Path) -> float:
    return ApiBudget(str(folder), ApiConfig().limits).ledger.spent


def test_another_model_stops_the_job_and_what_it_answered_is_kept_and_paid_once(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.script = [chat_said("yes", model="gpt-6-luna")]
    for _ in range(2):  # the second time by the kept answer
        with pytest.raises(OtherModelError, match=r"openai:gpt-4o was asked and 'gpt-6-luna' answered: .*warn") as stop:
            ask(server, tmp_path)
        assert isinstance(stop.value, EndpointError), "it ends a job as a refused key does"
    [kept] = [stored.answer for stored in stored_answers(f"{tmp_path}/answers")]
    assert (kept.reply.text, kept.reply.model) == ("yes", "gpt-6-luna")
    answer = ask(server, tmp_path, on_other_model="warn")
    assert (answer.reply.text, answer.reply.model) == ("yes", "gpt-6-luna")
    assert [r.message.partition(":")[0] for r in caplog.records if "gpt-6-luna" in r.message] == ["openai"]
    assert ask(server, tmp_path, answers_as="gpt-6-luna").reply.text == "yes"
    assert len(server.requests) == 1
    assert spent(tmp_path) == pytest.approx((1000 * 1.0 + 100 * 2.0) / 1e6)


@pytest.mark.parametrize(("label", "stops"), [("default", False), ("m", False), ("gpt-5", True), ("o3", True)])
def test_a_label_of_the_address_is_told_and_names_no_other_model(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, label: str, stops: bool
) -> None:
    server.script = [chat_said("yes", model=label)]
    if stops:
        with pytest.raises(OtherModelError, match=f"'{label}' answered"):
            ask(server, tmp_path)
    else:
        assert ask(server, tmp_path).reply.model == label
        assert sum(f"'{label}' answered" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("gemini_client", ["rest", "sdk"])
def test_gemini_states_its_version(server: Server, tmp_path: Path, gemini_client: str) -> None:
    server.script = [gemini_said("yes", model="gemini-2.5-flash-preview-09-2025")]
    how = {"model": "gemini-2.5-flash", "kind": "gemini", "gemini_client": gemini_client}
    answer = ask(server, tmp_path / "a", **how)
    assert answer.reply.model == "gemini-2.5-flash-preview-09-2025"
    server.script = [gemini_said("yes", model="gemini-3.5-flash-lite")]
    with pytest.raises(OtherModelError, match="gemini:gemini-2.5-flash was asked and 'gemini-3.5-flash-lite' answered"):
        ask(server, tmp_path / "b", **how)
    blocked = {"promptFeedback": {"blockReason": "SAFETY"}, "modelVersion": "gemini-3.5-flash-lite"}
    server.script = [Answer(blocked)]
    with pytest.raises(OtherModelError):
        ask(server, tmp_path / "c", **how)


def test_who_does_not_say_its_name_is_believed_and_a_refusal_of_another_model_stops_too(
    server: Server, tmp_path: Path
) -> None:
    server.script = [chat_said("yes", model=None)]
    assert ask(server, tmp_path / "a").reply.model is None
    server.script = [chat_said(None, refusal="no", model="gpt-6-luna")]
    with pytest.raises(OtherModelError):
        ask(server, tmp_path / "b")
    server.script = [chat_said(None, refusal="no", model=AS_ASKED)]
    with pytest.raises(RowError, match="refused"):
        ask(server, tmp_path / "c")


def test_all_who_ask_are_told_of_another_model_after_what_is_under_way_is_kept(server: Server, tmp_path: Path) -> None:
    server.script, server.delay_s = [chat_said("yes", model="gpt-6-luna")], 0.02
    made = client(server, tmp_path, in_flight=3)

    async def work() -> list[Any]:
        asks = (made.ask(ChatRequest("s", (Turn("user", (f"a{i}",)),), max_tokens=10), "q") for i in range(9))
        return await asyncio.gather(*asks, return_exceptions=True)

    found = asyncio.run(work())
    assert all(isinstance(fault, EndpointError) and "'gpt-6-luna' answered" in str(fault) for fault in found)
    assert len(list(stored_answers(f"{tmp_path}/answers"))) == len(server.requests) < 9


@pytest.mark.parametrize(("served", "share"), [("flex", 0.5), ("default", 1.0), (None, 1.0)])
def test_flex_is_asked_for_and_booked_as_it_was_served(
    server: Server, tmp_path: Path, served: str | None, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    server.script = [chat_said("yes", tier=served)]
    answer = ask(server, tmp_path, tier="flex", flex_price_share=0.5)
    assert server.requests[0]["service_tier"] == "flex"
    assert answer.reply.tier == served
    assert answer.cost == spent(tmp_path) == pytest.approx(share * 1200 / 1e6)
    assert ("booked at the list price" in caplog.text) is (served != "flex")
    again = ask(server, tmp_path)  # at the standard tier: what is asked is the same
    assert (again.cost, len(server.requests)) == (answer.cost, 1)


def test_without_a_tier_none_is_sent_and_a_header_states_it_too(server: Server, tmp_path: Path) -> None:
    server.script = [chat_said("yes")._replace(headers={"x-gemini-service-tier": "flex"})]
    answer = ask(server, tmp_path, flex_price_share=0.5)
    assert "service_tier" not in server.requests[0]
    assert (answer.reply.tier, answer.cost) == ("flex", pytest.approx(600 / 1e6))


@pytest.mark.parametrize("headers", [{}, {"x-gemini-service-tier": "flex"}])
def test_gemini_takes_a_tier_by_rest_and_the_sdk_refuses_it(
    server: Server, tmp_path: Path, headers: dict[str, str]
) -> None:
    scripted = gemini_said("yes")._replace(headers=headers)
    if not headers:
        scripted.body["usageMetadata"]["serviceTier"] = "flex"
    server.script = [scripted]
    how: dict[str, Any] = {"model": "gemini-3.5-flash-lite", "kind": "gemini", "tier": "flex"}
    answer = ask(server, tmp_path, **how)
    assert server.requests[0]["service_tier"] == "flex"
    assert (answer.reply.tier, answer.cost) == ("flex", pytest.approx(600 / 1e6))
    with pytest.raises(ConfigError, match="tier=flex does not go with gemini_client=sdk: google-generativeai has no"):
        client(server, tmp_path, gemini_client="sdk", **how)


def test_flex_is_waited_for_longer() -> None:
    assert [ApiConfig(**how).longest_s for how in ({}, {"tier": "flex"}, {"tier": "flex", "timeout_s": 60.0})] == [
        120.0, 900.0, 60.0,
    ]  # fmt: skip
