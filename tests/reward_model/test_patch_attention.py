"""Where a fusion's attention lies, against a softmax by hand on its weights, and against what its forward pass uses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from medmm_ray.engines.image_preprocess import seen_area
from medmm_ray.reward_model import FusionConfig, ImageFeatures, RewardModel
from medmm_ray.reward_model.fusion import Fusion, Tokens
from tests.doubles import tiny_reward_model as tiny
from tests.doubles.clip_folders import write_native_clip

NUM_TAGS, TEXT_WIDTH, IMAGE_WIDTH, NUM_PATCHES = 5, 12, 10, 4


def random_fusion(tokens: Tokens, num_heads: int) -> Fusion:
    torch.manual_seed(1)
    fusion = Fusion(FusionConfig(tokens=tokens, width=8, num_heads=num_heads), TEXT_WIDTH, IMAGE_WIDTH).eval()
    # Far from their starts, so that weights differ from patch to patch.
    for weights in fusion.parameters():
        if weights.ndim > 1:
            torch.nn.init.normal_(weights, std=0.7)
    return fusion


def features(num_images: int, num_references: int) -> ImageFeatures:
    generator = torch.Generator().manual_seed(2)
    total = num_images + num_references
    pooled = torch.randn(total, IMAGE_WIDTH, generator=generator)
    patches = torch.randn(total, NUM_PATCHES, IMAGE_WIDTH, generator=generator)
    return ImageFeatures.gather(pooled, patches, [range(num_images)], [range(num_images, total)])


def states() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(NUM_TAGS, TEXT_WIDTH, generator=generator),
        torch.randn(NUM_TAGS, TEXT_WIDTH, generator=generator),
    )


class ByHand:
    """The fusion's attention in NumPy, on its weights by their names."""

    def __init__(self, fusion: Fusion) -> None:
        self.fusion = fusion
        self.weights = {name: weight.detach().double().numpy() for name, weight in fusion.state_dict().items()}

    def norm(self, name: str, x: Any) -> Any:
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def linear(self, name: str, x: Any) -> Any:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def projected(self, tokens: Any) -> Any:
        hidden = self.linear("projector.1", self.norm("projector.0", tokens))
        gelu = torch.nn.functional.gelu(torch.tensor(hidden)).numpy()
        return self.linear("projector.3", gelu)

    def attention(self, states_TD: Any, summaries_TD: Any, tokens: list[tuple[Any, int, float]]) -> Any:
        """Mean over heads [T, M]; `tokens`: each image's tokens, their kind, and the logarithm of their weight."""
        inputs = [self.norm("state_norm", states_TD), self.norm("summary_norm", summaries_TD)]
        queries = self.linear("attend_query", self.linear("query", np.concatenate(inputs, axis=-1)))
        projected = [self.projected(values) + self.weights["kinds.weight"][kind] for values, kind, _ in tokens]
        keys = self.linear("attend_key", np.concatenate(projected))
        bias = np.concatenate([np.full(len(values), log_weight) for values, _, log_weight in tokens])
        width = 8 // self.fusion.config.num_heads
        by_head = []
        for head in range(self.fusion.config.num_heads):
            part = slice(head * width, (head + 1) * width)
            logits = queries[:, part] @ keys[:, part].T / np.sqrt(width) + bias
            odds = np.exp(logits - logits.max(axis=1, keepdims=True))
            by_head.append(odds / odds.sum(axis=1, keepdims=True))
        return np.mean(by_head, axis=0)


@pytest.mark.parametrize(("tokens", "num_heads"), [("both", 2), ("both", 1), ("patches", 4)])
def test_weights_of_the_first_images_patches_by_hand(tokens: Tokens, num_heads: int) -> None:
    fusion = random_fusion(tokens, num_heads)
    images = features(num_images=2, num_references=1)
    assert images.patches_QIPW is not None
    pooled_IW, patches_IPW = images.pooled_QIW[0].double().numpy(), images.patches_QIPW[0].double().numpy()
    reference_weight = fusion.reference_bias.item()  # of the one reference against the question's own
    of_image = [0.0, 0.0, reference_weight]
    all_tokens = []
    if tokens == "both":
        all_tokens += [(pooled_IW[i : i + 1], 2 * (i == 2), of_image[i]) for i in range(3)]
    num_before = len(all_tokens)
    all_tokens += [(patches_IPW[i], 2 * (i == 2) + 1, of_image[i] - np.log(NUM_PATCHES)) for i in range(3)]
    states_TD, summaries_TD = states()
    expected_TM = ByHand(fusion).attention(states_TD.double().numpy(), summaries_TD.double().numpy(), all_tokens)
    with torch.inference_mode():
        weights_TP = fusion.patch_weights(states_TD, summaries_TD, images)
    assert weights_TP.numpy() == pytest.approx(expected_TM[:, num_before : num_before + NUM_PATCHES], abs=1e-5)
    assert weights_TP.std() > 0.01, "weights differ"


