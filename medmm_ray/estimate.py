"""What a run will cost, before it runs: calls, tokens, dollars, GPU-hours and bytes, step by step.

Enters: a `Plan`, plain numbers that a recipe states. Leaves: an `Estimate`, one line a step, and its table. Pure
arithmetic: nothing is measured or asked for. The model of time is floating-point operations over a share of the GPU's
peak, with P parameters: 2P a token read or written, 6P a token trained (Kaplan et al. 2020, attention left out). The
shares (`utilisation`):

- reading (prefill, scoring, states): 0.28. Med-PRM's own scorer did 1.5 solutions/s of 3,720 tokens on an A100: 8e9
  parameters x 2 x 3,720 x 1.5 = 89 of 312 TFLOP/s.
- training: 0.35, what well-fed dense models reach under ZeRO.
- writing (decoding at large batches): 0.15, that is 2,900 tokens/s for 8e9 parameters on an A100.

They are rough: expect a factor of two. Where a step was measured, put its hours into `Plan.known_gpu_hours`.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from rich.console import Group
from rich.table import Table
from rich.text import Text

READING, TRAINING, WRITING = 0.28, 0.35, 0.15
PATCHES = 197  # tokens of a ViT-B/16 at 224 pixels, its class token included
BYTES_A_TOKEN = 4.5  # of English text, about
BF16 = 2  # bytes
EMBEDDING_BYTES = 512 * 4  # of one image, as float32
SCORE_BYTES = 3 * 2 * 4  # of one step: three arms, text and image part, as float32
# Tokens around a question: of the prompts, and of the JSON that answers them. Thoughts are left out.
WRITE_PROMPT, WRITE_REPLY = 250, 180
CHECK_PROMPT, GRADE_PROMPT, SHORT_REPLY = 70, 120, 10


@dataclass(frozen=True)
class Gpu:
    """`peak` is dense bfloat16 TFLOP/s by the vendor's data sheet, `memory` GB, `price` US dollars an hour.

    Prices are round on-demand figures that a recipe overrides; the A100's is the published plan's $10 for four.
    """

    peak: float
    memory: int
    price: float


GPUS: Mapping[str, Gpu] = {
    "A100-80G": Gpu(312, 80, 2.50),
    "A100-40G": Gpu(312, 40, 2.00),
    "H100": Gpu(989, 80, 4.00),
    "H200": Gpu(989, 141, 5.00),
    "L40S": Gpu(362, 48, 1.50),
    "L4": Gpu(121, 24, 0.80),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What decides the cost of a run. Parameters are counts, prices US dollars, shares between 0 and 1."""

    train_questions: int
    test_questions: int
    train_samples: int
    test_samples: int
    images: int
    reference_images: int = 3
    """Retrieved images a question, which the image part sees."""
    steps: float = 8
    """Mean steps a solution."""
    question_tokens: float = 185
    solution_tokens: float = 350
    document_tokens: float = 3072
    with_documents: Collection[str] = ("tree_search", "sample", "judge", "train_text_prm", "states", "score")
    """Steps whose prompts have the documents."""
    wrong_share: float = 0.5
    """Share of the solutions whose answer is wrong."""
    oversampling: float = 1.25
    """Samples drawn for each one kept (Med-PRM's, for its filter of 3 to 9 steps)."""

    policy_parameters: float = 8.03e9
    """0: the policy is behind an API, and its prices count."""
    policy_input_price: float = 0
    policy_output_price: float = 0
    text_parameters: float = 8.03e9
    image_parameters: float = 86e6
    fusion_parameters: float = 30e6
    hidden_size: int = 4096
    """Width of the text tower; it sets the size of the stored states."""
    policy_epochs: float = 0
    text_epochs: float = 0
    """0 where a published reward model is the text tower."""
    text_solutions: int | None = None
    """Most solutions of a question that the text tower is trained on."""
    fusion_epochs: float = 5

    written_images: int = 0
    """Images for which a model writes questions."""
    questions_per_image: int = 1
    question_checks: int = 2
    """Times that a written question is answered with the image, and as often without."""
    writer_parameters: float = 0
    """Of a writer on our own GPUs; 0: an API."""
    writer_input_price: float = 0
    writer_output_price: float = 0
    writer_image_tokens: float = 258
    """Tokens that the writer's API counts for one image."""
    graded_answers: float = 0
    """Distinct answers a question about which a model behind an API is asked whether they are right."""
    grader_input_price: float = 0
    grader_output_price: float = 0

    judge_calls: bool = True
    """False: the source's own truth judges, which costs nothing."""
    judge_splits: Collection[str] = ("train", "validation", "test")
    judged_solutions: int | None = None
    """Most solutions of a question that the judge reads; None: all."""
    judge_solutions_per_call: int = 1
    judge_by_step: bool = False
    """A call for each step, which reads the solution up to it."""
    judge_parameters: float = 0
    """Of a judge on our own GPUs; 0: an API."""
    judge_images: float = 4
    """Images that the judge sees with a question."""
    image_tokens: float = 258
    """Tokens that the judge's API counts for one image."""
    verdict_tokens: float = 25
    """Tokens that the judge writes a step."""
    judge_dollars_per_call: float = 0
    judge_input_price: float = 0
    judge_cached_input_price: float | None = None
    """Of what a question's calls after the first share; None: an API that caches nothing."""
    judge_output_price: float = 0
    max_dollars: Mapping[str, float] = field(default_factory=dict)
    """Hard budgets by step."""

    rollout_mode: str = "uncertain"
    """uncertain, all, first_error or verify: which prefixes Monte Carlo continues."""
    rollout_splits: Collection[str] = ("train",)
    rollout_solutions: int | None = None
    """Most solutions of a question that Monte Carlo looks at; None: all."""
    right_is_free: bool = False
    """Solutions with the right answer are left out, or show without a continuation that it can be reached."""
    uncertain_share: float = 0.1
    """Share of judged steps of which the judge is unsure."""
    max_share: float = 1.0
    """Most steps of a question that mode uncertain continues, as a share of all its steps."""
    continuations: int = 4
    dollars_per_continuation: float = 0
    """Of a policy behind an API; 0: the policy on our own GPUs."""

    trees: int = 0
    """Questions that are searched by a tree."""
    tree_nodes: int = 60
    """Nodes of a tree, at most."""
    node_rollouts: float = 6
    """Mean rollouts of a node."""
    tree_tokens: float | None = None
    """Most tokens drawn for one tree."""

    review_steps: int = 1000
    dollars_per_reviewed_step: float = 0.5
    """A minute of a resident at $30 an hour."""

    gpu: str = "A100-80G"
    num_gpus: int = 4
    dollars_per_gpu_hour: float | None = None
    """None: the table's price."""
    known_gpu_hours: Mapping[str, float] = field(default_factory=dict)
    """GPU-hours by step that were measured or published; they replace the arithmetic."""


