"""The answer extractor on the forms that models really write, on hostile ones, and on very long texts."""

import json

import pytest

from medmm_ray.text import answer_key, extract_answer, is_correct
from medmm_ray.text.markup import plain_text

OPTIONS = ["appendicitis", "Crohn's disease", "ovarian torsion", "normal study"]
MANY = [f"finding {i}" for i in range(1, 11)]
DOZEN = [f"finding {i}" for i in range(1, 13)]
ALPHABET = [f"finding {i}" for i in range(1, 27)]
BLOOD = ["A", "B", "AB", "O"]
PAIRS = ["a", "c", "bc", "ad"]
CODED = ["D cells", "E. coli", "A and B", "None of the above"]
AGREED = ["yes", "no", "maybe"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        # plain statements
        ("The answer is D.", "D"),
        ("The answer is C", "C"),
        ("  The answer is (A). ки", "A"),
        ("The answer is (C) ovarian torsion within the next week.", "C"),
        ("the answer would be stimulation.  The answer is B.", "B"),
        ("Based on this information, the answer to the question is A. appendicitis.", "A"),
        ("Therefore, the correct answer is C. ovarian torsion. This is because it is twisted.", "C"),
        ("Among the options provided, the correct answer is C. 6 gauge round shape.", "C"),
        ("the most appropriate answer would be C. 6 gauge. This is a common design.", "C"),
        ("so the best choice would be option A. Crohn's disease (option B) is reserved for later.", "A"),
        ("the most appropriate treatment would be progestin therapy (choice B).", "B"),
        ("Therefore, the most likely cause of the symptoms is ovarian torsion, which twists.", "C"),
        ("the most likely explanation for this patient's pain is torsion (Choice C).", "C"),
        ("The faulty statement regarding the bowel is statement A, which says so.", None),
        ("The correct answer among the options, as far as documents tell, is: (D)", "D"),
        ("Option B is the most likely answer, as it fits the trend.", "B"),
        ("Option B, noted above, is the best choice.", "B"),
        ("Option C (ovarian torsion) seems to be the most likely answer here.", "C"),
        ("option B, Crohn's disease, seems to be the most appropriate answer.", "B"),
        ("Step 4: Option C, seen on the scan, fits and is the most suitable choice", "C"),
        ("Option D is correct.", "D"),
        ("(B) is the best answer.", "B"),
        ("Thus C is the correct option", "C"),
        ("I would choose (D).", "D"),
        ("I'll go with option B.", "B"),
        ("Therefore, (B).", "B"),
        ("In conclusion: D.", "D"),
        ("The answer's B.", "B"),
        ("ANSWER: c", "C"),
        ("Answer - B", None),  # no verb, no colon: not a statement
        ("Final Answer - option D", "D"),
        ("Final Answer - B", "B"),
        ("Final answer – (B)", "B"),
        ("Final answer — B.", "B"),
        ("**Final Answer** - B", "B"),
        ("**Answer** - (b)", "B"),
        ("Answer - option C", "C"),
        ("Correct answer - C", "C"),
        ("The final answer - to be clear - is B.", "B"),
        ("Final answer - A fracture", None),
        ("Answer => B", "B"),
        ("Answer ⇒ C", "C"),
        ("Option (b) is the best answer.", "B"),
        ("option (b) is correct", "B"),
        ("Option b is correct.", "B"),
        ("Option **(b)** is the best answer.", "B"),
        ("**b)** is the correct answer", "B"),
        ("(b) is the best answer.", "B"),
        ("[b] is correct", "B"),
        ("choice (c) is right", "C"),
        ('Option "B" is correct', "B"),
        ("Option 'b' is correct.", "B"),
        ("Option [B] is correct.", "B"),
        ("Option B must be the answer.", "B"),
        ("Option B would be the right choice.", "B"),
        ("Option B fits best.", "B"),
        ("Option B best explains the findings.", "B"),
        ("B is my final answer.", "B"),
        ("I'd go for B.", "B"),
        ("So, option (b).", "B"),
        ("The answer corresponds to option B.", "B"),
        ("This matches choice (c).", "C"),
        ("which points to option B", "B"),
        ("All of this makes option B the correct answer.", "B"),
        ("It twists, making (C) the best answer.", "C"),
        ("Therefore, option A is incorrect.", None),
        ("Option a patient may know is given.", None),
        ("A patient (b) is seen. It is best to wait.", None),
        ("Option C is the choice of many.", None),
        ("Answer C", "C"),
        ("Ans: B", "B"),
        ("Ans. (C)", "C"),
        ("Answer = C", "C"),
        ("Choice: D", "D"),
        ("Selected option: D", "D"),
        ("It is option D.", "D"),
        ("I think it's D.", "D"),
        ("Hence D is the answer.", "D"),
        ("The correct choice is letter B", "B"),
        ("The answer, then, is most likely B.", "B"),
        ("The answer is B – Crohn's disease", "B"),
        ("The answer is A, appendicitis.", "A"),
        ("The answer is A and not B.", "A"),
        ("The answer is B rather than A.", "B"),
        ("Answer: B\nExplanation: A is wrong since it skips.", "B"),
        ("The patient has type A blood. The answer is C", "C"),
        ("#### B", "B"),
        ("Answer (B)", "B"),
        ("Answer:\n\n(B)", "B"),
        ("The answer is b) Crohn's disease", "B"),
        ("The answer is: **(D) normal study**", "D"),
        # markdown, boxes, tags, JSON
        ("**Final Answer:** C", "C"),
        ("**Final Answer: C**", "C"),
        ("### Final Answer\n\n**D**", "D"),
        ("### Answer: B. Crohn's disease", "B"),
        ("The answer is **B. Crohn's disease**.", "B"),
        ("The answer is `C`.", "C"),
        ("The answer is *C*", "C"),
        ("the correct option is __B__", "B"),
        (r"$\boxed{\text{B}}$", "B"),
        (r"\[ \boxed{\textbf{(C)}} \]", "C"),
        (r"The final answer is: $\boxed{D}$. I hope it is correct.", "D"),
        (r"\boxed{\text{Crohn's disease}}", "B"),
        (r"\boxed{A}\nWait: \boxed{D}", "D"),
        ("<answer>B</answer>", "B"),
        ("<think>The answer is A?</think><answer> (C) </answer>", "C"),
        ("[[C]]", "C"),
        ("My final answer is: [[B]]", "B"),
        ('{"step_by_step_thinking": "The answer is B.", "answer_choice": "C"}', "C"),
        ('{"step_by_step_thinking": "It twists." "answer_choice": "C"}', "C"),  # the comma was forgotten
        ('{"step_by_step_thinking": ""Grape" shaped", "answer_choice": "A"}', "A"),  # quotes in quotes
        ('{"step_by_step_thinking": "...", "answer_choice": "B. Crohn\'s disease"}', "B"),
        ('{"step_by_step_thinking": "...", "answer_choice": "Ovarian torsion"}', "C"),
        ('```json\n{"answer": "D"}\n```', "D"),
        ("{'answer': 'B'}", "B"),
        ('{"answer": {"letter": "C"}}', "C"),
        ('{"answer_idx": "B"}', "B"),
        ('{"choice": 2}', None),
        ('{"answer_choice": ["B"]}', "B"),
        ('{"answer_choice": "Option D"}', "D"),
        ('{"answer_choice": "The answer is C."}', "C"),
        ('{"step_by_step_thinking": "the answer is B", "answer_choice": ""}', "B"),
        ('{"step_by_step_thinking": "the answer is B", "answer_choice": "Unknown"}', None),
        ('{"step_by_step_thinking": "the answer is B", "answer_choice": "None of the above"}', None),
        ('{"step_by_step_thinking": "the answer is B", "answer_choice": "None of the above (E)"}', None),
        ('{"step_by_step_thinking": "...", "answer_choice": "E"}', None),
        ('{"step_by_step_thinking": "...", "answer_choice": "A/B"}', None),
        ('{"step_by_step_thinking": "...", "answer_choice": "A/B/C/D"}', None),
        ('{"step_by_step_thinking": "...", "answer_choice": "A and C"}', None),
        ('{"step_by_step_thinking": "...", "answer_choice": "N/A"}', None),
        ('{"step_by_step_thinking": "...", "answer_choice": "Cannot be determined"}', None),
        ('{"step_by_step_thinking": "...", "answer_choice": "Not listed among the choices"}', None),
        ('{"step_by_step_thinking": "...", "answer_choice": "156"}', None),
        ('{"error": {"code": "content_filter", "param": "prompt"}}', None),
        # other alphabets' punctuation
        ("The answer is：（Ｂ）。", "B"),
        ("The answer is 【C】", "C"),
        ("The answer is „D“.", "D"),
        ("The answer is “B”.", "B"),
        ("The answer is Crohn’s disease.", "B"),
        # the option's text in place of its letter
        ("The answer is appendicitis.", "A"),
        ("The answer is the ovarian torsion.", "C"),
        ("the answer is Crohn's disease, because it skips.", "B"),
        ("Final answer: Normal study", "D"),
        ("appendicitis", "A"),
        ("D. normal study", "D"),
        ("D normal study", None),
        ("The answer is D normal study", "D"),
        ("It hurts.\n\nB. Crohn's disease", "B"),
        ("(A) appendicitis\n(B) Crohn's disease", None),  # a list of options
        ("Options:\nA. appendicitis\nB. Crohn's disease\nC. ovarian torsion\nD. normal study", None),
        ("The answer is acute appendicitis.", None),
        ("The answer is appendicitis or torsion.", None),
        ("appendicitis is common", None),
        # bare letters
        ("D", "D"),
        (" (d) ", "D"),
        ("B.", "B"),
        ("**B**", "B"),
        ("Step 1: It twists.\nStep 2: So it must.\nC", "C"),
        # several statements, corrections, negations
        ("Step 1: the answer is (A). Step 2: No, the answer is (D).", "D"),
        ("The answer is not A but B.", "B"),
        ("The answer is not A, it is rather C.", "C"),
        ("The answer is not (A) because the answer is (D).", "D"),
        ("The answer is B. The answer is not A.", "B"),
        ("The answer is A. Wait, the answer is not A.", None),
        ("The answer is not A. On reflection, the answer is A.", "A"),
        ("the answer is not A", None),
        ("is not A", None),
        ("The answer isn't B.", None),
        ("The answer is neither A nor B.", None),
        ("The answer is A or B.", None),
        ("The answer is B. No: the answer is A or C.", None),
        ("The answer is either (A) or (D)", None),
        ("Option A is incorrect.", None),
        ("Option A is not correct. Option B is not the best choice.", None),
        ("Option A is incorrect, so the answer is C.", "C"),
        ("The answer is C. Option A is the most tempting.", "C"),
        ("The answer cannot be determined.", None),
        ("The answer is none of the above.", None),
        ("None of the options A, B, C, or D are components.", None),
        ("The answer is anything but (B).", None),
        ("The answer is unlikely to be (B).", None),
        ("The answer is no longer B.", None),
        ("Neither option A nor option B is correct.", None),
        ("Option B is never the best choice.", None),
        ("The answer is B unless she is pregnant.", "B"),
        # another condition, or another's view
        ("The answer is B. If the patient were pregnant, the answer would be C.", "B"),
        ("The answer is B. If she were pregnant, the answer is C.", "B"),
        ("The answer is B. The answer would be C if the patient were pregnant.", "B"),
        ("The answer is B. Had she been pregnant, the answer would have been C.", "B"),
        ("The answer is B. Were the patient pregnant, the answer would be C.", "B"),
        ("The answer is B. In a pregnant patient, the answer would be C.", "B"),
        ("The answer is B. Without fever, the answer would be C.", "B"),
        ("The answer is B; otherwise the answer would be C.", "B"),
        ("The answer is B. With fever the answer might be C if the finding is appendicitis.", "B"),
        ("The answer is B. Some might say the answer is C.", "B"),
        ("The answer is B. One might think that the correct answer is C, but it is not.", "B"),
        ("If the patient were pregnant, the answer would be C. The answer is B.", "B"),
        ("If she were pregnant, the answer would be C. As she is not, option B is correct.", "B"),
        ("Option B is correct. Option A would be correct if the patient were pregnant.", "B"),
        ("Option B is correct. If she were pregnant, option A would be correct.", "B"),
        ("If she has fever, the answer is C; since she has none, the answer is B.", "B"),
        ("Given that she is pregnant, the answer would be C.", "C"),  # the case itself
        ("If we look at all options, the best answer would be C.", "C"),  # nothing else is stated
        ("The answer would be B, because C would need fever.", "B"),
        ("The answer is A. On reflection, the answer would be B.", "B"),
        # what only looks like a statement
        ("The answer is a fracture.", None),
        ("The answer is A fracture of the rib", None),
        ("The answer is D-dimer.", None),
        ("The answer is B cells.", None),
        ("The answer is B12.", None),
        ("The answer is A's colour.", None),
        ("Is the answer B?", None),
        ("Is option D right?", None),
        ("If the answer is B, there would be pain.", None),
        ("Vitamin D is the most likely cause", None),
        ("A. appendicitis: This statement is true.", None),
        ("The answer is (F).", None),
        ("The answer choices are: A. appendicitis B. torsion", None),
        ("I cannot tell.", None),
        ("", None),
        ("\n \t", None),
    ],
)
def test_real_forms_of_a_choice(text: str, letter: str | None) -> None:
    assert extract_answer(text, OPTIONS) == letter


