"""Phantoms with reports: each question begins with its picture in words, so that a text-only model can answer it.

The worked solutions are by somebody who read neither picture nor report: from them a model learns what a solution looks
like and which answers are common, and nothing of how a report answers a question. That it can only learn by trying.
"""

from dataclasses import replace

from medmm_ray.data.sources import SourceData, SourceQuestion, SourceRequest, phantom
from medmm_ray.data.sources.phantom import PhantomQuestion, blind_solution, captions, generator, make_questions


def read(request: SourceRequest) -> SourceData:
    """As `phantom.read`, each question with its report."""
    data = phantom.read(request)
    with_reports: list[SourceQuestion] = []
    for split in ("train", "test"):
        questions = [question for question in data.questions if question.split == split]
        phantoms = make_questions(
            request.seed,
            split,
            len(questions),
            0,
            request.hardness or phantom.PLAIN,
        )
        for question, drawn_question in zip(questions, phantoms, strict=True):
            with_reports.append(_with_report(request, question, drawn_question))
    return replace(data, questions=with_reports)


def _with_report(request: SourceRequest, question: SourceQuestion, drawn_question: PhantomQuestion) -> SourceQuestion:
    rng = generator("report", request.seed, question.name)
    reports = captions(drawn_question.case)
    report = reports[int(rng.integers(len(reports)))]
    number = request.num_worked if question.split == "train" else 0
    worked = []
    for _ in range(number):
        steps, _letter = blind_solution(drawn_question, rng)
        worked.append(tuple(steps))
    return replace(
        question,
        question=f"Report: {report} {question.question}",
        worked=tuple(worked),
    )
