"""engines/token_pooler.py: which computed token answers for which position, without an engine."""

from collections.abc import Sequence

import pytest
import torch

from medmm_ray.engines.token_pooler import PooledTokens, Pooling, TokenSequence, gather_values, pooler_arguments
from medmm_ray.engines.vllm_engine import VllmEngine


def computed(values: Sequence[float], start: int = 0) -> PooledTokens:
    return PooledTokens(torch.tensor(values)[:, None], start)


def test_a_sequence_answers_for_itself_from_where_it_was_computed() -> None:
    (values_TW,) = gather_values([TokenSequence([7, 8, 9, 10], [2, 3])], [computed([0.2, 0.3], start=2)])
    assert values_TW is not None
    assert values_TW.tolist() == [[pytest.approx(0.2)], [pytest.approx(0.3)]]


def test_what_was_cached_comes_from_the_sequence_with_the_same_beginning() -> None:
    sequences = [
        TokenSequence([1, 2, 3, 4, 5, 6], [1, 5]),
        TokenSequence([1, 2, 9, 4, 5, 6], [1, 3, 5]),  # differs at 2: its first position is the first sequence's …
        TokenSequence([1, 2, 9, 4, 5, 7], [3, 5]),  # … and what this one lacks at 3 was computed by the second alone
    ]
    found = gather_values(
        sequences, [computed([0, 1, 2, 3, 4, 5]), computed([12, 13, 14, 15], 2), computed([24, 25], 4)]
    )
    assert [None if v is None else v[:, 0].tolist() for v in found] == [[1, 5], [1, 13, 15], [13, 25]]


def test_an_equal_token_at_another_place_or_after_another_beginning_answers_for_nothing() -> None:
    sequences = [TokenSequence([1, 2, 3], [2]), TokenSequence([4, 2, 3], [1, 2])]
    found = gather_values(sequences, [computed([0, 1, 2]), computed([12], 2)])
    assert found[0] is not None
    assert found[1] is None  # position 1 was computed in no sequence that begins with 4


def test_a_sequence_whose_size_is_not_as_said_is_taken_for_nothing() -> None:
    sequences = [TokenSequence([1, 2, 3], [0]), TokenSequence([1, 2, 3], [0])]
    assert gather_values(sequences, [None, computed([5], 2)]) == [None, None]


def test_arguments_of_the_engine() -> None:
    cpu = pooler_arguments("m", VllmEngine(max_model_len=8192, vllm={"block_size": 64}))
    assert (cpu["enable_prefix_caching"], cpu["enable_chunked_prefill"], cpu["block_size"]) == (True, True, 64)
    gpus = VllmEngine(num_gpus=2, tensor_parallel_size=2, vllm={"quantization": "fp8"}, max_model_len=100)
    on_gpus = pooler_arguments("m", gpus)
    expected = {"tensor_parallel_size": 2, "quantization": "fp8", "gpu_memory_utilization": 0.9, "max_model_len": 100}
    assert expected.items() <= on_gpus.items()
    assert not {"enable_chunked_prefill", "max_num_batched_tokens"} & set(on_gpus)


def test_the_sign_that_counts_as_true_stands_second() -> None:
    head = Pooling.difference(plus="Ġ+", minus="Ġ-").arguments["hf_overrides"]
    assert head == {"classifier_from_token": ["Ġ-", "Ġ+"], "method": "from_2_way_softmax"}
