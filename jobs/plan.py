"""--dry-run: what a recipe would do and cost, by arithmetic; nothing is read and no engine is started."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rich.console import Console

from jobs.graph import Step
from jobs.recipe import Recipe, api_engines, asking
from jobs.step import Run
from medmm_ray.config import ConfigError
from medmm_ray.engines.llm.access import check_tier, configured_price
from medmm_ray.engines.llm.client import ApiConfig, ApiEngine
from medmm_ray.engines.llm.prices import Price, price_warnings
from medmm_ray.engines.llm.probe import ApiModel
from medmm_ray.engines.vllm_engine import VllmEngine
from medmm_ray.estimate import (
    GPUS,
    Estimate,
    Grading,
    Hardware,
    Judging,
    ModelCost,
    Plan,
    QuestionWriting,
    Reviewing,
    Rollouts,
    Training,
    Trees,
    Workload,
    estimate,
    rendered,
)
from medmm_ray.steps.judge import JudgeApi, JudgeConfig, JudgeVllm, PhantomEngine

VERDICT_TOKENS = {"json": 70, "lines": 6}  # that a judge generates a step
DOCUMENT_STEPS = ("tree_search", "sample", "judge", "monte_carlo", "train_text_prm", "states", "score")


def print_plan(recipe: Recipe, steps: Sequence[Step], console: Console) -> None:
    """The steps with what is there already, then calls, tokens, dollars and GPU-hours by step."""
    run = Run(recipe, asks_stores=False)
    console.print("[bold]Steps[/bold]")
    for step in steps:
        console.print(f"  {step.name:<18}{step.what:<40}{_state(run, step)}", highlight=False)
    console.print()
    left_out = [step.name for step in steps if step.name in recipe.without]
    result = _with_second_judge(recipe, run, estimate(plan_of(recipe, run), left_out))
    notes = (*price_notes(asking(recipe)), *replaced(recipe), *result.notes)
    console.print(rendered(replace(result, notes=notes)))


def _state(run: Run, step: Step) -> str:
    if step.name in run.recipe.without:
        return "left out"
    if run.skipped(step):
        return "left out: its model is given"
    is_local = "://" not in run.root
    return "complete" if is_local and run.is_complete(step) else "to do"


def _with_second_judge(recipe: Recipe, run: Run, result: Estimate) -> Estimate:
    """The estimate with a line for the second judge, where there is one."""
    if recipe.second_judge is None or "judge" in recipe.without:
        return result
    plan = plan_of(recipe.model_copy(update={"judge": recipe.second_judge}), run)
    line = replace(estimate(plan).line("judge"), step="second_judge")
    return replace(result, lines=(*result.lines, line))


def plan_of(recipe: Recipe, run: Run) -> Plan:
    """The numbers that decide the cost: the recipe's own, and the assumptions of its section ``plan``."""
    assumed = recipe.plan
    if assumed.gpu not in GPUS:
        raise ConfigError(f"plan.gpu is {assumed.gpu!r}; known: {', '.join(GPUS)}")
    policy_price = _price(recipe, "sample")
    workload = _workload(recipe)
    return Plan(
        workload=workload,
        policy=_model(policy_price, assumed.policy_parameters),
        training=_training(recipe, run),
        writing=_writing(recipe),
        grading=_grading(recipe),
        judging=_judging(recipe, recipe.judge),
        rollouts=_rollouts(recipe),
        trees=_trees(recipe, workload.train_questions),
        reviewing=Reviewing(steps=recipe.review.review_steps, dollars_per_step=recipe.audit.dollars_per_reviewed_step),
        hardware=Hardware(
            gpu=assumed.gpu, num_gpus=assumed.num_gpus, dollars_per_gpu_hour=assumed.dollars_per_gpu_hour
        ),
        max_dollars=_budgets(recipe),
    )