def test_the_forward_pass_uses_these_weights() -> None:
    fusion = random_fusion("patches", num_heads=1)
    images = features(num_images=1, num_references=0)
    mixed: list[Tensor] = []
    handle = fusion.attend_out.register_forward_pre_hook(lambda _, inputs: mixed.append(inputs[0]))
    with torch.inference_mode():
        fusion(*states(), images)
        weights_TP = fusion.patch_weights(*states(), images)
        values_PF = fusion.attend_value(fusion._tokens(images, torch.float32)[0][0])
    handle.remove()
    assert mixed[0][0].numpy() == pytest.approx((weights_TP @ values_PF).numpy(), abs=1e-5)
    assert weights_TP.sum(dim=1).numpy() == pytest.approx(np.ones(NUM_TAGS), abs=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attention")
    tiny.save(folder / "text")
    write_native_clip(folder / "tower")
    return folder


def two_tower(folder: Path, tokens: Tokens) -> RewardModel:
    model = RewardModel.from_pretrained(folder / "text")
    torch.manual_seed(3)
    model.add_image_tower(str(folder / "tower"), FusionConfig(tokens=tokens, width=16, num_heads=2))
    return model.eval()


def test_each_step_has_a_grid_that_adds_up_to_one_and_a_share(folder: Path) -> None:
    model = two_tower(folder, "both")
    picture = Image.effect_noise((48, 32), 60).convert("RGB")
    solutions = [*tiny.SOLUTIONS, []]
    read = model.text_states(tiny.QUESTION, solutions)
    images = model.image_features([picture], [picture])
    attention = model.patch_attention(read, images)
    assert attention is not None
    assert images.patches_QIPW is not None
    side = int(images.patches_QIPW.shape[2] ** 0.5)
    assert [len(of_solution) for of_solution in attention] == [2, 3, 1, 0], "the last one could not be read"
    for of_solution in attention:
        for step in of_solution:
            assert np.shape(step.weights) == (side, side)
            assert np.sum(step.weights) == pytest.approx(1, abs=1e-6)
            # The image's pooled token and the reference have the rest.
            assert 0 < step.share < 1
    assert model.fusion is not None
    with torch.inference_mode():
        whole = model.fusion.patch_weights(read[0].states_TD, read[0].summaries_TD, images)[1]
    first_row = np.array(attention[0][1].weights[0]) * attention[0][1].share
    assert first_row == pytest.approx(whole[:side].numpy(), abs=1e-6)


def test_a_fusion_that_reads_pooled_tokens_has_none(folder: Path) -> None:
    model = two_tower(folder, "pooled")
    read = model.text_states(tiny.QUESTION, tiny.SOLUTIONS)
    images = model.image_features([Image.new("RGB", (32, 32))])
    assert model.patch_attention(read, images) is None
    assert model.fusion is not None
    with pytest.raises(ValueError, match="tokens='pooled': there is no attention over patches"):
        model.fusion.patch_weights(read[0].states_TD, read[0].summaries_TD, images)


@pytest.mark.parametrize(
    ("resize", "area"),
    [
        ("squash", (0, 0, 1, 1)),
        # Of 800 x 600 the middle 600 columns, or 100 empty rows above and below.
        ("shortest", (0.125, 0, 0.875, 1)),
        ("longest", (0, -1 / 6, 1, 7 / 6)),
    ],
)
def test_the_area_of_a_picture_that_is_seen(resize: Any, area: tuple[float, ...]) -> None:
    assert seen_area(resize, 800, 600) == pytest.approx(area)


def test_the_area_is_what_changes_the_pixels(folder: Path) -> None:
    from medmm_ray.engines.image_tower import ImageTower

    tower = ImageTower.from_pretrained(folder / "tower")
    grey = Image.new("RGB", (64, 32), (90, 90, 90))
    left, _, right, _ = tower.area(64, 32)
    for column, is_seen in ((0, left <= 0), (round(64 * left) + 8, True), (60, right >= 1)):
        changed = grey.copy()
        changed.paste((250, 0, 0), (column, 0, column + 4, 32))
        is_changed = not torch.equal(tower.preprocess(changed), tower.preprocess(grey))
        assert is_changed == is_seen, column
