"""The arithmetic: a line for each step of a `Plan`, and what a reader should know of them."""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

from medmm_ray.estimate.plan import Plan, at_most
from medmm_ray.estimate.result import Estimate, Line, size

PATCHES = 197  # tokens of a ViT-B/16 at 224 pixels, its class token included
BYTES_A_TOKEN = 4.5  # of English text, about
BF16 = 2  # bytes
EMBEDDING_BYTES = 512 * 4  # of one image, as float32
SCORE_BYTES = 3 * 2 * 4  # of one step: three arms, text and image part, as float32
# Tokens around a question: of the prompts, and of the JSON that answers them. Thoughts are left out.
WRITE_PROMPT, WRITE_REPLY = 250, 180
CHECK_PROMPT, GRADE_PROMPT, SHORT_REPLY = 70, 120, 10


def estimate(plan: Plan, without: Collection[str] = ()) -> Estimate:
    """The costs of the steps of `plan`, those in `without` left out.

    Raises ValueError for a GPU or a step that does not exist.
    """
    lines = [cost(plan) for cost in COSTS]
    names = [line.step for line in lines]
    unknown = set(plan.known_gpu_hours) - set(names)
    if unknown:
        raise ValueError(f"known_gpu_hours names {sorted(unknown)}; the steps are {names}")
    left_out = set(without)
    if "sample" in without or not plan.grading.answers:
        left_out.add("equivalence")
    if not plan.writing.images:
        left_out.add("write_questions")
    lines_in = []
    # Hours that were measured take the place of computed ones.
    for line in lines:
        if line.step not in left_out:
            gpu_hours = plan.known_gpu_hours.get(line.step, line.gpu_hours)
            lines_in.append(replace(line, gpu_hours=gpu_hours))
    return Estimate(
        plan,
        tuple(lines_in),
        tuple(_notes(plan, {line.step: line for line in lines_in})),
    )


def _write_questions(plan: Plan) -> Line:
    writing, model = plan.writing, plan.writing.model
    questions = writing.images * writing.questions_per_image
    checks = 2 * writing.checks  # half of them with the image
    text_tokens = CHECK_PROMPT + plan.workload.question_tokens
    check_tokens = checks * text_tokens + writing.checks * model.image_tokens
    input_tokens = questions * (WRITE_PROMPT + model.image_tokens + check_tokens)
    output_tokens = questions * (WRITE_REPLY + checks * SHORT_REPLY)
    return Line(
        step="write_questions",
        work=f"{questions:,} questions, each tried {checks} times",
        calls=questions * (1 + checks),
        tokens=input_tokens + output_tokens,
        dollars=model.dollars(input_tokens, output_tokens),
        gpu_hours=model.gpu_hours(plan.hardware, input_tokens, output_tokens),
    )


def _embed(plan: Plan) -> Line:
    images = plan.workload.images
    tokens = images * PATCHES
    return Line(
        step="embed",
        work=f"{images:,} images",
        tokens=tokens,
        gpu_hours=plan.hardware.prefill_hours(plan.training.image_parameters, tokens),
        stored=images * EMBEDDING_BYTES,
    )


def _train_policy(plan: Plan) -> Line:
    work, epochs = plan.workload, plan.training.policy_epochs
    tokens = work.train_questions * (work.question_tokens + work.solution_tokens) * epochs
    return Line(
        step="train_policy",
        work=f"{epochs:g} epochs",
        tokens=tokens,
        gpu_hours=plan.hardware.training_hours(plan.policy.parameters, tokens),
        stored=plan.policy.parameters * BF16 if epochs else 0,
    )


def _tree_search(plan: Plan) -> Line:
    work, trees = plan.workload, plan.trees
    nodes = trees.questions * trees.nodes
    # A node lies halfway through its solution, in the mean; what it continues comes from the prefix cache.
    input_tokens = trees.questions * work.prefix_tokens("tree_search")
    step_tokens = work.solution_tokens / work.steps
    rollout_tokens = trees.node_rollouts * work.solution_tokens / 2
    output_tokens = nodes * (step_tokens + rollout_tokens)
    if trees.max_tokens is not None:
        output_tokens = min(output_tokens, trees.questions * trees.max_tokens)
    return Line(
        step="tree_search",
        work=f"{nodes:,} nodes at most",
        calls=nodes,
        tokens=input_tokens + output_tokens,
        gpu_hours=plan.policy.gpu_hours(plan.hardware, input_tokens, output_tokens),
        stored=nodes * work.solution_tokens / work.steps * BYTES_A_TOKEN,
    )


