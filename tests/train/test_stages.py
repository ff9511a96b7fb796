"""What each stage makes of the tables and what its loss is; DeepSpeed is not needed for that."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medmm_ray.config import ConfigError
from medmm_ray.data import records
from medmm_ray.data.tables import Provenance, Table, write_rows
from medmm_ray.reward_model.attention import Block
from medmm_ray.train.config import TrainConfig
from medmm_ray.train.engine import deepspeed_config, parameter_groups
from medmm_ray.train.image_text import ImageTextConfig, augment, train_image_tower
from medmm_ray.train.launch import _scaling_config, figures
from medmm_ray.train.policy import (
    EncodedQuestion,
    PolicyConfig,
    PolicyStage,
    assistant_turn,
    collate,
    encode,
    train_policy,
    worked_questions,
)
from medmm_ray.train.schedule import Part, Units
from medmm_ray.train.stage import Stage
from medmm_ray.train.text_prm import TextPrmConfig, TextPrmStage, train_text_prm, validation_figures
from medmm_ray.train.text_prm_data import RightSteps, group_labels, labelled_questions, labelled_solutions
from medmm_ray.train.two_tower import TwoTowerConfig, TwoTowerStage, train_two_tower
from medmm_ray.train.two_tower_data import (
    TwoTowerExample,
    class_weights,
    located_states,
    questions_with_images,
    sampled_parts,
    states_files,
)
from medmm_ray.train.two_tower_figures import rerank_figures
from tests.doubles import tiny_vision
from tests.train import toy
from tests.train.conftest import SHAPE, image_text_stage, labelled, text_column, written


def whole(stage: Stage, units: Sequence[int]) -> list[Part]:
    """All that is trained on of some units."""
    return [stage.units.whole(unit) for unit in units]


def example(stage: TwoTowerStage, unit: int) -> TwoTowerExample:
    """What is stored of a question's solutions."""
    return stage._example(stage.units.whole(unit))


def log_odds(stage: TwoTowerStage, units: Sequence[int]) -> Any:
    """Log-odds of all tags of some questions, with their own images."""
    return stage._log_odds(stage._load(whole(stage, units), None), 0)


# The loop's own settings


def test_deepspeed_settings() -> None:
    plain = deepspeed_config(TrainConfig(), "float32")
    assert plain["zero_optimization"] == {"stage": 0, "overlap_comm": False}
    assert (plain["bf16"], plain["gradient_clipping"]) == ({"enabled": False}, 0.0)
    assert deepspeed_config(TrainConfig(), "bfloat16")["zero_optimization"]["stage"] == 1
    big = deepspeed_config(TrainConfig(zero_stage=3, offload="parameters"), "bfloat16")
    assert (big["bf16"], big["gradient_clipping"]) == ({"enabled": True}, 1.0)
    assert big["zero_optimization"] == {
        "stage": 3, "overlap_comm": False, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"},
    }  # fmt: skip


def test_where_a_training_may_run_is_handed_to_ray_train() -> None:
    plain = _scaling_config(TrainConfig(num_workers=3))
    assert (plain.num_workers, plain.use_gpu, plain.label_selector) == (3, False, None)
    market = {"ray.io/market-type": "in(spot,on-demand)"}
    config = TrainConfig(
        num_workers=8, min_workers=2, gpus_per_worker=1.0, accelerator_type="A100", label_selector=market
    )
    elastic = _scaling_config(config)
    assert (elastic.min_workers, elastic.max_workers, elastic.elasticity_enabled) == (2, 8, True)
    assert elastic.label_selector == {"ray.io/accelerator-type": "A100", **market}
    assert elastic.accelerator_type is None, "which makes no group grow from zero"
    assert elastic.resources_per_worker == {"CPU": 2.0, "GPU": 1.0}
    with pytest.raises(ValueError, match="min_workers=4 is more than num_workers=2"):
        TrainConfig(num_workers=2, min_workers=4)
    with pytest.raises(ValueError, match="accelerator_type='A100' names a GPU, and gpus_per_worker is 0"):
        TrainConfig(accelerator_type="A100")