PUBLISHED = Plan(
    train_questions=10_000,
    test_questions=0,
    train_samples=64,
    test_samples=64,
    images=10_000,
    steps=10,
    judged_solutions=1,
    judge_dollars_per_call=0.25,
    dollars_per_continuation=0.01,
    known_gpu_hours={"train_two_tower": 4 * 48},
)
"""The framework's own budget: $2,500 + $400 + $500 + $480 for 100,000 step labels and 48 hours on four A100."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One step: `dollars` go to others (an API, readers), GPU time is priced apart; `stored` is in bytes."""

    step: str
    work: str
    calls: float = 0
    tokens: float = 0
    dollars: float = 0
    gpu_hours: float = 0
    stored: float = 0


@dataclass(frozen=True)
class Estimate:
    plan: Plan
    lines: tuple[Line, ...]
    notes: tuple[str, ...]

    def line(self, step: str) -> Line:
        return next(line for line in self.lines if line.step == step)

    @property
    def gpu_hours(self) -> float:
        return sum(line.gpu_hours for line in self.lines)

    @property
    def gpu_dollars(self) -> float:
        return self.gpu_hours * gpu_price(self.plan)

    @property
    def hours(self) -> float:
        """Wall-clock hours of the GPU work at the plan's number of GPUs, all of them busy."""
        return self.gpu_hours / self.plan.num_gpus

    @property
    def dollars(self) -> float:
        return sum(line.dollars for line in self.lines) + self.gpu_dollars

    @property
    def stored(self) -> float:
        return sum(line.stored for line in self.lines)


