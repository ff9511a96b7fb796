"""The dry run's arithmetic, against the published budget and by hand."""

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from jobs.plan import estimate
from jobs.step import Run, load_recipe
from medmm_ray.engines.grader import equivalence_cost
from medmm_ray.estimate import Estimate, Line, ModelCost, Sizes, rendered, size
from medmm_ray.steps.judge import JudgeApi, JudgeConfig, JudgeVllm
from medmm_ray.steps.judge.cost import judge_cost
from medmm_ray.steps.monte_carlo import MonteCarloConfig
from medmm_ray.steps.monte_carlo.cost import monte_carlo_cost
from medmm_ray.steps.review import ReviewConfig, review_cost
from medmm_ray.steps.sample import PolicyApi, SampleConfig, sample_cost
from medmm_ray.steps.score import ScoreConfig, StatesConfig
from medmm_ray.steps.score.cost import score_cost, states_cost
from medmm_ray.steps.tree_search.cost import tree_search_cost
from medmm_ray.steps.tree_search.tree import TreeSearchConfig
from medmm_ray.steps.write_questions import WriteQuestionsConfig, WriterApi
from medmm_ray.steps.write_questions.cost import write_questions_cost
from medmm_ray.train.cost import train_policy_cost, train_text_prm_cost
from medmm_ray.train.policy import PolicyConfig
from medmm_ray.train.text_prm import TextPrmConfig

A100_SECOND = 312e12  # floating-point operations at its peak
API = JudgeApi(kind="gemini", model="some-model")
# The framework's own budget: 100,000 step labels in 10,000 calls, and 48 hours on four A100.
PUBLISHED = (
    "jobs/recipes/medmm.yaml", "run=s3://bucket/run", "without=[tree_search,train_policy,train_text_prm]",
    "plan.train_questions=10000", "plan.test_questions=0", "plan.steps=10", "sample.num_documents=8",
    "judge.max_solutions=1", "judge.warm_cache=false", "monte_carlo.wrong_only=false", "monte_carlo.stop_early=false",
)  # fmt: skip
PUBLISHED_DOLLARS_PER_CALL = {"judge": 0.25, "monte_carlo": 0.01}
PUBLISHED_GPU_HOURS = {"judge": 0.0, "monte_carlo": 0.0, "train_two_tower": 4 * 48}


def sizes(**changes: Any) -> Sizes:
    """100 training questions of 16 solutions, 50 test questions of 64, and what is changed."""
    small = {"train_questions": 100, "test_questions": 50, "train_samples": 16, "test_samples": 64, "images": 150}
    return Sizes.model_validate({**small, **changes})


def estimated(*words: str) -> Estimate:
    recipe = load_recipe(list(words))
    return estimate(recipe, Run(recipe, asks_stores=False), recipe.without)


def published() -> Estimate:
    """The estimate of the published plan at its own prices and hours, which no config has."""
    result = estimated(*PUBLISHED)
    lines = []
    for line in result.lines:
        price = PUBLISHED_DOLLARS_PER_CALL.get(line.step)
        dollars = line.dollars if price is None else line.calls * price
        lines.append(replace(line, dollars=dollars, gpu_hours=PUBLISHED_GPU_HOURS.get(line.step, line.gpu_hours)))
    return replace(result, lines=tuple(lines))


def test_the_published_budget() -> None:
    """$2,500 judge + $400 Monte Carlo + $500 experts + $480 for four A100 over 48 hours at $10: $3,900 in all."""
    result = published()
    paid = {step: result.line(step).dollars for step in ("judge", "monte_carlo", "review")}
    assert paid == {"judge": 2500, "monte_carlo": 400, "review": 500}
    training = result.line("train_two_tower").gpu_hours
    assert training * 2.5 == 480
    assert round(sum(paid.values()) + training * 2.5, -2) == 3900
    assert result.line("judge").work == "100,000 steps in 10,000 calls"
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
    one_by_one = sizes(test_questions=1000, test_samples=1, question_tokens=0.0, solution_tokens=648.0)
    seconds = score_cost(ScoreConfig(), one_by_one).gpu_hours * 3600
    assert 1000 / seconds == pytest.approx(1.5, rel=0.05)


