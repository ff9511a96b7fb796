"""The review page as a process of its own, and a client for it without a browser."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from medmm_ray.pages.review_page.accounts import add_reader
from tests.pages.review_page.phantom_run import RECIPE

PASSWORD = "correct horse battery"  # noqa: S105
READERS = {"anna": "reader", "ben": "reader", "cora": "adjudicator"}


def hire(folder: str) -> None:
    for name, role in READERS.items():
        add_reader(f"{folder}/readers.json", name, PASSWORD, role)  # type: ignore[arg-type]


@dataclass
class Page:
    url: str
    process: "subprocess.Popen[str]"


@contextmanager
def serving(folder: str, *overrides: str) -> Iterator[Page]:
    """The page of the run in `folder`, ready to answer."""
    words = [RECIPE, f"run={folder}", "review.expert=none", "port=0", *overrides]
    process = subprocess.Popen([sys.executable, "-m", "jobs.review_page", *words], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        url = next(m[0] for line in process.stdout if (m := re.search(r"http://\S+", line)))
        for _ in range(300):
            try:
                httpx.get(f"{url}/login")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        yield Page(url, process)
    finally:
        process.kill()
        process.wait()


class Client:
    """A reader's session, as the page in the browser has it."""

    def __init__(self, url: str, reader: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=30)
        assert self.http.post("/login", data={"name": reader, "password": PASSWORD}).status_code == 303
        components = self.http.get("/config").json()["components"]
        self.component = next(c["id"] for c in components if c["type"] == "html")

    def call(self, name: str, **said: Any) -> dict[str, Any]:
        body = {"data": said, "component_id": self.component, "fn_name": name, "session_hash": "test"}
        answer = self.http.post("/gradio_api/component_server", json=body)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found
