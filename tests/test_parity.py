"""Scores are those of the reference's own procedure, one solution at a time; nothing else that is read changes them.

The reference (`tiny_reward_model.reference_probs`): one solution, all logits, softmax over " +" and " -" at each tag.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmm_ray.engines.reward_model import RewardModel, ScoreRequest
from tests import tiny_reward_model as tiny

QUESTION = "Which lung shows the effusion? (A) left (B) right"
DOCUMENTS = ["a blunted costophrenic angle shows an effusion", "the heart is normal"]
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
# Of the weights: wide for exactness; in bfloat16 such that the reference's own rounding stays within the tolerance
# (at 0.2 it is up to .034 away from its float32), while probabilities still range from .15 to .8.
SPREAD = {"float32": 0.2, "bfloat16": 0.15}
# The tag: one added token of the tokenizer, or none (then it is added as the reference adds it). With `own_bos` the
# chat template writes a BOS, and tokenising the text another, as Llama 3's do.
TOKENIZERS = {
    "tag": (True, False),
    "tag_own_bos": (True, True),
    "no_tag": (False, False),
    "no_tag_own_bos": (False, True),
}


def steps(num: int, seed: int, words: int = 6) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(tiny.WORDS, k=rng.randint(1, words))) for _ in range(num)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Checkpoints by tokenizer and number format."""
    return {
        (name, dtype): tiny.save(tmp_path_factory.mktemp(name), tag=tag, own_bos=own_bos, spread=spread)
        for name, (tag, own_bos) in TOKENIZERS.items()
        for dtype, spread in SPREAD.items()
    }


@pytest.fixture(scope="module")
def model(folders: dict[tuple[str, str], Path]) -> RewardModel:
    return RewardModel.from_pretrained(folders["tag", "float32"])


def reference(model: RewardModel, solution: Sequence[str], documents: Sequence[str]) -> list[float]:
    return tiny.reference_probs(model.text_model, model.tokenizer, QUESTION, solution, documents)