def test_matrices_decay_and_named_parts_have_their_own_rate() -> None:
    import torch

    module = torch.nn.ModuleDict({"image_tower": torch.nn.Linear(2, 3), "fusion": torch.nn.Linear(3, 1)})
    module["fusion"].bias.requires_grad_(False)
    groups = parameter_groups(module, 1e-3, {"image_tower.": 1e-5}, 0.01)
    assert [(g["lr"], g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in groups] == [
        (1e-5, 0.0, [(3,)]),
        (1e-5, 0.01, [(3, 2)]),
        (1e-3, 0.01, [(1, 3)]),
    ]


def test_figures_are_those_of_the_epoch_that_is_kept() -> None:
    history = {
        "seconds": 4.0, "tokens": 1000, "samples": 20, "best_epoch": 0,
        "epochs": [{"epoch": 0, "loss": 0.5, "selection": 0.9, "validation_auroc": 0.9}, {"epoch": 1, "loss": 0.4}],
        "updates": [{}] * 6,
    }  # fmt: skip
    assert figures(history) == {
        "updates": 6.0, "samples": 20.0, "tokens": 1000.0, "train_seconds": 4.0, "tokens_per_second": 250.0,
        "loss": 0.5, "validation_auroc": 0.9,
    }  # fmt: skip
    assert figures({**history, "best_epoch": None})["loss"] == 0.4


# policy


def test_worked_questions_are_those_of_the_training_split() -> None:
    questions = [*toy.questions(1), *toy.questions(3, split="test")[1:]]
    worked = worked_questions(toy.table(records.Question, questions), toy.table(records.Solutions, toy.solutions(3)))
    assert worked.to_pylist() == [
        {
            "question_id": "q00",
            "question": "How does the picture look? (A) dark (B) bright",
            "answer_type": "choice",
            "solutions": [toy.steps("dark"), toy.steps("bright")],
        }
    ]


def test_a_policy_without_worked_solutions_is_refused() -> None:
    empty = toy.table(records.Solutions, [])
    with pytest.raises(ValueError, match="no question of the split 'train' has a worked solution"):
        train_policy(
            PolicyConfig(), toy.table(records.Question, toy.questions()), empty, text_column([]), "unused", "unused"
        )


def test_assistant_turn_has_one_step_a_line() -> None:
    assert assistant_turn(["It is\n dark.", "So (A)."]) == "Step 1: It is dark.\nStep 2: So (A)."


def test_encoding_ends_with_the_turn_and_is_what_generation_meets(policy_inputs: dict[str, str]) -> None:
    tokenizer = PolicyStage(PolicyConfig(shape=SHAPE), policy_inputs, "cpu").tokenizer
    encoded = encode(tokenizer, "Why? (A) a", "choice", [["It is.", "So."], ["No."]])
    assert [tokenizer.decode(ids) for ids in encoded.solutions] == [
        "Step 1: It is.\nStep 2: So.<|end|>",
        "Step 1: No.<|end|>",
    ]
    assert tokenizer.decode(encoded.prompt).endswith("<|user|>Question: Why? (A) a<|end|><|assistant|>")


def test_rows_hold_prompts_each_with_its_solutions() -> None:
    row = collate([EncodedQuestion([5, 6], [[7, 1], [8, 9, 1]]), EncodedQuestion([5], [[4, 1]])])
    assert row.ids_L.tolist() == [5, 6, 7, 1, 8, 9, 1, 5, 4, 1]
    assert row.positions_L.tolist() == [0, 1, 2, 3, 2, 3, 4, 0, 1, 2]
    assert row.blocks == [Block(2, (2, 3)), Block(0, (3,))]
    assert row.source_N.tolist() == [1, 2, 1, 4, 5, 7, 8]
    assert row.target_N.tolist() == [7, 1, 8, 9, 1, 4, 1]
    assert row.weight_N.tolist() == pytest.approx([1 / 2] * 2 + [1 / 3] * 3 + [1 / 2] * 2)


def test_policy_loss_and_gradient_are_those_of_the_solutions_one_by_one(policy_inputs: dict[str, str]) -> None:
    import torch

    stage = PolicyStage(PolicyConfig(shape=SHAPE), policy_inputs, "cpu")
    loss = stage.loss(whole(stage, [0, 3]), 0)
    loss.backward()  # type: ignore[no-untyped-call]
    packed = torch.cat([p.grad.flatten() for p in stage.module.parameters() if p.grad is not None])
    stage.module.zero_grad()
    expected = 0.0
    for unit in (0, 3):
        prompt = stage.encoded[unit].prompt
        for ids in stage.encoded[unit].solutions:
            logits = stage.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            one = torch.nn.functional.cross_entropy(logits, torch.tensor(ids))
            one.backward()  # type: ignore[no-untyped-call]
            expected += one.item()
    apart = torch.cat([p.grad.flatten() for p in stage.module.parameters() if p.grad is not None])
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert float((packed - apart).norm() / apart.norm()) < 1e-5


def test_a_solution_too_long_is_left_out_and_counted(policy_inputs: dict[str, str]) -> None:
    stage = PolicyStage(PolicyConfig(shape=SHAPE), policy_inputs, "cpu")
    (length,) = {len(e.prompt) + len(ids) for e in stage.encoded for ids in e.solutions}
    assert stage.units.samples.tolist() == [1] * 24
    stage = PolicyStage(PolicyConfig(shape=SHAPE, max_length=length - 1), policy_inputs, "cpu")
    assert stage.validate() == {"too_long": 24.0}
    assert len(stage.units.samples) == 0


def test_a_policy_starts_from_a_checkpoint(policy: Path, policy_inputs: dict[str, str]) -> None:
    import torch

    config = PolicyConfig(base=str(policy), activation_checkpointing=True)
    stage = PolicyStage(config, policy_inputs, "cpu")
    fresh = PolicyStage(PolicyConfig(shape=SHAPE), policy_inputs, "cpu")
    assert torch.equal(stage.model.lm_head.weight, fresh.model.lm_head.weight)
    assert stage.model.is_gradient_checkpointing


# labelled solutions and text_prm


def test_equal_solutions_with_equal_targets_are_merged() -> None:
    rows = labelled(each=4).to_pylist()
    assert [row["question_id"] for row in rows] == [f"q{i:02}" for i in range(12)]
    assert rows[1]["documents"] == ["Bright pictures have much light."]
    assert rows[1]["solutions"] == [
        {"solution_id": "s01-0", "steps": toy.steps("dark"), "targets": [1.0, 0.0, 0.0], "weight": 2},
        {"solution_id": "s01-2", "steps": toy.steps("bright"), "targets": [1.0, 1.0, 1.0], "weight": 2},
    ]
    right_steps = RightSteps()
    right_steps.add(labelled(each=4))
    assert right_steps.share == pytest.approx(4 / 6)


def test_solutions_and_documents_can_be_limited() -> None:
    solutions = toy.solutions(2, each=4)
    labels = group_labels([toy.table(records.Labels, toy.judge_labels(solutions))])
    rows = labelled_questions(
        toy.table(records.Question, toy.questions(2)), toy.table(records.Evidence, toy.evidence(2)),
        toy.table(records.Solutions, solutions), labels, "judge", "keep", max_solutions=3, num_documents=0,
    ).to_pylist()  # fmt: skip
    assert [[s["weight"] for s in row["solutions"]] for row in rows] == [[2, 1], [2, 1]]
    assert [row["documents"] for row in rows] == [[], []]


def test_unlabelled_solutions_are_left_out() -> None:
    (row,) = toy.table(records.Solutions, toy.solutions(1)).to_pylist()
    assert labelled_solutions(row["solutions"], {}, "judge") == []


def text_prm_stage(folder: Path, policy: Path, rows: pa.Table, **settings: Any) -> TextPrmStage:
    config = TextPrmConfig(max_length=400, reserve=200, validation_fraction=0.0, **settings)
    return TextPrmStage(config, {**written(folder, questions=rows), "base": str(policy)}, "cpu")


def test_merged_and_packed_gradients_equal_those_of_solutions_one_by_one(policy: Path, tmp_path: Path) -> None:
    import torch

    merged = text_prm_stage(tmp_path, policy, labelled(each=4))
    assert merged.units.samples.tolist() == [2] * 24
    merged.loss(whole(merged, [0, 1]), 0).backward()  # type: ignore[no-untyped-call]

    apart = [
        {**row, "solutions": [{**solution, "weight": 1}]}
        for row in labelled(each=4).to_pylist()[:2]
        for solution in row["solutions"]
        for _ in range(solution["weight"])
    ]
    single = text_prm_stage(tmp_path / "apart", policy, pa.Table.from_pylist(apart, schema=labelled().schema))
    for unit in range(8):
        single.loss(whole(single, [unit]), 0).backward()  # type: ignore[no-untyped-call]

    def gradient(stage: TextPrmStage) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in stage.module.parameters() if p.grad is not None])

    one, other = gradient(merged), gradient(single)
    assert float((one - other).norm() / other.norm()) < 1e-5


