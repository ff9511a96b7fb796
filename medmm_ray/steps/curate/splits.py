"""Which questions and images are in which split, so that no two splits share a picture."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from medmm_ray.config import digest
from medmm_ray.data.records import Image, Question
from medmm_ray.steps.curate.config import CurateConfig
from medmm_ray.steps.curate.merging import components


def picture_groups(questions: Sequence[Question]) -> dict[str, str]:
    """For each question the name of its group: questions that share a picture, directly or through others, share it.

    The name is the group's lowest image id; a question without a picture is a group of its own.
    """
    image_ids: set[str] = set()
    edges: list[tuple[str, str]] = []
    for question in questions:
        image_ids.update(question.image_ids)
        # Edges from its first image to each further one join the images of a question.
        for further_id in question.image_ids[1:]:
            edges.append((question.image_ids[0], further_id))
    group_of_image: dict[str, str] = {}
    for component in components(image_ids, edges):
        group_of_image |= dict.fromkeys(component, component[0])
    groups = {}
    for question in questions:
        group = question.question_id
        if question.image_ids:
            group = group_of_image[question.image_ids[0]]
        groups[question.question_id] = group
    return groups


def resplit(
    questions: Sequence[Question],
    groups: Mapping[str, str],
    config: CurateConfig,
) -> list[Question]:
    """The questions with new splits; all of a group get the one that a hash of its name decides."""

    def split(group: str) -> str:
        # A hash instead of a draw: a group keeps its split when others come or leave.
        name_hash = digest("split", config.seed, group)
        share = int(name_hash, 16) / 16**16
        return "test" if share < config.test_fraction else "train"

    split_anew = []
    for question in questions:
        group = groups[question.question_id]
        split_anew.append(replace(question, split=split(group)))
    return split_anew


def drop_leaks(
    questions: Sequence[Question],
    groups: Mapping[str, str],
    figures: Counter[str],
) -> list[Question]:
    """The questions less those of training whose group has a test question."""
    test_groups = {groups[q.question_id] for q in questions if q.split == "test"}
    clean = []
    for question in questions:
        group = groups[question.question_id]
        if question.split == "test" or group not in test_groups:
            clean.append(question)
    # The test split stays as its source made it: figures of it can be compared with others' of the same data set.
    figures["questions_leaked"] = len(questions) - len(clean)
    return clean


def limit_questions(
    questions: Sequence[Question],
    config: CurateConfig,
    figures: Counter[str],
) -> list[Question]:
    """At most `max_train` and `max_test` questions, chosen by a hash of their ids."""
    by_split: defaultdict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_split[question.split].append(question)
    limits = {"train": config.max_train, "test": config.max_test}

    def by_hash(question: Question) -> str:
        """A place in the choice that stays when other questions come or leave."""
        return digest("limit", config.seed, question.question_id)

    within: list[Question] = []
    for split, members in by_split.items():
        limit = limits.get(split)
        chosen = sorted(members, key=by_hash)[:limit]
        figures[f"questions_over_limit_{split}"] = len(members) - len(chosen)
        within += chosen
    return sorted(within, key=lambda q: q.question_id)


def split_images(
    questions: Sequence[Question],
    images: Mapping[str, Image],
    figures: Counter[str],
) -> list[Image]:
    """The images in the split of their questions; one without a question stays if its source calls it training's."""
    # Pictures without a question serve the image tower and as references: in training alone.
    split_of: dict[str, str] = {}
    for question in questions:
        split_of |= dict.fromkeys(question.image_ids, question.split)
    useful = []
    for image_id, image in images.items():
        split = split_of.get(image_id, image.split)
        in_split = replace(image, split=split)
        if image_id in split_of or split == "train":
            useful.append(in_split)
    figures["images_without_question"] = len(images) - len(useful)
    return useful