@pytest.mark.parametrize(
    ("text", "options", "letter"),
    [
        ("The answer is (J).", MANY, "J"),
        ("**Answer: G**", MANY, "G"),
        ("The answer is finding 10", MANY, "J"),
        ("The answer is finding 1.", MANY, "A"),
        ("The answer is H, I think.", MANY, "H"),
        ("I cannot say.", MANY, None),
        ("The answer is (K).", MANY, None),
        ("Answer K", DOZEN, "K"),
        ("Answer (L)", DOZEN, "L"),
        ("Option L is correct.", DOZEN, "L"),
        ("(K) is the best answer.", DOZEN, "K"),
        ("Hence K is the answer.", DOZEN, "K"),
        ("Thus L is the correct option", DOZEN, "L"),
        ("Therefore, (K).", DOZEN, "K"),
        ("Therefore, K.", DOZEN, "K"),
        ("I think it's L.", DOZEN, "L"),
        ("The answer is not A but K.", DOZEN, "K"),
        ("Option A is incorrect, so the answer is L.", DOZEN, "L"),
        ("Therefore I would choose option K.", DOZEN, "K"),
        ("Therefore I am sure. Option L is the best choice.", DOZEN, "L"),
        ("Option Z is the right one.", ALPHABET, "Z"),
        ("Therefore, (M).", DOZEN, None),
        ("Option M is correct.", DOZEN, None),
        ("Answer M", DOZEN, None),
        ("Answer K", MANY, None),
        ("In my answer I explain why.", ALPHABET, None),
        ("Which answer I would choose is not clear.", ALPHABET, None),
        ("Vitamin K is the most likely cause", ALPHABET, None),
        ("So K is low.", ALPHABET, None),
        ("Thus T waves are flat.", ALPHABET, None),
        ("It is S. aureus.", ALPHABET, None),
        ("Therefore, S. aureus is the cause.", ALPHABET, None),
        ("The answer is T cells.", ALPHABET, None),
        ("The answer is B.", BLOOD, "B"),
        ("The answer is AB.", BLOOD, "C"),
        ("the answer is C. bc.", PAIRS, "C"),
        ("The answer is E. coli.", CODED, "B"),
        ("The answer is D cells.", CODED, "A"),
        ("The answer is A and B.", CODED, "C"),
        ("The answer is None of the above", CODED, "D"),
        ("The answer is A.", CODED, "A"),
        ("the answer is yes.", AGREED, "A"),
        ("The answer is C. maybe, as calibration can contribute.", AGREED, "C"),
        ("The answer is no", AGREED, "B"),
        ("The answer is > 5 mg", ["< 5 mg", "> 5 mg"], "B"),
        ("The answer is 5 mg", ["< 5 mg", "> 5 mg"], None),
        ("The answer is the same.", ["same", "Same!"], None),  # two options with one text
    ],
)
def test_options_that_mislead(text: str, options: list[str], letter: str | None) -> None:
    assert extract_answer(text, options) == letter


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("the answer is yes.", "yes"),
        ("Answer: No, there is none.", "no"),
        ("**Answer:** Yes", "yes"),
        ("The statement is true. The answer is False.", "no"),
        ("yes", "yes"),
        ("No.", "no"),
        ("Yes, there is an effusion on the left.", "yes"),
        ("Step 1: There is no air.\nStep 2: So it is clear.\nNo", "no"),
        ("The answer is yes. No: the answer is no.", "no"),
        (r"\boxed{\text{yes}}", "yes"),
        ('{"answer": "no"}', "no"),
        ("the answer is not yes", None),
        ("The answer is unknown.", None),
        ("there is no effusion", None),
        ("The answer is left lung.", None),
        ("", None),
    ],
)
def test_yes_and_no(text: str, answer: str | None) -> None:
    assert extract_answer(text, [], "yes_no") == answer


