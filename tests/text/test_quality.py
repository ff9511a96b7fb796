"""quality.py: what is refused and what is kept, and how long the longest solution takes."""

import time

import pytest

from medmm_ray.data.sources.phantom import make_questions
from medmm_ray.text import join_steps, split_steps
from medmm_ray.text.quality import FAULTS, fault, in_order, repeats

GOOD = "Step 1: Look at the lung. Step 2: A dark rim without vessels is air. Step 3: So the answer is (B)."


def why(text: str, answer: str | None = "B", finish_reason: str = "stop") -> str | None:
    return fault(text, split_steps(text)[1], answer, finish_reason, min_steps=3, max_steps=9)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, None),
        ("", "empty"),
        (" \n", "empty"),
        ("Step 1: Look. Step 2: The answer is (B).", "num_steps"),
        (" ".join(f"Step {i}: Part {i}." for i in range(1, 11)), "num_steps"),
        ("No marks at all, the answer is (B).", "num_steps"),
        (GOOD.replace("Step 2", "Step 3"), "step_numbers"),  # 1 3 3
        (GOOD.replace("Step 3", "Step 2"), "step_numbers"),  # 1 2 2
        (GOOD.replace("Step 1", "Step 0"), "step_numbers"),
        (GOOD.replace("Step 1", f"Step {'7' * 5000}"), "step_numbers"),  # Python reads no int of so many digits
        (GOOD.replace("rim", "rim " + "of air in the left " * 4), "repetition"),
    ],
)
def test_what_is_refused(text: str, reason: str | None) -> None:
    assert why(text) == reason
    assert reason is None or reason in FAULTS


def test_what_is_cut_off_or_says_no_answer_is_refused() -> None:
    assert why(GOOD, finish_reason="length") == "cut_off"
    assert why("", finish_reason="length") == "empty"
    for kind in ("refused", "unavailable", "request"):
        assert why("", finish_reason=kind) == kind
    assert why(GOOD, answer=None) == "no_answer"


def test_numbers_in_order() -> None:
    assert in_order([])
    assert in_order([1, 2, 3])
    assert not in_order([2, 3])
    assert not in_order([1, 2, 2])


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("It is very, very, very large.", False),
        ("yes " * 15, False),
        ("yes " * 16, True),
        ("The left lung is clear. " * 2, False),
        ("The left lung is clear. " * 3, True),  # 18 words, full stops among them
        ("Step 1: The heart is wide, I think so. Step 2: The heart is wide, I think so. ", False),
        ("".join(f"Step {i}: The heart is wide, I think so. " for i in (1, 2, 3)), True),
        ("a b c d " * 3 + "and more", False),  # 12 words
        (") " * 40, True),
        ("肺部清晰没有异常。" * 30, True),
        ("A" * 2000, True),
        ("word " + " ".join(f"n{i}" for i in range(300)), False),
    ],
)
def test_what_a_loop_is(text: str, loops: bool) -> None:
    assert repeats(text) is loops


def test_a_loop_of_a_long_passage_is_seen_and_a_longer_one_is_not() -> None:
    passage = " ".join(f"word{i}" for i in range(128)) + " "
    assert repeats(passage * 3)
    assert not repeats(passage * 2)
    assert not repeats((passage + "more ") * 3)


def test_a_loop_whose_passage_repeats_itself_is_seen() -> None:
    clear = "the left lung is clear and "
    passage = f"{clear}wide, {clear}long, so that {clear}dark; "
    assert repeats(passage * 3)
    assert not repeats(passage * 2)


def test_a_hundred_thousand_tokens_are_judged_at_once() -> None:
    for text in (" ".join(f"word{i % 7919}" for i in range(100_000)), "A" * 500_000, "the lung is clear " * 25_000):
        started = time.process_time()
        repeats(text)
        assert time.process_time() - started < 2


def test_no_worked_solution_of_a_phantom_is_refused() -> None:
    for item in make_questions(0, "train", 300, num_worked=2):
        for steps in item.worked:
            text = join_steps(steps)
            assert fault(text, list(steps), "A", "stop", min_steps=1, max_steps=9) is None, text
