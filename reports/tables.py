"""The report's tables as data: every cell has the text that people read and the value that is sorted and copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from estimator.calibration.fitting import Calibration, Coefficient
from estimator.measured import MeasuredRun
from estimator.result import Estimate
from estimator.units import Interval
from reports import scale
from reports.comparison import Comparison
from reports.runs import setting_text, varied_settings
from reports.series import QUANTITIES, Predictor, Residual, parameters_of

Value = float | int | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    text: str
    value: Value
    """In base units, for sorting and copying; ``None`` is empty."""
    mark: str = ""
    """A class of the style sheet: good, bad or empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    title: str
    name: str
    """As it is copied, with the unit: ``peak_allocated_bytes``."""
    number: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    name: str
    """Unique in the page; letters and hyphens."""
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


def _text(value: str | None) -> Cell:
    return Cell(text=value or "", value=value)


def _cell(value: float | None, unit: str) -> Cell:
    return Cell(text="–" if value is None else scale.value_text(value, unit), value=value)


def _yes_no(value: bool) -> Cell:
    text = "yes" if value else "no"
    return Cell(text=text, value=text)


def _law(column: str) -> Cell:
    title = next((quantity.title for quantity in QUANTITIES if quantity.name == column), column)
    return Cell(text=title, value=column)


def _whole(value: int | None) -> Cell:
    return Cell(text="–" if value is None else f"{value:,}", value=value)


def _signed(value: float) -> Cell:
    return Cell(text=scale.percent_text(value, sign=True), value=value)


def _bounds(interval: Interval | None, unit: str) -> Cell:
    if interval is None:
        return Cell(text="–", value=None)
    return Cell(text=scale.bounds_text(interval, unit) or "exact", value=interval.high)


def runs_table(runs: Sequence[MeasuredRun], predict: Predictor) -> Table:
    """Every run, with its outcome and the reason where it did not complete."""
    varied = varied_settings(runs)
    columns = [
        Column(title="Model", name="model"),
        Column(title="Parameters", name="parameters", number=True),
        Column(title="Batch", name="batch", number=True),
        Column(title="Tokens", name="seq", number=True),
        *(Column(title=name.replace("_", " ").capitalize(), name=name) for name in varied),
        Column(title="Outcome", name="outcome"),
        Column(title="Reason", name="reason"),
        Column(title="Allocated", name="peak_allocated_bytes", number=True),
        Column(title="Reserved", name="peak_reserved_bytes", number=True),
        Column(title="Device", name="peak_device_bytes", number=True),
        Column(title="Peak in", name="peak_phase"),
        Column(title="Step", name="step_seconds", number=True),
        Column(title="Spread", name="step_seconds_spread", number=True),
        Column(title="Tokens/s", name="tokens_per_second_per_accelerator", number=True),
        Column(title="Checkpoint", name="checkpoint_bytes", number=True),
        Column(title="Run", name="run"),
        Column(title="Source", name="source"),
    ]
    rows = []
    for run in runs:
        setup = run.setup
        spread = run.step_seconds_spread
        speed = run.tokens_per_second_per_accelerator
        cells = [
            _text(setup.model),
            _cell(parameters_of(run, predict), "count"),
            _whole(setup.batch),
            _whole(setup.seq),
            *(Cell(text=setting_text(value), value=value) for value in (getattr(setup, name) for name in varied)),
            Cell(text=run.outcome, value=run.outcome, mark="" if run.outcome == "ok" else "bad"),
            _text(run.reason),
            _cell(run.peak_allocated_bytes, "bytes"),
            _cell(run.peak_reserved_bytes, "bytes"),
            _cell(run.peak_device_bytes, "bytes"),
            _text(run.peak_phase),
            _cell(run.step_seconds, "seconds"),
            Cell(text="–" if spread is None else f"±{scale.percent_text(spread)}", value=spread),
            Cell(text="–" if speed is None else scale.digits(speed), value=speed),
            _cell(run.checkpoint_bytes, "disk_bytes"),
            _text(run.run),
            _text(run.source),
        ]
        rows.append(tuple(cells))
    return _without_empty_columns(
        Table(name="runs", caption="All measured runs", columns=tuple(columns), rows=tuple(rows)),
        keep={"model", "batch", "seq", "outcome"},
    )