def test_a_letter_may_stand_for_yes_or_no() -> None:
    assert extract_answer("The answer is (B).", ["yes", "no"], "yes_no") == "no"
    assert extract_answer("The answer is (C).", ["yes", "no", "maybe"], "yes_no") is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is left lung.", "left lung"),
        ("Answer: the *heart*", "the heart"),
        ("The answer is 0.6.", "0.6"),
        ("The answer is 3.0 g/day. That is the dose.", "3.0 g/day"),
        ("The answer is high because it says so.", "high"),
        ("**Answer:** right upper lobe\n\nI hope this helps.", "right upper lobe"),
        (r"Therefore \boxed{25\text{ mg}}", "25 mg"),
        ('{"answer": "Crohn\'s disease"}', "Crohn's disease"),
        ("The most likely diagnosis is a pneumothorax.", "a pneumothorax"),
        ("The answer is A. The answer is E. coli.", "E. coli"),
        ("The answer is none.", "none"),
        ("The answer is unknown.", None),
        ("unclear", None),
        ("", None),
    ],
)
def test_open_answers(text: str, answer: str | None) -> None:
    assert extract_answer(text, [], "open") == answer
    assert extract_answer(text, []) == answer  # a choice without options is an open question


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("The Left lung", "left lung.", True),
        ("lungs", "lung", True),
        ("carotid arteries", "Carotid artery", True),
        ("diagnosis", "diagnosi", False),
        ("25mg", "25 milligrams", True),
        ("25 mg/kg", "25 mg per kg", True),
        ("3.0 g/day", "3 g/day", True),
        ("1,000 ml", "1000 cc", True),
        ("1,5", "15", False),
        ("two", "2", True),
        ("50 percent", "50%", True),
        (".5", "0.50", True),
        ("-3", "3", False),
        ("< 5", "> 5", False),
        ("10 µg", "10 mcg", True),
        ("X-ray", "x ray", True),
        ("Crohn's disease", "Crohns disease", True),
        ("ischémie", "ischemie", True),
        ("hepatitis A", "hepatitis", False),
        ("True", "yes", True),
        ("negative", "no", True),
        ("negative pressure", "no pressure", False),
        ("right lung", "lung", False),
        ("胸", "胸", True),
        ("胸", "肺", False),
        ("?", "!", False),
    ],
)
def test_open_answers_are_compared_by_their_normal_form(answer: str, gold: str, same: bool) -> None:
    assert is_correct(answer, gold, "open") is same


