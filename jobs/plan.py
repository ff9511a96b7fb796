"""--dry-run: what a recipe would do and cost, by arithmetic; nothing is read and no engine is started."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rich.console import Console

from jobs.graph import Step
from jobs.recipe import Recipe, asking
from jobs.step import Run
from medmm_ray.config import ConfigError
from medmm_ray.engines.llm.client import ApiConfig, check_tier, configured_price
from medmm_ray.engines.llm.prices import Price, price_warnings
from medmm_ray.engines.llm.probe import ApiModel
from medmm_ray.estimate import GPUS, Estimate, Plan, estimate, rendered
from medmm_ray.steps.judge import APIS

VERDICT_TOKENS = {"json": 70, "lines": 6}  # that a judge writes a step
READ_DOCUMENTS = ("tree_search", "sample", "judge", "monte_carlo", "train_text_prm", "states", "score")


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
    result = _with_second_judge(recipe, run, estimate(plan_of(recipe, run), left_out))
    notes = (*price_notes(asking(recipe)), *replaced(recipe), *result.notes)
    console.print(rendered(replace(result, notes=notes)))


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
    judge, rolls, tree, writer = recipe.judge, recipe.monte_carlo, recipe.tree_search, recipe.write_questions
    grader = recipe.sample.equivalence
    policy = _price(recipe.sample.backend, recipe.models.policy, recipe.sample)
    judging = _price(judge.backend, judge.model, judge)
    writing = _price(writer.backend, writer.model, writer) if writer.per_image else None
    grading = _price(grader.backend, grader.model, grader)
    reached = not rolls.threshold and (rolls.stop_early or rolls.searches)  # from a prefix of a right solution
    budgets = {"sample": recipe.sample, "equivalence": grader, "judge": judge, "write_questions": writer}
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
        images=train + test + recipe.ingest.num_extra_images,
        reference_images=recipe.train_two_tower.num_references,
        steps=assumed.steps,
        question_tokens=assumed.question_tokens,
        solution_tokens=assumed.solution_tokens,
        document_tokens=assumed.document_tokens,
        with_documents=tuple(name for name in READ_DOCUMENTS if getattr(recipe, name).num_documents),
        wrong_share=assumed.wrong_share,
        policy_parameters=0 if policy else assumed.policy_parameters,
        policy_input_price=policy.input_price if policy else 0,
        policy_output_price=policy.output_price if policy else 0,
        text_parameters=assumed.text_parameters,
        image_parameters=assumed.image_parameters,
        hidden_size=assumed.hidden_size,
        policy_epochs=0 if run.given("policy") else recipe.train_policy.epochs,
        text_epochs=0 if run.given("text_prm") else recipe.train_text_prm.epochs,
        text_solutions=recipe.train_text_prm.max_solutions,
        fusion_epochs=0 if run.given("two_tower") else recipe.train_two_tower.epochs,
        written_images=_written_images(recipe),
        questions_per_image=writer.per_image,
        question_checks=writer.num_checks,
        writer_parameters=0 if writing else assumed.policy_parameters,
        writer_image_tokens=writing.usual_image_tokens if writing else Plan.writer_image_tokens,
        writer_input_price=writing.input_price if writing else 0,
        writer_output_price=writing.output_price if writing else 0,
        graded_answers=assumed.graded_answers if grading else 0,
        grader_input_price=grading.input_price if grading else 0,
        grader_output_price=grading.output_price if grading else 0,
        judge_calls=judge.backend != "phantom",
        judge_splits=judge.splits,
        judged_solutions=judge.max_solutions,
        judge_parameters=_judge_parameters(recipe),
        judge_images=min(1 + judge.num_references, judge.num_images if judge.backend == "vllm" else judge.max_images),
        judge_solutions_per_call=judge.solutions_per_call,
        judge_by_step=judge.granularity == "step",
        verdict_tokens=VERDICT_TOKENS[judge.reply],
        image_tokens=judging.usual_image_tokens if judging else Plan.image_tokens,
        judge_input_price=judging.input_price if judging else 0,
        judge_cached_input_price=judging.cached_input_price if judging and judge.warm_cache else None,
        judge_output_price=judging.output_price if judging else 0,
        max_dollars={name: c.max_cost_usd for name, c in budgets.items() if c.max_cost_usd is not None},
        rollout_mode=rolls.mode,
        rollout_splits=rolls.splits,
        rollout_solutions=rolls.max_solutions,
        right_is_free=rolls.wrong_only or reached,
        uncertain_share=assumed.uncertain_share,
        max_share=rolls.max_share,
        continuations=rolls.rollouts_per_prefix,
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


def _price(backend: str, model: str | None, config: ApiConfig) -> Price | None:
    """What the ledger of a model behind an API will charge at the section's tier; None where it is none."""
    if backend not in APIS:
        return None
    assert model is not None, "its config asks for one"
    check_tier(backend, config)
    return configured_price(model, config).at_tier(config.tier)


def price_notes(sections: Mapping[str, ApiModel]) -> list[str]:
    """What is to be told of the prices of the models that sections ask: their age, a model's end, a tier."""
    notes = []
    for section, asked in sections.items():
        config = asked.config
        notes += [f"{section}: {told}" for told in price_warnings(asked.model, config.input_price, config.output_price)]
        if config.tier:
            share = configured_price(asked.model, config).flex
            notes.append(
                f"{section} is priced at the flex tier, {share:.0%} of the list price; what is served at the standard "
                "one costs the whole, and the budget reserves that"
            )
    return notes


def _judge_parameters(recipe: Recipe) -> float:
    """Of a judge on own GPUs: as the plan says, else as many as the policy has."""
    if recipe.judge.backend != "vllm":
        return 0
    said = recipe.plan.judge_parameters
    return recipe.plan.policy_parameters if said is None else said


def _written_images(recipe: Recipe) -> int:
    """Images for which questions are written."""
    if not recipe.write_questions.per_image:
        return 0
    known = [n for n in (recipe.plan.written_images, recipe.write_questions.max_images) if n is not None]
    if not known:
        raise ConfigError(
            "the number of images without a question is not known before the source is read; say plan.written_images=N "
            "or write_questions.max_images=N"
        )
    return min(known)


def replaced(recipe: Recipe) -> list[str]:
    """Where the plan's word stands in place of what the recipe says, or of a model whose size nobody named."""
    plan, notes = recipe.plan, []
    limits = {"train": (recipe.curate.max_train, recipe.ingest.num_train)}
    limits |= {"test": (recipe.curate.max_test, recipe.ingest.num_test)}
    for split, said in (("train", plan.train_questions), ("test", plan.test_questions)):
        limit = next((number for number in limits[split] if number is not None), said)
        if said != limit and said is not None:
            notes.append(
                f"plan.{split}_questions={said:,} stands in place of the {limit:,} to which the recipe limits it"
            )
    judge, writer = recipe.judge, recipe.write_questions
    local = {"judge": judge.model} if judge.backend == "vllm" and plan.judge_parameters is None else {}
    local |= {"write_questions": writer.model} if writer.backend == "vllm" and writer.per_image else {}
    for step, model in local.items():
        if model not in (None, recipe.models.policy):
            size = f"{plan.policy_parameters / 1e9:g}B parameters"
            notes.append(f"{step}: the size of {model} is not known; it is taken to be the policy's, {size}")
    return notes


def _questions(assumed: int | None, limit: int | None, asked: int | None, split: str) -> int:
    found = next((number for number in (assumed, limit, asked) if number is not None), None)
    if found is None:
        raise ConfigError(
            f"the number of {split} questions is not known before the source is read; say plan.{split}_questions=N"
        )
    return found
