"""Data sets that bring solutions and labels (Med-PRM, MedS3), and MedXpertQA."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from medmm_ray.config import ConfigError
from medmm_ray.data.records import StepLabel
from medmm_ray.data.source_files import stream_json
from medmm_ray.data.sources import SourceRequest, load_solved, med_prm, medmm, meds3, medxpertqa
from medmm_ray.data.sources.medxpertqa import bracketed
from medmm_ray.data.tables import TableError
from medmm_ray.text import tag_steps
from tests.paths import REAL_DATA

REAL = REAL_DATA


def write(path: Path, rows: Any) -> SourceRequest:
    path.write_text(json.dumps(rows))
    return SourceRequest(path=str(path.parent))


def published(**changes: Any) -> dict[str, Any]:
    """A question as Med-PRM's authors publish it."""
    return {
        "question_id": 7, "data_source": "med_qa", "question": "Which? ", "options": ["one", "two"],
        "correct_answer": "B", "related_docs": ["A guideline.", "Another."],
        "solutions": [{
            "solution": "So.\nStep 1: Look.\n\nStep 2: Think.", "answer": "B", "score": 1,
            "prm_processed_solution": "So. Step 1: Look. ки Step 2: Think. ки", "orm_label": 1,
            "prm_hard_label": [1, 0], "prm_soft_label": [0.125, 0.0], "prm_gemini_label": [1, 1],
            "prm_llama_label": [0, 1],
        }], **changes,
    }  # fmt: skip


def flat(**changes: Any) -> dict[str, Any]:
    """One solution as it was passed on for review."""
    return {
        "question_id": 7, "question": "Which?", "options": "  A. one\n  B. two", "correct_answer": "B",
        "model_answer": "A", "is_correct": False, "full_solution": "Step 1: Look. ки Step 2: Think. ки", "orm_label": 0,
        "prm_hard_label": [1, 0], "prm_soft_label": [0.5, 0.0], "prm_gemini_label": [1, 0, 1], **changes,
    }  # fmt: skip


def test_med_prm_as_published(tmp_path: Path) -> None:
    request = write(tmp_path / "train.json", [published()])
    (question,) = med_prm.read(request).questions
    assert (question.split, question.question, list(question.options), question.answer, question.answer_type) == (
        "train", "Which?", ["one", "two"], "B", "choice",
    )  # fmt: skip
    assert question.dataset == "medqa"
    assert [d.text for d in med_prm.read(request).documents] == ["A guideline.", "Another."]
    (found,) = med_prm.solved(request)
    (solution,) = found.solutions
    assert list(found.documents) == ["A guideline.", "Another."]
    assert (solution.text, solution.steps, solution.answer, solution.correct) == (
        "So.\nStep 1: Look.\n\nStep 2: Think.", ["So. Step 1: Look.", "Step 2: Think."], "B", True,
    )  # fmt: skip
    assert {(row.source, row.annotator): row.steps for row in solution.labels} == {
        ("judge", "unjudged"): [StepLabel(label=1), StepLabel(label=1)],
        ("judge_llama", "llama"): [StepLabel(label=0), StepLabel(label=1)],
        ("monte_carlo", "med_prm"): [StepLabel(label=1, value=0.125), StepLabel(label=0, value=0.0)],
    }


@pytest.mark.parametrize(
    ("processed", "steps"),
    [
        ("Step 1:  Look.\tTwice. ки Step 2: Think.  So. ки", [" Look.\tTwice.", "Think.  So."]),
        ("Step 1: Look. ки Step 3: Think. ки", ["Step 1: Look.", "Step 3: Think."]),
        ("So. Step 1: Look. ки", ["So. Step 1: Look."]),
        ("Step 1: Step 1: Look. ки", ["Step 1: Step 1: Look."]),
    ],
)
def test_a_processed_solution_is_kept_byte_for_byte(tmp_path: Path, processed: str, steps: list[str]) -> None:
    (found,) = med_prm.solved(write(tmp_path / "train.json", [flat(full_solution=processed)]))
    assert found.solutions[0].steps == steps
    assert tag_steps(steps) == processed