def gpu_of(plan: Plan) -> Gpu:
    if plan.gpu not in GPUS:
        raise ValueError(f"gpu {plan.gpu!r} is not in the table; known: {', '.join(GPUS)}")
    return GPUS[plan.gpu]


def gpu_price(plan: Plan) -> float:
    return gpu_of(plan).price if plan.dollars_per_gpu_hour is None else plan.dollars_per_gpu_hour


def _hours(plan: Plan, operations: float, share: float) -> float:
    return operations / (gpu_of(plan).peak * 1e12 * share) / 3600


def reading(plan: Plan, parameters: float, tokens: float) -> float:
    """GPU-hours to read `tokens` (prefill, scoring) with a model of so many parameters."""
    return _hours(plan, 2 * parameters * tokens, READING)


def writing(plan: Plan, parameters: float, tokens: float) -> float:
    """GPU-hours to write `tokens`."""
    return _hours(plan, 2 * parameters * tokens, WRITING)


def training(plan: Plan, parameters: float, tokens: float) -> float:
    """GPU-hours to train on `tokens`, forward and backward."""
    return _hours(plan, 6 * parameters * tokens, TRAINING)


def estimate(plan: Plan, without: Collection[str] = ()) -> Estimate:
    """The costs of the steps of `plan`, those in `without` left out.

    Raises ValueError for a GPU or a step that does not exist.
    """
    lines = [
        _write_questions(plan), _embed(plan), _train_policy(plan), _tree_search(plan), _sample(plan),
        _equivalence(plan), _judge(plan), _monte_carlo(plan), _review(plan), _train_text(plan), _states(plan),
        _train_two_tower(plan), _score(plan),
    ]  # fmt: skip
    unknown = set(plan.known_gpu_hours) - {line.step for line in lines}
    if unknown:
        raise ValueError(f"known_gpu_hours names {sorted(unknown)}; the steps are {[line.step for line in lines]}")
    left_out = {*without, *(["equivalence"] if "sample" in without or not plan.graded_answers else [])}
    left_out |= set() if plan.written_images else {"write_questions"}
    known = [replace(line, gpu_hours=plan.known_gpu_hours.get(line.step, line.gpu_hours)) for line in lines]
    kept = tuple(line for line in known if line.step not in left_out)
    return Estimate(plan, kept, tuple(_notes(plan, kept)))


def _prefix(plan: Plan, step: str) -> float:
    """Tokens of a question with the documents that a step reads with it."""
    return plan.question_tokens + (plan.document_tokens if step in plan.with_documents else 0)


def _by_question(plan: Plan, splits: Collection[str]) -> list[tuple[int, int]]:
    """Questions and samples of each, by split; a validation split is part of the training questions."""
    sizes = {
        "train": (plan.train_questions, plan.train_samples),
        "test": (plan.test_questions, plan.test_samples),
    }
    return [size for split, size in sizes.items() if split in splits]


def _at_most(number: int, *limits: int | None) -> int:
    return min([number, *(limit for limit in limits if limit is not None)])


def _write_questions(plan: Plan) -> Line:
    written = plan.written_images * plan.questions_per_image
    checks = 2 * plan.question_checks  # half of them with the image
    asked = checks * (CHECK_PROMPT + plan.question_tokens) + plan.question_checks * plan.writer_image_tokens
    read = written * (WRITE_PROMPT + plan.writer_image_tokens + asked)
    replies = written * (WRITE_REPLY + checks * SHORT_REPLY)
    return Line(
        step="write_questions",
        work=f"{written:,} questions, each tried {checks} times",
        calls=written * (1 + checks),
        tokens=read + replies,
        dollars=(read * plan.writer_input_price + replies * plan.writer_output_price) / 1e6,
        gpu_hours=reading(plan, plan.writer_parameters, read) + writing(plan, plan.writer_parameters, replies),
    )