def test_the_shared_prefix_saves_nine_tenths() -> None:
    shared = score_cost(ScoreConfig(), sizes()).tokens
    alone = score_cost(ScoreConfig(), sizes(test_questions=50 * 64, test_samples=1)).tokens
    assert alone / shared == pytest.approx(9.0, abs=0.2)


def test_states_of_the_real_recipe() -> None:
    """10,000 questions x 64 solutions x 8 steps x 16 KiB = 84 GB; of sixteen solutions a quarter."""
    real = sizes(train_questions=10_000, train_samples=64)
    states = states_cost(StatesConfig(), real)
    assert states.stored == 10_000 * 64 * 8 * 16 * 1024
    assert size(states.stored) == "83.9 GB"
    assert "5,120,000 steps at 16 KiB" in states.work
    sixteen = states_cost(StatesConfig(max_solutions=16), real)
    assert sixteen.stored == states.stored / 4
    assert states.tokens - sixteen.tokens == 10_000 * 48 * 350


SHORT = {"steps": 4.0, "question_tokens": 100.0, "document_tokens": 900.0, "solution_tokens": 200.0}


def test_sampling_and_trainings_by_hand() -> None:
    short = sizes(**SHORT, policy=ModelCost(parameters=1e9), text_parameters=2e9)
    sample = sample_cost(SampleConfig(num_documents=1), short)
    kept = 100 * 16 + 50 * 64
    assert sample.tokens == 150 * 1000 + kept * 1.25 * 200
    operations = 2e9 * 150_000 / 0.28 + 2e9 * kept * 250 / 0.15
    assert sample.gpu_hours * A100_SECOND * 3600 == pytest.approx(operations, rel=1e-9)
    assert train_policy_cost(PolicyConfig(epochs=2), short).tokens == 100 * 300 * 2
    text = train_text_prm_cost(TextPrmConfig(epochs=3), short)
    assert text.tokens == 3 * (100 * 1000 + 1600 * 200)
    assert text.gpu_hours == pytest.approx(6 * 2e9 * text.tokens / (A100_SECOND * 0.35 * 3600))
    assert train_text_prm_cost(TextPrmConfig(epochs=1, max_solutions=4), short).tokens == 100 * 1000 + 400 * 200
    assert score_cost(ScoreConfig(), short).tokens == 50 * 1000 + 50 * 64 * 200
    assert review_cost(ReviewConfig(review_steps=1000), 0.5).dollars == 500


def test_labels_by_hand() -> None:
    short = sizes(**SHORT, policy=ModelCost(parameters=1e9))
    config = JudgeConfig(engine=API, splits=("train",), num_references=2)
    judge = judge_cost(config, short, ModelCost(input_price=0.1, output_price=0.4))
    read, written = 1600 * (1000 + 200 + 3 * 258), 1600 * 4 * 70
    assert (judge.calls, judge.tokens) == (1600, read + written)
    assert judge.dollars == pytest.approx(read * 0.1e-6 + written * 0.4e-6)
    assert judge.gpu_hours == 0
    brief = judge_cost(config.model_copy(update={"reply": "lines"}), short, ModelCost())
    assert brief.tokens == read + 1600 * 4 * 6
    rolled = monte_carlo_cost(MonteCarloConfig(stop_early=False), short, None)
    assert (rolled.calls, rolled.dollars) == (1600 * 4 * 0.1 * 4, 0)
    assert rolled.tokens == pytest.approx(640 * (100 + 100) + 2560 * 100)
    assert rolled.gpu_hours > 0


def test_an_estimate_sums_its_lines() -> None:
    lines = (
        Line(step="judge", work="", dollars=3.0, gpu_hours=4.0, stored=5.0),
        Line(step="states", work="", dollars=1.0, gpu_hours=2.0, stored=7.0),
    )
    result = Estimate(sizes(num_gpus=2), lines, ())
    assert (result.gpu_hours, result.hours, result.gpu_dollars) == (6, 3, 15)
    assert (result.dollars, result.stored) == (19, 12)


