"""--dry-run: what a recipe would do and cost, by arithmetic; nothing is read and no engine is started."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from rich.console import Console

from jobs.graph import Step
from jobs.recipe import Recipe, api_engines, asking, judges
from jobs.step import Run
from medmm_ray.config import ConfigError
from medmm_ray.engines.grader import equivalence_cost
from medmm_ray.engines.llm.access import check_tier, configured_price
from medmm_ray.engines.llm.client import ApiConfig
from medmm_ray.engines.llm.prices import Price, price_warnings
from medmm_ray.engines.llm.probe import ApiModel
from medmm_ray.engines.vllm_engine import VllmEngine
from medmm_ray.estimate import BF16, GPUS, Estimate, Line, ModelCost, Sizes, rendered, size
from medmm_ray.steps.embed import embed_cost
from medmm_ray.steps.index import index_cost
from medmm_ray.steps.judge import JudgeVllm
from medmm_ray.steps.judge.cost import judge_cost
from medmm_ray.steps.monte_carlo.cost import monte_carlo_cost
from medmm_ray.steps.review import review_cost
from medmm_ray.steps.sample import sample_cost
from medmm_ray.steps.score.cost import score_cost, states_cost
from medmm_ray.steps.tree_search.cost import tree_search_cost
from medmm_ray.steps.write_questions.cost import write_questions_cost
from medmm_ray.train.config import TrainConfig
from medmm_ray.train.cost import train_policy_cost, train_text_prm_cost, train_two_tower_cost

TrainConfigT = TypeVar("TrainConfigT", bound=TrainConfig)


def print_plan(recipe: Recipe, steps: Sequence[Step], console: Console) -> None:
    """The steps with what is there already, then calls, tokens, dollars and GPU-hours by step."""
    run = Run(recipe, asks_stores=False)
    console.print("[bold]Steps[/bold]")
    for step in steps:
        console.print(f"  {step.name:<18}{step.what:<40}{_state(run, step)}", highlight=False)
    console.print()
    left_out = [step.name for step in steps if step.name in recipe.without]
    result = _with_second_judge(recipe, estimate(recipe, run, left_out))
    notes = (*price_notes(asking(recipe)), *replaced(recipe), *result.notes)
    console.print(rendered(replace(result, notes=notes)))


def _state(run: Run, step: Step) -> str:
    if step.name in run.recipe.without:
        return "left out"
    if run.skipped(step):
        return "left out: its model is given"
    is_local = "://" not in run.root
    return "complete" if is_local and run.is_complete(step) else "to do"


def _with_second_judge(recipe: Recipe, result: Estimate) -> Estimate:
    """The estimate with a line for the second judge, where there is one."""
    judge = recipe.second_judge
    if judge is None or "judge" in recipe.without:
        return result
    line = judge_cost(judge, result.sizes, _model(recipe, "second_judge"))
    return replace(result, lines=(*result.lines, replace(line, step="second_judge")))


def estimate(recipe: Recipe, run: Run, without: Collection[str] = (), next_policy_epochs: int = 0) -> Estimate:
    """What the steps of a recipe cost, those in `without` left out.

    `next_policy_epochs` are those in which a further policy is trained, as the first one is.
    """
    if "sample" in without:  # whose answers would be graded
        without = (*without, "equivalence")
    sizes = sizes_of(recipe)
    lines = [line for line in _lines(recipe, run, sizes, next_policy_epochs) if line.step not in without]
    notes = _memory_notes(recipe, sizes, lines)
    for line in lines:
        notes += line.notes
    return Estimate(sizes, tuple(lines), (*notes, *_budget_notes(recipe, lines)))


def _lines(recipe: Recipe, run: Run, sizes: Sizes, next_policy_epochs: int) -> list[Line]:
    """The lines of all steps, in the order of the table."""
    policy = _trained(recipe.train_policy, run.given("policy"), next_policy_epochs)
    lines = []
    if recipe.write_questions.per_image:
        lines.append(write_questions_cost(recipe.write_questions, sizes, _model(recipe, "write_questions")))
    lines += [
        embed_cost(sizes),
        index_cost(recipe.index, sizes),
        train_policy_cost(policy, sizes),
        tree_search_cost(recipe.tree_search, sizes),
        sample_cost(recipe.sample, sizes),
    ]
    if recipe.sample.equivalence.engine:
        lines.append(equivalence_cost(sizes, _model(recipe, "sample.equivalence")))
    lines += [
        judge_cost(recipe.judge, sizes, _model(recipe, "judge")),
        monte_carlo_cost(recipe.monte_carlo, sizes, recipe.judge.max_solutions),
        review_cost(recipe.review, recipe.audit.dollars_per_reviewed_step),
        train_text_prm_cost(_trained(recipe.train_text_prm, run.given("text_prm")), sizes),
        states_cost(recipe.states, sizes),
        train_two_tower_cost(_trained(recipe.train_two_tower, run.given("two_tower")), sizes),
        score_cost(recipe.score, sizes),
    ]
    return lines


def sizes_of(recipe: Recipe) -> Sizes:
    """What the recipe's section ``plan`` assumes, and what follows from its other sections."""
    plan, curate, ingest = recipe.plan, recipe.curate, recipe.ingest
    if plan.gpu not in GPUS:
        raise ConfigError(f"plan.gpu is {plan.gpu!r}; known: {', '.join(GPUS)}")
    train = _questions(plan.train_questions, curate.max_train, ingest.num_questions("train"), "train")
    test = _questions(plan.test_questions, curate.max_test, ingest.num_questions("test"), "test")
    derived = {
        "train_questions": train,
        "test_questions": test,
        "train_samples": recipe.sample.num_samples_train,
        "test_samples": recipe.sample.num_samples_test,
        "images": train + test + ingest.num_extra_images,
        "policy": _model(recipe, "sample"),
    }
    if recipe.gpus.count is not None and "num_gpus" not in plan.model_fields_set:
        derived["num_gpus"] = recipe.gpus.count
    return Sizes.model_validate({**dict(plan), **derived})


