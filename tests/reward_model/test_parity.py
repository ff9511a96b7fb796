"""Scores are those of the reference's own procedure, one solution at a time; nothing else that is read changes them.

The reference (`medprm_reference`) uses nothing of the product: one solution, all logits, softmax over " +" and " -" at
each tag. Its texts are literal: the example of Med-PRM's model card, and odd ones; its own training records besides.
"""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmm_ray.data.sources import SourceRequest, med_prm
from medmm_ray.reward_model import RewardModel, ScoreRequest
from medmm_ray.text import reference_steps
from tests.doubles import tiny_reward_model as tiny
from tests.paths import REAL_DATA
from tests.reward_model import medprm_card as card
from tests.reward_model import medprm_reference

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


# The bytes of published texts


LONG = tiny.tokenizer(own_bos=True, more=[card.PROMPT, *medprm_reference.SYSTEMS], vocab_size=4000)


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    return RewardModel.from_pretrained(tiny.save(tmp_path_factory.mktemp("long"), context=6144, fast=LONG))


def packed_ids(model: RewardModel, question: str, solution: str | Sequence[str], documents: Sequence[str]) -> list[int]:
    (group,) = model.pack(question, [solution], documents).groups
    (branch,) = group.branches
    return group.prefix_ids + branch.ids


def card_probs(model: RewardModel, system: str | None) -> list[float]:
    documents = [text.split(": ", 1)[1] for text in card.DOCUMENTS]
    return medprm_reference.probs(model.text_model, LONG, card.QUESTION, card.EXPLANATION, documents, system)


def test_the_model_cards_own_example(long_model: RewardModel, tmp_path: Path) -> None:
    expected = card_probs(long_model, card.SYSTEM)
    assert len(expected) == 6
    long_model.system_prompt = card.SYSTEM
    try:
        assert (
            packed_ids(long_model, card.QUESTION, card.EXPLANATION, card.DOCUMENTS)
            == LONG(f"<|bos|>{card.PROMPT}")["input_ids"]
        )
        (scores,) = long_model.score(card.QUESTION, [card.EXPLANATION], card.DOCUMENTS)
        long_model.save_pretrained(tmp_path / "saved")
    finally:
        long_model.system_prompt = None
    assert scores.plus_probs == pytest.approx(expected, abs=1e-5)
    assert scores.min_plus_prob == pytest.approx(min(expected), abs=1e-5)
    assert scores.final_plus_prob == pytest.approx(expected[-1], abs=1e-5)
    back = RewardModel.from_pretrained(tmp_path / "saved")
    (again,) = back.score(card.QUESTION, [card.EXPLANATION], card.DOCUMENTS)
    assert (back.system_prompt, again.plus_probs) == (card.SYSTEM, scores.plus_probs)


@pytest.mark.parametrize("labelled", [True, False])
def test_the_cards_texts_with_the_prompt_of_the_scoring_code(long_model: RewardModel, labelled: bool) -> None:
    documents = card.DOCUMENTS if labelled else [text.split(": ", 1)[1] for text in card.DOCUMENTS]
    (scores,) = long_model.score(card.QUESTION, [card.EXPLANATION], documents)
    assert scores.plus_probs == pytest.approx(card_probs(long_model, None), abs=1e-5)
    assert scores.num_documents == 2


def test_training_leaves_out_the_last_space_of_the_system_prompt(long_model: RewardModel) -> None:
    (group,) = long_model.pack(card.QUESTION, [card.EXPLANATION], ["A."], training=True).groups
    system = medprm_reference.SYSTEM_WITH_DOCUMENTS.removesuffix(" ")
    expected = medprm_reference.prompt_ids(LONG, card.QUESTION, card.EXPLANATION, ["A."], system)
    ids = group.prefix_ids + group.branches[0].ids
    assert ids == expected[: len(ids)]


# Raw solutions, and their text with tags, as the reference makes it.
ODD = {
    "double_spaces": (
        "Step 1:  Look.  So.\nStep 2: The answer  is A.",
        "Step 1:  Look.  So. ки Step 2: The answer  is A. ки",
    ),
    "tabs": ("Step 1:\tLook.\tSo.\nStep 2: a\t", "Step 1:\tLook.\tSo. ки Step 2: a ки"),
    "line_breaks": (
        "Step 1: Two findings:\n- blunt\n\n- no air\nStep 2: So.\n",
        "Step 1: Two findings: - blunt  - no air ки Step 2: So. ки",
    ),
    "text_before": ("So:\n\nStep 1: Look.\n\nStep 2: Think.", "So: Step 1: Look. ки Step 2: Think. ки"),
    "headings": ("## Step 1: Look.\n## Step 2: Think.", "Step 1: Look. ки Step 2: Think. ки"),
    "deep_headings": ("### Step 1: Look.\n### Step 2: Think.", "# Step 1: Look. # ки Step 2: Think. ки"),
    "bold": ("**Step 1:** Look.\n**Step 2:** Think.", "** Step 1:** Look. ** ки Step 2:** Think. ки"),
    "no_steps": ("  Look,\nthen think.  ", "Look, then think. ки"),
    "numbered_wrongly": ("Step 3: Look. Step 3: Think.", "Step 3: Look. ки Step 3: Think. ки"),
    "empty_steps": ("Step 1: Step 2: Think.", "Step 1: ки Step 2: Think. ки"),
    "a_step_of_something_else": (
        "Step 1: She sat USMLE Step 2: good. Step 2: So.",
        "Step 1: She sat USMLE ки Step 2: good. ки Step 2: So. ки",
    ),
    "carriage_returns": ("Step 1: Look.\r\nStep 2: \u00a0Think.", "Step 1: Look. ки Step 2: \u00a0Think. ки"),
}
TAGGED = {
    "tags": "Step 1:  Look.\tSo. ки Step 2: Think. ки",
    "tags_without_marks": "Look. ки  Think.ки ки",
    "two_tags": "Step 1: Look. ки ки Step 2: Think. ки",
    "a_tag_in_a_word": "Step 1: левая кисть ки Step 2: руки чисты ки",
}


