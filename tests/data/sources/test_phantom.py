import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmm_ray.config import digest
from medmm_ray.data.sources import SourceRequest
from medmm_ray.data.sources.phantom import (
    DOCUMENTS,
    HARD,
    PhantomCase,
    PhantomQuestion,
    blind_solution,
    captions,
    contact_sheet,
    corpus,
    draw,
    make_case,
    make_questions,
    read,
    render,
    truth,
)
from medmm_ray.data.sources.phantom.__main__ import main
from medmm_ray.data.sources.phantom.case import KINDS, LUNG_KINDS, Finding, generator
from medmm_ray.data.sources.phantom.questions import TEMPLATES
from medmm_ray.data.sources.phantom.truth import claims
from medmm_ray.text import extract_answer, join_steps, split_steps

SWAPPED = {"right": "left", "left": "right"}


def case(kind: str, side: str = "", zone: str = "") -> PhantomCase:
    return PhantomCase(seed=1, kind=kind, side=side, zone=zone, extent=0.8, contrast=1.0, difficulty="easy")


EFFUSION = case("effusion", "right", "lower")
PNEUMOTHORAX = case("pneumothorax", "left", "upper")
CONSOLIDATION = case("consolidation", "left", "lower")
NODULE = case("nodule", "right", "upper")
HEART = case("cardiomegaly")
NORMAL = case("normal")


@pytest.fixture(scope="module")
def items() -> list[PhantomQuestion]:
    return make_questions(0, "train", 400, num_worked=2)


def test_a_case_survives_its_annotation() -> None:
    made = make_case(generator("x"), ["nodule"], side="left")
    assert PhantomCase.from_annotation(made.annotation()) == made
    assert made.diagnosis == "left lung nodule"
    assert (HEART.diagnosis, NORMAL.diagnosis) == ("cardiomegaly", "normal")


def test_constraints_on_a_case_hold() -> None:
    made = [make_case(generator("c", i), side="right", zone="upper") for i in range(60)]
    assert {(c.side, c.zone) for c in made} == {("right", "upper")}
    assert {c.kind for c in made} == {"pneumothorax", "consolidation", "nodule"}


# Pictures


def test_pictures_are_deterministic_and_show_their_seed() -> None:
    assert np.array_equal(np.asarray(render(EFFUSION, 64)), np.asarray(render(EFFUSION, 64)))
    other = PhantomCase(**{**json.loads(EFFUSION.annotation()), "seed": 2})
    assert not np.array_equal(np.asarray(render(EFFUSION, 64)), np.asarray(render(other, 64)))
    assert render(EFFUSION, 96).size == (96, 96)
    assert np.array_equal(np.asarray(draw(EFFUSION.annotation(), 64)), np.asarray(render(EFFUSION, 64)))


@pytest.mark.parametrize(
    ("finding", "box", "sign"),
    [  # the box is (left, top, right, bottom) as fractions of the picture
        (EFFUSION, (0.12, 0.65, 0.25, 0.75), +1),
        (PNEUMOTHORAX, (0.80, 0.45, 0.86, 0.65), -1),
        (CONSOLIDATION, (0.69, 0.58, 0.78, 0.67), +1),
        (NODULE, (0.26, 0.31, 0.32, 0.38), +1),
        (HEART, (0.34, 0.55, 0.38, 0.65), +1),
    ],
)
def test_a_finding_changes_the_place_where_it_is_said_to_be(
    finding: PhantomCase, box: tuple[float, float, float, float], sign: int
) -> None:
    """The patient's right is on the viewer's left. Averaged over 40 people, against the same people without it."""
    size = 64
    left, top, right, bottom = (round(b * size) for b in box)

    def mean(kind: PhantomCase) -> float:
        pictures = [
            np.asarray(render(PhantomCase(**{**json.loads(kind.annotation()), "seed": seed}), size), dtype=float)
            for seed in range(40)
        ]
        return float(np.mean([p[top:bottom, left:right].mean() for p in pictures]))

    assert sign * (mean(finding) - mean(NORMAL)) > 12