def _questions(assumed: int | None, curated: int | None, ingested: int | None, split: str) -> int:
    for number in (assumed, curated, ingested):
        if number is not None:
            return number
    raise ConfigError(
        f"the number of {split} questions is not known before the source is read; say plan.{split}_questions=N"
    )


def _trained(config: TrainConfigT, given_model: str | None, further_epochs: int = 0) -> TrainConfigT:
    """A training as it costs: a model that is given takes no epochs."""
    epochs = 0 if given_model else config.epochs
    return config.model_copy(update={"epochs": epochs + further_epochs})


def _memory_notes(recipe: Recipe, sizes: Sizes, lines: Sequence[Line]) -> list[str]:
    """What does not fit one GPU, or wants room on disk."""
    notes = []
    gpu = sizes.hardware.specification
    weights = BF16 * max(sizes.policy.parameters, sizes.text_parameters, _model(recipe, "judge").parameters)
    if weights > 0.9 * gpu.memory * 1e9:  # something must be left for activations
        notes.append(f"{size(weights)} of weights do not fit one {sizes.gpu} ({gpu.memory} GB): shard the model")
    for line in lines:
        if line.step == "states" and line.stored > 10e9:
            notes.append(f"states take {size(line.stored)}: keep the training split only, on shared storage")
    return notes


def _budget_notes(recipe: Recipe, lines: Sequence[Line]) -> list[str]:
    """Where a hard budget that the recipe sets ends a step."""
    notes = []
    engines = api_engines(recipe)
    for line in lines:
        section = "sample.equivalence" if line.step == "equivalence" else line.step
        if section not in engines:
            continue
        budget = recipe.apis.get(engines[section][1], ApiConfig()).max_cost_usd
        if budget is not None and line.dollars > budget:
            notes.append(f"{line.step} will stop at max_cost_usd={budget:g}, before the end: ${line.dollars:,.0f}")
    return notes


def _model(recipe: Recipe, section: str) -> ModelCost:
    """The model that a section asks: behind an API by its price, else on own GPUs by its parameters."""
    price = _price(recipe, section)
    if price is None:
        return ModelCost(parameters=_parameters(recipe, section))
    return ModelCost(
        input_price=price.input_price,
        output_price=price.output_price,
        cached_input_price=price.cached_input_price,
        image_tokens=price.usual_image_tokens,
    )


def _parameters(recipe: Recipe, section: str) -> float:
    """Parameters of a section's model on own GPUs; 0 where it has none there."""
    judge = judges(recipe).get(section)
    if judge is None:
        return recipe.plan.policy_parameters
    if not isinstance(judge.engine, JudgeVllm):
        return 0
    return recipe.plan.judge_parameters or recipe.plan.policy_parameters


def _price(recipe: Recipe, section: str) -> Price | None:
    """What the ledger of a section's model behind an API will charge at its tier; None where it asks none."""
    if section not in api_engines(recipe):
        return None
    engine, model = api_engines(recipe)[section]
    config = recipe.apis.get(model, ApiConfig())
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
        ("train", plan.train_questions, (curate.max_train, ingest.num_questions("train"))),
        ("test", plan.test_questions, (curate.max_test, ingest.num_questions("test"))),
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