def _workload(recipe: Recipe) -> Workload:
    assumed = recipe.plan
    train = _questions(assumed.train_questions, recipe.curate.max_train, recipe.ingest.num_train, "train")
    test = _questions(assumed.test_questions, recipe.curate.max_test, recipe.ingest.num_test, "test")
    return Workload(
        train_questions=train,
        test_questions=test,
        train_samples=recipe.sample.num_samples_train,
        test_samples=recipe.sample.num_samples_test,
        images=train + test + recipe.ingest.num_extra_images,
        reference_images=recipe.train_two_tower.num_references,
        steps=assumed.steps,
        question_tokens=assumed.question_tokens,
        solution_tokens=assumed.solution_tokens,
        document_tokens=assumed.document_tokens,
        with_documents=tuple(name for name in DOCUMENT_STEPS if getattr(recipe, name).num_documents != 0),
        wrong_share=assumed.wrong_share,
    )


def _questions(assumed: int | None, curated: int | None, ingested: int | None, split: str) -> int:
    for number in (assumed, curated, ingested):
        if number is not None:
            return number
    raise ConfigError(
        f"the number of {split} questions is not known before the source is read; say plan.{split}_questions=N"
    )


def _training(recipe: Recipe, run: Run) -> Training:
    assumed = recipe.plan
    return Training(
        text_parameters=assumed.text_parameters,
        image_parameters=assumed.image_parameters,
        hidden_size=assumed.hidden_size,
        policy_epochs=0 if run.given("policy") else recipe.train_policy.epochs,
        text_epochs=0 if run.given("text_prm") else recipe.train_text_prm.epochs,
        text_solutions=recipe.train_text_prm.max_solutions,
        fusion_epochs=0 if run.given("two_tower") else recipe.train_two_tower.epochs,
    )


def _writing(recipe: Recipe) -> QuestionWriting:
    writer = recipe.write_questions
    price = _price(recipe, "write_questions") if writer.per_image else None
    return QuestionWriting(
        model=_model(price, recipe.plan.policy_parameters),
        images=_written_images(recipe),
        questions_per_image=writer.per_image,
        checks=writer.num_checks,
    )


def _written_images(recipe: Recipe) -> int:
    """Images for which questions are written."""
    if not recipe.write_questions.per_image:
        return 0
    limits = [n for n in (recipe.plan.written_images, recipe.write_questions.max_images) if n is not None]
    if not limits:
        raise ConfigError(
            "the number of images without a question is not known before the source is read; say plan.written_images=N "
            "or write_questions.max_images=N"
        )
    return min(limits)


def _grading(recipe: Recipe) -> Grading:
    price = _price(recipe, "sample.equivalence")
    if price is None:
        return Grading()
    return Grading(model=_model(price, 0), answers=recipe.plan.graded_answers)


def _judging(recipe: Recipe, judge: JudgeConfig) -> Judging:
    engine = judge.engine
    is_local = isinstance(engine, JudgeVllm)
    parameters = recipe.plan.judge_parameters
    if parameters is None:
        parameters = recipe.plan.policy_parameters
    price = None
    max_images = engine.num_images if isinstance(engine, JudgeVllm) else 0
    if isinstance(engine, JudgeApi):
        price = _price_of(engine, engine.model, recipe.apis)
        max_images = engine.max_images
    model = _model(price, parameters if is_local else 0)
    if not judge.warm_cache:
        model = replace(model, cached_input_price=None)
    return Judging(
        model=model,
        calls_model=not isinstance(engine, PhantomEngine),
        splits=judge.splits,
        max_solutions=judge.max_solutions,
        solutions_per_call=judge.solutions_per_call,
        by_step=judge.granularity == "step",
        images=min(1 + judge.num_references, max_images),
        verdict_tokens=VERDICT_TOKENS[judge.reply],
    )


def _rollouts(recipe: Recipe) -> Rollouts:
    config = recipe.monte_carlo
    # A right solution shows for each of its prefixes that the answer can be reached from it.
    is_shown = not config.threshold and (config.stop_early or config.searches)
    return Rollouts(
        mode=config.mode,
        splits=config.splits,
        max_solutions=config.max_solutions,
        right_is_free=config.wrong_only or is_shown,
        uncertain_share=recipe.plan.uncertain_share,
        max_share=config.max_share,
        continuations=config.rollouts_per_prefix,
    )


