"""The page of a dry run in a real browser, opened from the disk as people open it."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from estimator.result import Estimate
from reports.timeline import render_timeline

sys.path.insert(0, str(Path(__file__).parent))
from dry_estimates import dry_estimate

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
HOSTILE = "<img src=x onerror=\"document.title='owned'\">"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="Debian's chromium is not installed"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser: Any, tmp_path: Path, estimate: Estimate) -> Iterator[Callable[..., Any]]:
    """Opens the page; afterwards holds that it asked for nothing and complained of nothing."""
    path = tmp_path / "timeline.html"
    path.write_text(render_timeline(dry_estimate(estimate, name=HOSTILE)), encoding="utf-8")
    requests: list[str] = []
    complaints: list[str] = []
    contexts = []

    def open_it(**options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert {url for url in requests if not url.startswith("data:")} == {path.as_uri()}
    assert complaints == []


def reading(page: Any) -> dict[str, str]:
    rows = page.locator(".legend-table tbody tr").all()
    return {row.locator("th").inner_text().strip(): row.locator("td").first.inner_text() for row in rows}


AT_PEAK = {
    "logits": "1.00 GiB", "activations": "4.00 GiB", "gradients": "–", "optimizer": "2.00 GiB",
    "parameters": "1.00 GiB", "allocated": "8.00 GiB", "reserved": "9.00 GiB",
}  # fmt: skip


def test_the_page_opens_at_the_peak_and_runs_nothing_from_data(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.wait_for_timeout(200)
    assert "owned" not in page.title().split("'")[0]
    assert page.locator("main img").count() == 0
    assert page.locator("#when").inner_text().split("\n") == ["At the peak", "in loss"]
    assert reading(page) == AT_PEAK


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_width_makes_the_page_scroll_sideways(open_page: Callable[..., Any], width: int) -> None:
    page = open_page(viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    plot = page.locator("#plot").bounding_box()
    assert plot["width"] > 200 and plot["height"] > 200


def test_pointing_reads_a_moment_and_leaving_returns_to_the_peak(open_page: Callable[..., Any]) -> None:
    page = open_page(viewport={"width": 1280, "height": 900})
    page.locator("#plot").hover(position={"x": 1, "y": 50})
    assert page.locator("#when").inner_text().split("\n")[1] == "in forward"
    assert reading(page)["activations"] != AT_PEAK["activations"] and reading(page)["logits"] == "–"
    page.locator("h1").hover()
    assert reading(page) == AT_PEAK


def test_the_keyboard_reads_every_phase(open_page: Callable[..., Any]) -> None:
    page = open_page()
    slider = page.get_by_role("slider", name="Moment of the step")
    slider.focus()
    seen = []
    for key in ("Home", "PageUp", "PageUp", "PageUp", "PageUp", "PageUp", "End"):
        page.keyboard.press(key)
        seen.append(slider.get_attribute("aria-valuetext"))
    assert "in forward" in seen[0] and "in optimizer" in seen[-1]
    assert len(set(seen)) == len(seen) and all("allocated" in text for text in seen)
    page.keyboard.press("Home")
    for _ in range(500):  # no place holds the keyboard back
        page.keyboard.press("ArrowRight")
    assert "in optimizer" in slider.get_attribute("aria-valuetext")


def test_the_theme_follows_the_system(open_page: Callable[..., Any]) -> None:
    fills = [
        open_page(color_scheme=scheme).locator(".band").last.evaluate("e => getComputedStyle(e).fill")
        for scheme in ("light", "dark")
    ]
    assert fills == ["rgb(47, 95, 158)", "rgb(76, 128, 196)"]  # --parameters of the style sheet


def test_without_scripts_the_peak_is_there(open_page: Callable[..., Any]) -> None:
    page = open_page(java_script_enabled=False)
    assert reading(page) == AT_PEAK
    assert page.locator("button:visible, input:visible").count() == 0
    assert page.locator("#parts tbody tr").count() == 4


def test_print_is_light_has_the_peak_and_fits_the_paper(open_page: Callable[..., Any]) -> None:
    page = open_page(color_scheme="dark", viewport={"width": 718, "height": 1000})  # A4 within its margins
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 253, 251)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 718
    assert page.locator("input:visible").count() == 0
    assert reading(page) == AT_PEAK
