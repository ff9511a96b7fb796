"""The dry run's arithmetic, against the published budget and by hand."""

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from medmm_ray.estimate import PUBLISHED, Hardware, Judging, Plan, Workload, estimate, rendered, size

SMALL = Plan(
    workload=Workload(train_questions=100, test_questions=50, train_samples=16, test_samples=64, images=150),
    judging=Judging(splits=("train",)),
    hardware=Hardware(num_gpus=2),
)


def changed(plan: Plan, **changes: dict[str, Any]) -> Plan:
    """A plan with other values: of a group (``judging={...}``), of its model (``judging_model={...}``), of a dict."""
    for name, values in changes.items():
        group = name.removesuffix("_model")
        value: Any = getattr(plan, group)
        if name.endswith("_model"):
            value = replace(value, model=replace(value.model, **values))
        else:
            value = values if isinstance(value, dict) else replace(value, **values)
        plan = replace(plan, **{group: value})
    return plan


def test_the_published_budget() -> None:
    """$2,500 judge + $400 Monte Carlo + $500 experts + $480 for four A100 over 48 hours at $10: $3,900 in all."""
    result = estimate(PUBLISHED)
    paid = {step: result.line(step).dollars for step in ("judge", "monte_carlo", "review")}
    assert paid == {"judge": 2500, "monte_carlo": 400, "review": 500}
    training = result.line("train_two_tower").gpu_hours
    assert training * 2.5 == 480
    assert round(sum(paid.values()) + training * 2.5, -2) == 3900
    assert result.line("judge").calls * PUBLISHED.workload.steps == 100_000
    assert result.line("monte_carlo").calls == 40_000
    # What the published budget calls free: sampling 640,000 solutions and running the text tower over them.
    free = result.line("sample").gpu_hours + result.line("states").gpu_hours + result.line("embed").gpu_hours
    assert result.dollars == pytest.approx(3880 + free * 2.5)
    assert 30 < free < 60
    assert result.notes == (
        "states take 105 GB: keep the training split only, on shared storage",
        "monte_carlo assumes that 10% of the steps are uncertain",
    )


def test_med_prm_scores_at_its_published_speed() -> None:
    """1.5 solutions/s on an A100, one at a time with their documents (3,720 tokens)."""
    one_by_one = changed(
        SMALL, workload={"test_questions": 1000, "test_samples": 1, "question_tokens": 0, "solution_tokens": 648}
    )
    seconds = estimate(one_by_one).line("score").gpu_hours * 3600
    assert 1000 / seconds == pytest.approx(1.5, rel=0.05)


def test_the_shared_prefix_saves_nine_tenths() -> None:
    shared = changed(SMALL, workload={"question_tokens": 185, "document_tokens": 3072})
    alone = changed(shared, workload={"test_questions": 50 * 64, "test_samples": 1})
    assert estimate(alone).line("score").tokens / estimate(shared).line("score").tokens == pytest.approx(9.0, abs=0.2)


def test_states_of_the_real_recipe() -> None:
    """10,000 questions x 64 solutions x 8 steps x 16 KiB = 84 GB."""
    plan = changed(SMALL, workload={"train_questions": 10_000, "train_samples": 64})
    states = estimate(plan).line("states")
    assert states.stored == 10_000 * 64 * 8 * 16 * 1024
    assert size(states.stored) == "83.9 GB"
    assert "5,120,000 steps at 16 KiB" in states.work


