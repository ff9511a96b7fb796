"""The benchmarks run, on models small enough for a test; what they measure is read there, not here."""

import json
from pathlib import Path

import numpy as np
import pytest

from jobs import bench
from jobs.audit import report_of
from jobs.benches import Measured, models, monte_carlo
from jobs.benches.models import ForwardFlops, Shape, bench_question, reference_ids, reward_model
from jobs.benches.scale_driver import DriverConfig, recipe_words, used
from jobs.benches.scale_tables import TableShape, make_tables
from jobs.benches.scale_training import TrainingConfig, measure_training
from jobs.step import Run, load_recipe
from medmm_ray.data.sources.phantom import truth
from medmm_ray.data.sources.phantom.questions import PhantomQuestion, make_questions
from medmm_ray.reward_model import RewardModel
from medmm_ray.text import extract_answer
from medmm_ray.train.launch import read_input
from tests.doubles import tiny_reward_model as tiny
from tests.doubles.gguf_files import write_gguf

SMALL = Shape(hidden_size=32, num_layers=2, num_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=600)
ARMS = [
    "seeds=[0]", "arms=[published plan, both + summary + references]", "epochs=1", "threads=1", "questions=16",
    "test_questions=6", "solutions=4", "samples=4", "library=4", "references=1", "tower_images=20", "tower_epochs=1",
    "text_epochs=1",
    "tower={image_size: 32, width: 32, num_layers: 2, num_text_layers: 1, num_heads: 2, embed_dim: 16}",
    "text={hidden_size: 32, num_layers: 1, num_heads: 2, intermediate_size: 32, vocab_size: 600}",
]  # fmt: skip
SAMPLING = [
    "questions=4", "samples=4", "max_tokens=8", "hidden_size=128", "num_layers=1", "repeats=1", "actors=2",
    "pause_s=0.05", "rounds=2", "batch_size=2", "max_concurrency=2",
]  # fmt: skip
INDEX = [
    "vectors=3000", "width=16", "centres=20", "dimensions=4", "queries=8", "repeats=1", "chunk=1000", "over_ray=false",
]  # fmt: skip
EMBED = ["images=16", "batch_size=4", "encode_s=0.05", "decode_s=0.001", "decoders=1"]
VLLM = [
    "shapes=[wide]", "cells=[[3, 100]]", "question=20", "solution=60", "repeats=1", "reference_solutions=1",
    "vllm_solutions=2", "threads=1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.SHAPES, "smollm2", SMALL)
    for_vllm = SMALL.model_copy(update={"hidden_size": 64, "num_heads": 2, "num_key_value_heads": 1})  # 32 a head
    monkeypatch.setitem(models.SHAPES, "wide", for_vllm)


def test_texts_have_the_lengths_that_were_asked_for() -> None:
    model = reward_model(SMALL, "float32", "cpu", 2048)
    asked = bench_question(SMALL.vocab_size, 20, 300, 4, 50)
    assert [len(model.tokenizer(d)["input_ids"]) for d in asked.documents] == [256, 44]
    assert len(model.tokenizer(asked.question)["input_ids"]) == 20
    assert all(6 <= len(steps) <= 8 for steps in asked.solutions)
    lengths = [len(ids) for ids in reference_ids(model, asked)]
    assert max(lengths) - min(lengths) < 50


def test_flops_of_one_by_one_and_shared() -> None:
    flops = ForwardFlops(Shape(hidden_size=4, num_layers=1, num_heads=1, num_key_value_heads=1, intermediate_size=2,
                        vocab_size=10))  # fmt: skip
    assert flops.linear(1) == 2 * (4 * 4 * 4 + 3 * 4 * 2)
    assert flops.one_by_one([3, 2]) == flops.linear(5) + 4 * (6 + 3) * 4 + 2 * 5 * 10 * 4
    assert flops.shared(2, [1, 1], 3) == flops.linear(4) + 4 * (3 + 3 + 3) * 4 + 2 * 3 * 2 * 4


def test_flops_that_scores_do_not_need_in_the_last_layer() -> None:
    """One layer, prefix 2, two branches of one token, both tags: 848 in all; needed are both tags' own 352, keys and
    values of the prefix, 2 x 64, and the tags' pairs with the prefix and half of themselves, 80."""
    flops = ForwardFlops(
        Shape(hidden_size=4, num_layers=1, num_heads=1, num_key_value_heads=1, intermediate_size=2, vocab_size=10)
    )
    assert flops.beyond_tags(2, [1, 1], 2) == 848 - 352 - 128 - 80


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "scoring",
            [
                "shapes=[smollm2]",
                "cells=[[64, 100], [2, 0]]",
                "question=20",
                "solution=60",
                "repeats=1",
                "reference_solutions=2",
                "vllm_solutions=0",
            ],
        ),
        ("training", ["solutions=[3]", "documents=100", "question=20", "solution=60", "max_length=400", "repeats=1"]),
        ("near_duplicates", ["hashes=3000", "compared=2000", "distance=3", "repeats=1"]),
        ("curate", ["texts=400"]),
        ("phi", ["notes=40"]),
        ("evaluate", ["questions=20", "samples=16", "bootstrap_samples=20"]),
        ("retrieve", ["parts=[speed]", "passages=600", "baseline_passages=300", "queries=5"]),
        ("index", INDEX),
        ("files", ["parts=30", "remote_parts=5", "latency_ms=1", "answers=40"]),
        ("two_tower", ["solutions=3", "documents=100", "question=20", "solution=60", "repeats=1"]),
    ],
)
def test_a_benchmark_prints_its_table_and_writes_its_rows(
    name: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_runs(name, words, tmp_path, capsys)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "words"), [("scoring", VLLM), ("arms", ARMS), ("sampling", SAMPLING), ("embed", EMBED)]
)
def test_a_benchmark_of_engines_prints_its_table_and_writes_its_rows(
    name: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], ray_session: None
) -> None:
    assert_runs(name, words, tmp_path, capsys)


