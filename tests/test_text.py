import pytest

from medmm_ray.text import (
    extract_answer,
    is_correct,
    join_steps,
    normalise,
    question_with_options,
    split_steps,
    tag_steps,
)

OPTIONS = ["appendicitis", "Crohn's disease", "ovarian torsion", "normal study"]


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
    ],
)
def test_split_steps(text: str, expected: tuple[str, list[str]]) -> None:
    assert split_steps(text) == expected


def test_join_and_tag() -> None:
    assert join_steps(["a\nb", "c"]) == "Step 1: a b Step 2: c"
    assert tag_steps(["a", "c"], "So:") == "So: Step 1: a ки Step 2: c ки"
    assert split_steps(join_steps(["a", "b c"], "p")) == ("p", ["a", "b c"])


def test_question_with_options() -> None:
    assert question_with_options("Which?", ["x", "y"]) == "Which? (A) x (B) y"
    assert question_with_options("Which?", []) == "Which?"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("the answer is (B).", "B"),
        ("The answer is appendicitis.", "A"),
        ("The answer is option D", "D"),
        ("The answer is **C**.", "C"),
        ("so it is **C**", "C"),
        ("Final Answer: B", "B"),
        ("Answer: (D) normal study", "D"),
        ("\\boxed{C}", "C"),
        ("$\\boxed{\\text{B}}$", "B"),
        ("The correct option is B.", "B"),
        ("Option C is the most likely.", "C"),
        ("the answer is (b).", "B"),
        ("Step 1: the answer is (A). Step 2: No, the answer is (D).", "D"),
        ("The answer is Crohn's disease.", "B"),
        ("D", "D"),
        ("The answer is therefore (C)", "C"),
        ("is not A", None),
        ("the answer is not A", None),
        ("The answer is a fracture.", None),
        ("The answer is (F).", None),
        ("appendicitis is common", None),
        ("Is option D right?", None),
        ("I cannot tell.", None),
        ("", None),
    ],
)
def test_extract_choice(text: str, letter: str | None) -> None:
    assert extract_answer(text, OPTIONS) == letter


@pytest.mark.parametrize(
    ("text", "kind", "answer"),
    [
        ("the answer is yes.", "yes_no", "yes"),
        ("Answer: No, there is none.", "yes_no", "no"),
        ("yes", "yes_no", "yes"),
        ("there is no effusion", "yes_no", None),
        ("The answer is left lung.", "open", "left lung"),
        ("Answer: the *heart*", "open", "the *heart"),
        ("unclear", "open", None),
    ],
)
def test_extract_other_kinds(text: str, kind: str, answer: str | None) -> None:
    assert extract_answer(text, [], kind) == answer


def test_is_correct() -> None:
    assert is_correct("B", "B", "choice") is True
    assert is_correct("A", "B", "choice") is False
    assert is_correct(None, "B", "choice") is None
    assert is_correct("The Left lung", "left lung.", "open") is True
    assert normalise("  Café, the  X-ray! ") == "cafe x ray"