BEGUN = steps(3, seed=7)
SOLUTIONS = {
    "one": [steps(4, seed=3)],
    "one_step": [steps(1, seed=1), steps(1, seed=2)],
    "to_30_steps": [steps(n, seed=n) for n in (1, 2, 5, 17, 30)],
    "unequal": [["no"], steps(30, seed=4, words=14), ["left", "right"], steps(2, seed=5, words=40)],
    "shared_beginning": [BEGUN, [*BEGUN, "yes"], [*BEGUN[:2], "no", "yes"], [*BEGUN, "yes", "no"], BEGUN],
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("documents", [[], DOCUMENTS], ids=["alone", "documents"])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_scores_are_those_of_the_reference_one_by_one(
    folders: dict[tuple[str, str], Path], tokenizer: str, documents: list[str], dtype: str
) -> None:
    model = RewardModel.from_pretrained(folders[tokenizer, dtype], dtype=dtype)
    for solutions in SOLUTIONS.values():
        for solution, scores in zip(solutions, model.score(QUESTION, solutions, documents), strict=True):
            expected = reference(model, solution, documents)
            assert len(expected) == len(solution)
            assert scores.error is None
            assert scores.plus_probs == pytest.approx(expected, abs=TOLERANCE[dtype])
            assert scores.min_plus_prob == pytest.approx(min(expected), abs=TOLERANCE[dtype])
            assert scores.final_plus_prob == pytest.approx(expected[-1], abs=TOLERANCE[dtype])
            assert scores.image_log_odds == [0.0] * len(solution)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_64_solutions_of_very_unequal_length(folders: dict[tuple[str, str], Path], dtype: str) -> None:
    model = RewardModel.from_pretrained(folders["tag", dtype], dtype=dtype)
    solutions = [steps(1 + (7 * i) % 30, seed=i, words=1 + i % 12) for i in range(64)]
    scores = model.score(QUESTION, solutions, DOCUMENTS, token_budget=600)
    for solution, found in zip(solutions, scores, strict=True):
        assert found.plus_probs == pytest.approx(reference(model, solution, DOCUMENTS), abs=TOLERANCE[dtype])


def test_in_bfloat16_we_are_as_near_to_float32_as_the_reference(folders: dict[tuple[str, str], Path]) -> None:
    exact, ours = (RewardModel.from_pretrained(folders["tag", "float32"], dtype=dtype) for dtype in TOLERANCE)
    solutions = [steps(1 + i % 20, seed=i) for i in range(32)]
    truth, theirs = ([p for s in solutions for p in reference(m, s, DOCUMENTS)] for m in (exact, ours))
    found = [p for scores in ours.score(QUESTION, solutions, DOCUMENTS) for p in scores.plus_probs]
    of_ours, of_theirs = (
        sum(abs(p - t) for p, t in zip(probs, truth, strict=True)) / len(truth) for probs in (found, theirs)
    )
    assert 0 < of_ours < 1.25 * of_theirs


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8),
    st.integers(0, 2),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=4),
    st.integers(1, 3000),
    st.randoms(use_true_random=False),
)
def test_no_score_depends_on_order_batch_budget_or_neighbours(
    model: RewardModel, seeds: list[int], documents: int, others: list[tuple[int, int]], budget: int, rng: random.Random
) -> None:
    """A question's solutions in any order, among other questions in any order, at any budget: as each one alone."""
    solutions = [steps(1 + seed % 12, seed, words=1 + seed % 9) for seed in seeds]
    order = rng.sample(range(len(solutions)), len(solutions))
    asked = ScoreRequest(QUESTION, [solutions[i] for i in order], DOCUMENTS[:documents])
    requests = [
        asked,
        *(ScoreRequest(f"{QUESTION} {i}", [steps(1 + j, 9 * i + j) for j in range(number)], DOCUMENTS[:used])
          for i, (number, used) in enumerate(others)),
    ]  # fmt: skip
    rng.shuffle(requests)
    together = list(model.score_many(requests, token_budget=budget))
    place = next(i for i, request in enumerate(requests) if request is asked)
    for i, found in zip(order, together[place], strict=True):
        (alone,) = model.score(QUESTION, [solutions[i]], DOCUMENTS[:documents])
        assert found.plus_probs == pytest.approx(alone.plus_probs, abs=1e-5)
        assert found.log_odds == pytest.approx(alone.log_odds, abs=1e-4)
        assert found.num_documents == alone.num_documents == documents


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 2000))
def test_no_summary_depends_on_budget_or_neighbours(model: RewardModel, seeds: list[int], budget: int) -> None:
    solutions = [steps(1 + seed % 7, seed) for seed in seeds]
    for solution, found in zip(solutions, model.text_states(QUESTION, solutions, token_budget=budget), strict=True):
        (alone,) = model.text_states(QUESTION, [solution])
        assert (found.summaries_TD - alone.summaries_TD).abs().max() <= 1e-5
        assert (found.states_TD - alone.states_TD).abs().max() <= 1e-4


# Documents


def test_a_solution_longer_than_the_reserve_keeps_the_documents_while_the_context_holds(
    folders: dict[tuple[str, str], Path],
) -> None:
    model = RewardModel.from_pretrained(folders["tag", "float32"])  # a context of 2,048 tokens
    model.max_length, model.reserve = 400, 100
    documents = [" ".join([word] * 60) for word in ("effusion", "nodule", "heart", "lung", "normal")]
    cost = [len(model.tokenizer(d, add_special_tokens=False)["input_ids"]) + 1 for d in documents]
    chosen = next(n for n in range(5, -1, -1) if sum(cost[:n]) <= 300)
    long, endless = steps(40, seed=1), steps(190, seed=2)
    too_long = steps(600, seed=3, words=12)
    short, own, less, none = model.score(QUESTION, [["left"], long, endless, too_long], documents)
    length = sum(len(model.tokenizer(s, add_special_tokens=False)["input_ids"]) for s in long)
    assert length > model.reserve
    assert 0 < chosen < 5
    assert (short.num_documents, own.num_documents) == (chosen, chosen)
    assert own.plus_probs == pytest.approx(reference(model, long, documents[:chosen]), abs=1e-5)
    assert 0 <= less.num_documents < chosen
    assert less.plus_probs == pytest.approx(reference(model, endless, documents[: less.num_documents]), abs=1e-5)
    assert (none.num_documents, none.plus_probs) == (0, [])
    assert str(none.error).startswith("too_long: ")
    assert str(none.error).endswith("tokens without a document; the limit is 2048")