def test_med_prm_flattened_and_labels_that_do_not_fit(tmp_path: Path) -> None:
    request = write(tmp_path / "samples.json", [flat(), flat(prm_gemini_label=[1, 2]), flat(prm_gemini_label=[])])
    solutions = [s for found in med_prm.solved(request) for s in found.solutions]
    assert [(s.text, s.steps, s.answer, s.correct) for s in solutions] == [
        ("Step 1: Look. Step 2: Think.", ["Look.", "Think."], "A", False)
    ] * 3
    assert [s.labels[0].error for s in solutions] == [
        "label_count: prm_gemini_label has 3 labels for 2 steps: [1, 0, 1]",
        "label_value: prm_gemini_label must hold 0 and 1, or fractions between: [1, 2]",
        "label_count: prm_gemini_label has 0 labels for 2 steps: []",
    ]
    assert {(s.labels[0].annotator, s.labels[0].saw_answer) for s in solutions} == {("gemini", True)}
    assert all(s.labels[0].steps == () and s.labels[1].error is None for s in solutions)
    assert [list(q.options) for q in med_prm.read(request).questions] == [["one", "two"]] * 3


def test_med_prms_test_file_has_scores_but_no_labels(tmp_path: Path) -> None:
    plain = {"solution": "Step 1: Look.\nStep 2: Think.", "answer": "", "score": 0}
    write(tmp_path / "train.json", [published(), published()])
    request = write(tmp_path / "reward-test-set.json", [published(solutions=[plain], related_docs=[])])
    assert [q.split for q in med_prm.read(request).questions] == ["test", "train", "train"]
    first = next(med_prm.solved(request)).solutions[0]
    assert (first.steps, first.answer, first.correct, list(first.labels)) == (["Look.", "Think."], None, None, [])
    limited = SourceRequest(path=request.path, num_train=1, num_test=0)
    assert [q.name for q in med_prm.read(limited).questions] == ["train.json-0"]
    assert len(list(med_prm.solved(limited))) == 1


def test_faults_name_file_and_field(tmp_path: Path) -> None:
    bad = published()
    del bad["options"]
    with pytest.raises(TableError, match=r"train\.json entry 1: the field 'options' is missing"):
        med_prm.read(write(tmp_path / "train.json", [published(), bad]))
    (tmp_path / "train.json").write_text('[{"question_id": 1,')
    with pytest.raises(ConfigError, match=r"train\.json is not a valid JSON list"):
        med_prm.read(SourceRequest(path=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"has no \*\.json file"):
        med_prm.read(SourceRequest(path=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="source 'vqa_rad' brings no solutions; those that do: med_prm, medmm, meds3"):
        load_solved("vqa_rad")
    assert load_solved("med_prm").solved is med_prm.solved


def test_med_prms_options_come_in_the_order_of_their_letters(tmp_path: Path) -> None:
    rows = [
        published(options={"B": "two", "A": "one"}),
        published(options="B. two"),
        published(related_docs="One. Two."),
    ]
    with pytest.raises(TableError, match=r"entry 1: options must be .* by their letters from A on; it has \['B'\]"):
        med_prm.read(write(tmp_path / "train.json", rows))
    request = write(tmp_path / "train.json", [rows[0], rows[2]])
    assert [list(q.options) for q in med_prm.read(request).questions] == [["one", "two"]] * 2
    assert [d.text for d in med_prm.read(request).documents] == ["A guideline.", "Another.", "One. Two."]
    assert [list(found.documents) for found in med_prm.solved(request)] == [["A guideline.", "Another."], ["One. Two."]]


@pytest.mark.parametrize(("said", "right"), [(0, False), ("0", False), (False, False), (1, True), ("1", True)])
def test_what_a_file_says_of_an_answer_is_read_exactly(tmp_path: Path, said: Any, right: bool) -> None:
    (found,) = med_prm.solved(write(tmp_path / "train.json", [flat(orm_label=said)]))
    assert found.solutions[0].correct is right
    (found,) = medmm.solved(write(tmp_path / "train.json", [entry(score=said)]))
    assert found.solutions[0].correct is right


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"question": None}, "question must be text, not null"),
        ({"correct_answer": None}, "correct_answer must be text, not null"),
        ({"options": None}, "options must be a list, not null"),
        ({"options": ["one", None]}, "options[1] must be text, not null"),
        ({"solutions": None}, "solutions must be a list, not null"),
        ({"solutions": ["x"]}, "solutions[0] must be an object, not 'x'"),
        ({"solutions": [{"answer": 5}]}, "solutions[0].answer must be text, not 5"),
        ({"solutions": [{"score": "false"}]}, "solutions[0].score must be 0 or 1, true or false, not 'false'"),
        ({"related_docs": [{"text": "A."}]}, "related_docs[0] must be text, not a dict"),
    ],
)
def test_a_broken_entry_of_med_prm_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TableError) as fault:
        med_prm.read(write(tmp_path / "train.json", [published(), published(**changes)]))
    assert str(fault.value) == f"{tmp_path}/train.json entry 1: {words}"


