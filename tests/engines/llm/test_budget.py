"""engines/llm/budget.py, ledger.py, limits.py: rates, money, breaker, and a ledger that survives."""

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from medmm_ray.data.tables import TableError
from medmm_ray.engines.llm import budget as budgets
from medmm_ray.engines.llm.budget import ApiBudget, ReserveResult, Settlement, Stop, start_budget
from medmm_ray.engines.llm.endpoint import ChatChoice, ChatReply, EndpointError
from medmm_ray.engines.llm.ledger import PlannedCall
from medmm_ray.engines.llm.limits import Limits
from medmm_ray.engines.llm.store import AnswerStore, PricedAnswer


def ask(dollars: float = 0.0, tokens: int = 0, key: str = "k", group: str = "q") -> PlannedCall:
    return PlannedCall(group, key, tokens, dollars)


def answered(reservation_id: int, dollars: float = 0.0, tokens: int = 0) -> Settlement:
    return Settlement(reservation_id, tokens, dollars, answered=True)


def ledger(folder: Path) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((folder / "ledger.json").read_text())
    return stored


def test_what_may_cost_is_reserved_durably_before_it_is_sent(tmp_path: Path) -> None:
    async def work() -> None:
        budget = ApiBudget(str(tmp_path), Limits(max_cost_usd=1.0))
        result = await budget.reserve("s", 4, [ask(0.3, key="a"), ask(0.4, key="b")])
        assert result == ReserveResult((1, 2))
        assert ledger(tmp_path)["reserved"] == [["s", 4, "q", "a", 0.3], ["s", 4, "q", "b", 0.4]]
        await budget.settle("s", [answered(1, 0.1)])
        assert await budget.figures() == {
            "epoch": 1, "spent": 0.1, "answers": 1, "possibly_paid": 0.0, "lost_calls": 0,
        }  # fmt: skip
        assert budget._saver is not None
        await budget._saver
        assert ledger(tmp_path)["reserved"] == [["s", 4, "q", "b", 0.4]]

    asyncio.run(work())


def test_worst_cases_under_way_hold_the_next_call_back_until_they_are_settled(tmp_path: Path) -> None:
    async def work() -> None:
        budget = ApiBudget(str(tmp_path), Limits(max_cost_usd=1.0))
        assert await budget.reserve("s", 4, [ask(0.6), ask(0.6)]) == ReserveResult((1,))
        waiting = asyncio.create_task(budget.reserve("s", 4, [ask(0.6)]))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        await budget.settle("s", [answered(1, 0.4)])
        assert await waiting == ReserveResult((2,))

    asyncio.run(work())


def test_a_call_that_the_budget_cannot_hold_ends_the_job_once_all_is_settled(tmp_path: Path) -> None:
    async def work() -> None:
        budget = ApiBudget(str(tmp_path), Limits(max_cost_usd=1.0))
        await budget.reserve("s", 4, [ask(0.1), ask(0.1)])
        await budget.settle("s", [Settlement(1, fault="503: busy", lost=True)])
        over = asyncio.create_task(budget.reserve("s", 4, [ask(0.95)]))
        await asyncio.sleep(0.02)
        assert not over.done(), "an answer under way is waited for"
        await budget.settle("s", [answered(2, 0.05)])
        assert (await over).stopped == Stop(
            "budget",
            "the next call can cost $0.9500 and would exceed max_cost_usd=1: $0.0000 are spent on 0 answers, "
            "$0.1000 possibly paid for 1 calls that were cut off. What has arrived is kept; raise max_cost_usd and run "
            "again",
        )
        assert (await budget.reserve("other", 4, [ask(0.0)])).stopped is not None
        await budget.set_limits(Limits(max_cost_usd=2.0))
        assert await budget.reserve("s", 4, [ask(0.95)]) == ReserveResult((3,))

    asyncio.run(work())


