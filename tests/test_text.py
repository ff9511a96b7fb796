import pytest

from medmm_ray.text import (
    is_correct,
    join_steps,
    normalise,
    question_with_options,
    split_steps,
    tag_steps,
    well_formed,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Step 1: Look. Step 2: Think.", ("", ["Look.", "Think."])),
        ("So:\nStep 1: Look.\n\nStep 2:  Think\n twice.", ("So:", ["Look.", "Think twice."])),
        ("**Step 1:** Look.\n**Step 2:** Think.", ("", ["Look.", "Think."])),
        ("## Step 1. Look.\n## Step 2. Think.", ("", ["Look.", "Think."])),
        ("No marks here.", ("", ["No marks here."])),
        ("Step 1: The two-step 12: test.", ("", ["The two-step 12: test."])),
        ("  ", ("", [])),
        ("Step 1: Step 2: Think.", ("", ["Think."])),
        ("Step 1: Look. Step 1: Look again. Step 2: Think.", ("", ["Look.", "Look again.", "Think."])),  # twice
        ("Step 3: Look. Step 1: Think. Step 12: Say.", ("", ["Look.", "Think.", "Say."])),  # numbered wrongly
        ("Step 0: Break it down.\n\nStep 1: Look.", ("", ["Break it down.", "Look."])),
        ("Look.\nThink.", ("", ["Look. Think."])),
        ("Step 1:", ("", [])),
        ("", ("", [])),
    ],
)
def test_split_steps(text: str, expected: tuple[str, list[str]]) -> None:
    assert split_steps(text) == expected


def test_a_very_long_solution_keeps_all_its_words() -> None:
    long = "word " * 100_000
    assert split_steps(f"Step 1: {long}Step 2: Think.") == ("", [long.strip(), "Think."])
    assert len(split_steps("Step 1: a. " * 10_000)[1]) == 10_000
    assert split_steps("Step 1" * 20_000)[1] == ["Step 1" * 20_000]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ä \U0001f642", "ä \U0001f642"),
        ("\ud83d half", "\ufffd half"),
        ("\ud83d\ude42", "\U0001f642"),
        ("\ude42", "\ufffd"),
    ],
)
def test_halves_of_surrogate_pairs_are_joined_or_replaced(text: str, expected: str) -> None:
    assert well_formed(text) == expected


def test_join_and_tag() -> None:
    assert join_steps(["a\nb", "c"]) == "Step 1: a b Step 2: c"
    assert tag_steps(["a", "c"], "So:") == "So: Step 1: a ки Step 2: c ки"
    assert split_steps(join_steps(["a", "b c"], "p")) == ("p", ["a", "b c"])


def test_question_with_options() -> None:
    assert question_with_options("Which?", ["x", "y"]) == "Which? (A) x (B) y"
    assert question_with_options("Which?", []) == "Which?"


def test_is_correct() -> None:
    assert is_correct("B", "B", "choice") is True
    assert is_correct("A", "B", "choice") is False
    assert is_correct(None, "B", "choice") is None
    assert is_correct("The Left lung", "left lung.", "open") is True
    assert normalise("  Café, the  X-ray! ") == "cafe x ray"