def test_the_contact_sheet_holds_every_kind_at_every_difficulty(tmp_path: Path) -> None:
    main([str(tmp_path / "sheet.png"), "3"])
    assert (tmp_path / "sheet.png").stat().st_size > 100_000
    assert contact_sheet([EFFUSION, NORMAL, HEART], size=64, columns=2).size == (128, 156)


# Harder pictures


def two_findings() -> PhantomCase:
    nodule = Finding(kind="nodule", side="left", zone="upper", extent=0.5, contrast=0.8)
    return replace(EFFUSION, more=(nodule, Finding(kind="cardiomegaly", side="", zone="", extent=0.5, contrast=0.8)))


def test_plain_cases_are_written_and_drawn_as_ever() -> None:
    """The ids of pictures and questions hang on these."""
    made = make_case(generator("question", 0), ["nodule"])
    assert set(json.loads(made.annotation())) == {"seed", "kind", "side", "zone", "extent", "contrast", "difficulty"}
    items = make_questions(0, "train", 40, num_worked=2)
    assert (
        digest([(i.question, i.options, i.answer, i.case.annotation(), i.worked) for i in items]) == "3c3200995033fe55"
    )
    pixels = hashlib.sha256(b"".join(render(i.case).tobytes() for i in items)).hexdigest()
    assert pixels[:16] == "243abcaed98f93aa"


def test_a_case_of_several_findings_survives_its_annotation() -> None:
    made = replace(two_findings(), size=0.6, noise=2.0)
    assert PhantomCase.from_annotation(made.annotation()) == made
    assert made.diagnosis == "cardiomegaly and left lung nodule and right pleural effusion"
    assert [f.kind for f in made.findings] == ["effusion", "nodule", "cardiomegaly"]
    assert NORMAL.findings == ()


def test_hard_pictures_have_up_to_three_findings_in_places_of_their_own() -> None:
    made = [make_case(generator("hard", i), hardness=HARD) for i in range(300)]
    places = [[f.side for f in c.findings] for c in made]
    assert {len(p) for p in places} == {0, 1, 2, 3}
    assert all(len(set(p)) == len(p) for p in places)
    assert {c.kind for c in made if not c.findings} == {"normal"}
    assert all((c.size, c.noise) == (0.6, 2.0) and c.contrast <= 0.55 for c in made)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "normal"])
def test_hard_findings_change_fewer_grey_levels(kind: str) -> None:
    plain = replace(make_case(generator("grey", kind), [kind]), noise=0.0)
    hard = replace(plain, size=HARD.size, contrast=plain.contrast * HARD.contrast)
    normal = replace(plain, kind="normal", side="", zone="")
    plain_change, hard_change = (
        np.abs(np.asarray(render(c, 128), dtype=float) - np.asarray(render(normal, 128), dtype=float)).mean()
        for c in (plain, hard)
    )
    assert 0.0 < hard_change < 0.75 * plain_change


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("There is a right pleural effusion.", True),
        ("A round opacity is seen in the left upper zone.", True),
        ("The heart is enlarged.", True),
        ("There is a right effusion and a left nodule.", True),
        ("The left lung is clear.", False),
        ("Both lungs are clear.", False),
        ("Both lungs are abnormal.", True),
        ("Both costophrenic angles are blunted.", False),
        ("Both costophrenic angles are sharp.", False),
        ("The heart size is normal.", False),
        ("No pneumothorax is seen.", True),
        ("A round opacity is seen in the right upper zone.", False),
        ("The left costophrenic angle is sharp.", True),
        ("Consider (A) left pneumothorax.", None),
    ],
)
def test_truth_of_several_findings(step: str, expected: bool | None) -> None:
    assert truth(step, two_findings()) is expected, claims(step)