def test_a_limit_that_is_not_set_lifts_none_and_one_that_is_wins(tmp_path: Path) -> None:
    """A grader without a budget shares the policy's budget; a rerun in the same driver raises the budget."""

    async def work() -> None:
        budget = ApiBudget(str(tmp_path), Limits(max_cost_usd=1.0, requests_per_minute=60, drain_s=0.05))
        await budget.set_limits(Limits(tokens_per_minute=1000, breaker_faults=3, drain_s=0.05))
        assert budget.limits == Limits(60, 1000, 1.0, breaker_faults=3, drain_s=0.05)
        assert (budget._requests.rate, budget._tokens.rate) == (1.0, 1000 / 60)
        stopped = (await budget.reserve("s", 4, [ask(1.5)])).stopped
        assert stopped is not None
        assert stopped.kind == "budget"
        await budget.set_limits(Limits(max_cost_usd=2.0))
        assert await budget.reserve("s", 4, [ask(1.5)]) == ReserveResult((1,))

    asyncio.run(work())


def test_what_was_reserved_when_all_was_killed_is_found_or_booked_as_possibly_paid(tmp_path: Path) -> None:
    """In flight at most 2 of 4 reservations; one answer had arrived."""
    reply = ChatReply((ChatChoice("yes", "stop"),), 1, 0, 1)

    async def killed() -> None:
        budget = ApiBudget(str(tmp_path), Limits())
        reserved = [("a", 0.1, "q1"), ("b", 0.2, "q1"), ("c", 0.3, "q2"), ("d", 0.4, "q2")]
        await budget.reserve("s", 2, [ask(dollars, key=key, group=group) for key, dollars, group in reserved])
        await AnswerStore(f"{tmp_path}/answers").put("q2", "d", PricedAnswer(reply, 0.05))

    asyncio.run(killed())

    async def again() -> None:
        found = await ApiBudget(str(tmp_path), Limits()).figures()
        assert found == {"epoch": 2, "spent": 0.05, "answers": 1, "possibly_paid": 0.5, "lost_calls": 2}
        assert await ApiBudget(str(tmp_path), Limits()).figures() == {**found, "epoch": 3}, "booked once"

    asyncio.run(again())


def test_a_budget_whose_ledger_was_taken_over_ends_its_job(tmp_path: Path) -> None:
    async def work() -> None:
        old, new = ApiBudget(str(tmp_path), Limits(drain_s=0.05)), ApiBudget(str(tmp_path), Limits())
        for _ in range(2):
            result = await old.reserve("s", 4, [ask(0.5), ask(0.5)])
            assert result.reservation_ids == (), "nothing is reserved that the ledger does not know"
            assert result.stopped is not None
            assert "another run has taken over the ledger" in result.stopped.message
        assert await new.reserve("s", 4, [ask(0.5)]) == ReserveResult((1,))
        assert len(ledger(tmp_path)["reserved"]) == 1

    asyncio.run(work())


def test_a_budget_whose_process_died_goes_on_with_its_reservations(tmp_path: Path) -> None:
    async def died() -> None:
        budget = ApiBudget(str(tmp_path), Limits(max_cost_usd=1.0))
        calls = [ask(0.1, key="arrived"), ask(0.2, key="lost on the way"), ask(0.3, key="under way")]
        assert (await budget.reserve("s", 4, calls)).reservation_ids == (1, 2, 3)
        await budget.settle("s", [Settlement(1, dollars=0.05, answered=True)])
        await budget.set_limits(Limits(max_cost_usd=2.0))

    async def goes_on() -> None:
        budget = ApiBudget(str(tmp_path), Limits(max_cost_usd=1.0), epoch=1)
        assert budget.limits.max_cost_usd == 2.0, "the limits that were set last"
        await budget.settle("s", [Settlement(1, dollars=0.05, answered=True)])  # tried again: it is booked
        [reservation_id] = (await budget.reserve("s", 4, [ask(0.2, key="lost on the way")])).reservation_ids
        assert reservation_id > 3
        assert len(ledger(tmp_path)["reserved"]) == 2, "in place of the one that never arrived"
        answers = [Settlement(number, dollars=0.07, answered=True) for number in (3, reservation_id)]
        await budget.settle("s", answers)
        await budget.reserve("s", 4, [ask(0.0)])  # the ledger is saved with it
        assert ledger(tmp_path)["spent"] == pytest.approx(0.19)
        assert ledger(tmp_path)["answers"] == 3
        assert (ledger(tmp_path)["lost_calls"], ledger(tmp_path)["epoch"]) == (0, 1)

    asyncio.run(died())
    asyncio.run(goes_on())