def test_a_vision_language_model_is_not_trained_on_text_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a vision-language model, and .* name a text-only base"):
        text_prm_stage(tmp_path, tiny_vision.save_llava(tmp_path / "llava"), labelled())


def test_step_loss_is_the_two_class_cross_entropy_of_each_solutions_mean(policy: Path, tmp_path: Path) -> None:
    import torch

    rows = labelled(each=2).slice(1, 1)
    stage = text_prm_stage(tmp_path, policy, rows)
    log_odds = torch.split(stage.model(stage.groups[0]), [3, 3])
    aims = [torch.tensor([1.0, 0.0, 0.0]), torch.ones(3)]
    expected = sum(
        torch.nn.functional.cross_entropy(
            torch.stack([z, torch.zeros(3)], dim=1), torch.stack([t, 1 - t], dim=1)
        ).item()
        for z, t in zip(log_odds, aims, strict=True)
    )
    assert stage.loss(whole(stage, [0]), 0).item() == pytest.approx(expected, rel=1e-5)


def test_held_out_questions_are_measured_and_not_trained_on(policy: Path, tmp_path: Path) -> None:
    config = TextPrmConfig(max_length=400, reserve=200, validation_fraction=0.25, activation_checkpointing=True)
    stage = TextPrmStage(config, {**written(tmp_path, questions=labelled()), "base": str(policy)}, "cpu")
    assert len(stage.validation_ids) == 3
    assert [stage.units.num_samples([stage.units.whole(unit)]) for unit in stage.held_out] == [0, 0, 0]
    assert {stage.units.names[unit] for unit in stage.held_out} == stage.validation_ids
    found = stage.validate()
    # Each held-out question has two distinct solutions of three labelled steps.
    assert found["validation_steps"] == 18.0
    assert found["selection"] == found["validation_auroc"]
    assert found["not_packed"] == 0.0
    assert stage.model.trained_inputs.num_documents == 32  # what a checkpoint of this training is scored with


