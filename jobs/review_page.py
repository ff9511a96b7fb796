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

from pyarrow import fs as pafs

from jobs.entry import launch, parser, read_arguments
from jobs.graph import MAKER
from jobs.step import Run
from medmm_ray.config import ConfigError
from medmm_ray.data.records import Evidence, Question, QuestionReview, ReviewItem, from_dict
from medmm_ray.data.tables import Provenance, Table, filesystem, write_rows
from medmm_ray.pages.review_page import ReviewPageConfig
from medmm_ray.pages.review_page.accounts import ReaderAccount, add_reader, read_readers
from medmm_ray.pages.review_page.assigner import Assigner
from medmm_ray.pages.review_page.export import export_verdicts, log_uri, question_reviews, read_export
from medmm_ray.pages.review_page.item_views import Context, ItemViews, question_views, records_of, step_views, values_of
from medmm_ray.pages.review_page.sessions import Sessions
from medmm_ray.pages.review_page.verdicts import VerdictLog


def main(words: Sequence[str] | None = None) -> int:
    """Run the job; `words` are its arguments, else the command line's. Gives the exit status."""
    arguments = parser("review_page", "Experts read the run's queue in a page on 127.0.0.1.")
    arguments.add_argument("--add-reader", metavar="NAME", help="add a reader (the password is asked for) and end")
    arguments.add_argument("--role", default="reader", help="with --add-reader: reader or adjudicator")
    arguments.add_argument("--export", action="store_true", help="export the verdicts so far and end")
    return launch(arguments, words, _main, ReviewPageConfig)


def _main(arguments: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    run = Run(read_arguments(arguments, "review_page"))
    if arguments.add_reader:
        password = _password_of(arguments.add_reader)
        add_reader(readers_file(run), arguments.add_reader, password, arguments.role)
        print(f"{arguments.add_reader} ({arguments.role}) is in {readers_file(run)}")
    elif arguments.export:
        print(export(run))
    else:
        serve(run)
    return 0


def _password_of(name: str) -> str:
    """The password, typed unseen at a terminal, else the first line of the standard input."""
    if sys.stdin.isatty():
        return getpass.getpass(f"password of {name}: ").rstrip("\n")
    return sys.stdin.readline().rstrip("\n")


def readers_file(run: Run) -> Path:
    """The recipe's file of readers, or the run's own."""
    if run.recipe.review_page.readers is not None:
        return Path(run.recipe.review_page.readers)
    fs, folder = filesystem(run.root)
    if not isinstance(fs, pafs.LocalFileSystem):
        raise ConfigError(f"the run {run.root} is not a local folder: name a local file of readers, readers=FILE")
    return Path(folder) / "readers.json"


def verdict_log(run: Run) -> VerdictLog:
    """The run's log of verdicts on what the recipe reviews."""
    return VerdictLog(log_uri(run.root, run.recipe.review_page.what))


def questions_table(run: Run) -> Table:
    """The questions that are reviewed: the table that the recipe names, or the run's own."""
    name = run.recipe.review_page.questions or "questions"
    return run.table(name) if name in MAKER else Table(name, Question)


def item_views(run: Run) -> ItemViews:
    """All that the page shows, from the run's tables."""
    if run.recipe.review_page.what == "questions":
        questions = _questions(run)
        return question_views(questions, context_of(run, questions, {}))
    queue: list[ReviewItem] = []
    ids: set[str] = set()
    for row in run.table("review_queue").to_arrow().to_pylist():
        item = from_dict(ReviewItem, row)
        queue.append(item)
        ids.add(item.question_id)
    questions_by_id = records_of(run.table("questions"), "question_id", ids)
    evidence = records_of(run.table("evidence"), "question_id", ids)
    solutions = records_of(run.table("solutions"), "question_id", ids)
    context = context_of(run, list(questions_by_id.values()), evidence)
    return step_views(queue, questions_by_id, solutions, context)


def _questions(run: Run) -> list[Question]:
    return [from_dict(Question, row) for row in questions_table(run).to_arrow().to_pylist()]


def context_of(run: Run, questions: Sequence[Question], evidence: Mapping[str, Evidence]) -> Context:
    """The images and titles that the questions and their `evidence`, by question_id, name."""
    image_ids: set[str] = set()
    document_ids: set[str] = set()
    for question in questions:
        image_ids.update(question.image_ids)
    for of_question in evidence.values():
        image_ids.update(image.image_id for image in of_question.images)
        document_ids.update(document.document_id for document in of_question.documents)
    titles: dict[str, str] = {}
    if document_ids:  # without, the table need not be there
        titles = values_of(run.table("documents"), "document_id", document_ids, "title")
    return Context(
        image_uris=values_of(run.table("images"), "image_id", image_ids, "uri"),
        evidence=evidence,
        titles=titles,
        num_documents=run.recipe.judge.num_documents,
        num_references=run.recipe.judge.num_references,
    )


def serve(run: Run) -> None:
    """Serve the page until Ctrl-C."""
    config = run.recipe.review_page
    accounts = read_readers(readers_file(run))
    views = item_views(run)
    items = [view.item for view in views.by_id.values()]
    roles = {name: account.role for name, account in accounts.items()}
    verdicts = verdict_log(run)
    verdicts.claim()
    try:
        _listen(config, Assigner(items, verdicts, roles, config), views, accounts)
    finally:
        verdicts.release()


def _listen(
    config: ReviewPageConfig, assigner: Assigner, views: ItemViews, accounts: Mapping[str, ReaderAccount]
) -> None:
    import uvicorn

    from medmm_ray.pages.review_page.app import build_app

    encrypted = config.certificate is not None
    app = build_app(assigner, views, Sessions(accounts, config.session_hours), encrypted)
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        log_level="warning",
        access_log=False,
        ssl_certfile=config.certificate,
        ssl_keyfile=config.private_key,
    )
    settings.load()
    # Bound here, not by the server: with port 0 the address is known before the first request.
    sock = settings.bind_socket()
    url = f"{'https' if encrypted else 'http'}://{config.host}:{sock.getsockname()[1]}"
    print(
        f"{len(assigner.items)} {config.what} to review, {len(accounts)} readers\n  {url}\nCtrl-C stops it", flush=True
    )
    uvicorn.Server(settings).run(sockets=[sock])


def export(run: Run) -> str:
    """Freeze the verdicts so far; of questions, write their table too. Gives what to do next."""
    verdicts = verdict_log(run)
    name, number = export_verdicts(verdicts)
    if run.recipe.review_page.what == "steps":
        return (
            f"{number} verdicts are in the export {name}\n"
            f"take them as labels: python -m jobs.review RECIPE run={run.recipe.run} review.expert=readers "
            f"review.verdicts={name}"
        )
    questions = questions_table(run)
    table = Table(f"{run.root}/question_reviews/{name}", QuestionReview)
    if not table.is_complete:
        rows = question_reviews(read_export(verdicts.uri, name), _questions(run))
        origin = Provenance(
            name="question_reviews",
            fingerprint=name,
            config={},
            upstream={"questions": questions.manifest().fingerprint},
        )
        write_rows(table, rows, origin, "question_id")
    return f"{number} verdicts are in the export {name}, {table.manifest().rows} reviews in {table.uri}"


if __name__ == "__main__":
    sys.exit(main())
