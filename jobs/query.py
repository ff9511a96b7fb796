"""One held-out question through the real service: start it, send the question, print the answer, keep it.

The answer is kept in the run's folder; as long as the model is the same, a second call shows it without a service.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.compute as pc

from jobs.entry import launch, parser, read_arguments
from jobs.serve import serve_config
from jobs.step import Run
from medmm_ray.client import Client, rerank_request
from medmm_ray.config import ConfigError
from medmm_ray.data.tables import filesystem, read_json, write_file
from medmm_ray.engines.images import read_bytes
from medmm_ray.service.rerank import RerankAnswer, RerankRequest
from medmm_ray.service.show import show
from medmm_ray.steps.score import with_trained_inputs


def main(words: Sequence[str] | None = None) -> int:
    """Run the job; `words` are its arguments, else the command line's. Gives the exit status."""
    arguments = parser("query", "Serve the run's model, send it one held-out question and print the answer.")
    return launch(arguments, words, _main)


def _main(arguments: argparse.Namespace) -> int:
    run = Run(read_arguments(arguments, "serve"))
    answer_uri = f"{run.root}/answer.json"
    model = run.model_id("two_tower")
    stored = read_json(answer_uri)
    if stored is None or stored["model"] != model:
        request, gold = example(run)
        stored = {
            "model": model,
            "gold": gold,
            "request": request.model_dump(mode="json"),
            "answer": answer_of(run, request),
        }
        write_file(*filesystem(answer_uri), json.dumps(stored, indent=1).encode())
    request = RerankRequest.model_validate(stored["request"])
    show(request, RerankAnswer.model_validate(stored["answer"]), gold=stored["gold"])
    print(f"\nThe request and the answer: {answer_uri}\nServe it yourself: make serve, then POST /v1/rerank")
    return 0


def answer_of(run: Run, request: RerankRequest) -> dict[str, Any]:
    """The service's answer; the service runs for this one request."""
    from medmm_ray.service.deployment import running
    from medmm_ray.session import session

    # For this one request of this process's own.
    config = serve_config(run).model_copy(update={"access": "loopback", "host": "127.0.0.1"})
    with session(), running(config) as url, Client(url) as client:
        return client.rerank(request).model_dump(mode="json")


def example(run: Run) -> tuple[RerankRequest, str]:
    """A test question with all that is known of it, and its answer; one on which the solutions disagree, if any."""
    solutions: dict[str, list[dict[str, Any]]] = {}
    for row in run.table("solutions").to_arrow().to_pylist():
        solutions[row["question_id"]] = row["solutions"]
    question = _question(run, solutions)
    of_question = pc.field("question_id") == question["question_id"]
    evidence = run.table("evidence").to_arrow().filter(of_question).to_pylist()[0]
    scoring = with_trained_inputs(run.recipe.score, run.model("two_tower"))
    # As many as the model was trained on: the service would warn of more.
    documents = [document["text"] for document in evidence["documents"][: scoring.num_documents]]
    references = [read_bytes(image["uri"]) for image in evidence["images"][: scoring.num_references]]
    request = rerank_request(
        question["question"],
        question["options"],
        [solution["steps"] for solution in solutions[question["question_id"]]],
        documents=documents,
        image=read_bytes(_uri_of(run, question["image_ids"][0])),
        reference_images=references,
        answer_type=question["answer_type"],
    )
    return request, question["answer"]


def _question(run: Run, solutions: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """The first test question with an image on whose answer its solutions disagree, else the first with an image."""
    questions = run.table("questions").to_arrow()
    is_test = pc.equal(questions["split"], "test")
    rows: list[dict[str, Any]] = questions.filter(is_test).sort_by("question_id").to_pylist()
    first: dict[str, Any] | None = None
    for row in rows:
        question_solutions = solutions.get(row["question_id"])
        if not row["image_ids"] or not question_solutions:
            continue
        first = first or row
        # A solution without an answer disagrees with nobody.
        answers = {solution["answer"] for solution in question_solutions} - {None, ""}
        if len(answers) > 1:
            return row
    if first is None:
        raise ConfigError("no test question has an image and solutions; look at the tables questions and solutions")
    return first


def _uri_of(run: Run, image_id: str) -> str:
    images = run.table("images").to_arrow(["image_id", "uri"])
    uri: str = images.filter(pc.equal(images["image_id"], image_id))["uri"][0].as_py()
    return uri


if __name__ == "__main__":
    sys.exit(main())