def _equivalence(plan: Plan) -> Line:
    calls = (plan.train_questions + plan.test_questions) * plan.graded_answers
    read, written = calls * (GRADE_PROMPT + plan.question_tokens), calls * SHORT_REPLY
    return Line(
        step="equivalence",
        work=f"{plan.graded_answers:g} answers a question",
        calls=calls,
        tokens=read + written,
        dollars=(read * plan.grader_input_price + written * plan.grader_output_price) / 1e6,
    )


def _embed(plan: Plan) -> Line:
    tokens = plan.images * PATCHES
    return Line(
        step="embed",
        work=f"{plan.images:,} images",
        tokens=tokens,
        gpu_hours=reading(plan, plan.image_parameters, tokens),
        stored=plan.images * EMBEDDING_BYTES,
    )


def _train_policy(plan: Plan) -> Line:
    tokens = plan.train_questions * (plan.question_tokens + plan.solution_tokens) * plan.policy_epochs
    return Line(
        step="train_policy",
        work=f"{plan.policy_epochs:g} epochs",
        tokens=tokens,
        gpu_hours=training(plan, plan.policy_parameters, tokens),
        stored=plan.policy_parameters * BF16 if plan.policy_epochs else 0,
    )


def _tree_search(plan: Plan) -> Line:
    nodes = plan.trees * plan.tree_nodes
    # A node lies halfway through its solution, in the mean; what it continues is read from the prefix cache.
    prompts = plan.trees * _prefix(plan, "tree_search")
    written = nodes * (plan.solution_tokens / plan.steps + plan.node_rollouts * plan.solution_tokens / 2)
    if plan.tree_tokens is not None:
        written = min(written, plan.trees * plan.tree_tokens)
    return Line(
        step="tree_search",
        work=f"{nodes:,} nodes at most",
        calls=nodes,
        tokens=prompts + written,
        gpu_hours=reading(plan, plan.policy_parameters, prompts) + writing(plan, plan.policy_parameters, written),
        stored=nodes * plan.solution_tokens / plan.steps * BYTES_A_TOKEN,
    )


def _sample(plan: Plan) -> Line:
    kept = plan.train_questions * plan.train_samples + plan.test_questions * plan.test_samples
    drawn = kept * plan.oversampling
    # The prefix cache of an engine reads a question once for all of its samples; an API reads it for each.
    api = plan.policy_parameters == 0
    prompts = (drawn if api else plan.train_questions + plan.test_questions) * _prefix(plan, "sample")
    written = drawn * plan.solution_tokens
    return Line(
        step="sample",
        work=f"{kept:,} solutions kept of {drawn:,.0f}",
        calls=drawn if api else 0,
        tokens=prompts + written,
        dollars=(prompts * plan.policy_input_price + written * plan.policy_output_price) / 1e6,
        gpu_hours=reading(plan, plan.policy_parameters, prompts) + writing(plan, plan.policy_parameters, written),
        stored=kept * plan.solution_tokens * BYTES_A_TOKEN,
    )


def _judge(plan: Plan) -> Line:
    split = _by_question(plan, plan.judge_splits)
    judged = sum(questions * _at_most(samples, plan.judged_solutions) for questions, samples in split)
    if not plan.judge_calls:
        return Line(step="judge", work=f"{judged * plan.steps:,.0f} steps by the source's truth")
    calls = judged * plan.steps if plan.judge_by_step else judged / plan.judge_solutions_per_call
    shared = _prefix(plan, "judge") + plan.judge_images * plan.image_tokens
    own = judged * plan.solution_tokens * ((plan.steps + 1) / 2 if plan.judge_by_step else 1)
    read = calls * shared + own
    price = plan.judge_cached_input_price
    cached = 0 if price is None else max(0, calls - sum(questions for questions, _ in split)) * shared
    written = judged * plan.steps * plan.verdict_tokens
    return Line(
        step="judge",
        work=f"{judged * plan.steps:,.0f} steps in {calls:,.0f} calls",
        calls=calls,
        tokens=read + written,
        dollars=calls * plan.judge_dollars_per_call
        + (read - cached) / 1e6 * plan.judge_input_price
        + cached / 1e6 * (price or 0)
        + written / 1e6 * plan.judge_output_price,
        gpu_hours=reading(plan, plan.judge_parameters, read) + writing(plan, plan.judge_parameters, written),
        stored=written * BYTES_A_TOKEN,
    )


