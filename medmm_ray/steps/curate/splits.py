"""Which questions and images are in which split, so that no two splits share a picture."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from medmm_ray.config import digest
from medmm_ray.data.datasets import benchmarks
from medmm_ray.data.records import Image, Question
from medmm_ray.steps.curate.config import CurateConfig
from medmm_ray.steps.curate.merging import components


def joined_groups(questions: Sequence[Question]) -> dict[str, str]:
    """For each question the name of its group: questions that share a picture, a patient or a study, directly or
    through others, share it.

    The name is the lowest of the groups that are joined in it; a question that shares nothing is a group of its own.
    """
    nodes: set[str] = set()
    edges: list[tuple[str, str]] = []
    for question in questions:
        # A group is a node as its pictures are: two patients of one picture become one group.
        group = _group_of_source(question)
        nodes.add(group)
        nodes.update(question.image_ids)
        for image_id in question.image_ids:
            edges.append((group, image_id))
    name_of_group: dict[str, str] = {}
    group_names = set(map(_group_of_source, questions))
    for component in components(nodes, edges):
        members = [node for node in component if node in group_names]
        name_of_group |= dict.fromkeys(members, members[0])
    names = {}
    for question in questions:
        names[question.question_id] = name_of_group[_group_of_source(question)]
    return names


def _group_of_source(question: Question) -> str:
    """The group that ingest gave; of a table of an earlier version the first picture, or the question alone."""
    return question.group or next(iter(question.image_ids), question.question_id)


def official_questions(questions: Sequence[Question], config: CurateConfig) -> set[str]:
    """The ids of benchmarks' test questions, where they are to stay as published."""
    if config.official_test != "keep":
        return set()
    names = benchmarks()
    return {question.question_id for question in questions if question.split == "test" and question.dataset in names}


def resplit(
    questions: Sequence[Question],
    groups: Mapping[str, str],
    config: CurateConfig,
    official_ids: Collection[str] = (),
) -> list[Question]:
    """The questions with new splits; all of a group get the one that a hash of its name decides.

    An official test stays one: what shares its groups is training's, which `drop_leaks` then takes out.
    """
    official_groups = {groups[question_id] for question_id in official_ids}

    def split(group: str) -> str:
        # A hash instead of a draw: a group keeps its split when others come or leave.
        name_hash = digest("split", config.seed, group)
        share = int(name_hash, 16) / 16**16
        return "test" if share < config.test_fraction else "train"

    split_anew = []
    for question in questions:
        group = groups[question.question_id]
        if group in official_groups:
            new_split = "test" if question.question_id in official_ids else "train"
        else:
            new_split = split(group)
        split_anew.append(replace(question, split=new_split))
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
    official_ids: Collection[str] = (),
) -> list[Question]:
    """At most `max_train` and `max_test` questions, chosen by a hash of their ids; official tests are not counted."""
    by_split: defaultdict[str, list[Question]] = defaultdict(list)
    within: list[Question] = []
    for question in questions:
        if question.question_id in official_ids:
            within.append(question)
        else:
            by_split[question.split].append(question)
    limits = {"train": config.max_train, "test": config.max_test}

    def by_hash(question: Question) -> str:
        """A place in the choice that stays when other questions come or leave."""
        return digest("limit", config.seed, question.question_id)

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
