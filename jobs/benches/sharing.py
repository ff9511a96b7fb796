"""What `solutions_per_call` does to a judge's verdicts: Cohen's κ with the truth, call size against call size.

The judge is a real one behind the real prompts, schemas and readers of `medmm_ray.judge`: ``backend=gemini model=...``
(or openai, or a vllm checkpoint); without a model, a small Llama that is trained here (about 12 minutes on two cores)
and run by vLLM. What it judges are phantoms told in words, so that a model without eyes can know, and solutions of
which a part of the steps is wrong; `phantom.truth` decides which. The small judge is taught on other questions: first
calls of the first size, then of all sizes, equally many of each. So far it learns to read a report hardly at all (κ
.07): its figures show that the measurement runs, and say nothing of judges that can read.

κ is over the steps with something to check, of the solutions that both call sizes have verdicts on; the 95 % interval
of the difference is a paired bootstrap over questions. Unread are solutions whose verdicts did not fit twice.
"""

import asyncio
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import model_validator
from rich.console import Console
from rich.progress import track

from jobs.benches import Measured
from medmm_ray.config import Config, execution
from medmm_ray.engines.endpoint import Request, Turn
from medmm_ray.engines.generator import Generator, GeneratorConfig, TextGenerator
from medmm_ray.engines.linear import use_onednn
from medmm_ray.engines.local import prompt_of
from medmm_ray.engines.reward_model.attention import NAME
from medmm_ray.judge import Judge, JudgeCase, JudgeConfig, Judgement, make_judge
from medmm_ray.judge.prompt import SYSTEM, Call, call_text, schema_of, shared_text
from medmm_ray.metrics import cluster_bootstrap, kappa_of_counts
from medmm_ray.sources.phantom import Item, blind_work, generator, make_items, truth
from medmm_ray.train.policy import Encoded, LlamaShape, cross_entropy, new_llama

Floats = npt.NDArray[np.float64]
Solutions = list[list[str]]


class BenchConfig(Config):
    """Who judges how much."""

    backend: Literal["vllm", "gemini", "openai"] = "vllm"
    """Who judges: vllm runs a checkpoint here, gemini and openai ask an API."""
    model: str | None = None
    """The checkpoint, or the API's model; null trains the small judge."""
    endpoint: str | None = None
    """Another address of the API."""
    per_call: tuple[int, ...] = (1, 2, 4)
    """Values of solutions_per_call; the first is what the others are held against."""
    questions: int = 100
    """Questions that are judged."""
    solutions: int = 8
    """Solutions of a question."""
    train_questions: int = 4000
    """Questions that the small judge learns from."""
    updates: int = 2400
    """Updates of the small judge, the first two thirds of them on calls of the first size."""
    batch_size: int = 8
    """Calls of an update."""
    learning_rate: float = 3e-3
    """Highest learning rate."""
    shape: LlamaShape = LlamaShape(hidden_size=128, num_layers=3, intermediate_size=256, max_length=4096)
    """The small judge."""
    bootstrap_samples: int = 2000
    """Resamples of the questions, for the intervals."""
    seed: int = execution(0)
    """Start of all random numbers."""

    @model_validator(mode="after")
    def _an_api_has_a_name(self) -> "BenchConfig":
        if self.backend != "vllm" and self.model is None:
            raise ValueError(f"backend is {self.backend!r} and model is not set; name the API's model")
        return self


@dataclass(frozen=True)
class Told:
    """A phantom as the judge meets it, and solutions of it."""

    item: Item
    case: JudgeCase
    solutions: Solutions

    def truths(self, solution: int) -> list[bool | None]:
        return [truth(step, self.item.case, self.item) for step in self.solutions[solution]]


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    with tempfile.TemporaryDirectory() as folder:
        model = config.model or train_judge(config, Path(folder) / "judge", console)
        asked = tell(config, "test", config.questions, config.solutions)
        calls = [call_of(config, per_call) for per_call in config.per_call]
        engine = Generator(model, calls[0]) if config.backend == "vllm" else None

        def shared(model: str, config: GeneratorConfig) -> TextGenerator:  # noqa: ARG001
            assert engine is not None, "an API needs none"
            return engine

        judges = [make_judge(call, model, shared) for call in calls]
        counts = asyncio.run(all_judged(judges, config, asked))
        if engine:
            engine.shutdown()
        for per_call, counts_QSK in zip(config.per_call, counts, strict=True):
            yield from rows(config, per_call, counts[0], counts_QSK, console)