def _without_empty_columns(table: Table, keep: set[str]) -> Table:
    """Columns in which no row states anything say nothing."""
    shown = [
        i
        for i, column in enumerate(table.columns)
        if column.name in keep or any(row[i].value is not None and row[i].value != "" for row in table.rows)
    ]
    return Table(
        name=table.name,
        caption=table.caption,
        columns=tuple(table.columns[i] for i in shown),
        rows=tuple(tuple(row[i] for i in shown) for row in table.rows),
    )


def residual_table(residuals: Sequence[Residual]) -> Table:
    """Predicted against measured for each run and quantity."""
    columns = (
        Column(title="Model", name="model"),
        Column(title="Batch", name="batch", number=True),
        Column(title="Tokens", name="seq", number=True),
        Column(title="Quantity", name="quantity"),
        Column(title="Predicted", name="predicted", number=True),
        Column(title="90% interval", name="high", number=True),
        Column(title="Measured", name="measured", number=True),
        Column(title="Error", name="error", number=True),
        Column(title="In interval", name="within"),
        Column(title="In the fit", name="fitted"),
        Column(title="Run", name="run"),
    )
    rows = tuple(
        (
            _text(residual.run.setup.model),
            _whole(residual.run.setup.batch),
            _whole(residual.run.setup.seq),
            Cell(text=residual.quantity.short, value=residual.quantity.name),
            _cell(residual.predicted.value, residual.quantity.unit),
            _bounds(residual.predicted, residual.quantity.unit),
            _cell(residual.measured, residual.quantity.unit),
            _signed(residual.error),
            Cell(text="–", value=None) if residual.within is None else _yes_no(residual.within),
            _yes_no(not residual.unseen),
            _text(residual.run.run),
        )
        for residual in residuals
    )
    return Table(name="residuals", caption="Predicted against measured, run by run", columns=columns, rows=rows)


def coefficient_table(calibration: Calibration) -> Table:
    """Every coefficient of every law with its 90% interval."""
    columns = (
        Column(title="Law", name="law"),
        Column(title="Coefficient", name="coefficient"),
        Column(title="Value", name="value", number=True),
        Column(title="Low", name="low", number=True),
        Column(title="High", name="high", number=True),
        Column(title="Unit", name="unit"),
        Column(title="That is", name="meaning"),
        Column(title="Runs", name="runs", number=True),
    )
    rows = tuple(
        (
            _law(law.quantity),
            _text(coefficient.name),
            *(
                Cell(text=f"{number:.4g}", value=number)
                for number in (coefficient.value, coefficient.low, coefficient.high)
            ),
            _text(coefficient.unit),
            _text(_meaning(law.quantity, coefficient)),
            _whole(law.runs),
        )
        for law in calibration.laws
        for coefficient in law.coefficients
    )
    return Table(
        name="coefficients", caption="Coefficients of the laws, with 90% intervals", columns=columns, rows=rows
    )


def _meaning(quantity: str, coefficient: Coefficient) -> str:
    """The coefficient as people speak of it: a rate rather than seconds for each unit of work."""
    if coefficient.value < (0.5 if coefficient.name == "constant" else 1e-30):
        return "not needed"
    if quantity == "step_seconds":
        name = coefficient.name.partition("[")[0]
        if name.endswith("_flops"):
            return f"{scale.flops_text(1 / coefficient.value)}/s"
        if name.endswith("_bytes"):
            return f"{scale.disk_text(1 / coefficient.value)}/s"
        return scale.seconds_text(coefficient.value)
    if coefficient.name == "constant":
        return scale.memory_text(coefficient.value)
    return f"{scale.percent_text(coefficient.value - 1, sign=True)} on the formula"