@pytest.mark.parametrize("labels", ["10", 1, [1, None], ["1", "0"]])
def test_labels_of_another_type_are_an_error_of_their_row(tmp_path: Path, labels: Any) -> None:
    (found,) = med_prm.solved(write(tmp_path / "train.json", [flat(prm_gemini_label=labels)]))
    judged, rolled = found.solutions[0].labels
    assert judged.error == f"label_value: prm_gemini_label must be a list of numbers from 0 to 1, not {labels!r}"
    assert rolled.error is None


@pytest.mark.parametrize("content", ["[]", '{"data": [{"question": "Which?"}]}', '{"question": "Which?"}\n'])
@pytest.mark.parametrize("source", [med_prm, medmm, meds3])
def test_a_file_from_which_nothing_is_read_is_a_fault(tmp_path: Path, source: Any, content: str) -> None:
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(ConfigError, match=r"train\.json has no entry: expected one JSON list of objects"):
        source.read(SourceRequest(path=str(tmp_path)))


def entry(**changes: Any) -> dict[str, Any]:
    """A question in our published JSON with one solution, which `changes`."""
    solution = {
        "solution": "Step 1: Look. Step 2: Think.", "prm_processed_solution": "Step 1: Look. ки Step 2: Think. ки",
        "answer": "B", "score": 1, "gemini_labels": [1, 0], "gemini_confidence": ["high", None],
        "monte_carlo_labels": None, "expert_review": {"reviewed": False, "expert_label": None, "feedback": None},
    }  # fmt: skip
    return {
        "question_id": "q1", "data_source": "own", "modality": "radiology", "difficulty": "easy", "question": "Which?",
        "options": ["one", "two"], "correct_answer": "B", "solutions": [{**solution, **changes}],
    }  # fmt: skip


def test_a_file_of_our_json_is_named_by_its_split(tmp_path: Path) -> None:
    assert [q.split for q in medmm.read(write(tmp_path / "validation.json", [entry()])).questions] == ["validation"]
    with pytest.raises(ConfigError, match=r"dev\.json: .* one of train\.json, validation\.json, test\.json"):
        medmm.read(write(tmp_path / "dev.json", [entry()]))


