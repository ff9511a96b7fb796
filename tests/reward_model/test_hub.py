"""A reward model goes to a hub and comes back, with the ids and commits of all that it was made of."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.doubles import tiny_reward_model as tiny
from tests.doubles.clip_folders import write_biomed_clip
from tests.doubles.local_hub import Hub, running

# huggingface_hub reads its environment when it is imported, hence a process of its own.
SCRIPT = """
import json, sys
from PIL import Image
from medmm_ray.reward_model import CheckpointError, RewardModel

QUESTION, SOLUTIONS = "Which lung? (A) left (B) right", [["left", "so (A)"], ["right"]]

def scored(model):
    return [s.log_odds for s in model.score(QUESTION, SOLUTIONS, image=Image.new("RGB", (40, 32), (9, 200, 30)))]

def refusal(**asked):
    try:
        RewardModel.from_pretrained(**asked)
    except CheckpointError as error:
        return str(error)

made = RewardModel.from_pretrained("org/base", revision="v1")
made.add_image_tower("hf-hub:org/biomed", revision="main")
made.fusion.output.weight.data.fill_(0.01)
url = made.push_to_hub("me/prm", private=True, token="hf_secret", figures={"step AUROC": 0.9123456})
back = RewardModel.from_pretrained("me/prm")
commit = back.push_to_hub("me/prm", revision="again", commit_message="Once more")
print(json.dumps({
    "url": url, "commit": commit, "same": scored(made) == scored(back), "text": list(vars(back.text_origin).values()),
    "image": list(vars(back.image_tower.origin).values()), "figures": back.figures,
    "gguf_missing": refusal(path="org/base", revision="v1", gguf_file="none.gguf"),
    "no_revision": refusal(path="org/base", revision="v9"),
    "no_repository": refusal(path="org/none"),
}))
"""


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Hub, dict[str, Any], dict[str, str]]:
    """The hub after the script, what the script said, and the commits that were there before."""
    with running() as hub:
        commits = {}
        for repo, branch, folder in (
            ("org/base", "v1", tiny.save(tmp_path_factory.mktemp("base"), tag=False)),
            ("org/biomed", "main", write_biomed_clip(tmp_path_factory.mktemp("biomed"))),
        ):
            hub.create(repo, branch)
            commits[repo] = hub.commit(repo, branch, files_of(folder))
        environment = {
            **os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path_factory.mktemp("home")), "HF_TOKEN": "hf_mine",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return hub, json.loads(done.stdout.splitlines()[-1]), commits


def test_what_comes_back_is_what_went_up(told: tuple[Hub, dict[str, Any], dict[str, str]]) -> None:
    hub, said, _ = told
    assert said["same"] is True
    assert said["figures"] == {"step AUROC": 0.9123456}
    files = hub.commits[hub.branches["me/prm@main"]]
    weights = {"model.safetensors", "fusion.safetensors", "image_tower/open_clip_model.safetensors"}
    others = {"config.json", "tokenizer.json", "reward_model.json", "README.md", "image_tower/open_clip_config.json"}
    assert weights | others <= set(files)
    assert weights == set(hub.lfs_paths)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    assert said["url"] == f"{hub.endpoint}/me/prm/commit/{hub.branches['me/prm@main']}"


def test_the_commits_of_both_towers_are_recorded_and_kept(told: tuple[Hub, dict[str, Any], dict[str, str]]) -> None:
    hub, said, commits = told
    assert said["text"] == ["org/base", commits["org/base"]]
    assert said["image"] == ["hf-hub:org/biomed", commits["org/biomed"]]
    written = json.loads(hub.commits[hub.branches["me/prm@again"]]["reward_model.json"])
    assert (written["text_tower"]["source"], written["text_tower"]["revision"]) == ("org/base", commits["org/base"])
    assert written["image_tower"]["revision"] == commits["org/biomed"]
    card = hub.commits[hub.branches["me/prm@again"]]["README.md"].decode()
    assert "base_model:\n- org/base\n- org/biomed\n" in card
    assert f"[org/base](https://huggingface.co/org/base) | `{commits['org/base']}` |" in card
    assert 'RewardModel.from_pretrained("me/prm")' in card
    assert "| step AUROC | 0.9123 |" in card


def test_who_asked_and_for_what(told: tuple[Hub, dict[str, Any], dict[str, str]]) -> None:
    hub, said, _ = told
    assert hub.private == {"me/prm": True}
    assert {"Bearer hf_secret", "Bearer hf_mine"} <= hub.tokens
    assert said["commit"].endswith(hub.branches["me/prm@again"])


def test_what_is_not_there_is_said(told: tuple[Hub, dict[str, Any], dict[str, str]]) -> None:
    _, said, _ = told
    assert said["no_revision"].startswith("org/base cannot be fetched from the hub: v9 is not a valid git identifier")
    assert "none.gguf is not a language model that can be read" in said["gguf_missing"]
    assert "org/none" in said["no_repository"]
