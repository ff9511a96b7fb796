"""What of a run is found again where the run lies at a URI, without an engine."""

from pathlib import Path

import pytest

from jobs import export, query, review_page
from jobs.step import Run, load_recipe
from medmm_ray.client import rerank_request
from medmm_ray.config import ConfigError
from medmm_ray.reward_model.scores import StepScores
from medmm_ray.service.rerank import RerankRequest, Scored, rerank
from tests.pages.review_page.phantom_run import make_run

TINY = "jobs/recipes/tiny.yaml"


def run_at(root: str) -> Run:
    return Run(load_recipe([TINY, f"run={root}"]))


def test_the_readers_of_a_run_at_a_local_uri_lie_in_its_folder(tmp_path: Path) -> None:
    assert review_page.readers_file(run_at(f"file://{tmp_path}")) == tmp_path / "readers.json"
    with pytest.raises(ConfigError, match="is not a local folder: name a local file of readers, readers=FILE"):
        review_page.readers_file(run_at("memory://run"))


def test_a_run_at_a_uri_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run")
    words = [TINY, "review.expert=none", "format=json"]
    assert export.main([*words, f"run=file://{tmp_path}/run", f"to=file://{tmp_path}/dataset"]) == 0
    assert list((tmp_path / "dataset").rglob("*.json"))
    assert export.main([*words, f"run=file://{tmp_path}/none", f"to={tmp_path}/other"]) == 2
    assert f"there is no run at file://{tmp_path}/none" in capsys.readouterr().err


def test_a_stored_answer_of_a_run_at_a_uri_is_shown_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    request = rerank_request("Which?", ["left", "right"], [["So the answer is (A)."], ["So the answer is (B)."]])
    asked: list[RerankRequest] = []

    def answer_of(run: Run, request: RerankRequest) -> dict[str, object]:
        asked.append(request)
        scores = [StepScores([2.0], [0.0]), StepScores([-2.0], [0.0])]
        return rerank(request, Scored(scores), run.model_id("two_tower")).model_dump(mode="json")

    monkeypatch.setattr(query, "example", lambda run: (request, "A"))
    monkeypatch.setattr(query, "answer_of", answer_of)
    words = [TINY, f"run=file://{tmp_path}", "models.two_tower=org/model"]
    outputs = []
    for _ in range(2):
        assert query.main(words) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert len(asked) == 1
    assert f"The request and the answer: file://{tmp_path}/answer.json" in outputs[0]