@pytest.mark.parametrize(
    ("processed", "steps"),
    [
        ("Step 1: Look. ки Step 2: Think. ки", ["Look.", "Think."]),
        ("Step 1: Look. ки\nStep 2:  Think. ки\n", ["Look.", " Think."]),
        ("So. Step 1: Look. ки Step 2: Think. ки", ["So. Step 1: Look.", "Step 2: Think."]),
        ("", []),
        ("1. Look. ки 2. Think. ки", None),
        ("Look and think.", None),
        ("Step 1: Look. ки Step 3: Think. ки", None),
        ("Step 1: Look. Step 2: Think.", None),
    ],
)
def test_steps_of_our_json_are_read_whole_or_refused(tmp_path: Path, processed: str, steps: list[str] | None) -> None:
    request = write(tmp_path / "train.json", [entry(prm_processed_solution=processed)])
    if steps is None:
        with pytest.raises(TableError, match=r"entry 0: solutions\[0\]\.prm_processed_solution must be 'Step 1: "):
            medmm.read(request)
    else:
        (found,) = medmm.solved(request)
        assert found.solutions[0].steps == steps


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"gemini_labels": [7, 1]}, "label_value: each label of judge must be one of 1, 0 and null: [7, 1]"),
        ({"gemini_labels": "11"}, "label_value: each label of judge must be one of 1, 0 and null: '11'"),
        ({"gemini_confidence": ["very", None]},
         "label_value: each confidence of judge must be one of high, medium, low and null: ['very', None]"),
        ({"gemini_labels": [1]}, "label_count: judge has other than 2 entries for 2 steps: [1]"),
    ],
)  # fmt: skip
def test_labels_of_our_json_are_checked(tmp_path: Path, changes: dict[str, Any], error: str) -> None:
    (found,) = medmm.solved(write(tmp_path / "train.json", [entry(**changes)]))
    assert [(row.source, row.steps, row.error) for row in found.solutions[0].labels] == [("judge", (), error)]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (entry(expert_review=None), "solutions[0].expert_review must be an object, not null"),
        ({**entry(), "question_id": 5}, "question_id must be text, not 5"),
        ({**entry(), "related_images": [{"image_path": "a.png"}]},
         "the field 'related_images[0].diagnosis' is missing; it has ['image_path']"),
        ({**entry(), "solutions": [{"solution": "x"}]},
         "the field 'solutions[0].prm_processed_solution' is missing; it has ['solution']"),
    ],
)  # fmt: skip
def test_a_broken_entry_of_our_json_is_named(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(TableError) as fault:
        medmm.read(write(tmp_path / "train.json", [row]))
    assert str(fault.value) == f"{tmp_path}/train.json entry 0: {words}"


TREE = {
    "id": 1, "question": "Which?\nA. one\nB. two", "answer": "The answer is B.", "original_dataset": "MedQA",
    "pos": [[[["Step 0: Look.", 0.5, 0.25], ["Step 1: So. The answer is B.", 1.0, 1.0]], 1.0, 1.0]],
    "neg": [
        [["Look away.", 0.1, 0.2], ["The answer is A.", 0, 0], 0.0, 0.0],
        [{"step": "Guess. The answer is (A).", "value": 0.0, "rollout_value": 0.05}],
        [[["Guess.", 1.5, 0.0]], 0.0, 0.0],
    ],
}  # fmt: skip


def test_meds3s_trajectories_in_every_published_form(tmp_path: Path) -> None:
    request = write(tmp_path / "trees.json", [TREE])
    (question,) = meds3.read(request).questions
    assert (question.question, list(question.options), question.answer, question.split) == (
        "Which?", ["one", "two"], "B", "train",
    )  # fmt: skip
    (found,) = meds3.solved(request)
    assert [(s.steps, s.answer, s.correct) for s in found.solutions] == [
        (["Look.", "So. The answer is B."], "B", True),
        (["Look away.", "The answer is A."], "A", False),
        (["Guess. The answer is (A)."], "A", False),
        (["Guess."], None, False),
    ]
    rows = [[(row.source, [step.value for step in row.steps]) for row in s.labels] for s in found.solutions]
    assert rows[0] == [("tree_search", [0.5, 1.0]), ("monte_carlo", [0.25, 1.0])]
    assert rows[1] == [("tree_search", [0.1, 0]), ("monte_carlo", [0.2, 0])]
    assert rows[2] == [("tree_search", [0.0]), ("monte_carlo", [0.05])]
    assert str(found.solutions[3].labels[0].error).startswith("label_value: values of tree_search must lie between")


NODE = "must be a node [step, value, rollout value], or an object of these names, not"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pos": [[["Look."]]]}, f"pos[0][0] {NODE} a list"),
        ({"neg": [[[]]]}, f"neg[0][0] {NODE} a list"),
        ({"pos": [["Look.", "Think."]]}, f"pos[0][0] {NODE} 'Look.'"),
        ({"pos": [[{"value": 1}]]}, "the field 'pos[0][0].step' is missing; it has ['value']"),
        ({"pos": ["Look."]}, "pos[0] must be a list, not 'Look.'"),
        ({"pos": [[]]}, "pos[0] must be a list of nodes [step, value, rollout value], not a list"),
        ({"pos": 5}, "pos must be a list, not 5"),
        (
            {"conversations": [], "eval": {"answer": "A"}},
            "conversations must be a list with something in it, not a list",
        ),
        ({"conversations": [{"value": "Which?"}], "eval": "A"}, "eval must be an object, not 'A'"),
    ],
)
def test_a_broken_entry_of_meds3_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TableError) as fault:
        meds3.read(write(tmp_path / "trees.json", [TREE, {**TREE, **changes}]))
    assert str(fault.value) == f"{tmp_path}/trees.json entry 1: {words}"


