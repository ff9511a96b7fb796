"""Where a checkpoint lies: a folder, a URI, or a run's name of its latest."""

from pathlib import Path

import pytest

from medmm_ray.data.artifacts import Artifact, Provenance
from medmm_ray.reward_model import CheckpointError, RewardModel
from medmm_ray.reward_model.checkpoint import locate
from tests.doubles import tiny_reward_model as tiny


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "text_prm" / "f00d"
    tiny.save(folder)
    origin = Provenance(name="text_prm", fingerprint="f00d", config={}, upstream={})
    Artifact(str(folder)).commit(origin, seconds=0.0)
    return tmp_path / "run"


def test_a_runs_name_of_its_reward_model_is_followed(run: Path) -> None:
    for name in (f"{run}/text_prm", f"{run}/text_prm/latest", f"file://{run}/text_prm", f"file://{run}/text_prm/f00d"):
        assert Path(locate(name, None)) == run / "text_prm" / "f00d"
    assert locate(run / "text_prm" / "f00d", None) == run / "text_prm" / "f00d"
    by_name = RewardModel.from_pretrained(run / "text_prm").score(tiny.QUESTION, tiny.SOLUTIONS)
    by_folder = RewardModel.from_pretrained(run / "text_prm" / "f00d").score(tiny.QUESTION, tiny.SOLUTIONS)
    assert by_name == by_folder


def test_a_uri_where_nothing_is(run: Path) -> None:
    with pytest.raises(CheckpointError, match="no files are there; check the name"):
        locate(f"file://{run}/policy", None)
