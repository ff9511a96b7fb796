"""--dry-run: what a recipe would do and cost, by arithmetic; nothing is read and no engine is started."""

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from jobs.graph import Step
from jobs.recipe import Recipe
from jobs.step import Run
from medmm_ray.config import ConfigError
from medmm_ray.engines.prices import Price, price_of
from medmm_ray.estimate import GPUS, Estimate, Plan, estimate, rendered
from medmm_ray.judge import APIS

VERDICT_TOKENS = {"json": 70, "lines": 6}  # that a judge writes a step


def print_plan(recipe: Recipe, steps: Sequence[Step], console: Console) -> None:
    """The steps with what is there already, then calls, tokens, dollars and GPU-hours by step."""
    run = Run(recipe)
    console.print("[bold]Steps[/bold]")
    for step in steps:
        state = (
            "left out"
            if step.name in recipe.without
            else "left out: its model is given"
            if run.skipped(step)
            else "complete"
            if "://" not in run.root and run.is_complete(step)
            else "to do"
        )
        console.print(f"  {step.name:<18}{step.what:<40}{state}", highlight=False)
    console.print()
    left_out = [step.name for step in steps if step.name in recipe.without]
    console.print(rendered(_with_second_judge(recipe, run, estimate(plan_of(recipe, run), left_out))))


def _with_second_judge(recipe: Recipe, run: Run, found: Estimate) -> Estimate:
    """The estimate with a line for the second judge, where there is one."""
    if recipe.second_judge is None or "judge" in recipe.without:
        return found
    alone = plan_of(recipe.model_copy(update={"judge": recipe.second_judge}), run)
    second = replace(estimate(alone).line("judge"), step="second_judge")
    return replace(found, lines=(*found.lines, second))


def plan_of(recipe: Recipe, run: Run) -> Plan:
    """The numbers that decide the cost: the recipe's own, and the assumptions of its section ``plan``."""
    assumed = recipe.plan
    if assumed.gpu not in GPUS:
        raise ConfigError(f"plan.gpu is {assumed.gpu!r}; known: {', '.join(GPUS)}")
    price, policy = _judge_price(recipe), _policy_price(recipe)
    tree = recipe.tree_search
    rollouts = [
        max(tree.min_rollouts, tree.num_rollouts // (depth + 1)) for depth in range(1, round(assumed.steps) + 1)
    ]
    train = _questions(assumed.train_questions, recipe.curate.max_train, recipe.ingest.num_train, "train")
    test = _questions(assumed.test_questions, recipe.curate.max_test, recipe.ingest.num_test, "test")
    return Plan(
        train_questions=train,
        test_questions=test,
        train_samples=recipe.sample.num_samples_train,
        test_samples=recipe.sample.num_samples_test,
        images=train + test,
        reference_images=recipe.judge.num_references,
        steps=assumed.steps,
        question_tokens=assumed.question_tokens,
        solution_tokens=assumed.solution_tokens,
        document_tokens=assumed.document_tokens,
        policy_parameters=0 if policy else assumed.policy_parameters,
        policy_dollars_per_million_read=policy.read if policy else 0,
        policy_dollars_per_million_written=policy.written if policy else 0,
        text_parameters=assumed.text_parameters,
        image_parameters=assumed.image_parameters,
        hidden_size=assumed.hidden_size,
        policy_epochs=0 if run.given("policy") else recipe.train_policy.epochs,
        text_epochs=0 if run.given("text_prm") else recipe.train_text_prm.epochs,
        fusion_epochs=0 if run.given("two_tower") else recipe.train_two_tower.epochs,
        judged_solutions=assumed.judged_solutions or recipe.judge.max_solutions,
        judge_parameters=assumed.judge_parameters,
        judge_solutions_per_call=recipe.judge.solutions_per_call,
        judge_by_step=recipe.judge.granularity == "step",
        judge_max_dollars=recipe.judge.max_cost_usd,
        verdict_tokens=VERDICT_TOKENS[recipe.judge.reply],
        judge_dollars_per_call=assumed.judge_dollars_per_call,
        judge_dollars_per_million_read=price.read,
        judge_dollars_per_million_cached=price.cached if recipe.judge.warm_cache else None,
        judge_dollars_per_million_written=price.written,
        uncertain_share=recipe.monte_carlo.max_share,
        continuations=recipe.monte_carlo.rollouts,
        trees=train if "train" in tree.splits else 0,
        tree_nodes=tree.max_nodes,
        node_rollouts=sum(rollouts) / len(rollouts),
        tree_tokens=tree.max_tree_tokens,
        review_steps=recipe.review.review_steps,
        dollars_per_reviewed_step=recipe.audit.dollars_per_reviewed_step,
        gpu=assumed.gpu,
        num_gpus=assumed.num_gpus,
        dollars_per_gpu_hour=assumed.dollars_per_gpu_hour,
    )


def _judge_price(recipe: Recipe) -> Price:
    """What the plan says; else, for an API that is not priced by the call, what the judge's ledger will charge."""
    plan, config = recipe.plan, recipe.judge
    stated = plan.judge_dollars_per_million_read or plan.judge_dollars_per_million_written
    if stated or plan.judge_dollars_per_call or config.model is None or config.backend not in APIS:
        read = plan.judge_dollars_per_million_read
        return Price(read, read, plan.judge_dollars_per_million_written)
    return price_of(config.model, config.price_read, config.price_written, config.price_cached)


def _policy_price(recipe: Recipe) -> Price | None:
    """Of a policy behind an API; None where it is a checkpoint."""
    config, model = recipe.sample, recipe.models.policy
    if config.backend not in APIS or model is None:
        return None
    return price_of(model, config.price_read, config.price_written, config.price_cached)


def _questions(assumed: int | None, limit: int | None, asked: int | None, split: str) -> int:
    found = next((number for number in (assumed, limit, asked) if number is not None), None)
    if found is None:
        raise ConfigError(
            f"the number of {split} questions is not known before the source is read; say plan.{split}_questions=N"
        )
    return found
