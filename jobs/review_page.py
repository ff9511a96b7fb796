"""The page where experts read the run's queue, until Ctrl-C; ``--export`` makes what they said into a table.

python -m jobs.review_page recipe.yaml run=… --add-reader NAME [--role adjudicator]
python -m jobs.review_page recipe.yaml run=… [port=7870] [readers=FILE]
python -m jobs.review_page recipe.yaml run=… --export
"""

import argparse
import getpass
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from jobs.graph import MAKER
from jobs.step import Run, launch, parser, read_arguments
from medmm_ray.config import ConfigError
from medmm_ray.data.records import Question, QuestionReview, ReviewItem, from_dict
from medmm_ray.data.tables import Origin, Table, write_rows
from medmm_ray.pages.review_page import ReviewPageConfig
from medmm_ray.pages.review_page.cases import Background, Cases, Row, question_cases, rows_of, step_cases
from medmm_ray.pages.review_page.desk import Desk
from medmm_ray.pages.review_page.export import freeze, frozen, log_uri, question_reviews
from medmm_ray.pages.review_page.readers import Door, Reader, add_reader, read_readers
from medmm_ray.pages.review_page.verdicts import VerdictLog

log = logging.getLogger("medmm_ray")


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser("review_page", "Experts read the run's queue in a page on 127.0.0.1.")
    arguments.add_argument("--add-reader", metavar="NAME", help="add a reader (the password is asked for) and end")
    arguments.add_argument("--role", default="reader", help="with --add-reader: reader or adjudicator")
    arguments.add_argument("--export", action="store_true", help="export the verdicts so far and end")
    return launch(arguments, words, _main, ReviewPageConfig)


def _main(arguments: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    run = Run(read_arguments(arguments, "review_page"))
    if arguments.add_reader:
        password = (
            getpass.getpass(f"password of {arguments.add_reader}: ") if sys.stdin.isatty() else sys.stdin.readline()
        )
        add_reader(readers_file(run), arguments.add_reader, password.rstrip("\n"), arguments.role)
        print(f"{arguments.add_reader} ({arguments.role}) is in {readers_file(run)}")
    elif arguments.export:
        print(export(run))
    else:
        serve(run)
    return 0


def readers_file(run: Run) -> Path:
    """The recipe's file of readers, or the run's own."""
    if run.recipe.review_page.readers is None and "://" in run.root:
        raise ConfigError(f"the run {run.root} is not a local folder: name a local file of readers, readers=FILE")
    return Path(run.recipe.review_page.readers or f"{run.root}/readers.json")


def verdict_log(run: Run) -> VerdictLog:
    return VerdictLog(log_uri(run.root, run.recipe.review_page.what))


def questions_table(run: Run) -> Table:
    """The questions that are reviewed: the table that the recipe names, or the run's own."""
    given = run.recipe.review_page.questions or "questions"
    return run.table(given) if given in MAKER else Table(given, Question)


def cases(run: Run) -> Cases:
    """All that the page shows, from the run's tables."""
    if run.recipe.review_page.what == "questions":
        questions = questions_table(run).to_arrow().to_pylist()
        return question_cases(questions, background(run, questions, {}))
    queue = [from_dict(ReviewItem, row) for row in run.table("review_queue").to_arrow().to_pylist()]
    ids = {item.question_id for item in queue}
    of_queue = rows_of(run.table("questions"), "question_id", ids)
    evidence = rows_of(run.table("evidence"), "question_id", ids)
    solutions = rows_of(run.table("solutions"), "question_id", ids, ["question_id", "solutions"])
    return step_cases(queue, of_queue, solutions, background(run, list(of_queue.values()), evidence))


def background(run: Run, questions: Sequence[Row], evidence: Mapping[str, Row]) -> Background:
    judge = run.recipe.judge
    images = {image for question in questions for image in question["image_ids"]}
    images |= {image["image_id"] for row in evidence.values() for image in row["images"]}
    documents = {document["document_id"] for row in evidence.values() for document in row["documents"]}
    titles = rows_of(run.table("documents"), "document_id", documents, ["document_id", "title"]) if documents else {}
    return Background(
        images=rows_of(run.table("images"), "image_id", images, ["image_id", "uri"]),
        evidence=evidence,
        titles={key: row["title"] for key, row in titles.items()},
        num_documents=judge.num_documents,
        num_references=judge.num_references,
    )


def serve(run: Run) -> None:
    """Serve the page until Ctrl-C."""
    config = run.recipe.review_page
    readers = read_readers(readers_file(run))
    shown = cases(run)
    verdicts = verdict_log(run)
    verdicts.claim()
    try:
        desk = Desk(
            [case.item for case in shown.shown.values()], verdicts, {n: r.role for n, r in readers.items()}, config
        )
        _listen(config, desk, shown, readers)
    finally:
        verdicts.release()


def _listen(config: ReviewPageConfig, desk: Desk, shown: Cases, readers: Mapping[str, Reader]) -> None:
    import uvicorn

    from medmm_ray.pages.review_page.app import build_app

    encrypted = config.certificate is not None
    app = build_app(desk, shown, Door(readers, config.session_hours), encrypted)
    server = uvicorn.Server(
        uvicorn.Config(
            app, host=config.host, port=config.port, log_level="warning", access_log=False,
            ssl_certfile=config.certificate, ssl_keyfile=config.private_key,
        )
    )  # fmt: skip
    server.config.load()
    sock = server.config.bind_socket()
    url = f"{'https' if encrypted else 'http'}://{config.host}:{sock.getsockname()[1]}"
    print(f"{len(desk.items)} {config.what} to review, {len(readers)} readers\n  {url}\nCtrl-C stops it", flush=True)
    server.run(sockets=[sock])


def export(run: Run) -> str:
    """Freeze the verdicts so far; of questions, write their table too. Gives what to do next."""
    verdicts = verdict_log(run)
    name, number = freeze(verdicts)
    if run.recipe.review_page.what == "steps":
        return (
            f"{number} verdicts are in the export {name}\n"
            f"take them as labels: python -m jobs.review RECIPE run={run.recipe.run} review.expert=readers "
            f"review.verdicts={name}"
        )
    questions = questions_table(run)
    table = Table(f"{run.root}/question_reviews/{name}", QuestionReview)
    if not table.is_complete:
        rows = question_reviews(frozen(verdicts.uri, name), questions.to_arrow().to_pylist())
        origin = Origin(
            name="question_reviews",
            fingerprint=name,
            config={},
            upstream={"questions": questions.manifest().fingerprint},
        )
        write_rows(table, rows, origin, "question_id")
    return f"{number} verdicts are in the export {name}, {table.manifest().rows} reviews in {table.uri}"


if __name__ == "__main__":
    sys.exit(main())
