"""The demo page in headless Chromium, on a scripted model: by mouse, by keys, on a phone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import expect

from medmm_ray.reward_model import StepAttention
from medmm_ray.reward_model.occlusion import PatchAttention
from medmm_ray.service.app import api
from medmm_ray.service.backend import Backend, TileMaps
from medmm_ray.service.config import ServeConfig
from medmm_ray.service.models import Models
from medmm_ray.service.policy import GeneratorPolicy, PolicyConfig
from medmm_ray.service.readiness import Readiness
from medmm_ray.service.rerank import ModelInput, Scored, steps_of
from tests.doubles.fake_generator import FakeGenerator
from tests.doubles.served_app import served_app
from tests.pages.review_page.test_browser import ARGUMENTS, CHROMIUM
from tests.service.web import WITH_IMAGES, Scores

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is on the PATH"),
]

DESK, PHONE = (1440, 900), (390, 844)
# Only the lower left tile of 4 x 4 speaks, against each first step and for the others.
AGAINST = [[0.0] * 4, [0.0] * 4, [0.0] * 4, [-2.0, 0.0, 0.0, 0.0]]
FOR = [[0.0] * 4, [0.0] * 4, [0.0] * 4, [2.0, 0.0, 0.0, 0.0]]
# Three quarters of the attention lie in the upper right of the middle half, one quarter in its lower left.
ATTENTION = StepAttention([[0, 0, 0, 0.75], [0.0] * 4, [0.0] * 4, [0.25, 0, 0, 0]], share=0.4)
MIDDLE = (0.25, 0.0, 0.75, 1.0)
POOLED = "Which side, by a model that reads pooled tokens?"


def texts_of(case: ModelInput) -> list[list[str]]:
    return [steps_of(solution if isinstance(solution, str) else list(solution)) for solution in case.solutions]


async def score(case: ModelInput) -> Scored:
    """The longer a step, the better; the image speaks against a first step and for the others."""
    scores = []
    for steps in texts_of(case):
        image = [-1.5 if i == 0 else 0.5 for i in range(len(steps))]
        scores.append(Scores([len(step) / 20 for step in steps], image if case.image else [0.0] * len(steps)))
    return Scored(scores, num_tokens=7)


async def map_tiles(case: ModelInput) -> TileMaps:
    maps = [[AGAINST if i == 0 else FOR for i in range(len(steps))] for steps in texts_of(case)]
    attention = PatchAttention(MIDDLE, [[ATTENTION] * len(steps) for steps in texts_of(case)])
    return TileMaps(maps, attention=None if case.question.startswith(POOLED) else attention)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    sampled = "Step 1: The image is looked at with care.\nStep 2: So the answer is (B)."
    policy = GeneratorPolicy(FakeGenerator(lambda prompt, seed: sampled), PolicyConfig())
    backend = Backend(score, ServeConfig(model="m"), WITH_IMAGES, Readiness([2.0]), policy=policy, map_tiles=map_tiles)
    with served_app(api(Models.single(backend), None)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: "Browser", url: str, size: tuple[int, int]) -> "Iterator[Page]":
    """The page with its first example; at its end nothing came from elsewhere, and no script failed."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    context.set_default_timeout(20_000)
    page = context.new_page()
    requests: list[str] = []
    faults: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.goto(f"{url}/demo")
    page.wait_for_selector("#no-image:not([hidden])")
    yield page
    assert [name for name in requests if not name.startswith((url, "data:"))] == []
    # The browser notes an answer of 4xx by itself.
    assert [fault for fault in faults if not fault.startswith("Failed to load resource")] == []
    context.close()


def test_a_case_is_scored_and_its_steps_are_traced(browser: "Browser", url: str) -> None:
    with opened(browser, url, DESK) as page:
        assert page.inner_text(".notice").startswith("Not a medical device.")
        page.fill("#question", "Which side?")
        page.fill("#options", "left\nright")
        page.click("#documents-fold summary")
        page.fill("#documents", "One text.\n\nAnother text.")
        while page.locator("#solutions .one").count() > 1:
            page.locator("#solutions .one button").last.click()
        first = "This step has forty letters, as counted.\nSo the answer is (B)."
        page.locator("#solutions textarea").first.fill(first)
        page.click("#add")
        page.keyboard.type("Short.\nSo the answer is (A).")
        page.click("#go")
        page.wait_for_selector(".step")
        # 40 letters: 2.0 - 1.5 = 0.5, of which the sigmoid is 62 %; 21 letters: 1.05 + 0.5 = 1.55, 82 %.
        assert page.locator(".step .p").all_inner_texts()[:2] == ["✓ 62 %", "✓ 82 %"]
        assert page.locator(".step .image-part").all_inner_texts()[:2] == ["image −1.50", "image +0.50"]
        assert "(B) right" in page.inner_text("#answer .main")
        assert page.locator(".card summary b").all_inner_texts() == ["1. Solution 1", "2. Solution 2"]
        assert page.inner_text("#evidence summary") == "Evidence: 2 documents that were read"
        page.locator(".step").nth(0).click()
        expect(page.locator("#map-says")).to_contain_text("lower left")
        assert "changes the step by +2.00 log-odds" in page.inner_text("#map-says")
        assert overlay(page) == {12: [240, 149, 63, 255]}
        page.keyboard.press("ArrowDown")
        expect(page.locator("#map-says")).to_contain_text("Step 2")
        assert overlay(page) == {12: [111, 183, 234, 255]}
        assert page.locator(".step[aria-pressed=true] span").nth(1).inner_text() == "So the answer is (B)."