def test_each_step_by_hand() -> None:
    plan = changed(
        SMALL,
        workload={"steps": 4, "question_tokens": 100, "document_tokens": 900, "solution_tokens": 200},
        judging={"images": 3},
        policy={"parameters": 1e9},
        training={"text_parameters": 2e9, "policy_epochs": 2, "text_epochs": 3},
        judging_model={"input_price": 0.1, "output_price": 0.4},
    )
    result = estimate(plan)
    sample = result.line("sample")
    kept = 100 * 16 + 50 * 64
    assert sample.tokens == 150 * 1000 + kept * 1.25 * 200
    assert sample.gpu_hours * 312e12 * 3600 == pytest.approx(2e9 * 150_000 / 0.28 + 2e9 * kept * 250 / 0.15, rel=1e-9)
    judge = result.line("judge")
    read, written = 1600 * (1000 + 200 + 3 * 258), 1600 * 4 * 25
    assert (judge.calls, judge.tokens) == (1600, read + written)
    assert judge.dollars == pytest.approx(read * 0.1e-6 + written * 0.4e-6)
    assert judge.gpu_hours == 0
    rolled = result.line("monte_carlo")
    assert (rolled.calls, rolled.dollars) == (1600 * 4 * 0.1 * 4, 0)
    assert rolled.tokens == pytest.approx(640 * (100 + 100) + 2560 * 100)
    assert rolled.gpu_hours > 0
    assert result.line("review").dollars == 500
    assert result.line("train_policy").tokens == 100 * 300 * 2
    text = result.line("train_text_prm")
    assert text.tokens == 3 * (100 * 1000 + 1600 * 200)
    assert text.gpu_hours == pytest.approx(6 * 2e9 * text.tokens / (312e12 * 0.35 * 3600))
    assert result.line("score").tokens == 50 * 1000 + 50 * 64 * 200
    assert result.gpu_dollars == result.gpu_hours * 2.5
    assert result.hours == result.gpu_hours / 2
    assert result.dollars == sum(line.dollars for line in result.lines) + result.gpu_dollars
    assert result.stored == sum(line.stored for line in result.lines)


def test_a_judge_of_our_own_takes_gpu_hours_and_no_dollars() -> None:
    ours = estimate(changed(SMALL, judging_model={"parameters": 8e9})).line("judge")
    assert ours.dollars == 0
    assert ours.gpu_hours > 0


def test_calls_that_share_solutions_or_go_step_by_step_and_what_is_cached() -> None:
    plan = changed(
        SMALL,
        workload={"steps": 4, "question_tokens": 100, "document_tokens": 900, "solution_tokens": 200},
        judging={"images": 3},
        judging_model={"input_price": 1.0, "output_price": 0.0},
    )
    shared = 1000 + 3 * 258
    by_four = estimate(
        changed(plan, judging={"solutions_per_call": 4}, judging_model={"cached_input_price": 0.25})
    ).line("judge")
    assert by_four.calls == 400
    assert by_four.dollars == pytest.approx((100 * shared + 300 * shared / 4 + 1600 * 200) / 1e6)
    by_step = estimate(changed(plan, judging={"by_step": True})).line("judge")
    assert by_step.calls == 6400
    assert by_step.dollars == pytest.approx((6400 * shared + 1600 * 200 * (1 + 2 + 3 + 4) / 4) / 1e6)
    assert (
        "judge will stop at max_cost_usd=1, before the end: $12"
        in estimate(changed(plan, judging={"by_step": True}, max_dollars={"judge": 1.0})).notes
    )
    cached = estimate(changed(plan, judging_model={"cached_input_price": 0.25}))
    assert cached.line("judge").dollars == pytest.approx((100 * shared + 1500 * shared / 4 + 1600 * 200) / 1e6)
    assert "judge counts on the provider's prompt cache; without it: $3" in cached.notes


def test_the_judge_reads_the_splits_and_solutions_that_it_is_asked_for() -> None:
    """100 training questions with 16 samples, 50 test questions with 64."""
    everything = changed(SMALL, judging={"splits": ("train", "validation", "test")})
    assert estimate(everything).line("judge").calls == 100 * 16 + 50 * 64
    assert estimate(changed(everything, judging={"max_solutions": 20})).line("judge").calls == 100 * 16 + 50 * 20
    assert estimate(changed(everything, judging={"splits": ("test",)})).line("judge").calls == 50 * 64
    free = estimate(changed(everything, judging={"calls_model": False}, workload={"steps": 4})).line("judge")
    assert (free.calls, free.tokens, free.dollars, free.gpu_hours) == (0, 0, 0, 0)
    assert free.work == "19,200 steps by the source's truth"