def test_a_budget_that_starts_again_after_another_took_over_reserves_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        ApiBudget(str(tmp_path), Limits())
        ApiBudget(str(tmp_path), Limits())
        result = await ApiBudget(str(tmp_path), Limits(), epoch=1).reserve("s", 4, [ask(0.5)])
        assert result.stopped is not None
        assert "another run has taken over the ledger" in result.stopped.message

    asyncio.run(work())


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"epoch": 1, "spe', "17 bytes that are no JSON"),
        ("", "0 bytes that are no JSON"),
        ("[]", "Input should be an object"),
        ("null", "Input should be an object"),
        ('{"spent": "x"}', "spent: Input should be a valid number"),
        ('{"spent": NaN}', "spent: Input should be a finite number"),
        ('{"possibly_paid": -5}', "possibly_paid: Input should be greater than or equal to 0"),
        ('{"paid": 1}', "paid: Unexpected keyword argument"),
        ('{"reserved": [["s", 4, "g", "k"]]}', "reserved.0.4: Field required"),
    ],
)
def test_a_damaged_ledger_is_named(content: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "ledger.json").write_text(content)
    with pytest.raises(TableError) as caught:
        ApiBudget(str(tmp_path), Limits())
    assert str(caught.value).startswith(f"{tmp_path}/ledger.json is damaged ({fault}). Restore it from a copy")


def test_a_rate_limit_holds_over_all_clients(tmp_path: Path) -> None:
    """600 a minute: the first 100 (10 s of them) at once, then 10 a second; 30 more take 3 s."""

    async def work() -> float:
        budget = ApiBudget(str(tmp_path), Limits(requests_per_minute=600))
        budget._requests.level = 1.0
        started = time.monotonic()

        async def send(client_id: str) -> None:
            left = 4
            while left:
                left -= len((await budget.reserve(client_id, 4, [ask()] * left)).reservation_ids)

        await asyncio.gather(*(send(f"s{i}") for i in range(3)))
        return time.monotonic() - started

    assert 1.05 <= asyncio.run(work()) < 5.0  # 12 calls: one at once, 11 at 10 a second


def test_tokens_that_were_not_used_are_given_back(tmp_path: Path) -> None:
    async def work() -> None:
        budget = ApiBudget(str(tmp_path), Limits(tokens_per_minute=6000))  # 1,000 at once, 100 a second
        assert await budget.reserve("s", 4, [ask(tokens=900), ask(tokens=900)]) == ReserveResult((1,))
        waiting = asyncio.create_task(budget.reserve("s", 4, [ask(tokens=900)]))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        await budget.settle("s", [answered(1, tokens=50)])
        started = time.monotonic()
        assert await waiting == ReserveResult((2,))
        assert time.monotonic() - started < 3.0, "without them it would be 8 s"

    asyncio.run(work())


def test_faults_in_a_row_open_the_breaker_and_one_probe_closes_it(tmp_path: Path) -> None:
    async def work() -> None:
        budget = ApiBudget(str(tmp_path), Limits(breaker_faults=3, breaker_pause_s=0.1))
        result = await budget.reserve("s", 9, [ask()] * 5)
        await budget.settle(
            "s",
            [
                Settlement(1, fault="503: busy"),
                answered(2),
                Settlement(3, fault="503: busy"),
                Settlement(4, fault="503: busy"),
            ],
        )
        assert len((await budget.reserve("s", 9, [ask()])).reservation_ids) == 1, "two in a row are not three"
        started = time.monotonic()
        await budget.settle("s", [Settlement(5, fault="503: busy")])
        probe = await budget.reserve("s", 9, [ask()] * 3)
        assert len(probe.reservation_ids) == 1
        assert time.monotonic() - started >= 0.1
        await budget.settle("s", [Settlement(probe.reservation_ids[0], fault="503: busy")])
        probe = await budget.reserve("s", 9, [ask()] * 3)
        assert time.monotonic() - started >= 0.3, "the pause doubles"
        await budget.settle("s", [answered(probe.reservation_ids[0])])
        assert len((await budget.reserve("s", 9, [ask()] * 3)).reservation_ids) == 3
        assert result.reservation_ids == (1, 2, 3, 4, 5)

    asyncio.run(work())