def held_out_table(calibration: Calibration) -> Table:
    """How each law predicted what was left out of its fit."""
    columns = (
        Column(title="Law", name="law"),
        Column(title="Left out", name="left_out"),
        Column(title="Beyond the fit", name="reach", number=True),
        Column(title="Runs fitted", name="fitted_runs", number=True),
        Column(title="Runs predicted", name="predicted_runs", number=True),
        Column(title="Median error", name="median_ape", number=True),
        Column(title="Largest error", name="max_ape", number=True),
        Column(title="Bias", name="bias", number=True),
        Column(title="In 90% interval", name="coverage_90", number=True),
    )
    rows = tuple(
        (
            _law(law.quantity),
            _text(held.what),
            Cell(text=f"{scale.digits(held.reach, 2)}×", value=held.reach),
            _whole(held.fitted_runs),
            _whole(held.score.n),
            _cell(held.score.median_ape, "fraction"),
            _cell(held.score.max_ape, "fraction"),
            _signed(held.score.bias),
            _cell(held.score.coverage_90, "fraction"),
        )
        for law in calibration.laws
        if (held := law.held_out) is not None
    )
    return Table(name="held-out", caption="Predicted without having seen it", columns=columns, rows=rows)


def prediction_table(estimates: Sequence[tuple[str, Estimate]]) -> Table:
    """What bigger models would take, each value with its 90% interval below it."""
    columns = (
        Column(title="Model", name="model"),
        Column(title="Batch", name="batch", number=True),
        Column(title="Tokens", name="seq", number=True),
        Column(title="Allocated", name="peak_allocated_bytes", number=True),
        Column(title="90% interval", name="peak_allocated_high_bytes", number=True),
        Column(title="Device", name="peak_device_bytes", number=True),
        Column(title="Step", name="step_seconds", number=True),
        Column(title="90% interval", name="step_high_seconds", number=True),
        Column(title="Tokens/s", name="tokens_per_second", number=True),
        Column(title="Checkpoint", name="checkpoint_bytes", number=True),
    )
    rows = tuple(
        (
            _text(label),
            _whole(estimate.setup.batch),
            _whole(estimate.setup.seq),
            _cell(estimate.memory.peak_allocated_bytes.value, "bytes"),
            _bounds(estimate.memory.peak_allocated_bytes, "bytes"),
            _cell(estimate.memory.peak_device_bytes.value, "bytes"),
            _cell(estimate.time.step_seconds.value if estimate.time else None, "seconds"),
            _bounds(estimate.time.step_seconds if estimate.time else None, "seconds"),
            _cell(estimate.time.tokens_per_second.value if estimate.time else None, "tokens/s"),
            _cell(estimate.checkpoint.bytes, "disk_bytes"),
        )
        for label, estimate in estimates
    )
    return Table(name="predictions", caption="What the laws predict for bigger models", columns=columns, rows=rows)


def comparison_table(rows: Sequence[Comparison]) -> Table:
    """The training's own predictions against what happened."""
    columns = (
        Column(title="Quantity", name="quantity"),
        Column(title="Predicted", name="predicted", number=True),
        Column(title="90% interval", name="high", number=True),
        Column(title="Measured", name="measured", number=True),
        Column(title="Error", name="error", number=True),
    )
    cells = []
    for row in rows:
        bounds = Cell(text="–", value=None)
        if row.low is not None and row.high is not None:
            bounds = Cell(text=scale.range_text(row.low, row.high, row.unit), value=row.high)
        error = Cell(text="–", value=None) if row.error is None else _signed(row.error)
        cells.append(
            (
                _text(row.quantity),
                _cell(row.predicted, row.unit),
                bounds,
                _cell(row.measured, row.unit),
                error,
            )
        )
    return Table(
        name="training-comparison", caption="Predicted before the training, measured by it", columns=columns,
        rows=tuple(cells),
    )  # fmt: skip


def reasons_table(reasons: Sequence[tuple[str, str]], *, name: str, caption: str) -> Table:
    """Runs that something was not done with: (run, reason)."""
    columns = (Column(title="Run", name="run"), Column(title="Reason", name="reason"))
    rows = tuple((_text(run), _text(reason)) for run, reason in reasons)
    return Table(name=name, caption=caption, columns=columns, rows=rows)


def environment_table(environments: Sequence[tuple[str, str, int]]) -> Table:
    """What the runs ran on: (what, value, number of runs that state it)."""
    columns = (
        Column(title="What", name="what"),
        Column(title="Value", name="value"),
        Column(title="Runs", name="runs", number=True),
    )
    rows = tuple((_text(what), _text(value), _whole(count)) for what, value, count in environments)
    return Table(name="environment", caption="Devices, libraries and hosts of the runs", columns=columns, rows=rows)