def test_of_several_findings_one_makes_an_option_true() -> None:
    items = make_questions(0, "train", 400, num_worked=2, hardness=HARD)
    assert sum(len(i.case.findings) > 1 for i in items) > 100
    for item in items:
        template = next(t for t in TEMPLATES if tuple(o.text for o in t.options) == item.options)
        assert [o.holds(item.case) for o in template.options] == ["ABCD"[i] == item.answer for i in range(4)]
        assert False not in [truth(step, item.case, item) for steps in item.worked for step in steps]
        assert [truth(c, item.case) for c in captions(item.case)] == [True] * len(captions(item.case))
        assert len(captions(item.case)) >= 2


def test_blind_work_is_right_by_prevalence_and_slips_where_asked() -> None:
    items = make_questions(2, "train", 400, hardness=HARD)
    works = [blind_solution(item, generator("w", i)) for i, item in enumerate(items)]
    right = [letter == item.answer for (_, letter), item in zip(works, items, strict=True)]
    assert 0.25 < sum(right) / len(right) < 0.40  # 2 x .38 x .38 + 2 x .12 x .12 = .32
    assert all(extract_answer(join_steps(s), i.options) == x for (s, x), i in zip(works, items, strict=True))

    def wrong_steps(slip: float) -> int:
        """Of solutions with the right answer, those with a wrong step."""
        made = [blind_solution(item, generator("w", i), slip) for i, item in enumerate(items)]
        return sum(
            letter == item.answer and any(truth(step, item.case, item) is False for step in steps)
            for (steps, letter), item in zip(made, items, strict=True)
        )

    assert wrong_steps(1.0) > wrong_steps(0.0) + 20


# Questions


def test_questions_depend_on_seed_split_and_place_alone(items: list[PhantomQuestion]) -> None:
    assert make_questions(0, "train", 3, num_worked=2) == items[:3]
    assert make_questions(1, "train", 3, num_worked=2) != items[:3]
    assert make_questions(0, "test", 3, num_worked=2) != items[:3]


def test_letters_are_even_and_every_template_occurs(items: list[PhantomQuestion]) -> None:
    many = make_questions(4, "test", 2000)
    letters = Counter(i.answer for i in many)
    assert max(letters.values()) - min(letters.values()) < 110
    assert Counter(i.template for i in many).keys() == {"finding", "finding_side", "zone", "structure", "sign"}
    assert len({i.options for i in many}) == len(TEMPLATES) == 10
    common = sum(
        i.answer
        in next(t.common for t in TEMPLATES if t.options[0].text == i.options[0] and t.options[1].text == i.options[1])
        for i in many
    )
    assert 0.73 < common / len(many) < 0.79  # twice 0.38
    assert {i.case.kind for i in items} == set(KINDS)
    assert {i.case.difficulty for i in items} == {"easy", "medium", "hard"}


def test_exactly_the_answer_s_option_is_true_of_the_case(items: list[PhantomQuestion]) -> None:
    for item in items:
        named = item.template in ("finding", "finding_side", "sign")
        said = [f"This is a {o}." if named else f"The {o} is abnormal." for o in item.options]
        if item.template == "structure":
            said = [s.replace("The no structure", "No structure") for s in said]
        assert [truth(s, item.case) for s in said] == ["ABCD"[i] == item.answer for i in range(4)], item


def test_the_text_tells_no_more_than_prevalence(items: list[PhantomQuestion]) -> None:
    """The two common options of four share 76 %: a reader without the picture is right in 38 %."""
    many = make_questions(5, "test", 3000)
    by_stem: dict[tuple[str, tuple[str, ...]], Counter[str]] = {}
    for item in many:
        gold = item.options["ABCD".index(item.answer)]
        by_stem.setdefault((item.template, tuple(sorted(item.options))), Counter())[gold] += 1
    best = sum(max(counts.values()) for counts in by_stem.values()) / len(many)
    assert 0.36 < best < 0.45  # 0.38, and the luck of the small groups
    contexts = {(i.question.split(".")[0], i.case.kind) for i in many}
    assert len({c for c, _ in contexts}) == 60  # every sentence about the patient ...
    assert Counter(c for c, _ in contexts).most_common()[-1][1] >= 4  # ... comes with most kinds