def _trees(recipe: Recipe, train_questions: int) -> Trees:
    config = recipe.tree_search
    depths = range(1, round(recipe.plan.steps) + 1)
    rollouts = [max(config.min_rollouts, config.num_rollouts // (depth + 1)) for depth in depths]
    return Trees(
        questions=train_questions if "train" in config.splits else 0,
        nodes=config.max_nodes,
        node_rollouts=sum(rollouts) / len(rollouts),
        max_tokens=config.max_tree_tokens,
    )


def _budgets(recipe: Recipe) -> dict[str, float]:
    """The hard budgets that the recipe sets, by line of the estimate."""
    budgets = {}
    for section, (_, model) in api_engines(recipe).items():
        budget = recipe.apis.get(model, ApiConfig()).max_cost_usd
        if budget is not None:
            budgets[section.removeprefix("sample.")] = budget
    return budgets


def _model(price: Price | None, parameters: float) -> ModelCost:
    """A model behind an API by its price, else one of so many parameters on own GPUs."""
    if price is None:
        return ModelCost(parameters=parameters)
    return ModelCost(
        input_price=price.input_price,
        output_price=price.output_price,
        cached_input_price=price.cached_input_price,
        image_tokens=price.usual_image_tokens,
    )


def _price(recipe: Recipe, section: str) -> Price | None:
    """What a section's model behind an API costs; None where it asks none."""
    if section not in api_engines(recipe):
        return None
    engine, model = api_engines(recipe)[section]
    return _price_of(engine, model, recipe.apis)


def _price_of(engine: ApiEngine, model: str, apis: Mapping[str, ApiConfig]) -> Price:
    """What the ledger of a model behind an API will charge at its tier."""
    config = apis.get(model, ApiConfig())
    check_tier(engine, config)
    return configured_price(model, config).at_tier(config.tier)


def price_notes(sections: Mapping[str, ApiModel]) -> list[str]:
    """What to know of the prices of the models that sections ask: their age, a model's end, a tier."""
    notes = []
    for section, model in sections.items():
        config = model.config
        warnings = price_warnings(model.model, config.input_price, config.output_price)
        notes += [f"{section}: {warning}" for warning in warnings]
        if config.tier:
            share = configured_price(model.model, config).flex
            notes.append(
                f"{section} is priced at the flex tier, {share:.0%} of the list price; what is served at the standard "
                "one costs the whole, and the budget reserves that"
            )
    return notes


def replaced(recipe: Recipe) -> list[str]:
    """Where the plan's number stands in place of the recipe's, or of a model whose size nobody named."""
    plan, curate, ingest = recipe.plan, recipe.curate, recipe.ingest
    notes = []
    for split, assumed, limits in (
        ("train", plan.train_questions, (curate.max_train, ingest.num_train)),
        ("test", plan.test_questions, (curate.max_test, ingest.num_test)),
    ):
        limit = next((number for number in limits if number is not None), assumed)
        if assumed is not None and assumed != limit:
            notes.append(
                f"plan.{split}_questions={assumed:,} stands in place of the {limit:,} to which the recipe limits it"
            )
    size = f"{plan.policy_parameters / 1e9:g}B parameters"
    for step, model in _models_of_unknown_size(recipe).items():
        notes.append(f"{step}: the size of {model} is not known; it is taken to be the policy's, {size}")
    return notes


def _models_of_unknown_size(recipe: Recipe) -> dict[str, str]:
    """The models on own GPUs, beside the policy, that a section names and the plan gives no parameters of."""
    judge, writer = recipe.judge.engine, recipe.write_questions.engine
    models: dict[str, str | None] = {}
    if isinstance(judge, JudgeVllm) and recipe.plan.judge_parameters is None:
        models["judge"] = judge.model
    if isinstance(writer, VllmEngine) and recipe.write_questions.per_image:
        models["write_questions"] = writer.model
    return {step: model for step, model in models.items() if model is not None and model != recipe.models.policy}