@pytest.mark.parametrize(
    ("changes", "prefixes"),
    [
        ({}, 1600 * 8 * 0.1),
        ({"rollouts": {"right_is_free": True}}, 1600 * 0.5 * 8 * 0.1),
        ({"rollouts": {"max_share": 0.02}}, 1600 * 8 * 0.02),
        ({"judging": {"max_solutions": 4}}, 400 * 8 * 0.1),
        ({"rollouts": {"mode": "all"}}, 1600 * 7),
        ({"rollouts": {"mode": "all", "right_is_free": True}, "workload": {"wrong_share": 0.25}}, 400 * 7),
        ({"rollouts": {"mode": "all", "splits": ("train", "test")}}, (1600 + 3200) * 7),
        ({"rollouts": {"mode": "first_error"}}, 1600 * 3),
        ({"rollouts": {"mode": "first_error", "max_solutions": 8}}, 800 * 3),
        ({"rollouts": {"mode": "verify"}}, 1600 * 2),
        ({"rollouts": {"mode": "verify"}, "judging": {"max_solutions": 4}}, 400 * 2),
        ({"rollouts": {"mode": "verify"}, "workload": {"steps": 2}}, 1600),
        ({"rollouts": {"mode": "all", "splits": ("test",)}, "workload": {"test_questions": 0}}, 0),
    ],
)
def test_monte_carlo_continues_what_its_mode_asks_for(changes: dict[str, dict[str, Any]], prefixes: float) -> None:
    """1,600 solutions of 8 steps; the last step of each is known."""
    line = estimate(changed(SMALL, **changes)).line("monte_carlo")
    assert line.calls == pytest.approx(4 * prefixes)
    assert line.work == f"{changes.get('rollouts', {}).get('mode', 'uncertain')}: {prefixes:,.0f} steps x 4"


def test_written_questions_and_graded_answers_by_hand() -> None:
    plan = changed(
        SMALL,
        workload={"question_tokens": 100},
        writing={"images": 10, "questions_per_image": 2, "checks": 3},
        writing_model={"input_price": 1.0, "output_price": 4.0},
        grading={"answers": 2.5},
        grading_model={"input_price": 500, "output_price": 2000},
        max_dollars={"equivalence": 10.0, "write_questions": 9.0},
    )
    result = estimate(plan)
    written, graded = result.line("write_questions"), result.line("equivalence")
    read, replies = 20 * (250 + 258 + 6 * (70 + 100) + 3 * 258), 20 * (180 + 6 * 10)
    assert (written.calls, written.tokens, written.gpu_hours) == (20 * 7, read + replies, 0)
    assert written.dollars == pytest.approx((read + replies * 4) / 1e6)
    assert graded.calls == 150 * 2.5
    assert graded.dollars == pytest.approx(375 * (220 * 500 + 10 * 2000) / 1e6)
    assert result.notes[-2:] == (
        "equivalence assumes 2.5 distinct answers a question to ask about",
        "equivalence will stop at max_cost_usd=10, before the end: $49",
    )
    assert estimate(changed(plan, writing_model={"parameters": 8e9})).line("write_questions").gpu_hours > 0
    shown = {line.step for line in estimate(plan, without=("sample",)).lines}
    assert "write_questions" in shown
    assert "equivalence" not in shown


def test_documents_are_read_by_the_steps_that_ask_for_them() -> None:
    plan = changed(
        SMALL, workload={"question_tokens": 100, "document_tokens": 900, "with_documents": ("monte_carlo", "score")}
    )
    with_, without = estimate(plan), estimate(changed(plan, workload={"with_documents": ()}))
    more = {line.step: line.tokens - without.line(line.step).tokens for line in with_.lines}
    assert more.pop("score") == 50 * 900
    assert more.pop("monte_carlo") == pytest.approx(1600 * 8 * 0.1 * 900)
    assert set(more.values()) == {0}


def test_measured_hours_replace_the_arithmetic() -> None:
    result = estimate(changed(SMALL, known_gpu_hours={"score": 1.25, "sample": 0.75}))
    assert (result.line("score").gpu_hours, result.line("sample").gpu_hours) == (1.25, 0.75)
    with pytest.raises(
        ValueError, match=r"known_gpu_hours names \['scoring'\]; the steps are \['write_questions', 'embed'"
    ):
        estimate(changed(SMALL, known_gpu_hours={"scoring": 1}))


