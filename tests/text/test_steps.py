import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmm_ray.text import (
    is_correct,
    join_steps,
    normalise,
    numbered_steps,
    question_with_options,
    solution_prefix,
    solution_text,
    split_steps,
    step_numbers,
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
        ("**Step 1**: Look.\n**Step 2**: Think.", ("", ["Look.", "Think."])),
        ("### Step 1\nLook.\n\n### Step 2\nThink.", ("", ["Look.", "Think."])),
        ("### **Step 1:** Look. ### **Step 2:** Think.", ("", ["Look.", "Think."])),
        ("**Step 1: The angle.** It is blunt.\n**Step 2: So.**", ("", ["The angle. It is blunt.", "So."])),
        ("Step 1 - Look.\nStep 2 – Think.", ("", ["Look.", "Think."])),
        ("- Step 1: Look.\n- Step 2: Think.", ("", ["Look.", "Think."])),
        ("1. Step 1: Look.\n2. Step 2: Think.", ("", ["Look.", "Think."])),
        ("Step 1/2: Look. Step 2/2: Think.", ("", ["Look.", "Think."])),
        ("Step #1: Look. Step #2: Think.", ("", ["Look.", "Think."])),
        ("Step 1 (angle): Look.\nStep 2 (sum): Think.", ("", ["(angle): Look.", "(sum): Think."])),
        ("step 1: look. step 2: think.", ("", ["look.", "think."])),
        ("STEP 1: Look.\nSTEP 2: Think.", ("", ["Look.", "Think."])),
        ("Step 1. Look. Step 2. Think.", ("", ["Look.", "Think."])),
        ("Step 1：Look。Step 2：Think.", ("", ["Look。", "Think."])),
        ("步骤1：左侧。步骤 2：所以。", ("", ["左侧。", "所以。"])),
        ("第1步：左侧。\n第2步：所以。", ("", ["左侧。", "所以。"])),
        ("Step 1: Look. ки Step 2: Think. ки", ("", ["Look. ки", "Think. ки"])),
        # steps of which the text speaks
        (
            "Step 1: GINA step 2. Step 2: Now step 3: ICS. Step 3: So.",
            ("", ["GINA step 2.", "Now step 3: ICS.", "So."]),
        ),
        ("Step 1: He sat USMLE Step 1. Step 2: So.", ("", ["He sat USMLE Step 1.", "So."])),
        ("Step 1: He sat USMLE Step 2: good. Step 2: So.", ("", ["He sat USMLE Step 2: good.", "So."])),
        (
            "Step 1: On the WHO ladder's Step 2: codeine. Step 2: So.",
            ("", ["On the WHO ladder's Step 2: codeine.", "So."]),
        ),
        ("Step 1: She is at Step 2: codeine. Step 2: So.", ("", ["She is at Step 2: codeine.", "So."])),
        ("He sat USMLE Step 1: good.", ("", ["He sat USMLE Step 1: good."])),
        ("Step 1: Up to\nstep 3: low-dose ICS.\nStep 2: So.", ("", ["Up to step 3: low-dose ICS.", "So."])),
        ("Step 1: Look.\nStep 3 of the ladder helps.\nStep 2: So.", ("", ["Look. Step 3 of the ladder helps.", "So."])),
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


WORDS = st.lists(
    st.sampled_from(["The angle is blunt.", "GINA step 3", "in step 2:", "USMLE Step 1", "(B)", "0.5 mg", "so"]),
    min_size=1,
).map(lambda words: " ".join([*words, "and fluid."]))
FORMS = [
    "Step {}: {}",
    "**Step {}:** {}",
    "**Step {}**: {}",
    "## Step {}: {}",
    "### Step {}\n{}",
    "### **Step {}:** {}",
    "Step {} - {}",
    "Step {}：{}",
    "步骤{}：{}",
    "Step {}. {}",
]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FORMS), st.lists(WORDS, min_size=1, max_size=9), st.sampled_from(["\n", "\n\n"]))
def test_steps_come_back_from_every_form_of_mark(form: str, steps: list[str], between: str) -> None:
    text = between.join(form.format(number, step) for number, step in enumerate(steps, 1))
    assert split_steps(text) == ("", steps)
    assert step_numbers(text) == list(range(1, len(steps) + 1))


def test_marks_are_found_in_time_that_is_linear_in_the_text() -> None:
    for part in (" \t", "# ", "**", "\n ", "Step 1 ", "- ", "step 1: ", "第"):
        assert len(split_steps(part * 50_000)[1]) <= 50_000  # quadratic, each would take minutes


def test_join_and_tag() -> None:
    assert tag_steps([" a  b", "c\td\n"]) == "Step 1:  a  b ки Step 2: c\td ки"
    assert tag_steps(["So. Step 1: a", "Step 2: b"]) == "So. Step 1: a ки Step 2: b ки"
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


def test_a_policys_solution_and_its_beginning() -> None:
    assert solution_text(["Look.", "So (A)."]) == "Step 1: Look.\nStep 2: So (A)."
    assert solution_prefix(["Look.", "So (A)."]) == "Step 1: Look.\nStep 2: So (A).\nStep 3:"
    assert (solution_text([]), solution_prefix([])) == ("", "Step 1:")
    assert numbered_steps(["a", "b"], first=9) == ["Step 9: a", "Step 10: b"]
