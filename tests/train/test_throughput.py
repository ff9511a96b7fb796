"""What training costs, against figures by hand."""

import pytest

from medmm_ray.train.throughput import ThroughputMeter, TrainingFlops, peak_flops


def test_a_token_costs_six_flops_a_trained_weight_and_four_a_frozen_one() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(  # type: ignore[no-untyped-call]
        LlamaConfig(vocab_size=50, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16)
    )
    block = 4 * 8 * 8 + 3 * 8 * 16 + 2 * 8
    whole = TrainingFlops(model)
    assert (whole.per_token, whole.per_pair) == (6 * 3 * block, 12 * 3 * 8)
    # Pairs that a mask would show: the prefix 1 + 2 + 3; a branch of 2 tokens sees it from each, and itself 1 + 2.
    assert whole.prefix(3) == 3 * whole.per_token + 6 * whole.per_pair
    assert whole.branch(3, 2) == 2 * whole.per_token + 9 * whole.per_pair
    assert whole.branch(0, 4) == 4 * whole.per_token + 10 * whole.per_pair
    model.model.layers.requires_grad_(False)
    assert TrainingFlops(model).per_token == 4 * 3 * block


@pytest.mark.parametrize(
    ("name", "tera"),
    [("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H200", 989), ("NVIDIA L4", 121),
     ("NVIDIA L40S", 362)],
)  # fmt: skip
def test_peaks_are_found_by_the_name_that_cuda_gives(name: str, tera: float) -> None:
    assert peak_flops(name) == tera * 1e12
    assert peak_flops("Tesla T4") is None


def test_utilisation_is_the_share_of_what_all_gpus_could_do() -> None:
    speed = ThroughputMeter(peak=200.0)
    assert speed.add(tokens=10, flops=50.0, seconds=0.5) == {"tokens_per_second": 20.0, "mfu": 0.5}
    speed.add(tokens=10, flops=100.0, seconds=1.5)
    assert speed.take() == {"tokens_per_second": 10.0, "mfu": 0.375}
    assert speed.take() == {}
    assert ThroughputMeter(None).add(10, 50.0, 0.5) == {"tokens_per_second": 20.0}
