import json
import math
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from medmm_ray.engines.pretrained import save
from medmm_ray.reward_model import (
    CheckpointError,
    Fusion,
    FusionConfig,
    ImageError,
    ImageFeatures,
    PackedQuestion,
    RewardModel,
    ScoreRequest,
    choose_documents,
    pack,
)
from medmm_ray.reward_model.families import MedPrm
from medmm_ray.reward_model.forward import RowPacker, RowPiece
from medmm_ray.reward_model.packing import Branch
from medmm_ray.reward_model.reference import reference_log_odds
from medmm_ray.train.policy import load_pretrained
from tests.doubles import tiny_reward_model as tiny
from tests.doubles.clip_folders import write_native_clip
from tests.engines.test_weights import POINTER, change_weights, cut, renamed, shard, without
from tests.reward_model import medprm_reference

QUESTION = "Which lung shows the effusion? (A) left (B) right"
DOCUMENTS = ["a blunted costophrenic angle shows an effusion", "the heart is normal"]


def packed_question(*arguments: Any, **options: Any) -> PackedQuestion:
    """The one group of a packing without errors."""
    packing = pack(*arguments, **options)
    (group,) = packing.groups
    assert packing.errors == [None] * len(group.branches)
    return group


def steps(num: int, seed: int, words: int = 6) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(tiny.WORDS, k=rng.randint(1, words))) for _ in range(num)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("text_model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> RewardModel:
    return RewardModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def two_tower(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    """A model whose fusion has been trained a little: its output projection is not zero."""
    model = RewardModel.from_pretrained(folder)
    torch.manual_seed(3)
    tower = write_native_clip(tmp_path_factory.mktemp("tower"))
    model.add_image_tower(tower, FusionConfig(tokens="both", width=16, num_heads=2))
    assert model.fusion is not None
    torch.nn.init.normal_(model.fusion.output.weight, std=0.5)
    return model.eval()


def picture(shade: int) -> Image.Image:
    return (
        Image.effect_noise((40, 32), shade).convert("RGB") if shade > 255 else Image.new("RGB", (40, 32), (shade,) * 3)
    )


# Packing


def whole_ids(tok: Any, solution: Sequence[str], documents: Sequence[str] = ()) -> list[int]:
    tagged = medprm_reference.processed(medprm_reference.numbered(solution))
    return medprm_reference.prompt_ids(tok, QUESTION, tagged, documents)


@pytest.mark.parametrize("own_bos", [False, True])
def test_packed_ids_are_those_of_each_sequence_up_to_its_last_tag(own_bos: bool) -> None:
    tok = tiny.tokenizer(own_bos=own_bos)
    solutions = [steps(n, seed=n) for n in (1, 4, 2, 9)]
    packed = packed_question(MedPrm(tok), QUESTION, solutions, DOCUMENTS)
    tag = tiny.tag_id(tok)
    assert packed.prefix_ids[: 1 + own_bos] == [0] * (1 + own_bos)
    assert packed.num_documents == 2
    for branch, solution in zip(packed.branches, solutions, strict=True):
        ids = whole_ids(tok, solution, DOCUMENTS)
        last = max(i for i, t in enumerate(ids) if t == tag)
        assert packed.prefix_ids + branch.ids == ids[: last + 1]
        assert [branch.ids[t] for t in branch.tags] == [tag] * len(solution)


def test_the_prefix_is_the_longest_common_one_and_holds_no_tag() -> None:
    tok = tiny.tokenizer()
    tag = tiny.tag_id(tok)
    apart = packed_question(MedPrm(tok), QUESTION, [["left lung", "no"], ["right lung", "no"]])
    first, second = (whole_ids(tok, s) for s in (["left lung", "no"], ["right lung", "no"]))
    shared = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    assert len(apart.prefix_ids) == shared
    alike = packed_question(MedPrm(tok), QUESTION, [["left lung", "no"], ["left lung", "yes"]])
    assert len(alike.prefix_ids) == first.index(tag)
    assert [b.ids[0] for b in alike.branches] == [tag, tag]
    alone = packed_question(MedPrm(tok), QUESTION, [["left lung", "no"]])
    assert (len(alone.prefix_ids), alone.branches[0].tags[0]) == (first.index(tag), 0)


def test_length_and_tags_of_a_packed_question() -> None:
    packed = PackedQuestion([10, 11, 12], [Branch(0, [20, 9, 21, 9], [1, 3], start=2), Branch(2, [30, 9], [1], 2)], 0)
    assert packed.num_tokens == 9
    assert packed.tag_solutions == [0, 0, 2]
    assert packed.tag_steps == [0, 1, 0]
    assert packed.branches[0].spans(3) == [(2, 4), (5, 6)]


def test_a_tag_outside_the_end_of_a_step_ends_no_step() -> None:
    tok = tiny.tokenizer()
    tag = tiny.tag_id(tok)
    solution = ["the lung ки is clear", "a ки b ки", "no"]
    packed = packed_question(MedPrm(tok), "Is ки it? ки", [solution], ["of ки course"])
    (branch,) = packed.branches
    own = [i for i, t in enumerate(packed.prefix_ids + branch.ids) if t == tag]
    assert len(own) == 3 + 3 + 3  # question and document, inside steps, ends of steps
    ends = [len(packed.prefix_ids) + t for t in branch.tags]
    assert ends == [own[4], own[7], own[8]]


def test_where_a_solution_starts_does_not_depend_on_what_is_shared() -> None:
    tok = tiny.tokenizer()
    alone = packed_question(MedPrm(tok), QUESTION, [["left lung", "no"]])
    among = packed_question(MedPrm(tok), QUESTION, [["left lung", "no"], ["x"]])
    assert alone.branches[0].start == among.branches[0].start < len(among.prefix_ids) < len(alone.prefix_ids)
    text = str(tok.decode((among.prefix_ids + among.branches[0].ids)[among.branches[0].start :]))
    assert text.strip().startswith("Step 1: left lung")


def test_documents_are_chosen_by_rank_within_the_budget() -> None:
    tok = tiny.tokenizer()
    cost = {d: len(tok(d, add_special_tokens=False)["input_ids"]) + 1 for d in ("lung", "heart " * 30, "no")}
    budget = cost["lung"] + cost["no"]
    offered = list(cost)
    assert choose_documents(tok, offered, max_length=1024 + budget) == ["lung", "no"]
    assert choose_documents(tok, offered, max_length=1024 + budget, fit="break") == ["lung"]
    assert choose_documents(tok, offered, max_length=1024 + budget - 1) == ["lung"]
    assert choose_documents(tok, offered, max_length=10 + budget, reserve=10) == ["lung", "no"]
    assert choose_documents(tok, offered, max_length=500) == []


def test_raw_text_is_cut_and_keeps_its_own_tags() -> None:
    tok = tiny.tokenizer()
    listed = pack(MedPrm(tok), QUESTION, [["left lung", "the answer is (A)."]])
    for raw in ("Step 1: left lung\nStep 2: the answer is (A).", "Step 1: left lung ки Step 2: the answer is (A). ки"):
        assert pack(MedPrm(tok), QUESTION, [raw]) == listed
    (branch,) = packed_question(MedPrm(tok), QUESTION, ["no steps at all"]).branches
    assert len(branch.tags) == 1


def test_solutions_that_cannot_be_packed_become_errors_and_leave_the_others() -> None:
    tok = tiny.tokenizer()
    packing = pack(MedPrm(tok), QUESTION, [["left"], [], ["  "], steps(60, 1), ""], context=200)
    assert [b.solution for group in packing.groups for b in group.branches] == [0]
    assert packing.errors[0] is None
    assert [str(e).split(":")[0] for e in packing.errors[1:]] == ["no_steps", "no_steps", "too_long", "no_steps"]
    assert "without a document; the limit is 200" in str(packing.errors[3])
    assert pack(MedPrm(tok), QUESTION, [[]]).groups == []
    assert pack(MedPrm(tok), QUESTION, [steps(60, 1)], context=200).groups == []


def test_a_solution_too_long_for_the_context_loses_documents_alone() -> None:
    tok = tiny.tokenizer()
    documents = [" ".join(["effusion"] * 30), " ".join(["nodule"] * 30), " ".join(["heart"] * 30)]
    short, long = ["left lung", "no"], steps(8, 1)
    everything = pack(MedPrm(tok), QUESTION, [short, long], documents)
    (group,) = everything.groups
    room = len(group.prefix_ids) + max(len(b.ids) for b in group.branches)
    packing = pack(MedPrm(tok), QUESTION, [short, long], documents, context=room - 40)
    assert packing.errors == [None, None]
    assert [(g.num_documents, [b.solution for b in g.branches]) for g in packing.groups] == [(3, [0]), (1, [1])]
    assert packing.groups[0] == packed_question(MedPrm(tok), QUESTION, [short], documents)
    alone = packed_question(MedPrm(tok), QUESTION, [long], documents[:1])
    assert packing.groups[1].prefix_ids == alone.prefix_ids
    assert packing.num_tokens == sum(g.num_tokens for g in packing.groups)


def test_a_template_that_changes_the_solution_is_refused() -> None:
    tok = tiny.tokenizer()
    tok.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="alters the solution"):
        pack(MedPrm(tok), QUESTION, [["left"]])


def test_tags_that_cannot_be_told_apart_are_an_error_of_their_solution() -> None:
    # " ки" as a word of the vocabulary, not an added token: in " кит" its text is there, but no tag token.
    tok = tiny.tokenizer(tag=False, more=["ки ки ки кит кит кит кит"] * 50)
    assert len(tok(" ки", add_special_tokens=False)["input_ids"]) == 1
    packed = pack(MedPrm(tok), QUESTION, [["a кит"], ["left"]])
    assert [b.solution for b in packed.groups[0].branches] == [1]
    assert packed.errors == ["tags: 1 tag tokens for 2 tags in the text; expected as many", None]


# Scoring


def test_errors_are_data(model: RewardModel) -> None:
    good, empty, long, again = model.score(QUESTION, [["left"], [], steps(600, 1, words=12), ["left"]])
    assert good.plus_probs == again.plus_probs
    assert str(empty.error).startswith("no_steps")
    assert (empty.plus_probs, empty.min_plus_prob, empty.final_plus_prob) == ([], None, None)
    assert str(long.error).startswith("too_long")
    assert "the limit is 2048" in str(long.error)
    assert model.score(QUESTION, []) == []


@pytest.mark.parametrize(
    ("dtype", "value", "near", "advice"),
    [
        ("float16", 1e5, 5e-2, "float16 holds nothing above 65,504: load the model with dtype=bfloat16 or float32"),
        ("float32", math.nan, 1e-5, "look for NaN among the checkpoint's weights"),
    ],
)
@pytest.mark.parametrize("token_budget", [None, 40])
def test_a_solution_of_no_finite_scores_is_an_error_and_its_neighbours_keep_theirs(
    folder: Path, dtype: str, value: float, near: float, advice: str, token_budget: int | None
) -> None:
    good = [["left angle", "yes"], ["right angle", "no"], ["normal heart", "clear", "the answer is left"]]
    bad = ["left angle", "an image because of pneumothorax"]
    sound = RewardModel.from_pretrained(folder, dtype=dtype)
    expected = [sound.score(QUESTION, [solution])[0].log_odds for solution in good]
    broken = RewardModel.from_pretrained(folder, dtype=dtype)
    (word,) = broken.tokenizer(" pneumothorax", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        broken.text_model.get_input_embeddings().weight[word] = value  # 1e5 is infinite in float16
    found = broken.score(QUESTION, [good[0], bad, *good[1:]], token_budget=token_budget)
    assert found[1].error is not None
    assert found[1].error.startswith("not_finite: 2 of 2 steps have no finite score in")
    assert advice in found[1].error
    assert (found[1].log_odds, found[1].plus_probs, found[1].min_plus_prob) == ([], [], None)
    for own, wanted in zip([found[0], *found[2:]], expected, strict=True):
        assert own.error is None
        assert own.log_odds == pytest.approx(wanted, abs=near)
    requests = [ScoreRequest(QUESTION, [bad]), ScoreRequest(QUESTION, good)]  # two questions in a row
    (alone,), beside = broken.score_many(requests, token_budget=token_budget)
    assert str(alone.error).startswith("not_finite")
    assert [own.log_odds for own in beside] == [pytest.approx(wanted, abs=near) for wanted in expected]
    states = broken.text_states(QUESTION, [bad])[0]
    assert (len(states.states_TD), len(states.log_odds_T), states.error) == (0, 0, alone.error)


def test_an_image_part_that_is_not_finite_is_an_error(two_tower: RewardModel) -> None:
    assert two_tower.fusion is not None
    weights = {name: value.clone() for name, value in two_tower.fusion.state_dict().items()}
    try:
        with torch.no_grad():
            two_tower.fusion.output.weight[0, 0] = math.nan
        (with_image,) = two_tower.score(QUESTION, [["left", "no"]], image=picture(200))
        (without_image,) = two_tower.score(QUESTION, [["left", "no"]])
    finally:
        two_tower.fusion.load_state_dict(weights)
    assert with_image.error == (
        "not_finite: the image part of 2 of 2 steps is not finite; look for NaN among the fusion's weights"
    )
    assert with_image.log_odds == []
    assert without_image.error is None


def test_an_image_tower_of_no_finite_numbers_is_an_error_entry(
    two_tower: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert two_tower.image_tower is not None
    with torch.no_grad():
        tokens = two_tower.image_tower(torch.zeros(1, 3, 32, 32))
    broken = type(tokens)(tokens.pooled_BD * math.inf, tokens.patches_BPD)
    monkeypatch.setattr(two_tower.image_tower, "forward", lambda pixels: broken)
    (scores,) = two_tower.score(QUESTION, [["left"]], image=picture(1))
    assert str(scores.error).startswith("image_not_finite: the image tower makes no finite numbers")


def rows_of(questions: Iterator[tuple[int, PackedQuestion]], token_budget: int) -> Iterator[list[RowPiece]]:
    packer = RowPacker(token_budget)
    for i, packed in questions:
        yield from packer.add(i, packed)
    yield from packer.flush()


def test_a_stream_of_questions_fills_rows_to_the_budget(model: RewardModel) -> None:
    def questions() -> Iterator[tuple[int, PackedQuestion]]:
        for i in range(12):
            for group in model.pack(f"{QUESTION} {i}", [steps(2, i), steps(3, i + 50)]).groups:
                yield i, group

    total = sum(packed.num_tokens for _, packed in questions())
    largest = max(packed.num_tokens for _, packed in questions())
    budget = 3 * largest
    sizes = [sum(piece.block.length for piece in row) for row in rows_of(questions(), budget)]
    assert sum(sizes) == total
    assert max(sizes) <= budget
    assert min(sizes[:-1]) > budget - largest
    small = largest // 3
    pieces = [piece for row in rows_of(questions(), small) for piece in row]
    assert max(piece.block.length for piece in pieces) <= small
    assert any(piece.stop < len(piece.packed.prefix_ids) for piece in pieces)
    assert all(piece.cached is not None for piece in pieces)
    assert sum(piece.block.length for piece in pieces) == total


# Training


def test_packed_states_and_gradients_are_those_of_single_sequences(model: RewardModel) -> None:
    solutions = [steps(n, seed=n) for n in (3, 1, 6)] + [["left", "no"], ["left", "yes"]]
    (packed,) = model.pack(QUESTION, solutions, DOCUMENTS).groups
    weights_T = torch.linspace(-1, 1, len(packed.tag_steps))

    def gradients(loss: Tensor) -> Tensor:
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        return torch.cat([p.grad.flatten() for p in model.text_model.parameters() if p.grad is not None])

    together = gradients((model(packed) * weights_T).sum())
    apart = torch.zeros_like(together)
    start = 0
    for solution in solutions:
        log_odds_T = reference_log_odds(model.text_model, model.family, QUESTION, solution, DOCUMENTS)
        apart += gradients((log_odds_T * weights_T[start : start + len(solution)]).sum())
        start += len(solution)
    assert float((together - apart).norm() / apart.norm()) <= 1e-5


def test_training_and_scoring_read_the_same_states(model: RewardModel) -> None:
    solutions = [steps(n, seed=n) for n in (3, 1, 6)]
    with torch.no_grad():
        states_TD, summaries_TD = model.tag_states(model.pack(QUESTION, solutions).groups[0])
    scored = model.text_states(QUESTION, solutions)
    torch.testing.assert_close(states_TD, torch.cat([s.states_TD for s in scored]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(summaries_TD, torch.cat([s.summaries_TD for s in scored]), atol=1e-5, rtol=1e-5)


def test_a_summary_is_the_mean_of_the_steps_tokens_in_the_middle_layer(model: RewardModel) -> None:
    solution = ["the left lung", "is normal"]
    (packed,) = model.pack(QUESTION, [solution]).groups
    ids = packed.prefix_ids + packed.branches[0].ids
    with torch.no_grad():
        hidden_LD = model.text_model.base_model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0]
    first, second = (len(packed.prefix_ids) + t for t in packed.branches[0].tags)
    expected = torch.stack([hidden_LD[packed.branches[0].start : first].mean(0), hidden_LD[first + 1 : second].mean(0)])
    (states,) = model.text_states(QUESTION, [solution])
    torch.testing.assert_close(states.summaries_TD, expected, atol=1e-5, rtol=1e-5)


# Fusion


def features(questions: int = 1, references: int = 2, patches: int = 5, seed: int = 0) -> ImageFeatures:
    torch.manual_seed(seed)
    slots = 1 + references
    return ImageFeatures.gather(
        torch.randn(questions * slots, 12),
        torch.randn(questions * slots, patches, 12),
        [[q * slots] for q in range(questions)],
        [list(range(q * slots + 1, (q + 1) * slots)) for q in range(questions)],
    )


def opened(config: FusionConfig) -> Fusion:
    torch.manual_seed(1)
    fusion = Fusion(config, text_width=8, image_width=12).eval()
    torch.nn.init.normal_(fusion.output.weight)
    return fusion


@pytest.mark.parametrize("tokens", ["pooled", "patches", "both"])
def test_an_untrained_fusion_adds_exactly_nothing_and_then_learns(tokens: Any) -> None:
    torch.manual_seed(0)
    fusion = Fusion(FusionConfig(tokens=tokens), text_width=8, image_width=12)
    states, summaries, target = torch.randn(6, 8), torch.randn(6, 8), torch.randn(6, 8)
    assert torch.equal(fusion(states, summaries, features()), torch.zeros(6, 8))
    optimizer = torch.optim.Adam(fusion.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (fusion(states, summaries, features()) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert all(p.grad is not None for p in fusion.parameters())


def test_a_question_without_an_image_of_its_own_gets_exactly_nothing() -> None:
    fusion = opened(FusionConfig(tokens="both"))
    pooled, patches = torch.randn(3, 12), torch.randn(3, 5, 12)
    mixed = ImageFeatures.gather(pooled, patches, [[0], [], []], [[1], [2], []])
    delta = fusion(torch.randn(4, 8), torch.randn(4, 8), mixed, torch.tensor([1, 0, 2, 0]))
    assert torch.equal(delta[[0, 2]], torch.zeros(2, 8))
    assert delta[[1, 3]].abs().min().item() > 0
    assert torch.isfinite(delta).all()


@pytest.mark.parametrize("tokens", ["pooled", "patches", "both"])
def test_questions_in_a_batch_do_not_see_each_other(tokens: Any) -> None:
    fusion = opened(FusionConfig(tokens=tokens))
    torch.manual_seed(5)
    states, summaries = torch.randn(7, 8), torch.randn(7, 8)
    pooled, patches = torch.randn(4, 12), torch.randn(4, 5, 12)
    images, references = [[0], [1, 2]], [[3], []]
    question = torch.tensor([1, 0, 0, 1, 1, 0, 1])
    together = fusion(states, summaries, ImageFeatures.gather(pooled, patches, images, references), question)
    for q in (0, 1):
        own = ImageFeatures.gather(pooled, patches, [images[q]], [references[q]])
        apart = fusion(states[question == q], summaries[question == q], own)
        torch.testing.assert_close(together[question == q], apart, atol=1e-6, rtol=1e-5)


def test_references_weigh_half_of_the_image_and_patches_as_much_as_the_pooled_token_at_the_start() -> None:
    fusion = opened(FusionConfig(tokens="both", summary=False))
    for count in (1, 3):
        own = ImageFeatures.gather(torch.randn(4, 12), torch.randn(4, 5, 12), [[0]], [list(range(1, 1 + count))])
        tokens, bias = fusion._tokens(own, torch.float32)
        assert tokens.shape == (1, (1 + count) * 6, 32 // 4)
        weight = bias.exp()[0]
        pooled, patches = weight[: 1 + count], weight[1 + count :].view(1 + count, 5)
        assert pooled.tolist() == pytest.approx([1.0] + [0.5 / count] * count)
        assert patches[0].tolist() == pytest.approx([1 / 5] * 5)
        assert patches[1:].sum().item() == pytest.approx(0.5 * patches[0].sum().item())


def test_the_order_of_references_changes_nothing_and_their_content_does() -> None:
    fusion = opened(FusionConfig())
    torch.manual_seed(2)
    states, summaries, pooled = torch.randn(3, 8), torch.randn(3, 8), torch.randn(4, 12)

    def delta(own: list[int], more: list[int]) -> Tensor:
        result: Tensor = fusion(states, summaries, ImageFeatures.gather(pooled, None, [own], [more]))
        return result

    torch.testing.assert_close(delta([0], [1, 2]), delta([0], [2, 1]))
    assert not torch.allclose(delta([0], [1, 2]), delta([0], [1, 3]))
    assert not torch.allclose(delta([0], [1]), delta([1], [0]))  # a reference is told from the question's image


def test_switches_of_the_fusion() -> None:
    states, summaries = torch.randn(3, 8), torch.randn(3, 8)
    without = opened(FusionConfig(summary=False))
    torch.testing.assert_close(without(states, summaries, features()), without(states, summaries + 1, features()))
    with_it = opened(FusionConfig(summary=True))
    assert not torch.allclose(with_it(states, summaries, features()), with_it(states, summaries * -1, features()))
    assert opened(FusionConfig(width=16)).attend_key.weight.shape == (16, 16)
    with pytest.raises(ValueError, match="width 8 is not a multiple of num_heads=3"):
        Fusion(FusionConfig(num_heads=3), 8, 12)
    with pytest.raises(ValueError, match="reference_weight is 0"):
        Fusion(FusionConfig(reference_weight=0), 8, 12)
    no_patches = ImageFeatures.gather(torch.randn(1, 12), None, [[0]], [[]])
    with pytest.raises(ValueError, match="tokens='patches', but the images came without"):
        opened(FusionConfig(tokens="patches"))(states, summaries, no_patches)


# Two towers


def test_the_log_odds_are_exactly_text_plus_image(two_tower: RewardModel) -> None:
    solutions = [steps(3, 1), steps(5, 2)]
    text = two_tower.score(QUESTION, solutions, DOCUMENTS)
    both = two_tower.score(QUESTION, solutions, DOCUMENTS, picture(200), [picture(10), picture(90)])
    fusion, tok = two_tower.fusion, two_tower.tokenizer
    assert fusion is not None
    plus, minus = (tok(sign, add_special_tokens=False)["input_ids"][0] for sign in (" +", " -"))
    head_D = two_tower.text_model.lm_head.weight[plus] - two_tower.text_model.lm_head.weight[minus]
    states = two_tower.text_states(QUESTION, solutions, DOCUMENTS)
    with torch.no_grad():
        image = two_tower.image_features([picture(200)], [picture(10), picture(90)])
        for i, s in enumerate(states):
            changed = s.states_TD + fusion(s.states_TD, s.summaries_TD, image)
            assert both[i].log_odds == pytest.approx((changed @ head_D).tolist(), abs=1e-4)
            assert both[i].text_log_odds == text[i].text_log_odds
            assert text[i].image_log_odds == [0.0] * len(solutions[i])
            assert min(map(abs, both[i].image_log_odds)) > 0
            assert both[i].plus_probs[0] == pytest.approx(1 / (1 + math.exp(-both[i].log_odds[0])))


def test_a_different_image_gives_different_scores_and_several_views_are_read(two_tower: RewardModel) -> None:
    solutions = [steps(3, 1)]
    dark = two_tower.score(QUESTION, solutions, image=picture(10))[0]
    bright = two_tower.score(QUESTION, solutions, image=picture(240))[0]
    views = two_tower.score(QUESTION, solutions, image=[picture(10), picture(240)])[0]
    assert len({tuple(s.image_log_odds) for s in (dark, bright, views)}) == 3
    with_error = two_tower.score(QUESTION, [[], *solutions], image=picture(10))
    assert with_error[0].error is not None
    assert with_error[1].image_log_odds == pytest.approx(dark.image_log_odds, abs=1e-6)


def test_an_untrained_image_tower_changes_no_score(folder: Path, tmp_path: Path) -> None:
    model = RewardModel.from_pretrained(folder)
    solutions = [steps(3, 1), steps(4, 9)]
    before = model.score(QUESTION, solutions)
    model.add_image_tower(write_native_clip(tmp_path / "clip"))
    assert model.fusion is not None
    assert model.fusion.config == FusionConfig()
    for scores in (model.score(QUESTION, solutions), model.score(QUESTION, solutions, image=picture(99))):
        assert [s.log_odds for s in scores] == [s.log_odds for s in before]


def test_an_image_of_no_finite_numbers_is_an_error_entry(
    two_tower: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert two_tower.image_tower is not None
    monkeypatch.setattr(two_tower.image_tower, "preprocess", lambda image: torch.full((3, 32, 32), float("nan")))
    with pytest.raises(ImageError, match="no finite numbers"):
        two_tower.image_features([picture(1)])
    (scores,) = two_tower.score(QUESTION, [["left"]], image=picture(1))
    assert str(scores.error).startswith("image_not_finite")


def test_an_image_for_a_text_only_model_is_refused(model: RewardModel) -> None:
    with pytest.raises(ValueError, match="text-only"):
        model.score(QUESTION, [["left"]], image=picture(1))


# Checkpoints


def test_a_saved_model_comes_back_bit_equal(two_tower: RewardModel, tmp_path: Path) -> None:
    two_tower.max_length, two_tower.reserve, two_tower.fit = 700, 300, "break"
    two_tower.save_pretrained(tmp_path / "saved", figures={"step AUROC": 0.9123456})
    names = {p.name for p in (tmp_path / "saved").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "fusion.safetensors", "image_tower"} <= names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pkl"))]
    assert "| step AUROC | 0.9123 |" in (tmp_path / "saved" / "README.md").read_text()
    back = RewardModel.from_pretrained(tmp_path / "saved")
    assert (back.max_length, back.reserve, back.fit) == (700, 300, "break")
    assert not back.training
    ours, theirs = two_tower.state_dict(), back.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    solutions = [steps(3, 1), steps(5, 2)]
    before = two_tower.score(QUESTION, solutions, DOCUMENTS, picture(7), [picture(77)])
    assert back.score(QUESTION, solutions, DOCUMENTS, picture(7), [picture(77)]) == before


def test_a_text_only_model_is_saved_and_read(folder: Path, tmp_path: Path) -> None:
    model = RewardModel.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "fusion.safetensors").exists()
    saved = json.loads((tmp_path / "reward_model.json").read_text())
    ids = {name: model.tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in
           (("tag", " ки"), ("plus", " +"), ("minus", " -"))}  # fmt: skip
    assert {name: [token] for name, token in saved["ids"].items()} == ids
    back = RewardModel.from_pretrained(str(tmp_path))
    assert back.fusion is None
    assert back.score(QUESTION, [["left"]]) == model.score(QUESTION, [["left"]])


def test_a_missing_tag_is_added_the_same_way_each_time(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "plain", tag=False)
    before = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    model = RewardModel.from_pretrained(folder)
    after = model.text_model.get_input_embeddings().weight
    assert (model.family.ids["tag"], len(after)) == (len(before), len(before) + 1)
    torch.testing.assert_close(after[-1], before.mean(dim=0))
    model.save_pretrained(tmp_path / "saved")
    again = RewardModel.from_pretrained(tmp_path / "saved")
    assert again.score(QUESTION, [["left"]]) == RewardModel.from_pretrained(folder).score(QUESTION, [["left"]])


def test_checkpoints_that_are_no_reward_model_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"runs/none/here does not exist; expected a checkpoint folder"):
        RewardModel.from_pretrained("runs/none/here")
    with pytest.raises(CheckpointError, match="is not a language model that can be read"):
        RewardModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        RewardModel.from_pretrained(folder, dtype="int8")

    tok = tiny.tokenizer()
    text_model = RewardModel.from_pretrained(folder).text_model
    tok.chat_template = None
    with pytest.raises(CheckpointError, match="no chat template"):
        RewardModel(text_model, tok)
    tok = tiny.tokenizer()
    tok.add_tokens(["more"])
    with pytest.raises(CheckpointError, match="502 entries but the model's vocabulary 501"):
        RewardModel(text_model, tok)


def test_a_tokenizer_without_single_signs_is_refused(folder: Path, tmp_path: Path) -> None:
    tok = tiny.tokenizer()
    plain = json.loads(tok.backend_tokenizer.to_str())
    plain["model"]["merges"] = [m for m in plain["model"]["merges"] if m not in (["Ġ", "+"], "Ġ +")]
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    from transformers import PreTrainedTokenizerFast

    split = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))  # type: ignore[no-untyped-call]
    split.chat_template = tok.chat_template
    with pytest.raises(CheckpointError, match=r"encodes ' \+' as 2 tokens"):
        RewardModel(RewardModel.from_pretrained(folder).text_model, split)


def test_a_saved_folder_that_was_altered_is_refused(folder: Path, tmp_path: Path) -> None:
    RewardModel.from_pretrained(folder).save_pretrained(tmp_path)
    file = tmp_path / "reward_model.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, "ids": {**saved["ids"], "plus": 3}}))
    with pytest.raises(CheckpointError, match="its tokenizer gives the ids"):
        RewardModel.from_pretrained(tmp_path)
    file.write_text(json.dumps({**saved, "family": "other"}))
    with pytest.raises(CheckpointError, match="family 'other'; this version reads format 2 and the families medprm"):
        RewardModel.from_pretrained(tmp_path)


def test_a_fusion_that_is_not_whole_is_refused(two_tower: RewardModel, tmp_path: Path) -> None:
    two_tower.save_pretrained(tmp_path / "whole")

    def fault(change: Any) -> str:
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "model")
        change(tmp_path / "model")
        with pytest.raises(CheckpointError) as caught:
            RewardModel.from_pretrained(tmp_path / "model")
        return str(caught.value)

    def weights(change: Any) -> Any:
        return lambda folder: change_weights(folder, change, "fusion.safetensors")

    assert "missing are 1: attend_query.weight." in fault(weights(without("attend_query.weight")))
    narrow = weights(lambda w: w | {"query.bias": torch.ones(1)})
    assert "of another shape are 1: query.bias is [1], not [16]" in fault(narrow)
    assert "The names hold 'module.'" in fault(weights(renamed("module.{}")))
    assert "tells of a fusion, and fusion.safetensors is not" in fault(lambda f: (f / "fusion.safetensors").unlink())
    assert "fusion.safetensors is a git-lfs pointer" in fault(lambda f: (f / "fusion.safetensors").write_text(POINTER))
    assert "fusion.safetensors is not whole" in fault(lambda f: cut(f / "fusion.safetensors"))
    assert "reward_model.json is a git-lfs pointer" in fault(lambda f: (f / "reward_model.json").write_text(POINTER))
    assert "reward_model.json is not whole" in fault(lambda f: cut(f / "reward_model.json", 10))
    tower = "image_tower/open_clip_model.safetensors"
    assert f"{tower} is a git-lfs pointer" in fault(lambda f: (f / tower).write_text(POINTER))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ODD = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False, "temperature": 0.9, "top_p": 0.6}


def test_a_generation_config_is_written_back_as_it_was_read(tmp_path: Path) -> None:
    """Llama 2 chat's and LLaVA's kind, which transformers reads and refuses to write."""
    made = tiny.save(tmp_path / "made")
    (made / "generation_config.json").write_text(json.dumps(ODD))
    model = RewardModel.from_pretrained(made)
    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    written.pop("transformers_version")
    assert written == ODD
    assert model.text_model.generation_config.temperature == 0.9
    back = RewardModel.from_pretrained(tmp_path / "saved")
    assert back.score(QUESTION, [["left"]]) == model.score(QUESTION, [["left"]])
    policy, _ = load_pretrained(str(made))
    save(policy, tmp_path / "policy")
    assert json.loads((tmp_path / "policy" / "generation_config.json").read_text())["temperature"] == 0.9


def test_a_save_that_fails_leaves_nothing_new(
    two_tower: RewardModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_tower.save_pretrained(tmp_path / "old")
    before = files_of(tmp_path / "old")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    assert two_tower.image_tower is not None
    monkeypatch.setattr(two_tower.image_tower, "save_pretrained", full)
    for folder in ("new", "old"):
        with pytest.raises(OSError, match="No space left"):
            two_tower.save_pretrained(tmp_path / folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]
    assert files_of(tmp_path / "old") == before


def test_a_save_over_another_leaves_none_of_its_parts(two_tower: RewardModel, folder: Path, tmp_path: Path) -> None:
    two_tower.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    shard(tmp_path / "model")
    RewardModel.from_pretrained(folder).save_pretrained(tmp_path / "model")
    RewardModel.from_pretrained(folder).save_pretrained(tmp_path / "fresh")
    names = {name for name in files_of(tmp_path / "model") if name != "notes.txt"}
    assert names == set(files_of(tmp_path / "fresh"))
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


def test_a_model_is_saved_over_the_folder_that_it_was_read_from(two_tower: RewardModel, tmp_path: Path) -> None:
    two_tower.save_pretrained(tmp_path / "model")
    before = files_of(tmp_path / "model")
    RewardModel.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "model")
    after = files_of(tmp_path / "model")
    assert set(after) == set(before)
    weights = [name for name in before if name.endswith(".safetensors")]
    assert len(weights) == 3
    assert {name: after[name] for name in weights} == {name: before[name] for name in weights}