def test_where_the_attention_lies_is_shown_beside_what_changes_the_score(browser: "Browser", url: str) -> None:
    with opened(browser, url, DESK) as page:
        by_attention = page.get_by_label("where the attention lies")
        page.click("#go")
        page.wait_for_selector(".step")
        expect(by_attention).to_be_disabled()
        page.locator(".step").nth(0).click()
        expect(page.locator("#map-says")).to_contain_text("changes the step by")
        by_attention.check()
        says = page.inner_text("#map-says")
        assert "most attention at the upper right of the picture, 75 % of what lies on its patches" in says
        assert "They have 40 % of the whole attention." in says
        tiles = overlay(page)
        assert tiles[3] == [232, 215, 96, 255]
        assert {place: tile[3] for place, tile in tiles.items()} == {3: 255, 12: 85}
        assert page.is_visible("#of-attention")
        assert not page.is_visible("#of-tiles")
        # The grid lies over the middle half of the picture alone.
        assert page.evaluate(SPREAD) == pytest.approx([0.25, 0.75], abs=0.01)
        page.keyboard.press("Tab")
        page.locator(".step").nth(1).click()
        expect(page.locator("#map-says")).to_contain_text("Step 2")
        assert page.locator("input[value=attention]").is_checked(), "the next step is shown the same way"
        page.get_by_label("what changes the score").check()
        assert overlay(page) == {12: [111, 183, 234, 255]}
        assert page.evaluate(SPREAD) == pytest.approx([0.0, 1.0], abs=0.01)


SPREAD = """() => {
  const [picture, overlay] = ["picture", "overlay"].map((id) => document.getElementById(id).getBoundingClientRect());
  // The examples are square: the picture is as wide as it is high, in the middle of its box.
  const start = picture.left + (picture.width - picture.height) / 2;
  return [(overlay.left - start) / picture.height, (overlay.right - start) / picture.height];
}"""


def test_without_an_attention_over_patches_the_page_says_why(browser: "Browser", url: str) -> None:
    with opened(browser, url, DESK) as page:
        page.fill("#question", POOLED)
        page.click("#go")
        page.wait_for_selector(".step")
        page.locator(".step").nth(0).click()
        expect(page.locator("#map-says")).to_contain_text("changes the step by")
        expect(page.get_by_label("where the attention lies")).to_be_disabled()
        assert page.inner_text("#no-attention") == "this model reads an image as one token, not in patches"


def overlay(page: "Page") -> dict[int, list[int]]:
    """The tiles of the overlay that are painted: place -> colour."""
    script = "() => [...document.querySelector('#overlay').getContext('2d').getImageData(0, 0, 4, 4).data]"
    values: list[int] = page.evaluate(script)
    tiles = [values[4 * i : 4 * i + 4] for i in range(16)]
    return {i: tile for i, tile in enumerate(tiles) if tile[3]}


def test_the_order_by_another_aggregate_is_shown(browser: "Browser", url: str) -> None:
    with opened(browser, url, DESK) as page:
        solutions = page.locator("#solutions textarea")
        solutions.nth(0).fill("Short.\nThis last step is by far the longest of them all.")
        solutions.nth(1).fill("This step has forty letters, as counted.\nA middling last step.")
        page.click("#go")
        page.wait_for_selector(".step")
        by_worst = page.locator(".card summary b").all_inner_texts()
        page.check("input[value=last]")
        by_last = page.locator(".card summary b").all_inner_texts()
        assert by_worst[0] != by_last[0] == "1. Solution 1"
        assert page.locator("#orders tr.now th").inner_text() == "last step"
        assert page.locator("#orders .moved").count() > 0


def test_the_policy_samples(browser: "Browser", url: str) -> None:
    with opened(browser, url, DESK) as page:
        page.check("#way-sampled")
        page.fill("#num-samples", "16")
        page.click("#go")
        expect(page.locator("#status")).to_contain_text("of 16 samples")
        assert "sure to stay" in page.inner_text("#status")
        assert "(B)" in page.inner_text("#answer .main")


def test_by_keys_alone_and_on_a_phone(browser: "Browser", url: str) -> None:
    with opened(browser, url, PHONE) as page:
        page.focus("#go")
        page.keyboard.press("Enter")
        page.wait_for_selector(".step")
        page.locator(".step").first.focus()
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        expect(page.locator("#map-says")).to_contain_text("Step 1")
        assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
        small: list[Any] = page.evaluate(
            "() => [...document.querySelectorAll('button, summary, input:not([type=radio]), select')]"
            ".filter((e) => e.offsetParent && e.getBoundingClientRect().height < 24).map((e) => e.outerHTML)"
        )
        assert small == []


def test_a_fault_is_told_in_the_services_words(browser: "Browser", url: str) -> None:
    with opened(browser, url, DESK) as page:
        page.locator("#solutions textarea").first.fill("\n".join(["a step"] * 70))
        page.click("#go")
        page.wait_for_selector("#status.fault")
        assert page.inner_text("#status").startswith("70 steps of a solution; at most 64 are allowed")
