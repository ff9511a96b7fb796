"""Images and questions, each once."""

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from medmm_ray.config import digest
from medmm_ray.data.records import Image, Question, from_dict
from medmm_ray.data.tables import error_kind
from medmm_ray.steps.curate.config import CurateConfig
from medmm_ray.steps.curate.near_texts import near_texts
from medmm_ray.text import normalise


def by_uri(images: pa.Table) -> list[dict[str, Any]]:
    """The rows in an order that the table's own does not change."""
    return sorted(images.to_pylist(), key=lambda row: str(row["uri"]))


def merge_images(
    images: pa.Table,
    duplicates: Sequence[tuple[str, str]],
    figures: Counter[str],
) -> tuple[dict[str, Image], dict[str, str]]:
    """Images by id, each picture once; and for every raw image id the id that stands for it.

    Of near duplicates the one with most pixels stays.
    """
    unique: dict[str, Image] = {}
    for row in by_uri(images):
        image_id = row["image_id"]
        if row["error"]:
            kind = error_kind(row["error"])
            figures[f"images_error_{kind}"] += 1
        elif image_id in unique:
            figures["images_same_bytes"] += 1
        else:
            unique[image_id] = from_dict(Image, row)

    def by_size(image_id: str) -> tuple[int, str]:
        """The largest first; of equal ones the lower id, in any order of rows."""
        image = unique[image_id]
        return -image.width * image.height, image_id

    merged_id: dict[str, str] = {}
    # Copies of copies: A like B and B like C make one picture of all three.
    for group in components(unique, duplicates):
        largest = min(group, key=by_size)
        merged_id |= dict.fromkeys(group, largest)
    final_ids = sorted(set(merged_id.values()))
    figures["images_near_duplicate"] = len(unique) - len(final_ids)
    final_images = {image_id: unique[image_id] for image_id in final_ids}
    return final_images, merged_id


def merge_questions(
    questions: Sequence[Question],
    merged_id: Mapping[str, str],
    figures: Counter[str],
    official_ids: Collection[str] = (),
) -> list[Question]:
    """Questions about merged images, each once: of repeats an official test's all, else a test question, else the
    lowest id stays."""
    unique: dict[str, Question] = {}
    official: list[Question] = []

    def by_right(question: Question) -> tuple[bool, bool, str]:
        """Test questions first, so that of a repeat the one in training leaves."""
        return question.question_id not in official_ids, question.split != "test", question.question_id

    for question in sorted(questions, key=by_right):
        image_ids = [merged_id[image_id] for image_id in question.image_ids]
        question = replace(question, image_ids=image_ids)
        # Spelling alone does not make two questions of one.
        text = normalise(question.question)
        options = list(map(normalise, question.options))
        first = unique.setdefault(digest(text, options, image_ids), question)
        if first is question:
            continue
        # A benchmark's own repeats stay; a second copy of it, from another source, would double its denominator.
        if question.question_id in official_ids and question.source == first.source:
            figures["official_test_repeated"] += 1
            official.append(question)
            continue
        if normalise(first.answer) == normalise(question.answer):
            figures["questions_repeated"] += 1
        else:
            figures["questions_repeated_other_answer"] += 1
    return sorted([*unique.values(), *official], key=lambda q: q.question_id)


def merge_near_texts(
    questions: Sequence[Question],
    config: CurateConfig,
    figures: Counter[str],
    official_ids: Collection[str] = (),
) -> list[Question]:
    """Questions without a picture, each once also where words differ: of near texts an official test's all, else a test
    question, else the lowest id stays."""
    textual = [question for question in questions if not question.image_ids]
    if config.text_similarity >= 1 or len(textual) < 2:
        return list(questions)
    texts = [" ".join([question.question, *sorted(question.options)]) for question in textual]
    pairs = near_texts(texts, config.text_similarity)
    edges = [(textual[first].question_id, textual[second].question_id) for first, second in pairs.tolist()]
    by_id = {question.question_id: question for question in textual}

    def by_right(question_id: str) -> tuple[bool, bool, str]:
        return question_id not in official_ids, by_id[question_id].split != "test", question_id

    dropped: set[str] = set()
    for group in components(itertools.chain.from_iterable(edges), edges):
        _, *repeats = sorted(group, key=by_right)
        dropped.update(question_id for question_id in repeats if question_id not in official_ids)
    figures["questions_near_duplicate"] = len(dropped)
    return [question for question in questions if question.question_id not in dropped]


def components(nodes: Iterable[str], edges: Collection[tuple[str, str]]) -> list[list[str]]:
    """The connected components of an undirected graph, each sorted, in the order of their first members."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    names = sorted(set(nodes))
    number = {name: place for place, name in enumerate(names)}
    first = [number[name] for name, _ in edges]
    second = [number[name] for _, name in edges]
    graph = coo_array((np.ones(len(first), dtype=bool), (first, second)), shape=(len(names), len(names)))
    _, component_of_node = connected_components(graph, directed=False)
    members: dict[int, list[str]] = {}
    for name, component in zip(names, component_of_node.tolist(), strict=True):
        members.setdefault(component, []).append(name)
    return list(members.values())