def test_a_nodes_value_as_text_is_an_error_of_its_row(tmp_path: Path) -> None:
    (found,) = meds3.solved(write(tmp_path / "trees.json", [{**TREE, "pos": [[["Look.", "0.5", 1]]], "neg": []}]))
    assert [(row.source, row.error) for row in found.solutions[0].labels] == [
        ("tree_search", "label_value: values of tree_search must lie between 0 and 1: ['0.5']"),
        ("monte_carlo", None),
    ]


def test_meds3s_evaluation_files(tmp_path: Path) -> None:
    def asked(text: str, answer: str) -> dict[str, Any]:
        return {"id": 0, "conversations": [{"from": "human", "value": text}], "eval": {"answer": answer}}

    request = write(
        tmp_path / "sets.json",
        [
            asked("Which?\n\nA. one\nB. two,\nor more\nC. three", "C"),
            asked("Choose.\nA. not this\nNow:\nA. yes\nB. no", "A"),
            asked("Extract the dose.\nSentence: 5 mg of A. b.", "5 mg"),
        ],
    )
    assert [(q.question, list(q.options), q.answer, q.answer_type) for q in meds3.read(request).questions] == [
        ("Which?", ["one", "two, or more", "three"], "C", "choice"),
        ("Choose.\nA. not this\nNow:", ["yes", "no"], "A", "choice"),
        ("Extract the dose.\nSentence: 5 mg of A. b.", [], "5 mg", "open"),
    ]
    assert [list(found.solutions) for found in meds3.solved(request)] == [[], [], []]
    assert [(q.dataset, q.topic) for q in meds3.read(request).questions] == [("sets", "")] * 3