def test_an_endpoint_that_failed_is_not_probed_sooner_than_it_asked(tmp_path: Path) -> None:
    async def work() -> None:
        budget = ApiBudget(str(tmp_path), Limits(breaker_faults=2, breaker_pause_s=0.01))
        await budget.reserve("s", 9, [ask()] * 2)
        await budget.settle("s", [Settlement(1, fault="429", wait_s=9.0)])
        assert (await budget.reserve("s", 9, [ask()])).reservation_ids == (3,), (
            "one that is to wait holds no other back"
        )
        started = time.monotonic()
        await budget.settle("s", [Settlement(2, fault="429", wait_s=0.2)])
        assert (await budget.reserve("s", 9, [ask()])).reservation_ids == (4,)
        assert time.monotonic() - started >= 0.2

    asyncio.run(work())


def test_an_endpoint_that_only_fails_ends_the_job(tmp_path: Path) -> None:
    async def work() -> None:
        budget = ApiBudget(str(tmp_path), Limits(breaker_faults=1, breaker_pause_s=0.02, breaker_limit_s=0.1))
        while (result := await budget.reserve("s", 9, [ask()])).reservation_ids:
            await budget.settle("s", [Settlement(result.reservation_ids[0], fault="503: busy")])
        assert result.stopped is not None
        assert result.stopped.kind == "endpoint"
        assert re.fullmatch(
            r"for \d s there has been nothing but faults of the endpoint \(\d+ in a row\), the last one: 503: busy\. "
            r"What had arrived is kept; run again when the endpoint is back, or raise breaker_limit_s",
            result.stopped.message,
        )

    asyncio.run(work())


def test_reservations_of_a_client_without_heartbeat_are_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "CLIENT_TIMEOUT_S", 0.05)
    monkeypatch.setattr(budgets, "HEARTBEAT_S", 0.03)

    async def work() -> None:
        budget = ApiBudget(str(tmp_path), Limits(max_cost_usd=1.0))
        await budget.reserve("dead", 1, [ask(0.2, key="a"), ask(0.4, key="b")])
        assert len((await budget.reserve("alive", 1, [ask(0.5)])).reservation_ids) == 1
        found = await budget.figures()
        assert (found["possibly_paid"], found["lost_calls"]) == (0.4, 1)

    asyncio.run(work())


@pytest.mark.engine
def test_a_budget_actor_that_is_killed_starts_again(ray_session: None, tmp_path: Path) -> None:
    budget = start_budget(str(tmp_path), Limits())
    children = psutil.Process().children(recursive=True)
    process = next(
        process for process in reversed(children) if " ".join(process.cmdline()).startswith("ray::ApiBudget")
    )

    async def work() -> None:
        [first] = (await budget.reserve("s", 2, [ask(0.5, key="a")])).reservation_ids
        process.kill()
        [second] = (await budget.reserve("s", 2, [ask(0.25, key="b")])).reservation_ids
        await budget.settle("s", [Settlement(number, dollars=0.1, answered=True) for number in (first, second)])
        figures = await budget.figures()
        assert (figures["answers"], figures["spent"], figures["lost_calls"]) == (2, 0.2, 0)

    asyncio.run(work())
    assert not process.is_running()


@pytest.mark.engine
def test_a_budget_actor_that_died_is_a_clear_error(ray_session: None, tmp_path: Path) -> None:
    import ray

    budget = start_budget(str(tmp_path), Limits())
    assert start_budget(str(tmp_path), Limits(max_cost_usd=9.0)) is budget

    async def work() -> None:
        assert len((await budget.reserve("s", 1, [ask(0.5)])).reservation_ids) == 1
        ray.kill(budget.handle)
        with pytest.raises(EndpointError, match="the budget actor, .* is gone .* run again"):
            await budget.reserve("s", 1, [ask(0.5)])

    asyncio.run(work())
    reopened = start_budget(str(tmp_path), Limits())
    figures = asyncio.run(reopened.figures())
    assert (figures["possibly_paid"], figures["lost_calls"]) == (0.5, 1)
