"""The application behind the page: the login, what a reader is told, and that a kill loses nothing."""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from jobs import review_page as job
from jobs.review_page import item_views
from jobs.step import Run
from medmm_ray.pages.review_page.accounts import read_readers
from medmm_ray.pages.review_page.app import build_app
from medmm_ray.pages.review_page.assigner import Assigner
from medmm_ray.pages.review_page.login import COOKIE
from medmm_ray.pages.review_page.sessions import Sessions
from medmm_ray.pages.review_page.verdicts import VerdictLog
from tests.pages.review_page.page_process import PASSWORD, Client, hire, serving
from tests.pages.review_page.phantom_run import RECIPE, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    hire(str(folder))
    return make_run(folder, num_questions=2)


@pytest.fixture(scope="module")
def client(run: Run) -> Iterator[TestClient]:
    views = item_views(run)
    readers = read_readers(job.readers_file(run))
    log = VerdictLog(f"{run.root}/log")
    log.claim()
    assigner = Assigner(
        [view.item for view in views.by_id.values()],
        log,
        {name: reader.role for name, reader in readers.items()},
        run.recipe.review_page,
    )
    with TestClient(build_app(assigner, views, Sessions(readers, 1.0)), follow_redirects=False) as client:
        yield client


@pytest.mark.parametrize("path", ["/config", "/picture/im0", "/gradio_api/info", "/theme.css", "/nothing", "/logout"])
def test_nothing_is_told_without_a_login(path: str, client: TestClient) -> None:
    client.cookies.clear()
    assert client.get(path).status_code == 401
    assert client.post(path, json={}).status_code == 401
    assert client.get(path, headers={"cookie": f"{COOKIE}=made-up"}).status_code == 401
    assert client.get("/").headers["location"] == "/login"


def test_the_login_and_what_every_answer_says_to_the_browser(client: TestClient) -> None:
    client.cookies.clear()
    assert client.get("/login").status_code == 200
    wrong = client.post("/login", data={"name": "anna", "password": "wrong"})
    assert (wrong.status_code, COOKIE in wrong.cookies) == (401, False)
    assert "Name or password is wrong." in wrong.text
    assert client.post("/login", content=b"x" * 5000).status_code == 413
    right = client.post("/login", data={"name": " Anna", "password": PASSWORD})
    assert right.status_code == 303
    assert {"HttpOnly", "SameSite=strict"} <= set(right.headers["set-cookie"].split("; "))
    page = client.get("/")
    assert page.status_code == 200
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    picture = client.get("/picture/im0")
    assert (picture.status_code, picture.headers["content-type"], picture.headers["cache-control"]) == (
        200, "image/png", "no-store",
    )  # fmt: skip
    assert client.get("/picture/im99").status_code == 404
    assert client.post("/logout").status_code == 303
    assert client.get("/config").status_code == 401


def test_passwords_are_asked_for_by_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PASSWORD}\n"))
    assert job.main([RECIPE, f"run={tmp_path}", "--add-reader", "dora", "--role", "adjudicator"]) == 0
    told = capsys.readouterr().out
    assert told == f"dora (adjudicator) is in {tmp_path}/readers.json\n"
    assert Sessions(read_readers(tmp_path / "readers.json"), 1.0).log_in("dora", PASSWORD, "") is not None
    assert job.main([RECIPE, "run=memory://x", "--add-reader", "dora"]) == 2
    assert "name a local file of readers" in capsys.readouterr().err
    assert job.main([RECIPE, f"run={tmp_path / 'none'}"]) == 2
    assert "add readers with --add-reader NAME" in capsys.readouterr().err
    assert job.main(["--help"]) == 0
    assert "second_reader_share" in capsys.readouterr().out


@pytest.mark.engine
def test_readers_at_once_are_blind_and_a_kill_loses_nothing(tmp_path: Path) -> None:
    """Two readers work as fast as they can while the server is killed three times, at any moment."""
    hire(str(tmp_path))
    run = make_run(tmp_path, num_questions=30, size=32, steps=(0, 1, 2, 3))
    everything = set(item_views(run).by_id)
    acknowledged: list[tuple[str, str]] = []
    rng = random.Random(0)
    for kill in range(4):
        with serving(str(tmp_path), "second_reader_share=0") as page:

            def read(reader: str, url: str = page.url) -> None:
                try:
                    client = Client(url, reader)
                    view = client.call("show")
                    while view["case"]:
                        assert view["others"] == []
                        item_id = view["case"]["item"]["item_id"]
                        view = client.call("submit", item_id=item_id, verdict="right")
                        acknowledged.append((reader, item_id))
                except httpx.TransportError:
                    pass

            threads = [threading.Thread(target=read, args=(name,)) for name in ("anna", "ben")]
            for thread in threads:
                thread.start()
            if kill < 3:
                aim = len(acknowledged) + rng.randint(5, 20)
                while len(acknowledged) < aim:
                    time.sleep(rng.random() * 0.004)
                page.process.kill()
            for thread in threads:
                thread.join()
    kept = [(v.reader, v.item_id) for v in VerdictLog(f"{tmp_path}/reader_verdicts/steps").read()]
    assert set(acknowledged) <= set(kept)
    assert len(kept) == len(set(kept))
    assert sorted(item for _, item in kept) == sorted(everything)
    assert {reader for reader, _ in kept} == {"anna", "ben"}
