import dataclasses
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import pytest

from estimator.measured import MeasuredRun
from estimator.result import Estimate
from estimator.setup import Setup
from reports.figures import loss_figure, panel_figure, residual_figure
from reports.series import ALLOCATED, STEP, Panel, Point, Predictor, Series, panel, residuals
from reports.training import LossPoint, Training

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn(runs: list[MeasuredRun], estimate_of: Callable[[Setup], Estimate], training: Training) -> dict[str, str]:
    predictor = Predictor(estimate_of)
    found = panel(runs, ALLOCATED, "parameters", predictor, frozenset())
    assert found is not None
    errors = [entry for entry in residuals(runs, predictor, None) if entry.quantity == STEP]
    return {
        "panel": panel_figure(found, "panel"),
        "residual": residual_figure(errors, "residual"),
        "loss": loss_figure(training, "loss"),
    }


def test_figures_are_well_formed_and_described(drawn: dict[str, str]) -> None:
    for name, svg in drawn.items():
        root = ElementTree.fromstring(svg)
        assert root.tag == f"{SVG}svg"
        assert root.get("role") == "img"
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(ids) == len(set(ids))
        assert root.get("aria-labelledby") == f"{name}-title {name}-desc"
        assert {f"{name}-title", f"{name}-desc"} <= set(ids)
        assert all(str(identifier).startswith(f"{name}-") for identifier in ids)


def test_the_same_data_gives_the_same_bytes(drawn: dict[str, str], training: Training) -> None:
    assert loss_figure(training, "loss") == drawn["loss"]


def test_text_is_text_and_colours_are_the_pages(drawn: dict[str, str]) -> None:
    for svg in drawn.values():
        texts = ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]
        assert any(any(letter.isdigit() for letter in text) for text in texts)
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= set()
        assert "var(--" in svg


def test_the_page_is_not_named_in_an_identifier_that_the_figure_refers_to(drawn: dict[str, str]) -> None:
    for svg in drawn.values():
        defined = set(re.findall(r'\bid="([^"]+)"', svg))
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= defined


def test_names_in_data_are_escaped_in_the_description() -> None:
    hostile = '<script>alert("1")</script> $x^2$ &amp; stroke: #a00001;'
    points = (Point(x=64, y=1e6, unseen=False), Point(x=128, y=2e6, unseen=True))
    svg = panel_figure(
        Panel(
            quantity=ALLOCATED, axis="seq", series=(Series(label=hostile, points=points, curve=None),), left_out=0
        ),
        "panel",
    )  # fmt: skip
    assert "<script" not in svg
    assert hostile in (ElementTree.fromstring(svg).findtext(f"{SVG}desc") or "")


def test_the_best_epoch_and_overfitting_are_marked(drawn: dict[str, str], training: Training) -> None:
    assert ">best<" in drawn["loss"]
    assert ">overfitting<" in drawn["loss"]
    calm = loss_figure(dataclasses.replace(training, overfit_epoch=None), "loss")
    assert ">best<" in calm
    assert ">overfitting<" not in calm


@pytest.mark.parametrize("evaluations", [0, 1])
def test_a_training_that_has_barely_begun_has_a_figure(evaluations: int) -> None:
    point = LossPoint(step=1, epoch=0.5, loss=4.0)
    training = Training(
        name="x", train=(point,), evaluation=(point,) * evaluations, overfit_epoch=None, comparisons=()
    )  # fmt: skip
    assert loss_figure(training, "loss").startswith("<svg")


def test_one_run_with_no_error_at_all_has_a_residual_figure(
    runs: list[MeasuredRun], estimate_of: Callable[[Setup], Estimate]
) -> None:
    exact = dataclasses.replace(runs[0], checkpoint_bytes=12_000_000)
    (residual,) = [
        entry for entry in residuals([exact], Predictor(estimate_of), None) if entry.quantity.name == "checkpoint_bytes"
    ]
    assert residual.error == 0
    assert residual_figure([residual], "r").startswith("<svg")