def test_a_judge_of_our_own_takes_gpu_hours_and_no_dollars() -> None:
    ours = judge_cost(JudgeConfig(engine=JudgeVllm()), sizes(), ModelCost(parameters=8e9))
    assert ours.dollars == 0
    assert ours.gpu_hours > 0


def test_calls_that_share_solutions_or_go_step_by_step_and_what_is_cached() -> None:
    short = sizes(**SHORT)
    config = JudgeConfig(engine=API, splits=("train",), num_references=2)
    model, caching = ModelCost(input_price=1.0), ModelCost(input_price=1.0, cached_input_price=0.25)
    shared = 1000 + 3 * 258
    by_four = judge_cost(config.model_copy(update={"solutions_per_call": 4}), short, caching)
    assert by_four.calls == 400
    assert by_four.dollars == pytest.approx((100 * shared + 300 * shared / 4 + 1600 * 200) / 1e6)
    by_step = judge_cost(config.model_copy(update={"granularity": "step"}), short, model)
    assert by_step.calls == 6400
    assert by_step.dollars == pytest.approx((6400 * shared + 1600 * 200 * (1 + 2 + 3 + 4) / 4) / 1e6)
    cached = judge_cost(config, short, caching)
    assert cached.dollars == pytest.approx((100 * shared + 1500 * shared / 4 + 1600 * 200) / 1e6)
    assert cached.notes == ("judge counts on the provider's prompt cache; without it: $3",)
    at_once = judge_cost(config.model_copy(update={"warm_cache": False}), short, caching)
    assert at_once.dollars == pytest.approx((1600 * shared + 1600 * 200) / 1e6)
    assert at_once.notes == ()


@pytest.mark.parametrize(
    ("engine", "images"),
    [(API, 4), (JudgeApi(kind="gemini", model="m", max_images=2), 2), (JudgeVllm(num_images=0), 0)],
)
def test_a_judge_is_sent_as_many_images_as_its_engine_takes(engine: JudgeApi | JudgeVllm, images: int) -> None:
    """The question's and three similar cases', of 1,000 tokens each."""
    config = JudgeConfig(engine=engine)
    difference = judge_cost(config, sizes(), ModelCost(image_tokens=1000)).tokens
    difference -= judge_cost(config, sizes(), ModelCost(image_tokens=0)).tokens
    assert difference == (1600 + 3200) * images * 1000


def test_the_judge_reads_the_splits_and_solutions_that_it_is_asked_for() -> None:
    """100 training questions with 16 samples, 50 test questions with 64."""
    model = ModelCost(input_price=1.0)
    assert judge_cost(JudgeConfig(engine=API), sizes(), model).calls == 100 * 16 + 50 * 64
    assert judge_cost(JudgeConfig(engine=API, max_solutions=20), sizes(), model).calls == 100 * 16 + 50 * 20
    assert judge_cost(JudgeConfig(engine=API, splits=("test",)), sizes(), model).calls == 50 * 64
    free = judge_cost(JudgeConfig(), sizes(steps=4.0), model)
    assert (free.calls, free.tokens, free.dollars, free.gpu_hours) == (0, 0, 0, 0)
    assert free.work == "19,200 steps by the source's truth"


@pytest.mark.parametrize(
    ("config", "changes", "max_judged", "prefixes"),
    [
        ({}, {}, None, 1600 * 8 * 0.1),
        ({"stop_early": True}, {}, None, 1600 * 0.5 * 8 * 0.1),
        ({"stop_early": True, "threshold": 0.5}, {}, None, 1600 * 8 * 0.1),
        ({"max_share": 0.02}, {}, None, 1600 * 8 * 0.02),
        ({}, {}, 4, 400 * 8 * 0.1),
        ({"mode": "all"}, {}, None, 1600 * 7),
        ({"mode": "all", "wrong_only": True}, {"wrong_share": 0.25}, None, 400 * 7),
        ({"mode": "all", "splits": ("train", "test")}, {}, None, (1600 + 3200) * 7),
        ({"mode": "first_error"}, {}, None, 800 * 3),
        ({"mode": "first_error", "max_solutions": 8}, {}, None, 400 * 3),
        ({"mode": "verify"}, {}, None, 800 * 2),
        ({"mode": "verify"}, {}, 4, 200 * 2),
        ({"mode": "verify"}, {"steps": 2.0}, None, 800),
        ({"mode": "all", "splits": ("test",)}, {"test_questions": 0}, None, 0),
    ],
)
def test_monte_carlo_continues_what_its_mode_asks_for(
    config: dict[str, Any], changes: dict[str, Any], max_judged: int | None, prefixes: float
) -> None:
    """1,600 solutions of 8 steps, half of them wrong; the last step of each is known."""
    settings = MonteCarloConfig.model_validate({"stop_early": False, "num_rollouts": 4, **config})
    line = monte_carlo_cost(settings, sizes(**changes), max_judged)
    assert line.calls == pytest.approx(4 * prefixes)
    assert line.work == f"{settings.mode}: {prefixes:,.0f} steps x 4"