def test_a_key_of_an_answer() -> None:
    assert answer_key("The 3.50 Milligrams of an oral dose!") == "3.5 mg of oral dose"


def test_markup_is_taken_off() -> None:
    assert plain_text("**Bold**, `code`, ## no heading\n## Heading") == "Bold, code, ## no heading\nHeading"
    assert plain_text(r"\(x\) and $y$ and \textbf{z}") == "x and y and z"
    assert plain_text("a < b and c > d") == "a < b and c > d"


FRAGMENTS = (
    "answer ", "the answer is A or ", "answer: ", r"\boxed{", r"\boxed{{", r"\text{", "<answer>", "<", "**", "_A_",
    "((A", "A/", "not A but ", "most likely ", "option A is ", '"answer": "', '"answer": "\\', "if the ", "\n", " ",
    "# ", "1,000", "'answer is ", "correct is ", "`", "é", "-", "Step 1", "so K ", "it is S. ", "so (K",
    "if the answer would be ", "the answer would be C if ", "if had were ", "some might say the answer is C ",
    "final answer - ", "option (b is best ", "makes option ", "option A would be the best ", "nor option B is right ",
)  # fmt: skip


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_very_long_hostile_texts_are_read_to_their_end(fragment: str) -> None:
    """A pattern that backtracks would not come back from 100,000 characters of these within the time limit."""
    text = (fragment * 100_000)[:100_000] + "\nThe answer is not A. The answer is (C).\n"
    assert extract_answer(text.replace(r"\boxed{", "").replace('"answer": "', "x"), OPTIONS) == "C"
    extract_answer(text, OPTIONS)
    extract_answer(text, ALPHABET)
    assert extract_answer(text.replace('"answer":', "x") + "The answer is no.", [], "yes_no") == "no"


def test_an_answer_far_into_a_very_long_solution() -> None:
    words = "the film shows a shadow " * 25_000
    assert extract_answer(f"{words} The answer is (B).", OPTIONS) == "B"
    assert extract_answer(f"The answer is (B). {words}", OPTIONS) == "B"
    assert extract_answer(json.dumps({"thinking": words, "answer_choice": "D"}), OPTIONS) == "D"
