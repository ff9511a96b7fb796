"""The client of the rerank service: one case to a request, the request to an answer, the answer to the screen."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from medmm_ray.service.rerank import Aggregate, AnswerType, RerankAnswer, RerankRequest, ScoredSolution
from medmm_ray.text import LETTERS, equal_key


class QueryError(RuntimeError):
    """The service refused or could not be reached; `status` is the HTTP status, 0 where there was no answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def request_of(
    question: str,
    options: Sequence[str],
    solutions: Sequence[str | Sequence[str]],
    *,
    documents: Sequence[str] = (),
    image: bytes | None = None,
    reference_images: Sequence[bytes] = (),
    answer_type: AnswerType = "choice",
    aggregate: Aggregate = "min",
) -> RerankRequest:
    """A request from plain values; images are the bytes of their files."""
    return RerankRequest(
        question=question,
        options=list(options),
        solutions=[s if isinstance(s, str) else list(s) for s in solutions],
        documents=list(documents),
        image=None if image is None else base64.b64encode(image).decode(),
        reference_images=[base64.b64encode(content).decode() for content in reference_images],
        answer_type=answer_type,
        aggregate=aggregate,
    )


def query(url: str, request: RerankRequest, token: str = "", timeout_s: float = 120.0) -> RerankAnswer:
    """Post `request` to the service at `url` (scheme, host and port). Raises `QueryError` with the service's words."""
    return RerankAnswer.model_validate(
        post(
            url,
            request.model_dump(mode="json"),
            token,
            timeout_s,
        )
    )


def post(
    url: str,
    body: Mapping[str, Any],
    token: str = "",
    timeout_s: float = 120.0,
) -> dict[str, Any]:
    """Post plain JSON values to the service at `url` and give its answer's; otherwise as `query`."""
    if not url.startswith(("http://", "https://")):
        raise QueryError(0, f"{url!r} is not the address of a service; expected http://host:port")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        response = httpx.post(
            f"{url.rstrip('/')}/v1/rerank",
            json=body,
            headers=headers,
            timeout=timeout_s,
        )
    except httpx.RequestError as error:
        raise QueryError(0, f"{url} cannot be reached: {error}; is the service running?") from None
    if not response.is_success:
        raise QueryError(response.status_code, f"{url} answered {response.status_code}: {_detail(response)}")
    answer: dict[str, Any] = response.json()
    return answer


def _detail(response: httpx.Response) -> str:
    """The service's words; of another server's answer the beginning."""
    # A proxy in between answers in HTML, or in JSON of its own.
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


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