def test_validation_figures_are_exact_and_absent_for_one_class() -> None:
    found = validation_figures([0.1, 0.4, 0.35, 0.8], [False, False, True, True])
    assert found == {"selection": 0.75, "validation_auroc": 0.75, "validation_steps": 4.0}
    assert validation_figures([0.1, 0.2], [True, True]) == {}


def test_text_prm_without_targets_is_refused() -> None:
    with pytest.raises(ValueError, match="label policy 'hybrid' gives no target for any training solution"):
        train_text_prm(
            TextPrmConfig(), [toy.table(records.Question, toy.questions())], [toy.table(records.Evidence, [])],
            [toy.table(records.Solutions, toy.solutions())], [toy.table(records.Labels, [])], "base", "unused",
            "unused",
        )  # fmt: skip


# image_text


def test_open_clip_reads_the_tower_and_gives_the_same_numbers(tower: Path, tmp_path: Path) -> None:
    import open_clip
    import torch

    from medmm_ray.engines.image_tower import ImageTower
    from medmm_ray.engines.images import open_image

    stage = image_text_stage(tmp_path)
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tower}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tower}")
    ids = tokenizer(["The picture is dark."])
    assert ids.tolist() == stage.ids[0][:1].tolist()
    with torch.no_grad():
        expected = stage.module.encode_text(ids, normalize=True)
        assert torch.allclose(model.encode_text(ids, normalize=True), expected, atol=1e-6)
    image = open_image(stage.units.names[0])
    assert torch.equal(preprocess(image), stage._open(whole(stage, [0]))[0])
    assert torch.equal(ImageTower.from_pretrained(str(tower)).preprocess(image), stage._open(whole(stage, [0]))[0])


def test_contrastive_loss_is_seeded_by_epoch_and_sample(tmp_path: Path) -> None:
    stage = image_text_stage(tmp_path)
    first = stage.loss(whole(stage, [0, 1, 2, 3]), 0).item()
    stage.prepare(whole(stage, [0, 1, 2, 3]), 0)  # opened by a thread
    assert stage.loss(whole(stage, [0, 1, 2, 3]), 0).item() == first
    assert stage.loss(whole(stage, [0, 1, 2, 3]), 1).item() != first
    assert (stage.micro_batch_budget, stage.joint) == (6, True)


def test_contrastive_loss_is_the_sum_of_both_directions_cross_entropies(tmp_path: Path) -> None:
    import torch

    stage = image_text_stage(tmp_path, max_shift=0, max_brightness=0.0)
    stage.ids = [ids[:1] for ids in stage.ids]
    images_BE = stage.module.encode_image(torch.stack(stage._open(whole(stage, [0, 1, 2]))), normalize=True)
    texts_BE = stage.module.encode_text(torch.cat(stage.ids[:3]), normalize=True)
    logits_BB = images_BE @ texts_BE.T / 0.07  # CLIP's first temperature
    expected = sum(torch.nn.functional.cross_entropy(x, torch.arange(3)).item() for x in (logits_BB, logits_BB.T))
    assert stage.loss(whole(stage, [0, 1, 2]), 0).item() == pytest.approx(3 * expected / 2, rel=1e-4)


def test_augmentation_moves_and_brightens() -> None:
    import torch

    picture = torch.arange(12.0).view(1, 3, 4)
    rng = random.Random(5)
    right, down, brightness = rng.randint(-1, 1), rng.randint(-1, 1), rng.uniform(-0.1, 0.1) / 0.25
    rows = [min(max(y - down, 0), 2) for y in range(3)]
    columns = [min(max(x - right, 0), 3) for x in range(4)]
    assert (right, down) != (0, 0)
    moved = augment(picture, random.Random(5), max_shift=1, max_brightness=0.1)
    assert torch.allclose(moved, picture[:, rows][:, :, columns] + brightness)
    assert torch.equal(augment(picture, random.Random(5), 0, 0.0), picture)


def test_a_tower_without_captions_is_refused() -> None:
    empty = pa.table({"image_uri": pa.array([], pa.string()), "captions": pa.array([], pa.list_(pa.string()))})
    with pytest.raises(ValueError, match="no training image has a caption"):
        train_image_tower(ImageTextConfig(), empty, "unused", "unused")


# two_tower


def two_tower(inputs: dict[str, str], **settings: Any) -> TwoTowerStage:
    return TwoTowerStage(TwoTowerConfig(label_policy="judge", **settings), inputs, "cpu")


