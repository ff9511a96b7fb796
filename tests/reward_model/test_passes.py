"""Scores are the same where requests are read in pieces, share passes, and find their prefixes in the cache."""

import random
from collections.abc import Sequence

import pytest
import torch

from medmm_ray.reward_model import RewardModel, ScoreRequest, StepScores
from medmm_ray.reward_model.forward import CachedPrefix, RowPiece
from medmm_ray.reward_model.passes import PieceCutter
from medmm_ray.reward_model.prefix_cache import BLOCK, PrefixCache, PrefixIds
from tests.doubles import tiny_reward_model

DOCUMENTS = [" ".join(tiny_reward_model.WORDS[i:] + tiny_reward_model.WORDS[:i]) for i in range(0, 24, 3)]
OTHER = ["the heart is enlarged", "so the answer is (B)"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    return RewardModel.from_pretrained(tiny_reward_model.save(tmp_path_factory.mktemp("tiny")))


def read(
    model: RewardModel, requests: Sequence[ScoreRequest], prefixes: PrefixCache, budget: int, seed: int = 0
) -> tuple[list[list[StepScores]], int]:
    """The scores of requests that are read in passes of `budget` tokens, in turn at random, and the tokens read."""
    cutters = [PieceCutter(model.scoring_job(request), prefixes) for request in requests]
    turns, num_tokens = random.Random(seed), 0
    while not all(cutter.is_cut for cutter in cutters):
        row: list[tuple[PieceCutter, RowPiece]] = []
        used = 0
        for cutter in turns.sample(cutters, len(cutters)):
            piece = None if cutter.is_cut or used >= budget else cutter.take(budget - used, budget - used, used == 0)
            if piece is not None:
                row.append((cutter, piece))
                used += piece.num_tokens
        model.forward_pieces([piece for _, piece in row])
        for cutter, piece in row:
            cutter.keep_prefix(piece)
        num_tokens += used
    assert [cutter.tokens_left for cutter in cutters] == [0] * len(cutters)
    return [model.step_scores(cutter.job.states(), None) for cutter in cutters], num_tokens


def check(model: RewardModel, requests: Sequence[ScoreRequest], scores: Sequence[Sequence[StepScores]]) -> None:
    for request, of_request in zip(requests, scores, strict=True):
        expected = model.score(request.question, request.solutions, request.documents)
        for ours, alone in zip(of_request, expected, strict=True):
            assert ours.plus_probs == pytest.approx(alone.plus_probs, abs=1e-6)
            assert (ours.error, ours.num_documents) == (alone.error, alone.num_documents)


@pytest.mark.parametrize("budget", [40, 128, 1024])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_pieces_in_any_order_give_the_scores_of_whole_requests(
    model: RewardModel, budget: int, cache_bytes: int
) -> None:
    question, solutions = tiny_reward_model.QUESTION, tiny_reward_model.SOLUTIONS
    requests = [
        ScoreRequest(question, solutions, DOCUMENTS),
        ScoreRequest(question, [*solutions, OTHER, OTHER, []], DOCUMENTS),
        ScoreRequest("Which?", [OTHER]),
        ScoreRequest(question, solutions, DOCUMENTS[:2]),
    ]
    scores, _ = read(model, requests, PrefixCache(cache_bytes), budget)
    check(model, requests, scores)


def test_a_known_prefix_is_not_read_again(model: RewardModel) -> None:
    prefixes = PrefixCache(1 << 30)
    first = ScoreRequest(tiny_reward_model.QUESTION, tiny_reward_model.SOLUTIONS, DOCUMENTS)
    second = ScoreRequest(tiny_reward_model.QUESTION, [OTHER, ["normal", "no finding"]], DOCUMENTS)
    _, num_first = read(model, [first], prefixes, 128)
    scores, num_second = read(model, [second], prefixes, 128)
    check(model, [second], scores)
    branches = sum(len(branch.ids) for branch in model.scoring_job(second).packing.groups[0].branches)
    assert num_second <= branches + BLOCK < num_first / 3
    assert prefixes.statistics.num_hit_tokens > 200


def test_a_step_that_begins_in_a_known_prefix_has_its_whole_summary(model: RewardModel) -> None:
    """Solutions that begin alike have a part of their first step in the prefix; the image part reads its mean state."""
    prefixes = PrefixCache(1 << 30)
    alike = [["the left angle is blunted", "no"], ["the left angle is clear", "no"]]
    request = ScoreRequest(tiny_reward_model.QUESTION, alike, DOCUMENTS)
    read(model, [request], prefixes, 96)
    cutter = PieceCutter(model.scoring_job(request), prefixes)
    piece = cutter.take(4096, 4096, is_first=True)
    assert piece is not None
    assert not piece.has_prefix
    model.forward_pieces([piece])
    _, expected = next(model.iter_states([request]))
    for ours, alone in zip(cutter.job.states(), expected, strict=True):
        torch.testing.assert_close(ours.summaries_TD, alone.summaries_TD, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(ours.states_TD, alone.states_TD, atol=2e-5, rtol=1e-4)


# The cache alone


def prefix(length: int, value: float = 0.0) -> CachedPrefix:
    """One layer of keys and values of 8 bytes a token each, and 4 bytes a token of states."""
    keys = torch.full((1, 1, length, 2), value)
    return CachedPrefix({0: (keys, keys.clone())}, [torch.full((length, 1), value)])


def test_the_longest_beginning_is_given_and_no_other_salt() -> None:
    cache = PrefixCache(1 << 20)
    ids = list(range(200))
    cache.add(PrefixIds(ids, "image a"), prefix(200, 1.0))
    length, beginning = cache.longest(PrefixIds([*ids[:150], 7, 8, 9], "image a"))
    assert length == 150
    assert beginning.layers[0][0].shape == (1, 1, 150, 2)
    assert [len(part) for part in beginning.middle_PD] == [150]
    for other in (PrefixIds(ids, "image b"), PrefixIds([5, *ids], "image a"), PrefixIds(ids[: BLOCK - 1], "image a")):
        assert cache.longest(other)[0] == 0


def test_what_was_used_least_recently_goes_first_and_the_bound_holds() -> None:
    cache = PrefixCache(3 * 100 * 20)  # three prefixes of 100 tokens
    hundreds = {start: PrefixIds(range(start, start + 100)) for start in (1000, 2000, 3000, 4000)}
    for start in (1000, 2000, 3000):
        cache.add(hundreds[start], prefix(100))
    assert cache.num_bytes == 6000
    cache.longest(hundreds[1000])
    cache.add(hundreds[4000], prefix(100))
    assert (len(cache), cache.num_bytes, cache.statistics.num_evictions) == (3, 6000, 1)
    assert [cache.known_length(ids) for ids in hundreds.values()] == [100, 0, 100, 100]
    cache.add(PrefixIds(range(5000, 5400)), prefix(400))  # more than the bound: not kept, and nothing goes for it
    assert len(cache) == 3


def test_a_longer_prefix_takes_the_place_of_its_beginning() -> None:
    cache = PrefixCache(1 << 20)
    ids = list(range(300))
    for length in (128, 300, 200):
        cache.add(PrefixIds(ids[:length]), prefix(length))
    assert (len(cache), cache.num_bytes) == (1, 300 * 20)
    assert cache.known_length(PrefixIds([*ids, 1, 2])) == 300