def test_worked_solutions_are_right_short_and_checkable(items: list[PhantomQuestion]) -> None:
    verdicts: list[bool | None] = []
    for item in items:
        for steps in item.worked:
            assert 4 <= len(steps) <= 5
            assert sum(len(s.split()) for s in steps) <= 45
            assert steps[-1].endswith(f"the answer is ({item.answer}).")
            assert extract_answer(join_steps(steps), item.options) == item.answer
            assert split_steps(join_steps(steps)) == ("", list(steps))
            verdicts += [truth(step, item.case, item) for step in steps]
    assert False not in verdicts
    assert verdicts.count(None) / len(verdicts) < 0.30


def test_a_solution_has_at_most_64_tokens() -> None:
    """With a byte-level BPE of 1,024 entries, the step tags included."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = corpus(seed=0, number=600)
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1024, show_progress=False, special_tokens=["<s>"])
    )
    lengths = [
        len(tokenizer.encode(join_steps(steps)).ids) + len(steps)
        for item in make_questions(9, "train", 200)
        for steps in item.worked
    ]
    assert max(lengths) <= 64


# Truth


@given(st.integers(0, 10_000))
def test_a_worked_step_with_its_side_swapped_is_wrong(index: int) -> None:
    item = make_questions(index, "property", 1)[0]
    for step in item.worked[0]:
        swapped = re.sub(r"\b(right|left)\b", lambda m: SWAPPED[m[0]], step)
        if swapped != step and truth(step, item.case, item) is not None:
            assert truth(swapped, item.case, item) is False, swapped


@given(st.integers(0, 10_000))
def test_a_worked_step_denied_is_wrong(index: int) -> None:
    item = make_questions(index, "property", 1)[0]
    for step in item.worked[0][:-1]:
        if truth(step, item.case) is None or re.search(r"\b(no|not)\b", step, re.IGNORECASE):
            continue
        denied, count = re.subn(r"\b(is|are)\b", r"\1 not", step, count=1)
        if count:
            assert truth(denied, item.case) is False, denied


@given(st.integers(0, 10_000))
def test_another_letter_is_wrong(index: int) -> None:
    item = make_questions(index, "property", 1)[0]
    for letter in "ABCD":
        assert truth(f"So the answer is ({letter}).", item.case, item) is (letter == item.answer)


@given(st.text(max_size=200))
def test_any_text_gets_a_verdict(text: str) -> None:
    assert truth(text, EFFUSION, make_questions(0, "any", 1)[0]) in (True, False, None)


@pytest.mark.parametrize(
    ("step", "finding", "expected"),
    [
        # presence, side, zone
        ("There is a right pleural effusion.", EFFUSION, True),
        ("There is a left pleural effusion.", EFFUSION, False),
        ("A pleural effusion is present.", EFFUSION, True),
        ("There is an effusion on the right side.", EFFUSION, True),
        ("The right-sided effusion is large.", EFFUSION, True),
        ("Bilateral pleural effusions.", EFFUSION, False),
        ("Both costophrenic angles are blunted.", EFFUSION, False),
        ("Blunting of the right costophrenic angle is seen.", EFFUSION, True),
        ("The right CP angle is obscured.", EFFUSION, True),
        ("The left costophrenic angle is sharp.", EFFUSION, True),
        ("The right costophrenic angle is clear.", EFFUSION, False),
        ("A meniscus is seen at the left base.", EFFUSION, False),
        ("A round nodule lies in the right upper zone.", NODULE, True),
        ("A round nodule lies in the right lower zone.", NODULE, False),
        ("A nodule is seen in the mid zone.", NODULE, False),
        ("There is an opacity in the right lung.", NODULE, True),
        ("Patchy opacity at the left base.", CONSOLIDATION, True),
        ("Air bronchograms suggest pneumonia in the left lower lobe.", CONSOLIDATION, True),
        ("The left lower zone is hazy.", NODULE, False),
        ("No lung markings are seen at the left apex.", PNEUMOTHORAX, True),
        ("Lung markings are absent in the left upper zone.", PNEUMOTHORAX, True),
        ("The lung markings do not reach the chest wall.", PNEUMOTHORAX, True),
        ("The lung markings reach the chest wall.", PNEUMOTHORAX, False),
        ("A thin pleural line is visible on the left.", PNEUMOTHORAX, True),
        ("The left lung is collapsed.", PNEUMOTHORAX, True),
        ("The left apex is black.", PNEUMOTHORAX, True),
        ("The heart is enlarged.", HEART, True),
        ("The heart is enlarged.", NORMAL, False),
        ("The cardiothoracic ratio is above 0.5.", HEART, True),
        ("The cardiothoracic ratio is less than half.", HEART, False),
        ("There is cardiomegaly.", HEART, True),
        ("The heart looks abnormal.", HEART, True),
        ("The abnormal structure is the heart.", HEART, True),
        ("The abnormal structure is the heart.", EFFUSION, False),
        ("The left side is abnormal.", HEART, False),
        # negation
        ("There is no pleural effusion.", EFFUSION, False),
        ("There is no pleural effusion.", NODULE, True),
        ("There is no left pleural effusion.", EFFUSION, True),
        ("No effusion or pneumothorax is seen.", NODULE, True),
        ("No effusion or pneumothorax is seen.", PNEUMOTHORAX, False),
        ("Neither lung shows consolidation.", CONSOLIDATION, False),
        ("Neither lung shows consolidation.", HEART, True),
        ("The heart is not enlarged.", EFFUSION, True),
        ("The heart size is normal.", HEART, False),
        ("Pneumothorax is ruled out.", PNEUMOTHORAX, False),
        ("An effusion cannot be seen.", EFFUSION, False),
        ("An effusion can be seen on the right.", EFFUSION, True),
        ("The right lung is not clear.", EFFUSION, True),
        ("The left lung is clear without consolidation.", EFFUSION, True),
        ("The effusion is on the right, not the left.", EFFUSION, True),
        ("The effusion is on the left and not on the right.", EFFUSION, False),
        ("The effusion is not on the left.", EFFUSION, True),
        ("The abnormality is on the right rather than the left.", EFFUSION, True),
        # several claims
        ("There is a right effusion and a left pneumothorax.", EFFUSION, False),
        ("The left lung is clear, but the right angle is blunted.", EFFUSION, True),
        ("Right effusion and left pneumothorax.", EFFUSION, False),
        ("Right effusion and left upper zone clear.", EFFUSION, True),
        ("No left effusion or right consolidation.", EFFUSION, True),
        ("No left effusion or right consolidation.", CONSOLIDATION, True),
        ("No right effusion nor left consolidation.", CONSOLIDATION, False),
        ("The heart is normal and the lungs are clear.", EFFUSION, False),
        ("The heart is normal. There is a right effusion.", EFFUSION, True),
        ("The left and right lungs are clear.", EFFUSION, False),
        ("The left and right lungs are clear.", HEART, True),
        # whole pictures
        ("This is a normal chest radiograph.", NORMAL, True),
        ("This is a normal chest.", HEART, False),
        ("The radiograph is unremarkable.", NORMAL, True),
        ("Normal.", NORMAL, True),
        ("It is normal.", NODULE, False),
        ("Both lungs are clear.", HEART, True),
        ("Nothing is abnormal.", NORMAL, True),
        ("Nothing is abnormal.", NODULE, False),
        ("No abnormality is seen in the left lung.", EFFUSION, True),
        ("No structure is abnormal.", EFFUSION, False),
        ("There is no abnormal sign.", NORMAL, True),
        # what no phantom has
        ("The mediastinum is shifted to the left.", PNEUMOTHORAX, False),
        ("The trachea is midline.", PNEUMOTHORAX, True),
        ("The ribs are intact.", NORMAL, True),
        # nothing checkable
        ("Compare both lungs.", EFFUSION, None),
        ("Consider (B) left pneumothorax.", EFFUSION, None),
        ("Suppose (A) heart.", EFFUSION, None),
        ("First, we look for an effusion.", NORMAL, None),
        ("Is there an effusion?", NORMAL, None),
        ("There may be a left effusion.", NORMAL, None),
        ("An effusion blunts the costophrenic angle.", NORMAL, None),
        ("A meniscus is a sign of pleural fluid.", NORMAL, None),
        ("The patient has cough.", NORMAL, None),
        ("Read the question again.", NORMAL, None),
        ("No other abnormality is seen.", EFFUSION, True),
        ("", NORMAL, None),
        ("the the the (", NORMAL, None),
    ],
)
def test_truth_of_hand_written_steps(step: str, finding: PhantomCase, expected: bool | None) -> None:
    assert truth(step, finding) is expected, claims(step)


def test_stated_answers_need_the_question() -> None:
    item = next(i for i in make_questions(0, "train", 50) if i.template == "finding_side")
    wrong = next(letter for letter in "ABCD" if letter != item.answer)
    gold = item.options["ABCD".index(item.answer)]
    bad = item.options["ABCD".index(wrong)]
    assert truth(f"The answer is ({item.answer}).", item.case) is None
    assert truth(f"The answer is ({item.answer}).", item.case, item) is True
    assert truth(f"The answer is {wrong}.", item.case, item) is False
    assert truth(f"The answer is not ({wrong}).", item.case, item) is True
    assert truth(f"Option ({wrong}) is ruled out.", item.case, item) is True
    assert truth(f"({wrong}) is wrong.", item.case, item) is True
    assert truth(f"({item.answer}) fits.", item.case, item) is True
    assert truth(f"The answer is {gold}.", item.case, item) is True
    assert truth(f"The answer is {bad}.", item.case, item) is False
    assert truth(f"The answer is ({item.answer}) {bad}.", item.case, item) is False
    assert truth("The answer is a matter of taste.", item.case, item) is None
    assert truth(f"Consider option ({wrong}) {bad}.", item.case, item) is None
    assert truth(f"Is the answer ({wrong})?", item.case, item) is None


# The source


def test_read_gives_images_questions_documents_and_worked_solutions() -> None:
    data = read(SourceRequest(num_train=6, num_test=4, num_extra_images=3, num_worked=2, seed=1))
    assert [i.split for i in data.images] == ["train"] * 6 + ["test"] * 4 + ["train"] * 3
    assert len({i.uri for i in data.images}) == 13
    assert [len(q.worked) for q in data.questions] == [2] * 6 + [0] * 4
    assert data.questions[0].images == (data.images[0].uri,)
    assert len(data.documents) == len(DOCUMENTS) == 30
    assert data.draw is draw


def test_documents_are_short_and_differ() -> None:
    assert all(30 <= len(d.text.split()) <= 60 for d in DOCUMENTS)
    assert len({d.title for d in DOCUMENTS}) == len(DOCUMENTS)
    assert Counter(d.corpus for d in DOCUMENTS) == {"chest": 18, "other": 12}


@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_true_of_their_case(kind: str) -> None:
    made = make_case(generator("caption", kind), [kind])
    assert len(set(captions(made))) == 4
    assert [truth(c, made) for c in captions(made)] == [True] * 4
    if kind in LUNG_KINDS:
        assert all(made.side in c.lower() for c in captions(made))