def test_questions_with_images_carry_images_references_and_targets(two_tower_inputs: dict[str, str]) -> None:
    row = pq.read_table(two_tower_inputs["questions"]).to_pylist()[7]
    assert row["question_id"] == "q07"
    assert row["diagnosis"] == "bright"
    assert [Path(uri).stem for uri in row["image_uris"]] == ["im07"]
    assert [Path(uri).stem for uri in row["reference_uris"]] == ["im03", "im04", "im05"]
    assert row["solution_ids"] == ["s07-0", "s07-2"]
    assert row["targets"] == [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    assert row["correct"] == [False, True]


def test_a_questions_samples_and_its_trees_solutions_become_one_row(
    two_tower_inputs: dict[str, str], tmp_path: Path
) -> None:
    import torch

    def is_trees(name: str) -> bool:
        return name.endswith("-2")

    whole = Table(two_tower_inputs["states"], records.States)
    halves = [whole.to_arrow().filter([is_trees(i) == half for i in whole.to_arrow()["solution_id"].to_pylist()])
              for half in (False, True)]  # fmt: skip
    tables = [Table(str(tmp_path / name), records.States) for name in ("states", "tree_states")]
    for table, half in zip(tables, halves, strict=True):
        write_rows(
            table, half.to_pylist(), Provenance(name="s", fingerprint="f", config={}, upstream={}), "solution_id"
        )
    solved = [
        replace(row, solutions=[s for s in row.solutions if is_trees(s.solution_id) == half])
        for half in (False, True)
        for row in toy.solutions(each=4)
    ]
    labels = toy.judge_labels(solved[:12]) + [
        replace(row, source="tree_search") for row in toy.judge_labels(solved[12:])
    ]
    found = {
        policy: questions_with_images(
            pa.concat_tables(located_states(states_files(tables))),
            group_labels([toy.table(records.Labels, labels)]), toy.table(records.Question, toy.questions()),
            toy.table(records.Image, toy.images(tmp_path)), toy.table(records.Evidence, []),
            toy.table(records.Solutions, solved), policy,
        )
        for policy in ("judge", "tree_search", "outcome")
    }  # fmt: skip
    ids = {policy: table["solution_ids"].to_pylist()[7] for policy, table in found.items()}
    assert ids == {"judge": ["s07-0"], "tree_search": ["s07-2"], "outcome": ["s07-0", "s07-2"]}
    assert found["tree_search"]["correct"].to_pylist()[7] == [True]
    inputs = {name: two_tower_inputs[name] for name in ("text_prm", "image_tower")}
    inputs |= written(tmp_path, questions=found["outcome"], files=states_files(tables))
    stage, before = two_tower(inputs), two_tower(two_tower_inputs)
    assert stage.names == before.names
    assert torch.equal(example(stage, 7).states_TD, example(before, 7).states_TD)
    assert example(stage, 7).tags_per_solution == [3, 3]


def test_an_untrained_image_part_changes_nothing(two_tower_inputs: dict[str, str]) -> None:
    import torch

    stage = two_tower(two_tower_inputs)
    expected_T = torch.cat([example(stage, 0).log_odds_T, example(stage, 3).log_odds_T])
    assert torch.equal(log_odds(stage, [0, 3]), expected_T)
    found = stage.validate()
    assert found["validation_auroc"] == found["validation_auroc_text_only"]


@pytest.mark.parametrize("tokens", ["pooled", "patches", "both"])
def test_what_the_fusion_reads_is_centred_and_of_unit_spread(two_tower_inputs: dict[str, str], tokens: str) -> None:
    import torch

    stage = two_tower(two_tower_inputs, tokens=tokens, validation_fraction=0.0)
    examples = [example(stage, unit) for unit in range(12)]
    states_TD = torch.cat([each.states_TD for each in examples])
    summaries_TD = torch.cat([each.summaries_TD for each in examples])
    pictures = stage.pictures.tokens(stage.pictures.uris, 0, {})
    assert len(pictures.pooled_BW) == 12
    read = [] if tokens == "patches" else [pictures.pooled_BW]
    read += [] if pictures.patches_BPW is None else [pictures.patches_BPW.flatten(0, 1)]
    with torch.no_grad():
        query_TF = stage.fusion._query(states_TD, summaries_TD)
        projected_NF = stage.fusion.projector(torch.cat(read))
        seen_NF = stage.fusion.attend_out(stage.fusion.attend_value(projected_NF))
    for values in (query_TF, projected_NF):
        assert values.mean(dim=0).abs().max() < 1e-3
    for values in (query_TF, projected_NF, seen_NF):
        assert values.std(dim=0).mean().item() == pytest.approx(1.0, abs=0.05)


def test_the_fusion_is_fitted_to_many_questions_where_there_is_room_for_few_solutions() -> None:
    units = Units.of([f"q{i}" for i in range(100)], [[1] * 8] * 100, [[10] * 8] * 100, [[1.0] * 8] * 100, [0] * 100,
                     [0] * 100)  # fmt: skip
    all_units = list(range(100))
    assert [part.solutions for part in sampled_parts(units, all_units, 8000, 0)] == [tuple(range(8))] * 100
    assert [part.solutions for part in sampled_parts(units, all_units, 6400, 0)] == [tuple(range(8))] * 80
    few = sampled_parts(units, all_units, 1600, 0)  # twenty questions' worth, of sixty-four
    assert [part.solutions for part in few] == [(0, 1)] * 64
    assert len({part.unit for part in few}) == 64


def test_one_picture_or_one_step_is_no_spread_to_divide_by() -> None:
    import torch

    from medmm_ray.reward_model import Fusion, FusionConfig
    from medmm_ray.train.fusion_init import initialize_fusion, spread

    torch.manual_seed(0)
    for num_tags, num_tokens in ((1, 5), (5, 1), (1, 1)):
        fusion = Fusion(FusionConfig(width=8), 6, 4)
        initialize_fusion(fusion, torch.randn(num_tags, 6), torch.randn(num_tags, 6), torch.randn(num_tokens, 4))
        assert all(bool(weight.isfinite().all()) for weight in fusion.parameters())
    assert spread(torch.tensor([[1.0, 2.0], [3.0, 2.0]])).tolist() == pytest.approx([2**0.5, 0.01 * 2**0.5 / 2])
    assert spread(torch.tensor([[1.0, 2.0], [1.0, 2.0]])).tolist() == [1.0, 1.0]
    broken = torch.randn(3, 6)
    broken[1, 2] = float("nan")
    with pytest.raises(ValueError, match="1 of 3 summaries hold NaN or infinity; a fusion cannot be fitted to them"):
        initialize_fusion(Fusion(FusionConfig(width=8), 6, 4), torch.randn(3, 6), broken, torch.randn(2, 4))


@pytest.mark.parametrize("column", ["states", "summaries", "text_log_odds"])
def test_states_that_are_no_numbers_are_refused_with_their_question(
    two_tower_inputs: dict[str, str], tmp_path: Path, column: str
) -> None:
    import numpy as np

    rows = Table(two_tower_inputs["states"], records.States).to_arrow().sort_by("solution_id").to_pylist()
    nothing = [float("nan")] * len(rows[0]["text_log_odds"])
    width = len(rows[0]["states"]) // 4
    rows[0][column] = nothing if column == "text_log_odds" else np.full(width, np.inf, np.float32).tobytes()
    table = Table(str(tmp_path / "states"), records.States)
    write_rows(table, rows, Provenance(name="s", fingerprint="f", config={}, upstream={}), "solution_id")
    inputs = {**two_tower_inputs, **written(tmp_path, files=states_files([table]))}
    with pytest.raises(
        ValueError, match=r"the states of question 'q00' hold NaN or infinity; compute the states again"
    ):
        two_tower(inputs)


@pytest.mark.parametrize("tokens", ["pooled", "both"])
def test_frozen_and_trained_towers_give_the_same_loss(two_tower_inputs: dict[str, str], tokens: str) -> None:
    import torch

    stages = [two_tower(two_tower_inputs, tokens=tokens, freeze_image_tower=frozen) for frozen in (True, False)]
    for stage in stages:
        torch.manual_seed(1)
        torch.nn.init.normal_(stage.fusion.output.weight, std=0.3)
    frozen, trained = (stage.loss(whole(stage, [1, 2, 5]), 0) for stage in stages)
    assert frozen.item() == pytest.approx(trained.item(), rel=1e-4)
    untrained = two_tower(two_tower_inputs)
    assert frozen.item() != pytest.approx(untrained.loss(whole(untrained, [1, 2, 5]), 0).item(), rel=1e-3)
    trained.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in stages[0].tower.parameters())
    assert any(p.grad is not None for p in stages[1].tower.parameters())
    assert stages[1].learning_rates() == {"image_tower.": 1e-5}


