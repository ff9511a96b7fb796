"""An answer on the screen: question, options, the steps of the best and the worst solution, what each rule chooses."""

from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from medmm_ray.service.rerank import RerankAnswer, RerankRequest, ScoredSolution
from medmm_ray.text import LETTERS, equal_key


def show(
    request: RerankRequest,
    answer: RerankAnswer,
    *,
    gold: str | None = None,
    console: Console | None = None,
) -> None:
    """Print a case readably: question, options, the steps of the best and the worst solution, what each rule chooses.

    `gold` is the right answer where it is known: it marks each choice as right or wrong.
    """
    (console or Console()).print(rendered(request, answer, gold))


def rendered(request: RerankRequest, answer: RerankAnswer, gold: str | None = None) -> Group:
    """What `show` prints."""
    parts: list[Any] = [_question(request, answer, gold)]
    if answer.ranking:
        best = answer.solutions[answer.ranking[0]]
        worst = answer.solutions[answer.ranking[-1]]
        # The two ends of the ranking show most of what the scores tell.
        parts.append(_steps("best", best, answer, gold))
        if worst is not best:
            parts.append(_steps("worst", worst, answer, gold))
    num_failed = len(answer.solutions) - len(answer.ranking)
    if num_failed:
        # Kinds only: the messages are in the answer, and may be long.
        kinds: set[str] = set()
        for solution in answer.solutions:
            if solution.error:
                kinds.add(solution.error.partition(":")[0])
        parts.append(Text(f"{num_failed} solutions could not be scored: {', '.join(sorted(kinds))}", style="yellow"))
    parts += [Text(f"warning: {warning}", style="yellow") for warning in answer.warnings]
    parts.append(_choices(answer, gold))
    return Group(*parts)


def _question(request: RerankRequest, answer: RerankAnswer, gold: str | None) -> Panel:
    """The question with its options, the right one in green."""
    text = Text.assemble((request.question, "bold"))
    # Not strict: there are more letters than options.
    for letter, option in zip(LETTERS, request.options, strict=False):
        text.append(
            f"\n  ({letter}) {option}",
            style="green" if letter == gold else "default",
        )
    source = "image and text" if answer.arm == "multimodal" else "text alone"
    title = f"{len(answer.solutions)} solutions, scored from {source}"
    return Panel(text, title=title, title_align="left")


def _steps(name: str, solution: ScoredSolution, answer: RerankAnswer, gold: str | None) -> Table:
    """A solution's steps, one a row, with their scores."""
    title = Text.assemble(
        (f"The {name} solution", "bold"),
        f" (number {solution.index + 1}, answer ",
        _marked(solution.answer, gold),
        f", {answer.aggregate} {solution.reward or 0.0:.3f})",
    )
    has_image = answer.arm == "multimodal"
    table = Table(
        title=title,
        title_justify="left",
        box=None,
        padding=(0, 1),
        title_style="",
    )
    table.add_column("P(right)", justify="right")
    if has_image:
        table.add_column("text log-odds", justify="right")
        table.add_column("image log-odds", justify="right")
    table.add_column("step", ratio=1)
    for step in solution.steps:
        style = colour(step.probability)
        log_odds = [f"{step.text_log_odds:+.1f}", f"{step.image_log_odds:+.1f}"] if has_image else []
        table.add_row(
            Text(f"{step.probability:.3f}", style=style),
            *log_odds,
            Text(step.text, style=style),
        )
    return table


def _choices(answer: RerankAnswer, gold: str | None) -> Table:
    """The answer that each rule chooses."""
    table = Table(box=None, padding=(0, 1), show_header=False)
    for rule, choice, meaning in (
        ("best of N", answer.best_of_n, f"reward {answer.best_of_n.support:.3f}"),
        ("SC+RM", answer.sc_rm, f"{answer.sc_rm.support:.0%} of the rewards"),
        ("majority vote", answer.majority, f"{answer.majority.support:.0%} of the votes"),
    ):
        table.add_row(
            rule,
            _marked(choice.answer, gold),
            Text(meaning, style="dim"),
        )
    return table


def _marked(answer: str | None, gold: str | None) -> Text:
    """An answer, marked as right or wrong where the right one is known."""
    if answer is None:
        return Text("none", style="yellow")
    if gold is None:
        return Text(answer, style="bold")
    if equal_key(answer) == equal_key(gold):
        return Text(f"{answer} ✓", style="bold green")
    return Text(f"{answer} ✗", style="bold red")


def colour(probability: float) -> str:
    """Red below a half, yellow where the model is unsure, green above 0.8."""
    if probability < 0.5:
        return "red"
    return "yellow" if probability < 0.8 else "green"
