"""An estimate as a table for the screen."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from medmm_ray.estimate.hardware import DECODING, PREFILL, TRAINING
from medmm_ray.estimate.result import Estimate, Line, size


def rendered(result: Estimate) -> Group:
    """The lines and their sum, the notes, and what was assumed."""
    hardware = result.sizes.hardware
    title = f"Estimate: {hardware.num_gpus} x {hardware.gpu} at ${hardware.price:.2f} an hour each"
    table = Table(title=title, title_justify="left")
    table.add_column("step")
    table.add_column("work")
    for name in ("calls", "tokens", "dollars", "GPU-hours", "GPU dollars", "stored"):
        table.add_column(name, justify="right")
    for line in result.lines:
        table.add_row(
            line.step,
            line.work,
            *_cells(line, hardware.price),
        )
    table.add_section()
    table.add_row(
        "total",
        f"${result.dollars:,.0f}, {result.hours:,.1f} h on {hardware.num_gpus} GPUs",
        "",
        _count(sum(line.tokens for line in result.lines)),
        f"{result.dollars - result.gpu_dollars:,.2f}",
        f"{result.gpu_hours:,.2f}",
        f"{result.gpu_dollars:,.2f}",
        size(result.stored),
        style="bold",
    )
    notes = [Text(f"Note: {note}.") for note in result.notes]
    return Group(
        table,
        *notes,
        Text(_assumptions(result), style="dim"),
    )


def _cells(line: Line, gpu_price: float) -> list[str]:
    return [
        f"{line.calls:,.0f}" if line.calls else "",
        _count(line.tokens) if line.tokens else "",
        _small(line.dollars),
        _small(line.gpu_hours),
        _small(line.gpu_hours * gpu_price),
        size(line.stored) if line.stored else "",
    ]


def _assumptions(result: Estimate) -> str:
    sizes, parameters = result.sizes, result.sizes.policy.parameters
    policy = f"a policy of {_count(parameters)}" if parameters else "a policy behind an API"
    peak = sizes.hardware.specification.peak
    text_tower = f"a text tower of {_count(sizes.text_parameters)}"
    return (
        f"Assumed: {sizes.steps:g} steps and {sizes.solution_tokens:g} tokens a solution, {sizes.question_tokens:g} a "
        f"question, {sizes.document_tokens:,g} of documents; {policy}, {text_tower} parameters; "
        f"reading at {PREFILL:.0%}, training at {TRAINING:.0%}, writing at {DECODING:.0%} of {peak:g} TFLOP/s: "
        "expect a factor of two either way. Idle and start-up time is left out."
    )


def _small(number: float) -> str:
    if number == 0:
        return ""
    return "< 0.01" if number < 0.01 else f"{number:,.2f}"


def _count(number: float) -> str:
    # Three digits: an estimate is no better than that.
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:,.3g}B"