def test_swapped_images_are_of_another_diagnosis_and_make_right_steps_wrong(two_tower_inputs: dict[str, str]) -> None:
    import torch

    stage = two_tower(two_tower_inputs, swapped_share=1.0)
    other = stage._swapped_question(1, epoch=0)
    assert other is not None
    assert stage.questions[other]["diagnosis"] != stage.questions[1]["diagnosis"]
    assert stage._load(whole(stage, [1]), 0).image_uris == [stage.questions[other]["image_uris"]]
    assert other == stage._swapped_question(1, epoch=0)
    # The image part says nothing yet: each right step now costs softplus(log-odds), the wrong ones nothing.
    stored = example(stage, 1)
    costs_T = torch.nn.functional.softplus(stored.log_odds_T) / 3 * stored.targets_T
    assert stage.loss(whole(stage, [1]), 0).item() == pytest.approx(float(costs_T.sum()), rel=1e-5)
    assert two_tower(two_tower_inputs)._swapped_question(1, 0) is None


def test_balanced_classes_weigh_the_same_and_all_steps_together_as_before(two_tower_inputs: dict[str, str]) -> None:
    import torch

    plain = two_tower(two_tower_inputs, validation_fraction=0.0)
    balanced = two_tower(two_tower_inputs, validation_fraction=0.0, class_balance="balanced")
    # Of each question's two solutions one has three right steps, the other one right and two wrong.
    assert plain.positive_rate == balanced.positive_rate == pytest.approx(4 / 6)
    assert plain.class_weights == (1.0, 1.0)
    assert balanced.class_weights == pytest.approx((0.75, 1.5))
    # The image part says nothing yet, so the loss is that of the text's log-odds.
    stored = example(balanced, 1)
    losses_T = torch.nn.functional.softplus(torch.where(stored.targets_T > 0, -stored.log_odds_T, stored.log_odds_T))
    factors_T = torch.tensor([0.75, 1.5, 1.5, 0.75, 0.75, 0.75])
    loss = balanced.loss(whole(balanced, [1]), 0)
    assert loss.item() == pytest.approx(float((losses_T * factors_T).sum() / 3), rel=1e-5)
    assert float(factors_T.sum() / 3) == len(stored.tags_per_solution) == 2
    assert class_weights(0.9) == pytest.approx((0.5 / 0.9, 5.0))