def _monte_carlo(plan: Plan) -> Line:
    prefixes = sum(
        questions * _prefixes(plan, samples) for questions, samples in _by_question(plan, plan.rollout_splits)
    )
    calls = prefixes * plan.continuations
    # A step lies halfway through its solution, in the mean.
    prompts = prefixes * (_prefix(plan, "monte_carlo") + plan.solution_tokens / 2)
    written = calls * plan.solution_tokens / 2
    ours = reading(plan, plan.policy_parameters, prompts) + writing(plan, plan.policy_parameters, written)
    return Line(
        step="monte_carlo",
        work=f"{plan.rollout_mode}: {prefixes:,.0f} steps x {plan.continuations}",
        calls=calls,
        tokens=prompts + written,
        dollars=calls * plan.dollars_per_continuation,
        gpu_hours=0 if plan.dollars_per_continuation else ours,
    )


def _prefixes(plan: Plan, samples: int) -> float:
    """Prefixes of one question's solutions that Monte Carlo continues; a wrong solution's last step is known."""
    looked = _at_most(samples, plan.rollout_solutions)
    share = plan.wrong_share if plan.right_is_free else 1.0
    judged = _at_most(looked, plan.judged_solutions) * share
    if plan.rollout_mode == "uncertain":
        return min(judged * plan.steps * plan.uncertain_share, samples * plan.steps * plan.max_share)
    if plan.rollout_mode == "verify":
        return judged * min(2, plan.steps - 1)
    if plan.rollout_mode == "first_error":
        return looked * share * math.log2(plan.steps)
    return looked * share * (plan.steps - 1)


def _review(plan: Plan) -> Line:
    return Line(
        step="review",
        work=f"{plan.review_steps:,} steps",
        calls=plan.review_steps,
        dollars=plan.review_steps * plan.dollars_per_reviewed_step,
    )


def _packed(plan: Plan, step: str, most: int | None = None) -> float:
    """Tokens of the training split with each question's prefix once and at most `most` of its solutions."""
    solutions = _at_most(plan.train_samples, most)
    return plan.train_questions * (_prefix(plan, step) + solutions * plan.solution_tokens)


def _train_text(plan: Plan) -> Line:
    tokens = _packed(plan, "train_text_prm", plan.text_solutions) * plan.text_epochs
    return Line(
        step="train_text_prm",
        work=f"{plan.text_epochs:g} epochs, packed",
        tokens=tokens,
        gpu_hours=training(plan, plan.text_parameters, tokens),
        stored=plan.text_parameters * BF16,
    )


def _states(plan: Plan) -> Line:
    steps = plan.train_questions * plan.train_samples * plan.steps
    tokens = _packed(plan, "states")
    bytes_a_step = 2 * plan.hidden_size * BF16  # the state at the tag and the step's summary
    return Line(
        step="states",
        work=f"{steps:,.0f} steps at {bytes_a_step / 1024:g} KiB",
        tokens=tokens,
        gpu_hours=reading(plan, plan.text_parameters, tokens),
        stored=steps * bytes_a_step,
    )


def _train_two_tower(plan: Plan) -> Line:
    seen = plan.train_questions * (1 + plan.reference_images) * PATCHES * plan.fusion_epochs
    fused = plan.train_questions * plan.train_samples * plan.steps * plan.fusion_epochs
    return Line(
        step="train_two_tower",
        work=f"{plan.fusion_epochs:g} epochs on stored states",
        tokens=seen + fused,
        gpu_hours=training(plan, plan.image_parameters, seen) + training(plan, plan.fusion_parameters, fused),
        stored=(plan.text_parameters + plan.image_parameters + plan.fusion_parameters) * BF16,
    )


def _score(plan: Plan) -> Line:
    solutions = plan.test_questions * plan.test_samples
    tokens = plan.test_questions * _prefix(plan, "score") + solutions * plan.solution_tokens
    return Line(
        step="score",
        work=f"{solutions:,} solutions, prefix shared",
        tokens=tokens,
        gpu_hours=reading(plan, plan.text_parameters, tokens),
        stored=solutions * plan.steps * SCORE_BYTES,
    )


