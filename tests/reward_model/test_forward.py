"""The text tower's pass over a packed row: what the last layer computes where nobody needs the rest of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medmm_ray.reward_model import PackedQuestion, RewardModel
from tests.doubles import tiny_reward_model as tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    folder: Path = tiny.save(tmp_path_factory.mktemp("model"))
    return RewardModel.from_pretrained(folder)


@pytest.fixture
def packed(model: RewardModel) -> PackedQuestion:
    (group,) = model.pack(tiny.QUESTION, tiny.SOLUTIONS, tiny.DOCUMENTS).groups
    return group


def mlp_rows(model: RewardModel, packed: PackedQuestion) -> tuple[list[int], Tensor]:
    """Tokens that each layer's MLP is given in one pass, and the states at the tags."""
    counts: list[int] = []
    layers: Any = model.text_model.get_decoder().layers
    handles = [
        layer.mlp.act_fn.register_forward_hook(lambda _, __, out: counts.append(out.shape[1])) for layer in layers
    ]
    try:
        states_TD, _ = model.tag_states(packed)
    finally:
        for handle in handles:
            handle.remove()
    return counts, states_TD


def test_without_a_gradient_the_last_layer_is_computed_at_the_tags_alone(
    model: RewardModel, packed: PackedQuestion
) -> None:
    length = packed.num_tokens
    with torch.no_grad():
        counts, states_TD = mlp_rows(model, packed)
    counts_in_full, states_in_full_TD = mlp_rows(model, packed)
    assert counts == [length, length, 6]  # 2 + 3 + 1 steps
    assert counts_in_full == [length, length, length]
    assert torch.allclose(states_TD, states_in_full_TD, atol=1e-6)


def test_nothing_of_it_stays_with_the_model(model: RewardModel, packed: PackedQuestion) -> None:
    with torch.no_grad():
        model.tag_states(packed)
    ids = torch.tensor([packed.prefix_ids])
    with torch.no_grad():
        output = model.text_model.get_decoder()(input_ids=ids).last_hidden_state
    assert output.shape[1] == len(packed.prefix_ids)
    assert bool((output != 0).all())