def test_written_questions_by_hand() -> None:
    config = WriteQuestionsConfig(engine=WriterApi(kind="gemini", model="m"), per_image=2, max_images=10, num_checks=3)
    model = ModelCost(input_price=1.0, output_price=4.0)
    written = write_questions_cost(config, sizes(question_tokens=100.0), model)
    read, replies = 20 * (250 + 258 + 6 * (70 + 100) + 3 * 258), 20 * (180 + 6 * 10)
    assert (written.calls, written.tokens, written.gpu_hours) == (20 * 7, read + replies, 0)
    assert written.dollars == pytest.approx((read + replies * 4) / 1e6)
    assert write_questions_cost(config, sizes(written_images=5), model).calls == 10 * 7
    assert write_questions_cost(config, sizes(), ModelCost(parameters=8e9)).gpu_hours > 0


def test_graded_answers_by_hand() -> None:
    graded = equivalence_cost(
        sizes(question_tokens=100.0, graded_answers=2.5), ModelCost(input_price=500, output_price=2000)
    )
    assert graded.calls == 150 * 2.5
    assert graded.dollars == pytest.approx(375 * (220 * 500 + 10 * 2000) / 1e6)
    assert graded.notes == ("equivalence assumes 2.5 distinct answers a question to ask about",)


def test_a_budget_that_ends_grading_is_told_and_without_sampling_nothing_is_graded() -> None:
    words = (
        *PUBLISHED, "sample.equivalence.engine={kind: gemini, model: gemini-2.5-flash}",
        "apis.gemini-2.5-flash.max_cost_usd=1", "apis.gemini-3.5-flash-lite.max_cost_usd=1000",
    )  # fmt: skip
    result = estimated(*words)
    assert result.notes[-1].startswith("equivalence will stop at max_cost_usd=1, before the end: $")
    assert not any("judge will stop" in note for note in result.notes)
    unsampled = estimated(*words, "without=[sample]")
    assert not {"sample", "equivalence"} & {line.step for line in unsampled.lines}


def test_documents_are_read_by_the_steps_that_ask_for_them() -> None:
    short = sizes(question_tokens=100.0, document_tokens=900.0)
    without_documents = sizes(question_tokens=100.0, document_tokens=0.0)

    def difference(cost: Any, config: Any, *arguments: Any) -> float:
        tokens: float = cost(config, short, *arguments).tokens - cost(config, without_documents, *arguments).tokens
        return tokens

    # null: as many as the checkpoint was trained on.
    assert difference(score_cost, ScoreConfig()) == 50 * 900
    assert difference(score_cost, ScoreConfig(num_documents=0)) == 0
    assert difference(states_cost, StatesConfig(num_documents=2)) == 100 * 900
    rolling = {"num_documents": 1, "stop_early": False}
    rolled = difference(monte_carlo_cost, MonteCarloConfig.model_validate(rolling), None)
    assert rolled == pytest.approx(1600 * 8 * 0.1 * 900)
    assert difference(sample_cost, SampleConfig()) == 0
    assert difference(judge_cost, JudgeConfig(engine=API), ModelCost()) == (1600 + 3200) * 900


