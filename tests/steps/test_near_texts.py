"""Near texts are found among many, and other ones are not."""

import random

import pytest

from medmm_ray.data.records import Image, Question, to_arrow
from medmm_ray.steps.curate import CurateConfig, curate
from medmm_ray.steps.curate.merging import components
from medmm_ray.steps.curate.near_texts import near_texts
from medmm_ray.text.shingles import shingles, words_of
from tests.steps.test_curate import question


def jaccard(first: str, second: str) -> float:
    one, two = (set(shingles(words_of(text))) for text in (first, second))
    return len(one & two) / len(one | two)


def planted(number: int, seed: int = 0) -> tuple[list[str], set[tuple[int, int]]]:
    """Random texts of 30 words, and one copy of every fifth with one word changed at the end or the start."""
    rng = random.Random(seed)
    vocabulary = [f"w{place}" for place in range(5000)]
    texts = [" ".join(rng.choices(vocabulary, k=30)) for _ in range(number)]
    pairs = set()
    for place in range(0, number, 5):
        words = texts[place].split()
        words[rng.choice([0, -1])] = "changed"
        pairs.add((place, len(texts)))
        texts.append(" ".join(words))
    return texts, pairs


def test_pairs_are_those_of_a_plain_double_loop() -> None:
    texts, pairs = planted(100)
    expected = {(i, j) for j in range(len(texts)) for i in range(j) if jaccard(texts[i], texts[j]) >= 0.8}
    assert expected == pairs
    assert {(int(i), int(j)) for i, j in near_texts(texts, 0.8)} == expected


def test_planted_copies_are_found_among_many() -> None:
    texts, pairs = planted(5000, seed=1)
    found_pairs = {(int(i), int(j)) for i, j in near_texts(texts, 0.8)}
    assert found_pairs <= pairs
    assert len(found_pairs) >= 0.99 * len(pairs)


@pytest.mark.parametrize("texts", [[], ["one"], ["", ""], ["?", "!"]])
def test_nothing_to_compare(texts: list[str]) -> None:
    assert near_texts(texts, 0.8).shape == (0, 2)


def test_many_equal_texts_do_not_take_all_pairs() -> None:
    pairs = near_texts(["the same words in all of them"] * 3000, 0.8)
    assert len(pairs) <= 3000 * 16
    names = [str(place) for place in range(3000)]
    edges = [(names[first], names[second]) for first, second in pairs.tolist()]
    assert len(components(names, edges)) == 1


def test_a_near_text_leaves_training_and_pictures_tell_questions_apart() -> None:
    text = " ".join(f"word{place}" for place in range(30))
    near = text.replace("word29", "last")
    other = text.replace("word", "sign")
    questions = [
        question("1", [], text=text), question("2", [], "test", near), question("3", ["a"], text="Seen? " + other),
        question("4", ["b"], text="Seen? " + other), question("5", [], "test", text, dataset="medqa"),
    ]  # fmt: skip
    images = [
        Image(image_id=f"im-{name}", uri=name, sha256=name, perceptual_hash="0" * 16, width=8, height=8, split="train",
              modality="radiology", diagnosis="", annotation="")
        for name in "ab"
    ]  # fmt: skip
    config = CurateConfig(near_duplicates=False, benchmark_guard=False)
    done = curate(to_arrow(Question, questions), to_arrow(Image, images), {}, config)
    assert [q.question_id for q in done.questions] == ["q-3", "q-4", "q-5"]
    assert done.figures["questions_near_duplicate"] == 1
    assert done.figures["questions_repeated"] == 1
