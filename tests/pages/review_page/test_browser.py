"""The page in headless Chromium: a reader, a second reader, an adjudicator; keys, image, resuming, export."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from jobs.graph import BY_NAME
from jobs.review_page import export, item_views
from jobs.step import Run, load_recipe, run_step
from medmm_ray.pages.review_page.verdicts import VerdictLog
from tests.pages.review_page.page_process import PASSWORD, hire, serving
from tests.pages.review_page.phantom_run import RECIPE, make_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SIZES = ((1440, 900), (1280, 720))
FITS = """() => [...document.querySelectorAll(
  '.review-page header, .stage, .tools, .paper > *:not([hidden])')].every((e) => {
  const { height, left, top, right, bottom } = e.getBoundingClientRect();
  return !height || (left >= 0 && top >= 0 && right <= innerWidth + 0.5 && bottom <= innerHeight + 0.5);
}) && document.scrollingElement.scrollHeight <= innerHeight"""

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is on the PATH"),
]


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Reading:
    """One person at the page."""

    def __init__(self, browser: "Browser", url: str, name: str, size: tuple[int, int] = SIZES[0]) -> None:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]})
        context.set_default_timeout(20_000)
        self.page: Page = context.new_page()
        self.asked: list[str] = []
        self.faults: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.goto(url)
        self.log_in(name)

    def log_in(self, name: str, password: str = PASSWORD) -> None:
        self.page.fill("#name", name)
        self.page.fill("#password", password)
        self.page.keyboard.press("Enter")
        self.page.wait_for_selector("#mine:not(:empty)")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def verdict(self, *keys: str) -> str:
        """Press keys that save; gives what the page says of it."""
        before = self.page.inner_text("#mine")
        self.press(*keys)
        self.page.wait_for_function("before => document.querySelector('#mine').innerText !== before", arg=before)
        return self.text("#said")

    def text(self, place: str) -> str:
        return str(self.page.inner_text(place)).strip()

    def step(self) -> str:
        return self.text("#steps .now span")

    def shows(self, place: str) -> bool:
        return bool(self.page.is_visible(place))


def slope(reading: Reading) -> float:
    return float(reading.page.get_attribute("#window feFuncR", "slope") or 0)


def scale(reading: Reading) -> tuple[float, ...]:
    style = reading.page.get_attribute("#picture", "style") or ""
    return tuple(float(number) for number in re.findall(r"-?[\d.]+(?:e-?\d+)?", style))


def look_at_the_image(reading: Reading) -> None:
    page = reading.page
    page.wait_for_selector("#reading:not(:empty)")
    page.wait_for_function("document.querySelector('#picture').style.transform")
    assert (slope(reading), reading.text("#reading")) == (1.0, "100 %   W 255  L 128")
    box = page.locator("#stage").bounding_box()
    assert box
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    before = scale(reading)
    page.mouse.move(x, y)
    page.mouse.wheel(0, -347)
    page.wait_for_function("document.querySelector('#reading').innerText.startsWith('200 %')")
    zoomed = scale(reading)
    assert zoomed[2] == pytest.approx(2 * before[2], rel=1e-3)
    page.mouse.down()
    page.mouse.move(x + 40, y - 25)
    page.mouse.up()
    assert scale(reading) == pytest.approx((zoomed[0] + 40, zoomed[1] - 25, zoomed[2]))
    page.mouse.down(button="right")
    page.mouse.move(x - 60, y)
    page.mouse.up(button="right")
    assert reading.text("#reading") == "200 %   W 185  L 140"
    assert slope(reading) == pytest.approx(255 / 185)
    reading.press("w")
    assert "W 130  L 75" in reading.text("#reading")
    reading.press("v")
    assert slope(reading) == pytest.approx(-255 / 130)
    reading.press("Home", "ArrowDown")
    assert reading.text("#reading") == "100 %   W 255  L 128"
    assert reading.text("#caption").startswith("Similar case: ")
    reading.press("ArrowUp")
    assert reading.text("#caption") == "This patient"


def look_into_the_documents(reading: Reading) -> None:
    assert not reading.shows("#documents")
    reading.press("/")
    reading.page.keyboard.type("n1 zzz")  # letters and digits that are keys elsewhere
    assert reading.text("#found") == "0 of 4"
    reading.page.fill("#search", "costophrenic")
    hits = reading.page.locator("#passages article").count()
    assert 0 < hits < 4
    assert reading.page.locator("#passages mark").first.inner_text().lower() == "costophrenic"
    reading.press("Escape")
    assert not reading.shows("#documents")


def test_two_readers_an_adjudicator_and_an_export(browser: "Browser", tmp_path: Path) -> None:
    hire(str(tmp_path))
    run = make_run(tmp_path, num_questions=2, size=128)
    steps = [case.steps[case.step_index] for case in item_views(run).by_id.values() if case.step_index is not None]
    with serving(str(tmp_path), "second_reader_share=1") as page:
        anna = Reading(browser, page.url, "anna")
        first_reader(anna, steps)
        ben = Reading(browser, page.url, "ben", SIZES[1])
        second_reader(ben, steps)
        cora = Reading(browser, page.url, "cora", SIZES[1])
        adjudicator(cora, steps)
        for reading in (anna, ben, cora):
            assert [url for url in reading.asked if not url.startswith((page.url, "data:", "blob:"))] == []
            assert reading.faults == []
        server_dies(anna, page)
    taken(run)


def first_reader(anna: Reading, steps: list[str]) -> None:
    page = anna.page
    assert (anna.text("#who"), anna.step()) == ("anna", steps[0])
    for width, height in SIZES:
        page.set_viewport_size({"width": width, "height": height})
        assert page.evaluate(FITS), (width, height)
    look_at_the_image(anna)
    look_into_the_documents(anna)
    assert anna.verdict("1") == "Saved: ✓ Right"
    assert anna.step() == steps[1]
    anna.press("0")
    assert anna.shows("#faults")
    assert page.evaluate(FITS)
    anna.press("l", "i", "l", "m", "f")
    page.keyboard.type("Other side: 1 0 z")
    assert anna.verdict("Enter") == "Saved: ✕ Wrong, medicine, image"
    assert page.evaluate("document.activeElement.tagName") != "TEXTAREA"
    assert anna.step() == steps[2]

    page.reload()
    page.wait_for_selector("#steps .now")
    assert (anna.step(), anna.text("#mine")) == (steps[2], "you 2 of 4")
    anna.press("ArrowLeft")
    page.wait_for_selector("#mark:not(:empty)")
    assert (anna.step(), anna.text("#mark")) == (steps[1], "You said: ✕ Wrong, medicine, image")
    assert page.input_value("#feedback") == "Other side: 1 0 z"
    anna.press("ArrowRight")
    page.wait_for_selector("#mark", state="hidden")
    assert anna.step() == steps[2]
    anna.verdict("u")
    assert anna.step() == steps[3]
    assert anna.verdict("z") == "Taken back"
    assert anna.step() == steps[2]
    anna.verdict("n")
    anna.press("?")
    assert "take the last verdict back" in anna.text("#keys")
    anna.press("Escape")
    page.focus("#verdicts .right")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.click("#verdicts .right")
    page.wait_for_selector("#done h1")
    assert anna.text("#done h1") == "Nothing left for you. Thank you."


def second_reader(ben: Reading, steps: list[str]) -> None:
    """Blind to the first one: everything is open, and nothing that the server sent says otherwise."""
    assert (ben.step(), ben.text("#mine")) == (steps[0], "you 0 of 4")
    assert not ben.shows("#others")
    answers: list[Any] = []
    ben.page.on("response", lambda r: answers.append(r) if "component_server" in r.url else None)
    for key in ("1", "+", "n", "1"):
        ben.verdict(key)
    told = [answer.json() for answer in answers]
    assert len(told) == 4
    assert "Other side" not in str(told)
    assert [answer["others"] for answer in told] == [[]] * 4
    assert ben.text("#all") == "all: 3 of 4 decided, 1 disputed"


def adjudicator(cora: Reading, steps: list[str]) -> None:
    assert (cora.text("#who"), cora.step()) == ("cora · adjudicator", steps[1])
    assert [line for line in cora.text("#others").split("\n") if line] == [
        "Reader A: ✕ Wrong, medicine, image", "Other side: 1 0 z", "Reader B: ✓ Right",
    ]  # fmt: skip
    assert cora.page.evaluate(FITS)
    cora.verdict("1")
    assert cora.text("#done h1") == "Nothing left for you. Thank you."
    assert cora.text("#all") == "all: 4 of 4 decided"


def server_dies(anna: Reading, page: Any) -> None:
    """What was not saved is not called saved."""
    page.process.kill()
    page.process.wait()
    anna.press("z")
    anna.page.wait_for_selector("#lost-why:not(:empty)")
    assert anna.text("#lost-why") == "The server does not answer. What was saved before is safe."


def taken(run: Run) -> None:
    """The export's labels, through the review step."""
    assert export(run).startswith("11 verdicts are in the export ")
    [name] = [p.stem for p in Path(f"{run.root}/reader_verdicts/steps/exports").iterdir()]
    words = ["review.expert=readers", f"review.verdicts={name}", "review.review_steps=1000", f"run={run.root}"]
    again = Run(load_recipe([RECIPE, *words]))
    run_step(again, BY_NAME["review"])
    rows = again.table("expert_labels").to_arrow().to_pylist()
    found = {(r["solution_id"], r["annotator"]): [s["label"] for s in r["steps"]][1:3] for r in rows}
    assert found == {
        ("s0-0", "anna"): [1, 0],
        ("s0-0", "ben"): [1, 1],
        ("s0-0", "adjudicator"): [None, 1],
        ("s1-0", "anna"): [None, 1],
        ("s1-0", "ben"): [None, 1],
    }
    [wrong] = [s for r in rows for s in r["steps"] if s["label"] == 0]
    assert [wrong[name] for name in ("logical", "medical", "image_grounded", "reason")] == [
        True, False, False, "Other side: 1 0 z",
    ]  # fmt: skip


def test_questions_are_reviewed_by_key(browser: "Browser", tmp_path: Path) -> None:
    hire(str(tmp_path))
    run = make_run(tmp_path, num_questions=2, size=64)
    given = run.uri("questions")
    overrides = ("what=questions", f"questions={given}", "second_reader_share=0")
    with serving(str(tmp_path), *overrides) as page:
        anna = Reading(browser, page.url, "anna", SIZES[1])
        assert anna.text("#answer").startswith("Answer: ")
        assert anna.page.evaluate(FITS)
        anna.press("s", "e", "t")
        anna.press("f")
        anna.page.keyboard.type("Ask for the side.")
        anna.press("Enter")
        assert anna.verdict("x") == "Saved: ✕ Drop"
        anna.press("a", "e")
        anna.verdict("k")
        assert anna.text("#done h1") == "Nothing left for you. Thank you."
        assert anna.faults == []
    verdicts = VerdictLog(f"{tmp_path}/reader_verdicts/questions").read()
    assert [(v.item_id, v.verdict, v.answer_right, v.difficulty, v.feedback) for v in verdicts] == [
        ("q0", "drop", False, "hard", "Ask for the side."),
        ("q1", "keep", True, "easy", ""),
    ]