def tell(config: BenchConfig, split: str, number: int, num_solutions: int) -> list[Told]:
    """Phantoms with a report, and solutions by somebody who saw the picture or by one who did not."""
    told = []
    for index, item in enumerate(make_items(config.seed, split, number, num_worked=num_solutions)):
        rng = generator("sharing", config.seed, split, index)
        case = JudgeCase(
            question_id=f"{split}-{index}", question=f"Report: {report_of(item)} {item.question}", options=item.options,
            answer=item.answer, images=[], documents=[], references=[],
        )  # fmt: skip
        blind = [blind_work(item, rng, slip=0.3)[0] for _ in range(num_solutions)]
        seen = rng.random(num_solutions) < 0.4
        solutions = [list(item.worked[i]) if seen[i] else blind[i] for i in range(num_solutions)]
        told.append(Told(item, case, solutions))
    return told


def report_of(item: Item) -> str:
    """All that the picture shows, always in the same words."""
    places = [f"{f.name}, {f.side} {f.zone} zone" if f.zone else f.name for f in item.case.findings]
    return f"{'; '.join(places) or 'normal chest'}."


# The small judge


def train_judge(config: BenchConfig, folder: Path, console: Console) -> str:
    """A small Llama that has learnt to judge calls of every measured size; gives its checkpoint's folder."""
    told = tell(config, "train", config.train_questions, max(config.per_call))
    lessons = [lesson(one, per_call) for per_call in config.per_call for one in told]
    texts = [
        part
        for request, reply in lessons[:: len(lessons) // 1500 + 1]
        for part in (SYSTEM, *map(str, request.turns[0].parts), reply)
    ]
    model, tokenizer = new_llama(config.shape, texts, config.seed)
    encoded = [encode(tokenizer, request, reply) for request, reply in lessons]
    console.print(f"small judge: {np.mean([e.num_tokens for e in encoded]):.0f} tokens a call")
    model.set_attn_implementation(NAME)
    use_onednn(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.1)
    warm = max(1, config.updates // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda u: min((u + 1) / warm, (config.updates - u) / (config.updates - warm + 1))
    )
    rng, loss = generator("lessons", config.seed), torch.zeros(())
    for update in track(range(config.updates), "the small judge learns", console=console):
        known = len(told) if 3 * update < 2 * config.updates else len(encoded)
        batch = [encoded[int(i)] for i in rng.integers(known, size=config.batch_size)]
        loss = cross_entropy(model, batch, "cpu") / len(batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if update % 100 == 0:
            console.print(f"update {update}: loss {loss.item():.4f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def lesson(told: Told, per_call: int) -> tuple[Request, str]:
    """A call about the first solutions, and the right reply; a step with nothing to check is right."""
    call = Call(tuple(tuple(steps) for steps in told.solutions[:per_call]))
    blocks = [
        [
            entry(right is not False, report_of(told.item), number if per_call > 1 else None)
            for number, right in enumerate(told.truths(i), 1)
        ]
        for i in range(per_call)
    ]
    found: dict[str, Any] = {"steps": blocks[0]}
    if per_call > 1:
        found = {"solutions": [{"solution": i, "steps": steps} for i, steps in enumerate(blocks, 1)]}
    parts = (shared_text(told.case, (), False), call_text(call, lines=False))
    return Request(SYSTEM, (Turn("user", parts),), schema_of(call, exact=True)), json.dumps(found)


def entry(right: bool, reason: str, number: int | None) -> dict[str, Any]:
    """A step's entry. The reason repeats the report: whoever copies it before each verdict has learnt to look there."""
    return {
        **({} if number is None else {"step": number}),
        "reason": reason,
        "logical": right,
        "medical": True,
        "image_grounded": right,
        "verdict": "+" if right else "-",
        "confidence": "high",
    }


def encode(tokenizer: Any, request: Request, reply: str) -> Encoded:
    messages = prompt_of(request).messages
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return Encoded(
        tokenizer(prompt, add_special_tokens=False)["input_ids"],
        [tokenizer(reply + tokenizer.eos_token, add_special_tokens=False)["input_ids"]],
    )


# Its verdicts


def call_of(config: BenchConfig, per_call: int) -> JudgeConfig:
    """A judge of so many solutions a call."""
    return JudgeConfig(
        backend=config.backend, model=config.model, endpoint=config.endpoint, solutions_per_call=per_call,
        max_model_len=config.shape.max_length, max_tokens=200 + 400 * per_call, max_images=0, dtype="float32",
        price_read=0.0, price_written=0.0,  # nothing is booked here
    )  # fmt: skip


async def all_judged(judges: Sequence[Judge], config: BenchConfig, asked: Sequence[Told]) -> list[Floats]:
    """`judged` by one after another, in one event loop: it is the engine's."""
    return [await judged(judge, config, asked) for judge in judges]


async def judged(judge: Judge, config: BenchConfig, asked: Sequence[Told]) -> Floats:
    """Counts of each question's solutions: truth x verdict (wrong-wrong, wrong-right, right-wrong, right-right).

    NaN where a solution has no verdicts.
    """
    found = await asyncio.gather(*(judge.judge(one.case, one.solutions) for one in asked))
    counts_QSK = np.full((len(asked), config.solutions, 4), np.nan)
    for question, (one, verdicts) in enumerate(zip(asked, found, strict=True)):
        for solution, verdict in enumerate(verdicts):
            if isinstance(verdict, Judgement):
                counts_QSK[question, solution] = confusion(one.truths(solution), [s.label for s in verdict.steps])
    return counts_QSK


def confusion(truths: Sequence[bool | None], labels: Sequence[int | None]) -> Floats:
    places = [2 * int(right) + label for right, label in zip(truths, labels, strict=True)
              if right is not None and label is not None]  # fmt: skip
    return np.bincount(places, minlength=4).astype(np.float64)


def rows(config: BenchConfig, per_call: int, base_QSK: Floats, own_QSK: Floats, console: Console) -> Iterator[Measured]:
    """κ beside the first call size's on the same solutions, and the solutions without verdicts."""
    name = f"solutions_per_call={per_call}"
    unread = [float(np.isnan(counts[..., 0]).mean()) for counts in (base_QSK, own_QSK)]
    both_QS1 = ~np.isnan(base_QSK[..., :1] + own_QSK[..., :1])
    base_QK, own_QK = (np.where(both_QS1, counts, 0.0).sum(axis=1) for counts in (base_QSK, own_QSK))
    before, after = float(kappa_of_counts(base_QK.sum(axis=0))), float(kappa_of_counts(own_QK.sum(axis=0)))
    console.print(f"{name}: truth x verdict, wrong-wrong, wrong-right, right-wrong, right-right: {own_QK.sum(axis=0)}")
    low, high = cluster_bootstrap(
        np.concatenate([base_QK, own_QK], axis=1),
        lambda sums_B8: (kappa_of_counts(sums_B8[:, 4:]) - kappa_of_counts(sums_B8[:, :4]))[:, None],
        config.bootstrap_samples,
        config.seed,
    )
    yield Measured(
        f"{name}: kappa with the truth, gain [{low[0]:+.3f}, {high[0]:+.3f}]",
        before,
        after,
        after - before,
        "",
        "kappa",
    )
    yield Measured(f"{name}: solutions without verdicts", unread[0], unread[1], unread[1] - unread[0], "", "share")