def test_prices_and_gpus() -> None:
    fast, slow = estimate(changed(SMALL, hardware={"gpu": "H100"})), estimate(SMALL)
    assert slow.gpu_hours / fast.gpu_hours == pytest.approx(989 / 312)
    assert estimate(changed(SMALL, hardware={"dollars_per_gpu_hour": 1.0})).gpu_dollars == slow.gpu_hours
    with pytest.raises(ValueError, match="gpu 'A1000' is not in the table; known: A100-80G"):
        estimate(changed(SMALL, hardware={"gpu": "A1000"}))


def test_notes_say_what_a_reader_would_ask() -> None:
    notes = estimate(
        changed(
            SMALL,
            hardware={"gpu": "L4"},
            training={"text_parameters": 70e9},
            workload={"train_questions": 10_000},
            rollouts={"right_is_free": True},
        )
    ).notes
    assert notes == (
        "140 GB of weights do not fit one L4 (24 GB): shard the model",
        "states take 21 GB: keep the training split only, on shared storage",
        "monte_carlo assumes that 50% of the answers are wrong and that 10% of the steps are uncertain",
    )
    assert estimate(changed(SMALL, rollouts={"mode": "all"})).notes == ()


@pytest.mark.parametrize(
    ("stored", "shown"),
    [(12, "12 B"), (2048, "2.05 kB"), (1.5e6, "1.5 MB"), (84e9, "84 GB"), (1.2e12, "1.2 TB"), (5e15, "5,000.0 TB")],
)
def test_size(stored: float, shown: str) -> None:
    assert size(stored) == shown


def test_the_table_shows_each_step_the_totals_and_the_assumptions() -> None:
    console = Console(width=150, file=io.StringIO(), record=True)
    console.print(rendered(estimate(PUBLISHED)))
    shown = console.export_text()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == [
        "embed",
        "train_policy",
        "tree_search",
        "sample",
        "judge",
        "monte_carlo",
        "review",
        "train_text_prm",
        "states",
        "train_two_tower",
        "score",
        "total",
    ]
    assert rows[4][1:5] == ["100,000 steps in 10,000 calls", "10,000", "48.9M", "2,500.00"]
    assert rows[9][5:7] == ["192.00", "480.00"]
    assert rows[0][5] == "< 0.01"
    assert rows[-1][4] == "3,400.00"
    assert "4 x A100-80G at $2.50 an hour each" in shown
    assert "expect a factor of two either way" in shown


def test_a_policy_behind_an_api_is_paid_by_the_token_and_reads_each_prompt() -> None:
    api = changed(
        SMALL,
        policy={"parameters": 0, "input_price": 2, "output_price": 8},
        workload={"question_tokens": 100, "document_tokens": 900, "solution_tokens": 200},
    )
    sample, drawn = estimate(api).line("sample"), (100 * 16 + 50 * 64) * 1.25
    assert (sample.calls, sample.gpu_hours) == (drawn, 0)
    assert sample.dollars == pytest.approx((drawn * 1000 * 2 + drawn * 200 * 8) / 1e6)


def test_trees_are_counted_and_what_is_left_out_is_not() -> None:
    plan = changed(
        SMALL,
        trees={"questions": 100, "nodes": 60, "node_rollouts": 5},
        workload={"solution_tokens": 200, "steps": 4, "document_tokens": 0},
    )
    search = estimate(plan).line("tree_search")
    assert search.calls == 6000
    assert search.tokens == 100 * plan.workload.question_tokens + 6000 * (50 + 5 * 100)
    bounded = estimate(changed(plan, trees={"max_tokens": 1000})).line("tree_search")
    assert bounded.tokens == 100 * (plan.workload.question_tokens + 1000)
    left = estimate(
        changed(plan, max_dollars={"judge": 0.0}), without=("tree_search", "judge", "states", "monte_carlo")
    )
    assert not {"tree_search", "judge", "states", "monte_carlo"} & {line.step for line in left.lines}
    assert left.notes == ()
