"""The report in a real browser, opened from the disk as people open it."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from estimator.calibration.fitting import Calibration
from estimator.measured import MeasuredRun
from estimator.result import Estimate
from estimator.setup import Setup
from reports.html import render_report
from reports.training import Training

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
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


@pytest.fixture(scope="module")
def report(
    tmp_path_factory: pytest.TempPathFactory,
    runs: list[MeasuredRun],
    calibration: Calibration,
    training: Training,
    estimate_of: Callable[[Setup], Estimate],
) -> Path:
    runs = [dataclasses.replace(runs[0], source=HOSTILE, notes=HOSTILE), *runs[1:]]
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(
        render_report(runs, predict=estimate_of, calibration=calibration, training=training, title="A title"),
        encoding="utf-8",
    )
    return path


@pytest.fixture
def open_page(browser: Any, report: Path) -> Iterator[Callable[..., Any]]:
    """Opens the report; afterwards holds that it asked for nothing and complained of nothing."""
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
        page.goto(report.as_uri())
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert {url for url in requests if not url.startswith("data:")} == {report.as_uri()}
    assert complaints == []


def test_the_page_asks_for_nothing_and_runs_nothing_from_data(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.wait_for_timeout(300)
    assert page.title() == "A title"
    assert page.locator("main img, main script").count() == 0


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_width_makes_the_page_scroll_sideways(open_page: Callable[..., Any], width: int) -> None:
    page = open_page(viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = page.locator("#runs .scroll").evaluate("element => element.scrollWidth > element.clientWidth")
    assert wide or width > 360  # the table of runs scrolls in its own frame


def test_the_theme_follows_the_system_and_the_button(open_page: Callable[..., Any]) -> None:
    def ground(page: Any) -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light, dark = (open_page(color_scheme=scheme) for scheme in ("light", "dark"))
    light_ground, dark_ground = ground(light), ground(dark)
    assert light_ground != dark_ground
    button = light.get_by_role("button", name="Dark")
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    assert ground(light) == dark_ground
    assert button.get_attribute("aria-pressed") == "true"
    light.reload()
    assert ground(light) == dark_ground
    light.get_by_role("button", name="Dark").click()
    assert ground(light) == light_ground


def test_figures_take_the_colours_of_the_theme(open_page: Callable[..., Any]) -> None:
    strokes = []
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        strokes.append(
            page.locator("#memory figure svg [style*='stroke: var(--s0)']").first.evaluate(
                "e => getComputedStyle(e).stroke"
            )
        )
    assert strokes == ["rgb(31, 95, 168)", "rgb(134, 184, 242)"]  # --s0 of the style sheet


def test_a_table_is_copied_in_base_units(open_page: Callable[..., Any], runs: list[MeasuredRun]) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.locator("button[data-copy=runs]").click()
    page.get_by_text("Copied", exact=True).wait_for()
    header, *rows = page.evaluate("navigator.clipboard.readText()").rstrip("\n").split("\n")
    names = header.split("\t")
    assert len(rows) == len(runs)
    first = dict(zip(names, rows[0].split("\t"), strict=True))
    assert int(first["peak_allocated_bytes"]) == runs[0].peak_allocated_bytes
    assert float(first["step_seconds"]) == runs[0].step_seconds
    assert first["source"] == HOSTILE
    assert page.get_by_role("status").inner_text() == "The table is on the clipboard."


def test_a_table_is_copied_where_the_clipboard_is_closed_to_pages(open_page: Callable[..., Any]) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.evaluate("Object.defineProperty(navigator.clipboard, 'writeText', {value: () => Promise.reject(new Error())})")
    page.locator("button[data-copy=coefficients]").click()
    page.get_by_text("Copied", exact=True).wait_for()
    assert page.evaluate("navigator.clipboard.readText()").startswith("law\tcoefficient\tvalue\t")


def test_a_column_sorts_by_value_both_ways_with_empty_cells_last(
    open_page: Callable[..., Any], runs: list[MeasuredRun]
) -> None:
    page = open_page()
    head = page.locator("#runs thead th[data-name=peak_allocated_bytes]")
    peaks = [run.peak_allocated_bytes for run in runs if run.peak_allocated_bytes]
    empty = [""] * (len(runs) - len(peaks))
    for direction, expected in (("ascending", sorted(peaks)), ("descending", sorted(peaks, reverse=True))):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == direction
        column = head.evaluate("cell => cell.cellIndex")
        shown = page.locator("#runs tbody tr").evaluate_all("(rows, i) => rows.map(r => r.cells[i].dataset.v)", column)
        assert shown == [str(peak) for peak in expected] + empty


def test_the_keyboard_reaches_tables_and_shows_where_it_is(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    page.locator("button[data-copy=runs]").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "region"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_without_scripts_everything_is_there_but_the_buttons(open_page: Callable[..., Any]) -> None:
    page = open_page(java_script_enabled=False)
    assert page.locator("button:visible").count() == 0
    assert page.locator("#runs tbody tr").count() == 24


def test_print_is_light_and_shows_tables_in_full(open_page: Callable[..., Any]) -> None:
    page = open_page(color_scheme="dark", viewport={"width": 718, "height": 1000})  # A4 within its margins
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 253, 251)"
    assert page.locator("#runs .scroll").evaluate("e => getComputedStyle(e).overflowX") == "visible"
    assert page.evaluate("document.documentElement.scrollWidth") <= 718
    assert page.locator("button:visible").count() == page.locator("th button:visible").count()