def _notes(plan: Plan, lines: Collection[Line]) -> list[str]:
    notes, gpu, by_step = [], gpu_of(plan), {line.step: line for line in lines}
    states = by_step["states"].stored if "states" in by_step else 0
    largest = max(plan.policy_parameters, plan.text_parameters, plan.judge_parameters) * BF16
    if largest > 0.9 * gpu.memory * 1e9:
        notes.append(f"{size(largest)} of weights do not fit one {plan.gpu} ({gpu.memory} GB): shard the model")
    if states > 10e9:
        notes.append(f"states take {size(states)}: keep the training split only, on shared storage")
    uncached = _judge(replace(plan, judge_cached_input_price=None)).dollars
    if "judge" in by_step and uncached > by_step["judge"].dollars:
        notes.append(f"judge counts on the provider's prompt cache; without it: ${uncached:,.0f}")
    if "monte_carlo" in by_step:
        assumed = [f"{plan.wrong_share:.0%} of the answers are wrong"] if plan.right_is_free else []
        assumed += (
            [f"{plan.uncertain_share:.0%} of the steps are uncertain"] if plan.rollout_mode == "uncertain" else []
        )
        if assumed:
            notes.append(f"monte_carlo assumes that {' and that '.join(assumed)}")
    if "equivalence" in by_step:
        notes.append(f"equivalence assumes {plan.graded_answers:g} distinct answers a question to ask about")
    for step, most in plan.max_dollars.items():
        if step in by_step and by_step[step].dollars > most:
            notes.append(f"{step} will stop at max_cost_usd={most:g}, before the end: ${by_step[step].dollars:,.0f}")
    return notes


def size(stored: float) -> str:
    """Bytes for people, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if stored < 1000:
            return f"{stored:.3g} {unit}"
        stored /= 1000
    return f"{stored:,.1f} TB"


def rendered(result: Estimate) -> Group:
    """The estimate as a table for the screen."""
    plan = result.plan
    table = Table(
        title=f"Estimate: {plan.num_gpus} x {plan.gpu} at ${gpu_price(plan):.2f} an hour each", title_justify="left"
    )
    table.add_column("step")
    table.add_column("work")
    for name in ("calls", "tokens", "dollars", "GPU-hours", "GPU dollars", "stored"):
        table.add_column(name, justify="right")
    for line in result.lines:
        table.add_row(
            line.step,
            line.work,
            f"{line.calls:,.0f}" if line.calls else "",
            _count(line.tokens) if line.tokens else "",
            _small(line.dollars),
            _small(line.gpu_hours),
            _small(line.gpu_hours * gpu_price(plan)),
            size(line.stored) if line.stored else "",
        )
    table.add_section()
    table.add_row(
        "total",
        f"${result.dollars:,.0f}, {result.hours:,.1f} h on {plan.num_gpus} GPUs",
        "",
        _count(sum(line.tokens for line in result.lines)),
        f"{result.dollars - result.gpu_dollars:,.2f}",
        f"{result.gpu_hours:,.2f}",
        f"{result.gpu_dollars:,.2f}",
        size(result.stored),
        style="bold",
    )
    policy = f"a policy of {_count(plan.policy_parameters)}" if plan.policy_parameters else "a policy behind an API"
    basis = (
        f"Assumed: {plan.steps:g} steps and {plan.solution_tokens:g} tokens a solution, {plan.question_tokens:g} a "
        f"question, {plan.document_tokens:,g} of documents; {policy}, a text tower of {_count(plan.text_parameters)} "
        f"parameters; reading at {READING:.0%}, training at {TRAINING:.0%}, writing at {WRITING:.0%} of "
        f"{gpu_of(plan).peak:g} TFLOP/s: expect a factor of two either way. Idle and start-up time is left out."
    )
    return Group(table, *(Text(f"Note: {note}.") for note in result.notes), Text(basis, style="dim"))


def _small(number: float) -> str:
    return "" if number == 0 else "< 0.01" if number < 0.01 else f"{number:,.2f}"


def _count(number: float) -> str:
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:,.3g}B"
