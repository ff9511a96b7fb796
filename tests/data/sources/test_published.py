"""Published data sets by their declarations, on small files in the published form, and on real ones where they are."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medmm_ray.config import ConfigError
from medmm_ray.data.datasets import benchmarks, data_sets
from medmm_ray.data.records import StepLabel
from medmm_ray.data.sources import SourceData, load_solved, names
from medmm_ray.steps.ingest import SourceConfig, read_source, reader_of, request_of
from tests.paths import REAL_DATA


def published(name: str, path: Path, files: dict[str, Any]) -> SourceData:
    """A data set read from small files: rows as JSON lines (.jsonl), a list (.json), CSV text, or Parquet columns."""
    for file, content in files.items():
        target = path / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.endswith(".parquet"):
            pq.write_table(pa.table(content), target)
        elif file.endswith(".jsonl"):
            target.write_text("".join(json.dumps(row) + "\n" for row in content))
        elif file.endswith(".json"):
            target.write_text(json.dumps(content))
        else:
            target.write_text(content)
    return read_source(SourceConfig(name=name, path=str(path)))


def test_every_declaration_can_be_read_and_has_a_reader() -> None:
    assert len(data_sets()) >= 36
    for name, data_set in data_sets().items():
        assert data_set.reader in names(), name
        assert bool(data_set.forms) == (data_set.reader == "table"), name
    assert {"medqa", "medmcqa", "pubmedqa", "mmlu", "bioasq", "vqa_rad", "slake", "path_vqa"} <= benchmarks()
    assert "mirage" not in benchmarks()


def test_a_folder_without_the_files_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"has 0 tables, and none is of SLAKE; expected test\.json, .*archive: train\.json"
    ):
        published("slake", tmp_path, {})
    with pytest.raises(ConfigError, match="source 'slak' is unknown"):
        published("slak", tmp_path, {})


CHOICE = {
    "question": "Who?",
    "options": {"A": "w", "B": "x", "C": "y", "D": "z"},
    "answer_idx": "C",
    "meta_info": "step1",
}
MEDMCQA = {
    "id": "7",
    "question": "What?",
    "opa": "w",
    "opb": "x",
    "opc": "y",
    "opd": "z",
    "cop": 4,
    "subject_name": "ENT",
}
SLAKE = {"qid": 1, "img_id": 3, "img_name": "xmlab3/source.jpg", "question": "Which organ?", "answer": "Liver",
         "q_lang": "en", "location": "Abdomen", "answer_type": "OPEN"}  # fmt: skip
OSCE = {"OSCE_Examination": {"Objective_for_Doctor": "Find it.", "Patient_Actor": {"Demographics": "35-year-old"},
        "Physical_Examination_Findings": {"Pulse": "80"}, "Test_Results": {}, "Correct_Diagnosis": "Gout"}}  # fmt: skip


BIOASQ = {"questions": [{"id": "1", "type": "yesno", "body": "Is it?", "exact_answer": "no"},
                        {"id": "2", "type": "list", "body": "?"}]}  # fmt: skip
HEALTHFACT = "claim_id\tclaim\tmain_text\tlabel\tsubjects\n1\tIt is.\tLong.\tmixture\tdiet\n"
PATIENT = "The patient is a woman of 49 years, who says:\n- Any pain? Yes.\n- Where? chest.\nWhat is the diagnosis?"


@pytest.mark.parametrize(
    ("name", "files", "expected"),
    [
        ("medqa", {"4_options/phrases_no_exclude_test.jsonl": [CHOICE]}, ("test", "Who?", "wxyz", "C", "step1")),
        ("medqa_5", {"US/train.jsonl": [{**CHOICE, "options": {**CHOICE["options"], "E": "v"}}]},  # type: ignore[dict-item]
         ("train", "Who?", "wxyzv", "C", "step1")),
        ("medmcqa", {"dev.json": [MEDMCQA]}, ("test", "What?", "wxyz", "D", "ENT")),
        ("medmcqa", {"data/validation-0.parquet": {**{key: [value] for key, value in MEDMCQA.items()}, "cop": [3]}},
         ("test", "What?", "wxyz", "D", "ENT")),
        ("mmlu", {"anatomy_test.csv": "Which?,w,x,y,z,B\n"}, ("test", "Which?", "wxyz", "B", "")),
        ("mmlu", {"anatomy/test-0.parquet": {"question": ["Which?"], "choices": [["w", "x"]], "answer": [1],
                                             "subject": ["anatomy"]}}, ("test", "Which?", "wx", "B", "anatomy")),
        ("pmc_vqa", {"test_clean.csv": "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label\n"
                                       "f.jpg,Seen?,x,A:w,B:x,C:y,D:z,B\n"}, ("test", "Seen?", "wxyz", "B", "")),
        ("slake", {"train.json": [SLAKE, {**SLAKE, "q_lang": "zh"}]},
         ("train", "Which organ?", "", "Liver", "Abdomen")),
        ("bioasq", {"7B1_golden.json": BIOASQ},
         ("test", "Is it?", ("yes", "no"), "no", "")),
        ("healthfact", {"test.tsv": HEALTHFACT},
         ("test", "It is.\nLong.", ("false", "mixture", "true", "unproven"), "mixture", "diet")),
        ("agentclinic_nejm", {"agentclinic_nejm_extended.jsonl": [
            {"question": "What?", "patient_info": "A man.", "physical_exams": "", "image_url": "u", "type": "Text",
             "answers": [{"text": "w", "correct": False}, {"text": "x", "correct": True}]}]},
         ("test", "A man.\nWhat?", "wx", "B", "")),
        ("agentclinic_osce", {"agentclinic_medqa_extended.jsonl": [OSCE]},
         ("test", "Find it.\nDemographics: 35-year-old\nPulse: 80", "", "Gout", "")),
        ("pubmedqa", {"ori_pqal.json": {"9": {"QUESTION": "So?", "CONTEXTS": ["Because."], "final_decision": "maybe"}},
                      "test_ground_truth.json": {"9": "maybe"}}, ("test", "So?", ("yes", "no", "maybe"), "C", "")),
        ("biomrc", {"dataset_test.json": {"abstracts": ["@e1 helps."], "titles": ["XXXX"],
                                          "entities_list": [["@e1", "@e2"]], "answers": ["@e1"]}},
         ("test", "@e1 helps.\n\nXXXX", ("@e1", "@e2"), "@e1", "")),
        ("ddxplus", {"release_evidences.json": {"E_1": {"question_en": "Any pain?"}, "E_2": {
            "question_en": "Where?", "value_meaning": {"V_3": {"en": "chest"}}}},
            "release_test_patients.csv": "AGE,DIFFERENTIAL_DIAGNOSIS,SEX,PATHOLOGY,EVIDENCES,INITIAL_EVIDENCE\n"
            "49,\"[['GERD', 0.6], ['Angina', 0.4]]\",F,Angina,\"['E_1', 'E_2_@_V_3']\",E_1\n"},
         ("test", PATIENT, ("GERD", "Angina"), "Angina", "")),
    ],
)  # fmt: skip
def test_questions(name: str, files: dict[str, Any], expected: tuple[Any, ...], tmp_path: Path) -> None:
    (question,) = published(name, tmp_path, files).questions
    split, text, options, answer, topic = expected
    assert (question.split, question.question, list(question.options)) == (split, text, list(options))
    assert (question.answer, question.topic, question.error) == (answer, topic, None)


def test_slakes_pictures_lie_in_imgs(tmp_path: Path) -> None:
    (tmp_path / "imgs" / "xmlab3").mkdir(parents=True)
    (tmp_path / "imgs" / "xmlab3" / "source.jpg").write_bytes(b"x")
    (question,) = published("slake", tmp_path, {"test.json": [SLAKE]}).questions
    assert list(question.images) == [f"{tmp_path}/imgs/xmlab3/source.jpg"]
    assert (question.group, question.published_type, question.modality) == ("3", "open", "radiology")


def test_pictures_without_questions(tmp_path: Path) -> None:
    metadata = "lesion_id,image_id,dx,dx_type,age,sex,localization\nHAM_1,ISIC_7,mel,histo,60,male,back\n"
    (tmp_path / "ham" / "HAM10000_images_part_2").mkdir(parents=True)
    (tmp_path / "ham" / "HAM10000_images_part_2" / "ISIC_7.jpg").write_bytes(b"x")
    (image,) = published("ham10000", tmp_path / "ham", {"HAM10000_metadata.csv": metadata}).images
    assert image.uri == f"{tmp_path}/ham/HAM10000_images_part_2/ISIC_7.jpg"
    assert (image.diagnosis, image.modality) == ("melanoma", "clinical")
    (tmp_path / "derm" / "test" / "Eczema").mkdir(parents=True)
    (tmp_path / "derm" / "test" / "Eczema" / "1.jpg").write_bytes(b"x")
    (image,) = published("dermnet", tmp_path / "derm", {}).images
    assert (image.uri, image.split, image.diagnosis) == (f"{tmp_path}/derm/test/Eczema/1.jpg", "test", "Eczema")


def test_mimic_cxr_has_the_impressions_of_its_reports(tmp_path: Path) -> None:
    below = tmp_path / "files" / "p10" / "p10000032"
    below.mkdir(parents=True)
    (below / "s50414267.txt").write_text("FINDINGS: Clear.\n\nIMPRESSION:  No acute\n process.\n\nSIGNED BY: x")
    split = "dicom_id,study_id,subject_id,split\nabc,50414267,10000032,validate\n"
    (image,) = published("mimic_cxr", tmp_path, {"mimic-cxr-2.0.0-split.csv": split}).images
    assert image.uri == f"{below}/s50414267/abc.jpg"
    assert (image.split, image.diagnosis) == ("validation", "No acute process.")


PRM800K = {
    "question": {"problem": "2+2?", "ground_truth_answer": "4"},
    "label": {
        "steps": [
            {"completions": [{"text": "Two and two.", "rating": 1}]},
            {"completions": [{"text": "Is five.", "rating": -1}]},
        ]
    },
}


VISUAL = {"image": ["i.png"], "question": "Q?", "answer": "A", "data_source": "MMMU",
          "response": {"steps": ["a", "b", "c"], "process_correctness": [1, 0, -1]}}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "file", "rows", "labels"),
    [
        ("processbench", "gsm8k.json", [{"id": "g-0", "problem": "P?", "steps": ["a", "b", "c"], "label": 1,
                                         "final_answer_correct": False}], [1, 0, None]),
        ("processbench", "gsm8k.jsonl", [{"id": "g-0", "problem": "P?", "steps": ["a", "b"], "label": -1,
                                          "final_answer_correct": True}], [1, 1]),
        ("prmbench", "prmtest_classified.jsonl", [{"idx": "x", "modified_question": "P?", "classification": "circular",
                                                   "modified_process": ["1. a", "2. b"], "error_steps": [2]}], [1, 0]),
        ("prm800k", "phase2_train.jsonl", [PRM800K], [1, 0]),
        ("visualprm400k", "geo.jsonl", [{"image": "i.png", "question": "Q?", "answer": "A", "steps_with_score": [
            {"step": "a", "score": 0.25}, {"step": "b", "score": 0.0}]}], [1, 0]),
        ("vl_prm300k", "train.jsonl", [{"image": "i.png", "question": "Q?", "answer": "A", "steps": [
            {"step": "a", "label": "+"}, {"step": "b", "label": "-"}]}], [1, 0]),
        ("visualprocessbench", "test.jsonl", [VISUAL], [1, None, 0]),
    ],
)  # fmt: skip
def test_solutions_with_labelled_steps(name: str, file: str, rows: Any, labels: list[Any], tmp_path: Path) -> None:
    data = published(name, tmp_path, {file: [*rows, *rows]})
    assert len(data.questions) == 1  # each row is a solution of it
    source = SourceConfig(name=name, path=str(tmp_path))
    (solved,) = load_solved(reader_of(source)).solved(request_of(source))
    assert len(solved.solutions) == 2
    (row,) = solved.solutions[0].labels
    assert [step.label for step in row.steps] == labels
    assert row.error is None


def test_labels_that_do_not_fit_are_an_error_of_theirs(tmp_path: Path) -> None:
    bad = {"image": "", "question": "Q?", "answer": "A", "data_source": "x",
           "response": {"steps": ["a", "b"], "process_correctness": [1]}}  # fmt: skip
    published("visualprocessbench", tmp_path, {"test.jsonl": [bad]})
    source = SourceConfig(name="visualprocessbench", path=str(tmp_path))
    (solved,) = load_solved("table").solved(request_of(source))
    (row,) = solved.solutions[0].labels
    assert row.error == "label_count: response.process_correctness does not have 2 labels for 2 steps"
    assert list(row.steps) == []


def test_values_are_kept_beside_their_labels(tmp_path: Path) -> None:
    rows = [{"image": "", "question": "Q?", "answer": "A", "steps_with_score": [{"step": "a", "score": 0.25}]}]
    published("visualprm400k", tmp_path, {"a.jsonl": rows})
    source = SourceConfig(name="visualprm400k", path=str(tmp_path))
    (solved,) = load_solved("table").solved(request_of(source))
    (row,) = solved.solutions[0].labels
    assert (row.source, list(row.steps)) == ("monte_carlo", [StepLabel(label=1, value=0.25)])


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"the real data sets are not at {REAL_DATA}")
def test_the_real_files_have_the_declared_counts() -> None:
    mirage = REAL_DATA / "mirage" / "rawdata"
    for name, path in {
        "medqa": mirage / "medqa", "medmcqa": mirage / "medmcqa", "mmlu": mirage / "mmlu", "bioasq": mirage / "bioasq",
        "pubmedqa": REAL_DATA / "pubmedqa", "vqa_rad": REAL_DATA / "vqa_rad",
    }.items():  # fmt: skip
        questions = read_source(SourceConfig(name=name, path=str(path))).questions
        declared = data_sets()[name].counts
        counts = Counter(q.split for q in questions)
        assert counts == {split: declared[split] for split in counts}, name
        assert counts["test"] == declared["test"], name