def assert_runs(name: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    assert bench.main([name, *words, f"json={path}"]) == 0
    rows = json.loads(path.read_text())
    assert rows
    assert set(rows[0]) == {"name", "baseline", "ours", "ratio", "target", "unit"}
    assert all(row["ratio"] > 0 for row in rows if row["target"] not in ("", "≤ 0"))
    assert rows[0]["name"].partition(",")[0] in capsys.readouterr().out


def test_how_well_a_file_and_rounded_weights_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save(tmp_path / "model", context=4096)
    model = RewardModel.from_pretrained(folder)
    file = write_gguf(tmp_path / "tiny-Q8_0.gguf", model.text_model, model.tokenizer)
    words = [f"model={folder}", "questions=2", "solutions=3"]

    def agreement(*more: str) -> dict[str, float]:
        assert bench.main(["gguf", *words, *more, f"json={tmp_path}/rows.json"]) == 0
        return {row["name"]: row["ours"] for row in json.loads((tmp_path / "rows.json").read_text())}

    of_file, rounded = agreement(f"gguf=[{file}]"), agreement("kinds=[Q8_0, Q4_0]")
    name = "mean |Δ log-odds| beside their spread"
    assert of_file[f"tiny-Q8_0.gguf, {name}"] == pytest.approx(rounded[f"Q8_0, {name}"], rel=1e-3)
    assert 0 < rounded[f"Q8_0, {name}"] < rounded[f"Q4_0, {name}"]
    assert rounded["Q8_0, same best of 3"] in (0.5, 1.0)
    assert "Spearman of" in capsys.readouterr().out


def test_monte_carlos_modes_are_measured_against_all_continuations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["questions=8", "solutions=4", "rollouts=4", "bootstrap_samples=50", "recovery=[0.0]"]
    assert bench.main(["monte_carlo", *small, f"json={tmp_path}/rows.json"]) == 0
    rows = {row["name"].partition(", loss")[0]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    tokens = {name[12:-8]: row["ratio"] for name, row in rows.items() if name.endswith(": tokens")}
    assert tokens["the judge alone"] == 0 < tokens["uncertain, else the judge"] < tokens["verify"]
    assert tokens["verify"] <= tokens["first_error"] < tokens["all, stopped early"] < tokens["all, whole ratios"] < 1
    loss = rows["recovery 0, first_error: first-error accuracy"]
    assert (loss["ratio"], loss["target"]) == (pytest.approx(loss["baseline"] - loss["ours"]), "≤ 1")
    assert 50 < loss["ours"] <= 100
    assert "recovery 0: 8 questions, 32 solutions" in capsys.readouterr().out


def test_the_scripted_policys_chances_follow_from_the_truth_of_the_prefix() -> None:
    items = make_questions(0, "train", 1, num_worked=monte_carlo.NUM_WORKS)
    truthful = monte_carlo.ScriptedPolicy(items, (0.0, 0.0), recovery=0.0, seed=0)
    assert all(_is_right(truthful, items[0], "", seed) for seed in range(20))
    wrong = next(s for s in truthful.wrong_solutions[0][0] if truth(s, items[0].case, items[0]) is False)
    said = f"Step 1: {wrong}\nStep 2:"
    assert not any(_is_right(truthful, items[0], said, seed) for seed in range(20))
    lucky = monte_carlo.ScriptedPolicy(items, (0.0, 0.0), recovery=0.5, seed=0)
    assert 5 < sum(_is_right(lucky, items[0], said, seed) for seed in range(40)) < 35


def _is_right(policy: monte_carlo.ScriptedPolicy, item: PhantomQuestion, said: str, seed: int) -> bool:
    return extract_answer(said + policy.complete(0, said, seed).text, item.options) == item.answer


def test_first_errors_and_steps_are_counted() -> None:
    assert monte_carlo.counts([1.0, 0.0, 0.0], 1) == [1, 1, 1, 1, 2, 2]
    assert monte_carlo.counts([1.0, 1.0, 0.0], 1) == [0, 1, 1, 1, 1, 2]
    assert monte_carlo.counts([None, 0.0, 0.0], 1) == [0, 1, 0, 1, 2, 2]
    assert monte_carlo.counts([1.0, 1.0, 1.0], None) == [1, 1, 3, 3, 0, 0]
    assert monte_carlo.shares(np.array([3.0, 4, 1, 2, 3, 4])).tolist() == [75.0, 62.5]


def test_training_scales_as_it_is_said_to() -> None:
    rows = list(measure_training(TrainingConfig(updates=3, questions=128)))
    speed_ups = {row.name: row for row in rows if row.name.startswith("speed-up")}
    assert len(speed_ups) == 4 * 2 * 4  # stages, shapes, numbers of workers
    assert [row.name for row in speed_ups.values() if row.met is False] == []
    assert all(row.ours <= row.baseline * (1 + 1e-9) for row in speed_ups.values())
    # Pictures are all alike: 128 of them are 2 for each of 64 workers.
    assert speed_ups["speed-up of training, image_text, defaults (batch 128), 64 workers"].ours == pytest.approx(64)
    # A prefix for 4 solutions instead of 64: to meet 64 questions an update is paid for.
    (cost,) = [row.ratio for row in rows if row.name.endswith("whole ones, text_prm, flagship")]
    assert 2.4 < cost < 3.2  # in tokens 64 x (3,200 + 4 x 350) against 4 x (3,200 + 64 x 350): 2.87


def test_drivers_are_measured_on_tables_that_hang_together(tmp_path: Path) -> None:
    config = DriverConfig(bootstrap_samples=10, shape=TableShape(solutions=3, steps=2))
    words = recipe_words(config, str(tmp_path))
    make_tables(config.shape, 90, words)
    report = report_of(Run(load_recipe(words)))
    assert (report.coverage.questions, report.sampling.kept, report.sampling.missing) == (90, 270, 0)
    assert [balance.right + balance.wrong for balance in report.balance] == [540, 540]
    assert [pair.overall_kappa.count for pair in report.agreement] == [540]
    assert [check.count for check in report.leakage] == [0] * 5
    for step in ("train_text_prm", "train_two_tower", "judge", "monte_carlo", "review", "score"):
        used(step, words)
        assert not list(tmp_path.glob("*/*/.lookups/*"))
    questions = read_input(f"{tmp_path}/inputs/questions.parquet")
    assert questions.num_rows == 68  # of 90 three in four are for training
    # Of each question's three solutions two are equal in text and targets: every fourth step is wrong.
    weights = [sorted(solution["weight"] for solution in row) for row in questions["solutions"].to_pylist()]
    assert weights == [[1, 2]] * 68
    with_images = read_input(f"{tmp_path}/two-tower-inputs/questions.parquet")
    assert with_images.num_rows == 68
    assert sorted(place for row in with_images["places"].to_pylist() for place in row)[-1] == [0, 0, 269]
    usage = used("audit", words)
    assert 50 < usage.mebibytes < 100_000
    assert usage.seconds > 0


def test_targets_are_met_or_not() -> None:
    assert Measured("a", 1.0, 9.0, 9.0, "≥ 8", "x").met is True
    assert Measured("a", 1.0, 0.6, 0.6, "≤ 0.5", "x").met is False
    assert Measured("a", 1.0, 0.6, 0.6, "", "x").met is None


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["scorin"]) == 2
    assert "expected one of scoring, " in capsys.readouterr().err


def test_arms_go_on_after_the_seeds_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = {"step_auroc": 0.75, "best_of_n": 0.5}
    figures = {"one_sample": 0.25, "oracle": 1.0, "arms": {"text only": done, "pooled": done | {"step_auroc": 0.9}}}
    for seed in (0, 1):
        (tmp_path / f"seed-{seed}.json").write_text(json.dumps(figures))
    chart, rows = tmp_path / "arms.png", tmp_path / "rows.json"
    words = ["arms=[pooled]", "seeds=[0, 1]", f"folder={tmp_path}", f"figure={chart}", f"json={rows}"]
    assert bench.main(["arms", *words]) == 0
    first, second = json.loads(rows.read_text())
    assert first["name"] == "arms, pooled: step AUROC (± 0.000 over 2 seeds)"
    assert (first["baseline"], first["ours"], first["ratio"]) == (0.75, 0.9, pytest.approx(1.2))
    assert (second["baseline"], second["ours"]) == (0.5, 0.5)
    assert chart.stat().st_size > 10_000
    assert "pooled" in capsys.readouterr().out


def test_an_unknown_arm_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["arms", "arms=[poled]"]) == 1
    assert "there is no arm 'poled'; expected some of published plan, pooled" in capsys.readouterr().err


def test_the_published_fusion_adds_one_vector_a_question_whatever_the_step() -> None:
    import torch

    from jobs.studies.published import PublishedFusion
    from medmm_ray.reward_model import ImageFeatures

    torch.manual_seed(0)
    fusion = PublishedFusion(8, 4)
    states_TD, pooled_BW = torch.randn(5, 8), torch.randn(2, 4)
    features = ImageFeatures.gather(pooled_BW, None, [[0], [1]], [[], []])
    question_T = torch.tensor([0, 0, 0, 1, 1])
    fused_TD = states_TD + fusion(states_TD, states_TD, features, question_T)
    assert torch.allclose(fused_TD.mean(dim=1), torch.zeros(5), atol=1e-6)  # the LayerNorm comes last
    fusion.norm = torch.nn.Identity()  # type: ignore[assignment]
    added_TD = fusion(states_TD, states_TD, features, question_T)
    expected_BD = fusion.attention.out_proj(fusion.projector(pooled_BW) @ fusion.attention.in_proj_weight[16:].T)
    assert torch.allclose(added_TD, expected_BD[question_T], atol=1e-6)