@pytest.mark.parametrize("documents", [[], DOCUMENTS], ids=["alone", "documents"])
@pytest.mark.parametrize("name", ODD)
def test_raw_text_is_scored_as_the_reference_does(model: RewardModel, name: str, documents: list[str]) -> None:
    raw, tagged = ODD[name]
    assert medprm_reference.processed(raw) == tagged
    expected = medprm_reference.probs(model.text_model, model.tokenizer, QUESTION, tagged, documents)
    (scores,) = model.score(QUESTION, [raw], documents)
    assert scores.plus_probs == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", TAGGED)
def test_tagged_text_keeps_its_tags_where_they_are(model: RewardModel, name: str) -> None:
    tagged = TAGGED[name]
    places = [found.start() for found in re.finditer(" ки", tagged)]
    ends = [i for i, place in enumerate(places) if not tagged[place + 3 :][:1].isalpha()]
    probs = medprm_reference.probs(model.text_model, model.tokenizer, QUESTION, tagged)
    assert len(probs) == len(places)
    (scores,) = model.score(QUESTION, [tagged])
    assert scores.plus_probs == pytest.approx([probs[i] for i in ends], abs=1e-5)


def test_what_stands_behind_the_last_tag_is_a_step_too(model: RewardModel) -> None:
    (scores,) = model.score(QUESTION, ["Step 1: Look. ки\nStep 2: Think.\n"])
    expected = medprm_reference.probs(
        model.text_model, model.tokenizer, QUESTION, "Step 1: Look. ки Step 2: Think.  ки"
    )
    assert scores.plus_probs == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("listed", "tagged"),
    [
        (
            [" Look.  So.", "a\tb", "one\ntwo\n\nthree\n"],
            "Step 1:  Look.  So. ки Step 2: a\tb ки Step 3: one two  three ки",
        ),
        (["Step 1:  Look. ки", "Step 2: Think. ки"], "Step 1:  Look. ки Step 2: Think. ки"),
        (["So. Step 1: Look.", "Step 2: Think."], "So. Step 1: Look. ки Step 2: Think. ки"),
        (["Look at Step 2: so.", "Think."], "Step 1: Look at Step 2: so. ки Step 2: Think. ки"),
    ],
)
def test_lists_of_steps_are_written_as_they_are(model: RewardModel, listed: list[str], tagged: str) -> None:
    (scores,) = model.score(QUESTION, [listed], DOCUMENTS)
    expected = medprm_reference.probs(model.text_model, model.tokenizer, QUESTION, tagged, DOCUMENTS)
    assert scores.plus_probs == pytest.approx(expected, abs=1e-5)


PIECES = st.sampled_from(
    [
        "Step 1:",
        "Step 12:",
        "## Step 2:",
        "##",
        "step 3:",
        "Step",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r",
        "\u3000",
        "Look.",
        "кит",
        "к",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=14).map("".join))
def test_any_raw_text_gets_the_references_tags(raw: str) -> None:
    assert "".join(f"{step} ки" for step in reference_steps(raw)) == medprm_reference.processed(raw)


REAL = REAL_DATA / "med_prm"


@pytest.mark.skipif(not REAL.is_dir(), reason=f"Med-PRM's training records are not at {REAL}")
@pytest.mark.parametrize(
    "documents", [[], [text.split(": ", 1)[1] for text in card.DOCUMENTS]], ids=["alone", "documents"]
)
def test_med_prms_own_records(long_model: RewardModel, documents: list[str]) -> None:
    """As they are published, tagged and in steps, and as the import leaves them in the tables: 591 steps."""
    rows = json.loads((REAL / "medprm_train_samples.json").read_text())
    stored = [solution.steps for row in med_prm.solved(SourceRequest(path=str(REAL))) for solution in row.solutions]
    assert len(rows) == len(stored) == 100
    num_steps = 0
    for row, steps in zip(rows, stored, strict=True):
        options = [f"({line.strip()[0]}) {line.strip()[3:]}" for line in row["options"].split("\n")]
        question = " ".join([row["question"], *options])
        tagged = row["full_solution"]
        ids = medprm_reference.prompt_ids(LONG, question, tagged, documents)
        expected = medprm_reference.probs_at_tags(long_model.text_model, LONG, ids)
        for solution in (tagged, row["steps"], steps, tagged.replace(" ки", "")):
            own = packed_ids(long_model, question, solution, documents)
            assert own == ids[: len(own)]
        (scores,) = long_model.score(question, [steps], documents)
        assert scores.plus_probs == pytest.approx(expected, abs=1e-5)
        num_steps += len(expected)
    assert num_steps == 591