def _sample(plan: Plan) -> Line:
    work, policy = plan.workload, plan.policy
    samples = work.solutions * work.oversampling
    # The prefix cache of an engine takes in a question once for all of its samples; an API is sent it for each.
    is_api = policy.parameters == 0
    input_tokens = (samples if is_api else work.questions) * work.prefix_tokens("sample")
    output_tokens = samples * work.solution_tokens
    return Line(
        step="sample",
        work=f"{work.solutions:,} solutions kept of {samples:,.0f}",
        calls=samples if is_api else 0,
        tokens=input_tokens + output_tokens,
        dollars=policy.dollars(input_tokens, output_tokens),
        gpu_hours=policy.gpu_hours(plan.hardware, input_tokens, output_tokens),
        stored=work.solutions * work.solution_tokens * BYTES_A_TOKEN,
    )


def _equivalence(plan: Plan) -> Line:
    work, grading = plan.workload, plan.grading
    calls = work.questions * grading.answers
    input_tokens = calls * (GRADE_PROMPT + work.question_tokens)
    output_tokens = calls * SHORT_REPLY
    return Line(
        step="equivalence",
        work=f"{grading.answers:g} answers a question",
        calls=calls,
        tokens=input_tokens + output_tokens,
        dollars=grading.model.dollars(input_tokens, output_tokens),
    )


def _judge(plan: Plan) -> Line:
    work, judging, model = plan.workload, plan.judging, plan.judging.model
    questions = solutions = 0
    for split_questions, samples in work.by_split(judging.splits):
        questions += split_questions
        solutions += split_questions * at_most(samples, judging.max_solutions)
    steps = solutions * work.steps
    if not judging.calls_model:
        return Line(step="judge", work=f"{steps:,.0f} steps by the source's truth")
    calls = steps if judging.by_step else solutions / judging.solutions_per_call
    shared_tokens = work.prefix_tokens("judge") + judging.images * model.image_tokens
    # A call for each step has the solution up to it: half of it, in the mean.
    repeats = (work.steps + 1) / 2 if judging.by_step else 1
    input_tokens = calls * shared_tokens + solutions * work.solution_tokens * repeats
    output_tokens = steps * judging.verdict_tokens
    dollars = calls * judging.dollars_per_call + model.dollars(input_tokens, output_tokens)
    if model.cached_input_price is not None:  # of what a question's calls after the first one share
        cached_tokens = max(0, calls - questions) * shared_tokens
        # Prices are US dollars a million tokens.
        dollars += cached_tokens * (model.cached_input_price - model.input_price) / 1e6
    return Line(
        step="judge",
        work=f"{steps:,.0f} steps in {calls:,.0f} calls",
        calls=calls,
        tokens=input_tokens + output_tokens,
        dollars=dollars,
        gpu_hours=model.gpu_hours(plan.hardware, input_tokens, output_tokens),
        stored=output_tokens * BYTES_A_TOKEN,
    )


def _monte_carlo(plan: Plan) -> Line:
    work, rollouts = plan.workload, plan.rollouts
    prefixes = 0.0
    for questions, samples in work.by_split(rollouts.splits):
        prefixes += questions * _prefixes(plan, samples)
    calls = prefixes * rollouts.continuations
    # A step lies halfway through its solution, in the mean.
    input_tokens = prefixes * (work.prefix_tokens("monte_carlo") + work.solution_tokens / 2)
    output_tokens = calls * work.solution_tokens / 2
    gpu_hours = plan.policy.gpu_hours(plan.hardware, input_tokens, output_tokens)
    return Line(
        step="monte_carlo",
        work=f"{rollouts.mode}: {prefixes:,.0f} steps x {rollouts.continuations}",
        calls=calls,
        tokens=input_tokens + output_tokens,
        dollars=calls * rollouts.dollars_per_continuation,
        gpu_hours=0 if rollouts.dollars_per_continuation else gpu_hours,
    )


def _prefixes(plan: Plan, samples: int) -> float:
    """Prefixes of one question's solutions that Monte Carlo continues; a wrong solution's last step is known."""
    work, rollouts = plan.workload, plan.rollouts
    # Of a solution with s steps: all but the last, log2 s of them by bisection, or the two at the judge's first error.
    solutions = at_most(samples, rollouts.max_solutions)
    share = work.wrong_share if rollouts.right_is_free else 1.0
    judged = at_most(solutions, plan.judging.max_solutions) * share
    if rollouts.mode == "uncertain":
        return min(
            judged * work.steps * rollouts.uncertain_share,
            samples * work.steps * rollouts.max_share,
        )
    if rollouts.mode == "verify":
        return judged * min(2, work.steps - 1)
    if rollouts.mode == "first_error":
        return solutions * share * math.log2(work.steps)
    return solutions * share * (work.steps - 1)


def _review(plan: Plan) -> Line:
    steps = plan.reviewing.steps
    dollars = steps * plan.reviewing.dollars_per_step
    return Line(
        step="review",
        work=f"{steps:,} steps",
        calls=steps,
        dollars=dollars,
    )