def test_medxpertqa(tmp_path: Path) -> None:
    rows = [
        {"question": "Which?\nAnswer Choices: (A) one (B) group (A) two", "label": ["B"]},
        {"question": "Seen?\nAnswer Choices: (A) x (B) y", "label": ["A"], "images": [{"image_path": "a.jpeg"}],
         "options": [{"letter": "A", "content": "x"}, {"letter": "B", "content": "y"}]},
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = medxpertqa.read(SourceRequest(path=str(tmp_path)))
    assert [(q.question, list(q.options), q.answer, list(q.images)) for q in data.questions] == [
        ("Which?", ["one", "group (A) two"], "B", []),
        ("Seen?", ["x", "y"], "A", [f"{tmp_path}/images/a.jpeg"]),
    ]
    assert [image.uri for image in data.images] == [f"{tmp_path}/images/a.jpeg"]
    assert bracketed("") == []
    (tmp_path / "in.jsonl").write_text('{"question": "Which?", "label": ["B"]}\n\n{"question": null, "label": ["B"]}\n')
    with pytest.raises(TableError, match=r"in\.jsonl line 3: question must be text, not null"):
        medxpertqa.read(SourceRequest(path=str(tmp_path)))


def test_medxpertqa_as_on_the_hub(tmp_path: Path) -> None:
    """Options by their letters, one label, pictures by their names in the archive beside the folder."""
    (tmp_path / "MM").mkdir()
    (tmp_path / "images").mkdir()
    row = {
        "id": "MM-1",
        "question": "Seen?\nAnswer Choices: (A) x (B) y",
        "options": {"B": "y", "A": "x"},
        "label": "B",
        "images": ["MM-1-a.jpeg", "MM-1-b.jpeg"],
        "medical_task": "Diagnosis",
        "question_type": "Reasoning",
        "body_system": "Skeletal",
    }
    (tmp_path / "MM" / "test.jsonl").write_text(json.dumps(row))
    (question,) = medxpertqa.read(SourceRequest(path=str(tmp_path / "MM"))).questions
    assert (question.question, list(question.options), question.answer) == ("Seen?", ["x", "y"], "B")
    assert list(question.images) == [f"{tmp_path}/images/MM-1-a.jpeg", f"{tmp_path}/images/MM-1-b.jpeg"]
    assert (question.dataset, question.published_type, question.topic) == ("medxpertqa_mm", "reasoning", "Skeletal")
    (tmp_path / "MM" / "test.jsonl").write_text(json.dumps({**row, "options": {"A": "x", "C": "y"}}))
    with pytest.raises(TableError, match=r"line 1: options must be .* by their letters from A on; it has \['A', 'C'\]"):
        medxpertqa.read(SourceRequest(path=str(tmp_path / "MM")))


def test_json_as_other_programs_save_it(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([published()]).encode())
    assert len(med_prm.read(SourceRequest(path=str(path))).questions) == 1
    path.write_bytes(json.dumps([published()]).encode("utf-16"))
    with pytest.raises(ConfigError, match=r"train\.json is UTF-16 text; save it as UTF-8"):
        med_prm.read(SourceRequest(path=str(path)))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (
            '{"question": "A patient"}\n{"question": "Another"}\n',
            "an object a line (JSON lines), make it a list: jq -s",
        ),
        ('[{"question": "A patient", "x": [NaN]}]', "NaN stands where JSON has numbers and null alone; write null"),
        ('[{"question": "A patient", "x": -Infinity}]', "-Infinity stands where JSON has numbers and null alone"),
        ('[{"question": "A patient"} {"question": "Another"}]', "(after 1 entries)"),
    ],
)
def test_faults_of_json_are_one_line_without_the_text(tmp_path: Path, content: str, fault: str) -> None:
    path = tmp_path / "train.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        list(stream_json(str(path)))
    assert fault in str(error.value)
    assert "\n" not in str(error.value)
    assert "patient" not in str(error.value)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real data sets are not at {REAL}")
def test_the_real_files() -> None:
    request = SourceRequest(path=str(REAL / "med_prm"))
    solutions = [s for found in med_prm.solved(request) for s in found.solutions]
    counts = (len(solutions), sum(len(s.steps) for s in solutions), sum(bool(s.correct) for s in solutions))
    assert counts == (100, 591, 71)
    texts = [row["full_solution"] for row in json.loads((REAL / "med_prm" / "medprm_train_samples.json").read_text())]
    assert [tag_steps(s.steps) for s in solutions] == texts
    faults = [row.error for s in solutions for row in s.labels if row.error]
    assert faults == ["label_count: prm_gemini_label has 12 labels for 5 steps: [1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0]"]
    judged = Counter(row.annotator for s in solutions for row in s.labels if row.source == "judge")
    assert judged == {"unjudged": 71, "gemini": 29}
    assert all((step.label == 1) == (step.value > 0) for s in solutions for row in s.labels
               if row.source == "monte_carlo" for step in row.steps if step.value is not None)  # fmt: skip
    questions = meds3.read(SourceRequest(path=str(REAL / "medsss_eval"))).questions
    assert Counter(q.answer_type for q in questions) == {"choice": 9366, "open": 23}
    assert Counter(q.dataset for q in questions) == {
        "medmcqa": 4183, "medqa": 1273, "bioasq": 618, "drugdose": 23, "med_mmlu": 1561, "pubhealth": 1231,
        "pubmedqa": 500,
    }  # fmt: skip
    questions = medxpertqa.read(SourceRequest(path=str(REAL / "medxpertqa"))).questions
    assert Counter(q.dataset for q in questions) == {
        "medmcqa": 4183, "medqa": 1273, "mmlu": 1089, "medxpertqa_text": 244, "medxpertqa_mm": 2199,
    }  # fmt: skip
    assert Counter(q.dataset for q in med_prm.read(request).questions) == {
        "medqa": 88, "pubmedqa": 4, "medmcqa": 4, "mmlu": 4,
    }  # fmt: skip