def test_prices_and_gpus() -> None:
    slow, fast = estimated(*PUBLISHED), estimated(*PUBLISHED, "plan.gpu=H100")
    assert slow.gpu_hours / fast.gpu_hours == pytest.approx(989 / 312)
    assert slow.gpu_dollars == slow.gpu_hours * 2.5
    assert estimated(*PUBLISHED, "plan.dollars_per_gpu_hour=1.0").gpu_dollars == slow.gpu_hours
    with pytest.raises(ValueError, match="gpu 'A1000' is not in the table; known: A100-80G"):
        score_cost(ScoreConfig(), sizes(gpu="A1000"))


def test_notes_say_what_a_reader_would_ask() -> None:
    words = (*PUBLISHED, "sample.num_samples_train=16", "plan.steps=8")
    notes = estimated(*words, "plan.gpu=L4", "plan.text_parameters=70e9", "monte_carlo.stop_early=true").notes
    assert notes == (
        "140 GB of weights do not fit one L4 (24 GB): shard the model",
        "states take 21 GB: keep the training split only, on shared storage",
        "monte_carlo assumes that 50% of the answers are wrong and that 10% of the steps are uncertain",
    )
    assert estimated(*words, "plan.train_questions=100", "monte_carlo.mode=all").notes == ()


@pytest.mark.parametrize(
    ("stored", "shown"),
    [(12, "12 B"), (2048, "2.05 kB"), (1.5e6, "1.5 MB"), (84e9, "84 GB"), (1.2e12, "1.2 TB"), (5e15, "5,000.0 TB")],
)
def test_size(stored: float, shown: str) -> None:
    assert size(stored) == shown


def test_the_table_shows_each_step_the_totals_and_the_assumptions() -> None:
    console = Console(width=150, file=io.StringIO(), record=True)
    console.print(rendered(published()))
    shown = console.export_text()
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    rows = {row[0]: row[1:] for row in table}
    steps = ["embed", "index", "sample", "judge", "monte_carlo", "review", "states", "train_two_tower", "score"]
    assert list(rows) == [*steps, "total"]
    assert rows["judge"][:2] == ["100,000 steps in 10,000 calls", "10,000"]
    assert rows["judge"][3] == "2,500.00"
    assert rows["train_two_tower"][4:6] == ["192.00", "480.00"]
    assert rows["embed"][4] == "< 0.01"
    assert rows["total"][3] == "3,400.00"
    assert "4 x A100-80G at $2.50 an hour each" in shown
    assert "expect a factor of two either way" in shown


def test_a_policy_behind_an_api_is_paid_by_the_token_and_reads_each_prompt() -> None:
    policy = ModelCost(input_price=2, output_price=8)
    config = SampleConfig(engine=PolicyApi(kind="openai"), num_documents=1, top_k=0)
    sample, drawn = sample_cost(config, sizes(**SHORT, policy=policy)), (100 * 16 + 50 * 64) * 1.25
    assert (sample.calls, sample.gpu_hours) == (drawn, 0)
    assert sample.dollars == pytest.approx((drawn * 1000 * 2 + drawn * 200 * 8) / 1e6)


def test_trees_are_counted_and_bounded_by_their_tokens() -> None:
    """Rollouts of a node at depths 1 to 4: 10, 6, 5 and 5."""
    short = sizes(steps=4.0, solution_tokens=200.0, question_tokens=100.0)
    search = tree_search_cost(TreeSearchConfig(num_documents=0), short)
    assert search.calls == 6000
    assert search.tokens == 100 * 100 + 6000 * (50 + 6.5 * 100)
    bounded = tree_search_cost(TreeSearchConfig(num_documents=0, max_tree_tokens=1000), short)
    assert bounded.tokens == 100 * (100 + 1000)
    assert tree_search_cost(TreeSearchConfig(splits=("test",)), short).calls == 0


def test_what_is_left_out_has_neither_line_nor_note() -> None:
    left_out = {"tree_search", "judge", "states", "monte_carlo"}
    words = (*PUBLISHED, "apis.gemini-3.5-flash-lite.max_cost_usd=0", f"without=[{','.join(sorted(left_out))}]")
    result = estimated(*words)
    assert not left_out & {line.step for line in result.lines}
    assert result.notes == ()
