"""One HTML file from measured runs, laws and a training: opens from the disk, asks for nothing from anywhere."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from estimator.calibration.fitting import Calibration
from estimator.measured import MeasuredRun
from estimator.result import Estimate
from estimator.setup import Setup
from reports import summary, tables
from reports.environment import environment_facts
from reports.figures import SERIES_MARKS, loss_figure, panel_figure, residual_figure
from reports.series import (
    ALLOCATED,
    CHECKPOINT,
    DEVICE,
    QUANTITIES,
    RESERVED,
    STEP,
    AxisName,
    Panel,
    Predict,
    Predictor,
    Quantity,
    Residual,
    completed,
    panel,
    residuals,
)
from reports.templating import render_template
from reports.training import Training

LARGER = (("8B", "8e9"), ("400B", "400e9"))
"""The bigger models that a report predicts: what they are called, and the ``model`` of their setup."""
LARGER_SEQS = (2048, 8192)

_AXES: tuple[tuple[AxisName, str, str], ...] = (
    ("seq", "By sequence length", "sequence length"),
    ("batch", "By batch", "batch size"),
    ("parameters", "By model size", "model size"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Legend:
    label: str
    color: int
    mark: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Figure:
    title: str
    svg: str
    legend: tuple[_Legend, ...]
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Section:
    name: str
    title: str
    lead: str
    figures: tuple[_Figure, ...]
    gaps: str
    """Which figures there are none of, and why."""


def render_report(
    runs: Sequence[MeasuredRun],
    *,
    predict: Predict | None = None,
    calibration: Calibration | None = None,
    training: Training | None = None,
    skipped: Sequence[tuple[str, str]] = (),
    title: str = "Measured fine-tunes",
    created: str | None = None,
) -> str:
    """The report as one HTML document, the same for the same arguments.

    ``predict`` estimates a setup with the laws that are to be shown; ``skipped`` are (run, reason) of rows that could
    not be read. Every part may be missing, and the runs may be none or all failed.
    Raises MissingError without jinja2 or matplotlib.
    """
    asked = Predictor(predict)
    fitted = frozenset(calibration.runs) if calibration else None
    memory = _memory_quantity(runs)
    errors = residuals(runs, asked, fitted)
    larger = _larger(runs, asked)
    shown_tables: list[tables.Table] = []
    if runs:
        shown_tables.append(tables.runs_table(runs, asked))
    if errors:
        shown_tables.append(tables.residual_table(errors))
    if skipped:
        shown_tables.append(tables.reasons_table(skipped, name="skipped", caption="Rows that could not be read"))
    if unpredicted := [(run.run, reason) for run in completed(runs) if (reason := asked.reason(run.setup))]:
        caption = "Runs that could not be predicted"
        shown_tables.append(tables.reasons_table(unpredicted, name="unpredicted", caption=caption))
    if facts := environment_facts(runs):
        shown_tables.append(tables.environment_table(facts))
    return render_template(
        "report.html.j2",
        title=title,
        created=created,
        tiles=summary.tiles(runs, errors, calibration, memory) if runs else [],
        sentences=summary.sentences(runs, errors, calibration, training, larger, asked),
        sections=[
            section
            for quantity, name, lead in (
                (memory, "memory", "What one device must hold at the highest moment of a step."),
                (STEP, "time", "The median of the timed optimizer steps."),
                (CHECKPOINT, "checkpoint", "What one checkpoint takes on the disk: weights, optimizer and the rest."),
            )
            if (section := _section(runs, quantity, name, lead, asked, fitted)) is not None
        ],
        residual_figures=_residual_figures(errors),
        has_laws=calibration is not None,
        held_out=tables.held_out_table(calibration)
        if calibration and any(x.held_out for x in calibration.laws)
        else None,
        coefficients=tables.coefficient_table(calibration) if calibration and calibration.laws else None,
        predictions=tables.prediction_table(larger) if larger else None,
        prediction_notes=_notes(larger),
        training=training,
        loss_figure=loss_figure(training, "loss") if training else None,
        comparison=tables.comparison_table(training.comparisons) if training and training.comparisons else None,
        tables=shown_tables,
        dropped=[(drop.run, drop.quantity, drop.reason) for drop in calibration.dropped] if calibration else [],
    )


def _memory_quantity(runs: Sequence[MeasuredRun]) -> Quantity:
    """The kind of peak that most runs state; kinds are never mixed in a figure."""
    done = completed(runs)
    return max(
        (ALLOCATED, RESERVED, DEVICE), key=lambda quantity: sum(bool(getattr(run, quantity.name)) for run in done)
    )


def _section(
    runs: Sequence[MeasuredRun],
    quantity: Quantity,
    name: str,
    lead: str,
    predict: Predictor,
    fitted: frozenset[str] | None,
) -> _Section | None:
    if not any(getattr(run, quantity.name) for run in completed(runs)):
        return None
    figures, gaps = [], []
    for axis, title, plain in _AXES:
        found = panel(runs, quantity, axis, predict, fitted)
        if found is None:
            gaps.append(plain)
            continue
        figures.append(
            _Figure(
                title=title,
                svg=panel_figure(found, f"{name}-{axis}"),
                legend=tuple(
                    _Legend(label=series.label, color=i, mark=SERIES_MARKS[i]) for i, series in enumerate(found.series)
                ),
                note=_left_out(found),
            )
        )
    missing = f"No two comparable runs differ in {' or '.join(gaps)} alone." if gaps else ""
    return _Section(name=name, title=quantity.title, lead=lead, figures=tuple(figures), gaps=missing)


def _left_out(found: Panel) -> str:
    if not found.left_out:
        return ""
    return f"The table of runs holds {found.left_out} more series."


def _residual_figures(errors: Sequence[Residual]) -> list[_Figure]:
    figures = []
    for quantity in QUANTITIES:
        own = [residual for residual in errors if residual.quantity == quantity]
        if own:
            svg = residual_figure(own, f"residual-{quantity.name.replace('_', '-')}")
            figures.append(_Figure(title=quantity.title, svg=svg, legend=(), note=""))
    return figures


def _larger(runs: Sequence[MeasuredRun], predict: Predictor) -> list[tuple[str, Estimate]]:
    """Estimates of ``LARGER`` in the setup that most of the completed runs share, one sequence at a time."""
    done = completed(runs)
    if not done:
        return []
    usual = Counter(_without_size(run.setup) for run in done).most_common(1)[0][0]
    found = []
    for label, model in LARGER:
        for seq in LARGER_SEQS:
            estimate = predict(dataclasses.replace(usual, model=model, seq=seq))
            if estimate is not None:
                found.append((label, estimate))
    return found


def _without_size(setup: Setup) -> Setup:
    return dataclasses.replace(setup, model="8e9", seq=1, batch=1)


def _notes(larger: Sequence[tuple[str, Estimate]]) -> list[str]:
    """What the last and largest assumes. That no amount of data was given is no assumption here: no run is estimated."""
    return [
        f"{label}, {estimate.setup.seq:,} tokens: {note}"
        for label, estimate in larger[-1:]
        for note in estimate.notes
        if not note.startswith("no data given")
    ]