def test_validation_reranks_the_held_out_questions(
    two_tower_inputs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    stage = two_tower(two_tower_inputs, validation_fraction=0.25, select_by="best_of_n")
    held = [unit for unit, name in enumerate(stage.names) if name in stage.validation_ids]
    assert len(held) == 3
    # Text scores that prefer the right solution of the first two: its worst step is -1, the other's -2.
    examples: dict[int, TwoTowerExample] = {}
    for number, unit in enumerate(held):
        stored = example(stage, unit)
        right = stored.correct.index(True)
        good, bad = torch.tensor([5.0, -1.0, 5.0]), torch.tensor([9.0, 9.0, -2.0])
        parts = [good if (i == right) == (number < 2) else bad for i in range(2)]
        examples[unit] = replace(stored, log_odds_T=torch.cat(parts))
    monkeypatch.setattr(stage, "_example", lambda part: examples[part.unit])
    found = stage.validate()
    assert found["validation_best_of_n"] == found["selection"] == pytest.approx(2 / 3)
    assert found["validation_one_sample"] == 0.5
    assert found["validation_oracle"] == 1.0
    assert found["right_steps"] == pytest.approx(4 / 6)
    by_step = two_tower(two_tower_inputs, validation_fraction=0.25).validate()
    assert by_step["selection"] == by_step["validation_auroc"]


def test_rerank_figures_are_exact() -> None:
    questions = [([0.3, 0.1], [True, False]), ([0.3, 0.1], [False, True]), ([0.0, 0.0], [False, False])]
    assert rerank_figures(questions) == {
        "validation_best_of_n": 1 / 3, "validation_one_sample": 1 / 3, "validation_oracle": 2 / 3,
    }  # fmt: skip
    assert rerank_figures([]) == {}


def test_augmented_views_start_with_the_picture_itself_and_repeat(two_tower_inputs: dict[str, str]) -> None:
    import torch

    plain, views = two_tower(two_tower_inputs), two_tower(two_tower_inputs, augment=True, augmented_views=2)
    shown = [views.pictures.tokens(views.pictures.uris, epoch, {}).pooled_BW for epoch in range(3)]
    assert torch.equal(shown[0], plain.pictures.tokens(plain.pictures.uris, 0, {}).pooled_BW)
    assert not torch.allclose(shown[1], shown[0])
    assert torch.equal(shown[2], shown[0])


@pytest.mark.parametrize("frozen", [True, False])
def test_without_room_to_keep_anything_the_loss_is_the_same(two_tower_inputs: dict[str, str], frozen: bool) -> None:
    import torch

    settings = {"freeze_image_tower": frozen, "augment": True, "tokens": "both"}
    stages = [two_tower(two_tower_inputs, cache_gib=gib, **settings) for gib in (1.0, 0.0)]
    for stage in stages:
        torch.manual_seed(1)
        torch.nn.init.normal_(stage.fusion.output.weight, std=0.3)
        parts = whole(stage, [1, 2, 5])
        stage.prepare(parts, 1)  # read by a thread
    losses = [stage.loss(parts, 1).item() for stage in stages]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert stages[0].states._cache.num_bytes > 0
    assert stages[1].states._cache.num_bytes == 0


def test_a_part_of_a_question_is_read_without_the_rest(two_tower_inputs: dict[str, str]) -> None:
    import torch

    stage = two_tower(two_tower_inputs)
    both, second = example(stage, 4), stage._example(Part(4, (1,)))
    assert torch.equal(second.states_TD, both.states_TD[3:])
    assert torch.equal(second.weights_T, both.weights_T[3:])
    assert (second.tags_per_solution, second.correct) == ([3], both.correct[1:])


def test_of_the_text_tower_two_rows_are_read(two_tower_inputs: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from medmm_ray.reward_model import RewardModel, TextHead

    model = RewardModel.from_pretrained(two_tower_inputs["text_prm"])
    rows_VD = model.text_model.get_output_embeddings().weight
    expected_D = rows_VD[model.family.ids["plus"]] - rows_VD[model.family.ids["minus"]]
    # The policy's checkpoint has no tag yet, so that it is loaded whole; what is saved then has one.
    assert torch.equal(TextHead.from_pretrained(two_tower_inputs["text_prm"], "float32").direction_D, expected_D)
    folder = Path(two_tower_inputs["questions"]).parent / "with-tag"
    model.save_pretrained(folder)
    monkeypatch.setattr(RewardModel, "from_pretrained", None)
    head = TextHead.from_pretrained(folder, "float32")
    assert torch.equal(head.direction_D, expected_D)
    assert head.hidden_size == model.hidden_size


def test_what_two_tower_saves_scores_as_it_trained(two_tower_inputs: dict[str, str], tmp_path: Path) -> None:
    import torch

    from medmm_ray.engines.images import open_image
    from medmm_ray.reward_model import RewardModel

    stage = two_tower(two_tower_inputs, num_references=0)
    torch.nn.init.normal_(stage.fusion.output.weight)
    assert stage.questions[0]["reference_uris"] == []
    stage.save(tmp_path, {"validation_auroc": 0.75})
    assert "| validation_auroc | 0.75 |" in (tmp_path / "README.md").read_text()
    row = labelled(each=4).to_pylist()[0]
    saved = RewardModel.from_pretrained(tmp_path)
    assert saved.trained_inputs.num_references == 0
    scores = saved.score(
        row["question"], [s["steps"] for s in row["solutions"]], row["documents"],
        image=open_image(stage.questions[0]["image_uris"][0]),
    )  # fmt: skip
    expected = log_odds(stage, [0]).tolist()
    assert [value for score in scores for value in score.log_odds] == pytest.approx(expected, abs=1e-4)


def test_two_tower_refuses_what_it_cannot_train_on(two_tower_inputs: dict[str, str], tmp_path: Path) -> None:
    states = Table(two_tower_inputs["states"], records.States)
    tables = (
        [toy.table(records.Labels, [])], [toy.table(records.Question, toy.questions())],
        [toy.table(records.Image, toy.images(tmp_path))], [toy.table(records.Evidence, [])],
        [toy.table(records.Solutions, toy.solutions(each=4))],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"no training question has an image, states and a target \(24 states"):
        train_two_tower(TwoTowerConfig(), [states], *tables, "p", "t", "unused", "unused")
    written_inputs = {**two_tower_inputs, **written(tmp_path, questions=_all_right(two_tower_inputs))}
    with pytest.raises(ValueError, match=r"class_balance is 'balanced', but 100% of the training steps are right"):
        two_tower(written_inputs, class_balance="balanced")


def _all_right(inputs: dict[str, str]) -> pa.Table:
    """The toy's questions with every target 1."""
    table = pq.read_table(inputs["questions"])
    rows = [{**row, "targets": [[1.0] * len(aims) for aims in row["targets"]]} for row in table.to_pylist()]
    return pa.Table.from_pylist(rows, schema=table.schema)


def test_states_of_two_models_are_refused(two_tower_inputs: dict[str, str], tmp_path: Path) -> None:
    source = Table(two_tower_inputs["states"], records.States)
    rows = source.to_arrow().to_pylist()
    rows[0]["dtype"] = "bfloat16"
    mixed = Table(str(tmp_path / "mixed"), records.States)
    write_rows(mixed, rows, Provenance(name="states", fingerprint="f", config={}, upstream={}), "solution_id")
    with pytest.raises(ValueError, match=r"states of the dtypes \['bfloat16', 'float32'\]"):
        list(located_states(states_files([mixed])))


def test_history_is_plain_json(two_tower_inputs: dict[str, str]) -> None:
    assert json.loads(json.dumps(two_tower(two_tower_inputs).validate()))["validation_steps"] > 0


@pytest.mark.parametrize("recomputed", [False, True])
def test_activation_checkpointing_runs_each_block_twice(policy: Path, tmp_path: Path, recomputed: bool) -> None:
    config = TextPrmConfig(max_length=400, reserve=200, activation_checkpointing=recomputed)
    stage = TextPrmStage(config, {**written(tmp_path, questions=labelled()), "base": str(policy)}, "cpu")
    stage.module.train()
    runs: list[None] = []
    stage.model.text_model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(None))
    stage.loss(whole(stage, [0, 1]), 0).backward()  # type: ignore[no-untyped-call]
    assert len(runs) == 1 + recomputed
