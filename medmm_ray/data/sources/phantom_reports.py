"""Phantoms told in words: each question begins with a report of its picture, so that a model without eyes can answer.

The worked solutions are by somebody who read neither picture nor report: from them a model learns what a solution looks
like and which answers are common, and nothing of how a report answers a question. That it can only learn by trying.
"""

from dataclasses import replace

from medmm_ray.data.sources import SourceData, SourceQuestion, SourceRequest, phantom
from medmm_ray.data.sources.phantom import PhantomQuestion, blind_solution, captions, generator, make_questions


def read(request: SourceRequest) -> SourceData:
    """As `phantom.read`, each question with its report."""
    data = phantom.read(request)
    told: list[SourceQuestion] = []
    for split in ("train", "test"):
        asked = [question for question in data.questions if question.split == split]
        items = make_questions(request.seed, split, len(asked), 0, request.hardness or phantom.PLAIN)
        told += [_told(request, question, item) for question, item in zip(asked, items, strict=True)]
    return replace(data, questions=told)


def _told(request: SourceRequest, question: SourceQuestion, item: PhantomQuestion) -> SourceQuestion:
    rng = generator("report", request.seed, question.name)
    reports = captions(item.case)
    report = reports[int(rng.integers(len(reports)))]
    number = request.num_worked if question.split == "train" else 0
    worked = tuple(tuple(blind_solution(item, rng)[0]) for _ in range(number))
    return replace(question, question=f"Report: {report} {question.question}", worked=worked)
