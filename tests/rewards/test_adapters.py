"""The adapters, called as each trainer calls them: by TRL's documented signature, by verl's reward managers', and by
OpenRLHF's executor's, over HTTP too."""

import importlib.util
import io
import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from medmm_ray.rewards import openrlhf, verl
from medmm_ray.rewards.trl import step_reward
from medmm_ray.service.rewards import RewardTerms
from tests.doubles.served_app import served_app
from tests.service.web import LEFT, OPTIONS, QUESTION, FakeModel, client

ONE = 2 / (1 + math.exp(-1)) - 1
TWO = 2 / (1 + math.exp(-2)) - 1
"""The process rewards of a solution with one step and with two: the fake's log-odds are the number of steps."""


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def url(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with served_app(client(model).app) as url:
        monkeypatch.setenv("MEDMM_URL", url)
        monkeypatch.delenv("MEDMM_TOKEN", raising=False)
        yield url


# TRL: prompts, completions and columns by name, a list of floats back


def test_trl_with_plain_texts_and_columns(url: str, model: FakeModel) -> None:
    reward = step_reward(url, terms=RewardTerms(answer_weight=0.5), columns={"gold": "solution"})
    assert reward.__name__ == "medmm_step_reward"
    rewards = reward(
        prompts=["P"] * 3,
        completions=[LEFT, "The answer is (A).", ""],
        completion_ids=[[1], [2], [3]],
        trainer_state=None,
        question=[QUESTION] * 3,
        options=[OPTIONS] * 3,
        solution=["C"] * 3,
    )
    assert rewards == pytest.approx([TWO + 0.5, ONE, -1.0])
    assert [call[1] for call in model.calls] == [2], "completions of a prompt are read together"


def test_trl_with_conversations_and_images(url: str, model: FakeModel) -> None:
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    white = Image.new("RGB", (8, 8), "white")
    rewards = step_reward()(
        prompts=[prompt, prompt],
        completions=[[{"role": "assistant", "content": LEFT}], [{"role": "assistant", "content": "So it is."}]],
        images=[[white], [white]],
    )
    assert rewards == pytest.approx([2 / (1 + math.exp(-5)) - 1, 2 / (1 + math.exp(2)) - 1])
    assert model.calls == [(QUESTION, 2, 0, True)]


# verl: naive manager (a sample, by keyword) and batch manager (lists, by keyword)


def picture() -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (8, 8), "white").save(sink, "PNG")
    return sink.getvalue()


def test_verl_by_sample_and_by_batch(url: str) -> None:
    row: dict[str, Any] = {"question": QUESTION, "options": OPTIONS, "num_turns": None, "split": "train"}
    one = verl.compute_score(
        data_source="phantoms", solution_str=LEFT, ground_truth="C", extra_info=row, url=url, reward_router_address="x"
    )
    assert one == pytest.approx({"score": TWO + 1, "process": TWO, "answer": 1.0, "length": 0.0})
    batch = verl.compute_scores(
        data_sources=["phantoms"] * 2,
        solution_strs=[LEFT, "So it is."],
        ground_truths=["B", ""],
        extra_infos=[{**row, "options": np.array(OPTIONS)}, {**row, "image": picture()}],  # as Parquet is read
    )
    assert [entry["score"] for entry in batch] == pytest.approx([TWO, 2 / (1 + math.exp(2)) - 1])
    with pytest.raises(ValueError, match="a row of phantoms has no question"):
        verl.compute_score("phantoms", LEFT, "C", None)


# OpenRLHF: a file with `reward_func`, or an address


def test_openrlhf_from_the_file_and_over_http(url: str) -> None:
    label = json.dumps({"question": QUESTION, "options": OPTIONS, "gold": "C"})
    template = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    spec = importlib.util.spec_from_file_location("reward_func", str(openrlhf.__file__))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    answer = module.reward_func([f"{template}{LEFT}<|im_end|>"], [template], [label])
    assert answer["rewards"].tolist() == pytest.approx([TWO + 1], abs=1e-6)
    assert answer["scores"].tolist() == [1.0]
    assert answer["extra_logs"]["num_steps"].tolist() == [2.0]
    payload = {"query": [f"{template}{LEFT}<|im_end|>"], "prompts": [template], "labels": [label]}
    over_http = httpx.post(f"{url}/v1/rewards", json=payload).json()
    assert over_http["rewards"] == pytest.approx([TWO + 1])


def test_an_adapter_without_an_address_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDMM_URL", raising=False)
    with pytest.raises(ValueError, match="set MEDMM_URL"):
        step_reward()
