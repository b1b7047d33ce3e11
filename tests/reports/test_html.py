import dataclasses
import itertools
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

import reports.html
from estimator.calibration.fitting import Calibration
from estimator.errors import InputError
from estimator.measured import MEASUREMENTS, MeasuredRun
from estimator.result import Estimate
from estimator.setup import Setup
from reports.html import render_report
from reports.training import Training

Predict = Callable[[Setup], Estimate]
VOID = {"meta", "link", "br", "path", "rect", "circle", "use"}


class Page(HTMLParser):
    """The elements of a page, whether they nest, and its visible text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def full(runs: list[MeasuredRun], calibration: Calibration, training: Training, estimate_of: Predict) -> str:
    return render_report(
        runs, predict=estimate_of, calibration=calibration, training=training, skipped=[("row 7", "precision: 'fp4'")],
        title="A title", created="2026-01-02",
    )  # fmt: skip


def test_the_report_nests_and_names_everything_once(full: str) -> None:
    page = Page(full)
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [str(a["href"])[1:] for tag, a in page.tags if tag == "a" and str(a.get("href")).startswith("#")]
    assert set(links) <= set(ids)
    labels = [name for _, a in page.tags for name in str(a.get("aria-labelledby") or "").split()]
    assert set(labels) <= set(ids)


def test_headings_step_down_one_level_at_a_time(full: str) -> None:
    levels = [int(tag[1]) for tag, _ in Page(full).tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_nothing_in_the_page_points_out_of_it(full: str) -> None:
    for tag, attributes in Page(full).tags:
        for name in ("src", "href", "xlink:href", "data", "action", "srcset"):
            assert str(attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    assert "@import" not in full
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", full))


def test_the_summary_says_how_well_the_unseen_was_predicted(full: str) -> None:
    text = " ".join(Page(full).text.split())
    assert "24 fine-tuning runs of 4 models of 1M to 60M parameters" in text
    assert "1 ran out of memory, 1 hit the time limit, the others completed." in text
    assert "They predicted 2 runs that they had not seen, up to 3.0 times the size of any in the fit" in text
    assert "Refitted without the largest model (mini)" in text
    assert "lowest at epoch 2 (2.71); from epoch 2 on it overfits" in text


def test_figures_stand_for_each_quantity_against_each_axis(full: str) -> None:
    assert len(re.findall(r'id="(memory|time|checkpoint)-(seq|batch|parameters)-title"', full)) == 9
    assert len(re.findall(r'id="residual-[a-z-]*-title"', full)) == 4
    assert 'id="loss-title"' in full


def test_every_run_has_a_row_and_every_failure_its_reason(full: str, runs: list[MeasuredRun]) -> None:
    start = full.index('<figure class="table" id="runs">')
    table = full[start : full.index("</figure>", start)]
    assert table.count('<th scope="row"') + table.count("<th scope=row") == len(runs)
    assert "not enough memory: 24 GiB asked for" in table
    assert "no step ended within 120 s" in table


def test_cells_carry_base_units_for_sorting_and_copying(full: str, runs: list[MeasuredRun]) -> None:
    assert f'data-v="{runs[0].peak_allocated_bytes}"' in full
    assert 'data-name="peak_allocated_bytes"' in full
    assert f'data-v="{runs[0].step_seconds}"' in full


def test_bigger_models_are_predicted(full: str) -> None:
    start = full.index('id="predictions"')
    text = Page(full[start : full.index("</table>", start)]).text
    # From the fixture: 16 B x 8e9 + 60 B x 2,048 x sqrt(8e9) + 32,000 B x 2,048 = 139.06e9 B; 12 B x 400e9 = 4.80 TB.
    assert "130 GiB" in text
    assert "4.80 TB" in text


def test_the_same_data_gives_the_same_report(
    full: str, runs: list[MeasuredRun], calibration: Calibration, training: Training, estimate_of: Predict
) -> None:
    again = render_report(
        runs, predict=estimate_of, calibration=calibration, training=training, skipped=[("row 7", "precision: 'fp4'")],
        title="A title", created="2026-01-02",
    )  # fmt: skip
    assert again == full


@pytest.mark.parametrize("kept", ["nothing", "failures", "one run", "unmeasured"])
def test_any_subset_makes_a_report(runs: list[MeasuredRun], estimate_of: Predict, kept: str) -> None:
    chosen = {
        "nothing": [],
        "failures": [run for run in runs if run.outcome != "ok"],
        "one run": runs[:1],
        "unmeasured": [MeasuredRun(run="x", setup=Setup(model="nano"))],
    }[kept]
    for predict in (None, estimate_of):
        page = Page(render_report(chosen, predict=predict))
        assert page.open == []
        assert page.count("h1") == 1


def test_without_a_law_the_report_says_that_it_is_the_formula(runs: list[MeasuredRun], estimate_of: Predict) -> None:
    text = " ".join(Page(render_report(runs, predict=estimate_of)).text.split())
    assert "No law was fitted" in text
    assert "lines are the formula" in text
    assert "hollow points" not in text


def test_runs_without_a_prediction_are_listed_with_the_reason(runs: list[MeasuredRun], estimate_of: Predict) -> None:
    def predict(setup: Setup) -> Estimate:
        if setup.model == "nano":
            raise InputError("model: nano is too small")
        return estimate_of(setup)

    html = render_report(runs, predict=predict)
    start = html.index('id="unpredicted"')
    assert html[start : html.index("</table>", start)].count("model: nano is too small") == 6


HOSTILE = "<script>document.title='owned'</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}&amp;"


def test_everything_from_data_is_escaped(
    runs: list[MeasuredRun], calibration: Calibration, training: Training, estimate_of: Predict
) -> None:
    texts = [name for name, kind in MEASUREMENTS.items() if kind is str and name not in ("outcome", "run")]
    poisoned = [
        dataclasses.replace(
            run,
            run=f"{number} {HOSTILE}",
            setup=dataclasses.replace(run.setup, model=f"{run.setup.model} {HOSTILE}", accelerator=HOSTILE),
            **dict.fromkeys(texts, HOSTILE),
        )
        for number, run in enumerate(runs)
    ]  # fmt: skip

    def predict(setup: Setup) -> Estimate:
        estimate = estimate_of(dataclasses.replace(setup, model=setup.model.split()[0]))
        return dataclasses.replace(estimate, notes=(HOSTILE,))

    html = render_report(
        poisoned,
        predict=predict,
        calibration=dataclasses.replace(calibration, device=HOSTILE, accelerator=HOSTILE),
        training=dataclasses.replace(training, name=HOSTILE),
        skipped=[(HOSTILE, HOSTILE)],
        title=HOSTILE,
        created=HOSTILE,
    )
    page = Page(html)
    assert page.open == []
    assert page.count("script") == 1
    assert page.count("img") == 0
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert HOSTILE in page.text  # as text, unchanged
    assert "49&amp;" not in html


def _luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.1 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: str, b: str) -> float:
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_have_the_contrast_that_wcag_aa_asks_for(theme: int) -> None:
    css = (Path(reports.html.__file__).parent / "templates" / "report.css").read_text()
    pairs = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", css)
    colours = {name: both[theme] for name, *both in pairs}
    for ground in ("paper", "raised"):
        for name in ("ink", "muted", "accent", "good", "bad"):
            assert _contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
        for number in range(5):
            assert _contrast(colours[f"s{number}"], colours[ground]) >= 3, (number, ground)
