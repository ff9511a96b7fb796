"""jobs.bench sharing: what the small judge is taught, and how its verdicts are counted."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jobs.benches import sharing as bench
from jobs.benches.judge import BenchConfig as JudgeBench
from jobs.benches.judge import server as judge_server
from jobs.benches.judge import server_report
from medmm_ray.config import ConfigError, load
from medmm_ray.engines.llm.client import ApiConfig
from medmm_ray.engines.llm.local import prompt_of
from medmm_ray.engines.vllm_engine import VllmEngine
from medmm_ray.steps.judge import JudgeApi, JudgeConfig, verdicts
from medmm_ray.steps.judge.prompt import SYSTEM, JudgeCall
from medmm_ray.train.policy import LlamaShape, new_llama
from tests.doubles.fake_generator import FakeGenerator, text_of

CONFIG = bench.BenchConfig(per_call=(1, 3), questions=3, solutions=3, train_questions=4, bootstrap_samples=20)


@pytest.mark.parametrize("per_call", [1, 3])
def test_the_judges_own_reader_reads_the_truth_out_of_a_lesson(per_call: int) -> None:
    for phantom in bench.make_phantoms(CONFIG, "train", 20, per_call):
        _, reply = bench.lesson(phantom, per_call)
        call = JudgeCall(tuple(tuple(steps) for steps in phantom.solutions[:per_call]))
        read = [[step.label for step in steps] for steps in verdicts(reply, call.numbers)]
        assert read == [[int(right is not False) for right in phantom.truths(i)] for i in range(per_call)]
        assert json.loads(reply)


def test_solutions_have_right_steps_and_wrong_ones() -> None:
    phantoms = bench.make_phantoms(CONFIG, "test", 50, 4)
    found = [right for phantom in phantoms for i in range(4) for right in phantom.truths(i) if right is not None]
    assert 0.5 < np.mean(found) < 0.8
    assert all("Report: " in phantom.case.question and phantom.case.images == [] for phantom in phantoms)


def test_verdicts_are_counted_by_the_truth() -> None:
    truths, labels = [True, None, False, False, True, True], [1, 0, 0, 1, 0, None]
    assert bench.confusion(truths, labels).tolist() == [1, 1, 1, 1]


def test_two_call_sizes_are_held_against_each_other_where_both_have_verdicts() -> None:
    perfect = np.tile([5.0, 0.0, 0.0, 5.0], (2, 3, 1))
    worse = perfect.copy()
    worse[:, 0] = [0.0, 5.0, 5.0, 0.0]  # all wrong in one of three solutions
    worse[0, 0] = np.nan  # and that one unread in the first question
    kappa, unread = bench.rows(CONFIG, 3, perfect, worse, Console(quiet=True))
    assert kappa.baseline == 1.0
    assert unread.ours == pytest.approx(1 / 6)
    assert kappa.ours == pytest.approx(1 - 2 * 10 / 50)


def test_an_api_without_a_models_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'judge\.engine\.model' is required"):
        load(bench.BenchConfig, None, ["judge.engine.kind=gemini"])


def test_a_judge_that_sees_no_calls_is_refused() -> None:
    with pytest.raises(ValueError, match="name vllm, gemini or openai"):
        bench.BenchConfig(judge=JudgeConfig())


def test_a_judge_behind_an_api_is_measured_and_paid_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    """The bench's own server: its verdicts depend on the step alone, so sharing a call changes nothing."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    server = JudgeBench(latency_s=0.01, fault_rate=0.0)
    with judge_server(server) as address:
        judge = JudgeConfig(engine=JudgeApi(kind="openai", model="bench"))
        api = ApiConfig(endpoint=f"{address}/v1", input_price=1.0, output_price=1.0)
        config = CONFIG.model_copy(
            update={"questions": 12, "judge": judge, "apis": {"bench": api}, "folder": str(tmp_path)}
        )
        rows = list(bench.measure(config, Console(quiet=True)))
        assert list(bench.measure(config, Console(quiet=True))) == rows
        report = server_report(address)
    assert (report["delivered"], report["twice"]) == (12 * (3 + 1), 0)
    kappas = {row.baseline for row in rows if row.unit == "kappa"} | {row.ours for row in rows if row.unit == "kappa"}
    assert len(kappas) == 1
    assert [row.ours for row in rows if row.unit == "share"] == [0, 0]


@pytest.mark.engine
def test_a_small_judge_is_taught_and_asked_in_the_words_of_its_lessons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    """A generator answers in the engine's place, each call as the lesson with the same prompt does."""
    texts = [
        SYSTEM,
        *(str(part) for phantom in bench.make_phantoms(CONFIG, "train", 4, 3) for part in bench.lesson(phantom, 3)),
    ]
    shape = LlamaShape(hidden_size=32, num_layers=1, num_heads=1, intermediate_size=64, max_length=8192)
    for part in new_llama(shape, texts, seed=0):
        part.save_pretrained(tmp_path / "base")
    replies: dict[str, str] = {}
    for phantom in bench.make_phantoms(CONFIG, "test", CONFIG.questions, CONFIG.solutions):
        for per_call in CONFIG.per_call:
            for start in range(0, CONFIG.solutions, per_call):
                part_of = replace(phantom, solutions=phantom.solutions[start : start + per_call])
                request, reply = bench.lesson(part_of, per_call)
                replies[text_of(prompt_of(request))] = reply
    folder = str(tmp_path / "judge")

    def engine_of(model: str, engine: VllmEngine) -> FakeGenerator:
        assert (model, engine) == (folder, CONFIG.judge.engine)
        return Engine(lambda prompt, seed: replies[prompt])

    monkeypatch.setattr(bench, "Generator", engine_of)
    lessons = CONFIG.lessons.model_copy(update={"base": str(tmp_path / "base"), "dtype": "float32"})
    config = CONFIG.model_copy(update={"lessons": lessons, "folder": str(tmp_path)})
    rows = list(bench.measure(config, Console(quiet=True)))
    assert Path(folder, "model.safetensors").is_file()
    assert [row.name.partition(":")[0] for row in rows] == ["solutions_per_call=1"] * 2 + ["solutions_per_call=3"] * 2
    assert [row.ours for row in rows] == [1.0, 0.0, 1.0, 0.0]  # kappa with the truth, solutions without verdicts


class Engine(FakeGenerator):
    """One that can be stopped, as vLLM's."""

    def shutdown(self) -> None:
        pass
