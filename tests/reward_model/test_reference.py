"""The package's own reference: it gives what Med-PRM's own procedure gives, and everything faster gives the same."""

from pathlib import Path

import pytest
import torch

from medmm_ray.reward_model import RewardModel
from medmm_ray.reward_model.reference import reference_log_odds
from tests.doubles import tiny_reward_model as tiny
from tests.doubles.tiny_reward_model import DOCUMENTS, QUESTION, SOLUTIONS
from tests.reward_model.test_families import math_shepherd


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    return RewardModel.from_pretrained(tiny.save(tmp_path_factory.mktemp("model")))


@torch.no_grad()
@pytest.mark.parametrize("documents", [[], DOCUMENTS], ids=["alone", "documents"])
def test_it_gives_what_the_published_procedure_gives(model: RewardModel, documents: list[str]) -> None:
    for solution in SOLUTIONS:
        log_odds_T = reference_log_odds(model.text_model, model.family, QUESTION, solution, documents)
        expected = tiny.reference_probs(model.text_model, model.tokenizer, QUESTION, solution, documents)
        assert log_odds_T.sigmoid().tolist() == pytest.approx(expected, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("token_budget", [None, 40, 200])
@pytest.mark.parametrize("family", ["medprm", "math_shepherd"])
def test_scores_are_exactly_its_log_odds(
    model: RewardModel, family: str, token_budget: int | None, tmp_path: Path
) -> None:
    if family == "math_shepherd":
        model = RewardModel.from_pretrained(math_shepherd(tmp_path))
    scores = model.score(QUESTION, SOLUTIONS, DOCUMENTS, token_budget=token_budget)
    for solution, found in zip(SOLUTIONS, scores, strict=True):
        expected_T = reference_log_odds(model.text_model, model.family, QUESTION, solution, DOCUMENTS)
        assert found.log_odds == pytest.approx(expected_T.tolist(), abs=2e-5)