def _train_text_prm(plan: Plan) -> Line:
    training = plan.training
    tokens = plan.workload.packed_tokens("train_text_prm", training.text_solutions) * training.text_epochs
    return Line(
        step="train_text_prm",
        work=f"{training.text_epochs:g} epochs, packed",
        tokens=tokens,
        gpu_hours=plan.hardware.training_hours(training.text_parameters, tokens),
        stored=training.text_parameters * BF16,
    )


def _states(plan: Plan) -> Line:
    work = plan.workload
    steps = work.train_questions * work.train_samples * work.steps
    tokens = work.packed_tokens("states")
    bytes_a_step = 2 * plan.training.hidden_size * BF16  # the state at the tag and the step's summary
    return Line(
        step="states",
        work=f"{steps:,.0f} steps at {bytes_a_step / 1024:g} KiB",
        tokens=tokens,
        gpu_hours=plan.hardware.prefill_hours(plan.training.text_parameters, tokens),
        stored=steps * bytes_a_step,
    )


def _train_two_tower(plan: Plan) -> Line:
    work, training, hardware = plan.workload, plan.training, plan.hardware
    images = work.train_questions * (1 + work.reference_images)
    image_tokens = images * PATCHES * training.fusion_epochs
    # The text tower does not run here: a step is one state that was stored.
    steps = work.train_questions * work.train_samples * work.steps * training.fusion_epochs
    image_hours = hardware.training_hours(training.image_parameters, image_tokens)
    return Line(
        step="train_two_tower",
        work=f"{training.fusion_epochs:g} epochs on stored states",
        tokens=image_tokens + steps,
        gpu_hours=image_hours + hardware.training_hours(training.fusion_parameters, steps),
        stored=(training.text_parameters + training.image_parameters + training.fusion_parameters) * BF16,
    )


def _score(plan: Plan) -> Line:
    work = plan.workload
    solutions = work.test_questions * work.test_samples
    # A question's solutions share its prefix.
    tokens = work.test_questions * work.prefix_tokens("score") + solutions * work.solution_tokens
    return Line(
        step="score",
        work=f"{solutions:,} solutions, prefix shared",
        tokens=tokens,
        gpu_hours=plan.hardware.prefill_hours(plan.training.text_parameters, tokens),
        stored=solutions * work.steps * SCORE_BYTES,
    )


COSTS = (
    _write_questions,
    _embed,
    _train_policy,
    _tree_search,
    _sample,
    _equivalence,
    _judge,
    _monte_carlo,
    _review,
    _train_text_prm,
    _states,
    _train_two_tower,
    _score,
)


def _notes(plan: Plan, lines: Mapping[str, Line]) -> list[str]:
    """What a reader would ask about the lines, by step."""
    notes = [*_size_notes(plan, lines)]
    if "judge" in lines:
        # A cache holds for minutes: who asks slowly pays in full.
        model = replace(plan.judging.model, cached_input_price=None)
        uncached = _judge(replace(plan, judging=replace(plan.judging, model=model))).dollars
        if uncached > lines["judge"].dollars:
            notes.append(f"judge counts on the provider's prompt cache; without it: ${uncached:,.0f}")
    if "monte_carlo" in lines:
        assumptions = []
        if plan.rollouts.right_is_free:
            assumptions.append(f"{plan.workload.wrong_share:.0%} of the answers are wrong")
        if plan.rollouts.mode == "uncertain":
            assumptions.append(f"{plan.rollouts.uncertain_share:.0%} of the steps are uncertain")
        if assumptions:
            notes.append(f"monte_carlo assumes that {' and that '.join(assumptions)}")
    if "equivalence" in lines:
        notes.append(f"equivalence assumes {plan.grading.answers:g} distinct answers a question to ask about")
    for step, budget in plan.max_dollars.items():
        if step in lines and lines[step].dollars > budget:
            dollars = lines[step].dollars
            notes.append(f"{step} will stop at max_cost_usd={budget:g}, before the end: ${dollars:,.0f}")
    return notes


def _size_notes(plan: Plan, lines: Mapping[str, Line]) -> list[str]:
    notes = []
    gpu = plan.hardware.specification
    parameters = max(
        plan.policy.parameters,
        plan.training.text_parameters,
        plan.judging.model.parameters,
    )
    weights = parameters * BF16
    if weights > 0.9 * gpu.memory * 1e9:  # something must be left for activations
        notes.append(
            f"{size(weights)} of weights do not fit one {plan.hardware.gpu} ({gpu.memory} GB): shard the model"
        )
    states = lines["states"].stored if "states" in lines else 0
    if states > 10e9:
        notes.append(f"states take {size(states)}: keep the training split only, on shared storage")
    return notes
