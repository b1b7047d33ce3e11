"""From measured runs to what a figure shows: points that differ in one thing, and the law's curve through them.

Everything is in base units; ``reports.figures`` draws it. ``Predict`` is handed in, so that this room computes no law.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from estimator.errors import InputError, MissingError
from estimator.measured import MeasuredRun
from estimator.result import Estimate
from estimator.setup import Setup, setting_types
from estimator.units import Interval
from reports.runs import setting_text

Predict = Callable[[Setup], Estimate]
"""Estimates a setup; raises InputError or MissingError where that setup cannot be predicted."""

AxisName = Literal["seq", "batch", "parameters"]
MAX_SERIES = 5
_CURVE_POINTS = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """Something that is measured and predicted."""

    name: str
    """The column of a table of measured runs."""
    title: str
    unit: str
    """A unit of ``reports.scale.value_text``."""
    short: str
    """In a sentence."""


ALLOCATED = Quantity(
    name="peak_allocated_bytes", title="Peak memory, allocated", unit="bytes", short="allocated memory"
)
RESERVED = Quantity(name="peak_reserved_bytes", title="Peak memory, reserved", unit="bytes", short="reserved memory")
DEVICE = Quantity(name="peak_device_bytes", title="Peak memory, device", unit="bytes", short="device memory")
STEP = Quantity(name="step_seconds", title="Step time", unit="seconds", short="step time")
CHECKPOINT = Quantity(name="checkpoint_bytes", title="Checkpoint size", unit="disk_bytes", short="checkpoint size")
QUANTITIES = (ALLOCATED, RESERVED, DEVICE, STEP, CHECKPOINT)


def predicted(estimate: Estimate, quantity: Quantity) -> Interval | None:
    """What an estimate says about a quantity; ``None`` where it says nothing."""
    if quantity.name == "step_seconds":
        return estimate.time.step_seconds if estimate.time else None
    if quantity.name == "checkpoint_bytes":
        return Interval.exactly(estimate.checkpoint.bytes)
    interval: Interval = getattr(estimate.memory, quantity.name)
    return interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A law sampled along one axis, with its 90% interval; all four of one length, ``xs`` ascending."""

    xs: tuple[float, ...]
    ys: tuple[float, ...]
    lows: tuple[float, ...]
    highs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measured run."""

    x: float
    y: float
    unseen: bool
    """The law was fitted without this run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Runs that differ only in the axis, and the law's curve for them where there is a law."""

    label: str
    points: tuple[Point, ...]
    curve: Curve | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One figure: a quantity against an axis."""

    quantity: Quantity
    axis: AxisName
    series: tuple[Series, ...]
    left_out: int
    """Further series that would not fit; their runs are in the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """One run's error in one quantity."""

    run: MeasuredRun
    quantity: Quantity
    predicted: Interval
    measured: float
    parameters: float
    unseen: bool

    @property
    def error(self) -> float:
        """predicted / measured - 1."""
        return self.predicted.value / self.measured - 1

    @property
    def within(self) -> bool | None:
        """Whether the measurement lies inside the 90% interval; ``None`` for a prediction that has none."""
        if self.predicted.low == self.predicted.high:
            return None
        return self.predicted.low <= self.measured <= self.predicted.high


class Predictor:
    """Asks for each setup once: a report needs the same estimate in figures, residuals and tables.

    ``None`` for what cannot be predicted, whose ``reason`` is kept.
    """

    def __init__(self, predict: Predict | None) -> None:
        self._predict = predict
        self._known: dict[Setup, Estimate] = {}
        self._reasons: dict[Setup, str] = {}

    def __call__(self, setup: Setup) -> Estimate | None:
        if self._predict is None or setup in self._reasons:
            return None
        if setup not in self._known:
            try:
                self._known[setup] = self._predict(setup)
            except (InputError, MissingError) as error:
                self._reasons[setup] = str(error)
        return self._known.get(setup)

    def reason(self, setup: Setup) -> str | None:
        """Why a setup that was asked for could not be predicted."""
        return self._reasons.get(setup)


def parameters_of(run: MeasuredRun, predict: Predictor) -> int | None:
    """The run's parameter count: as measured, else as the estimate counts them."""
    if run.parameters is not None:
        return run.parameters
    estimate = predict(run.setup)
    return estimate.model.parameters if estimate else None


def completed(runs: Sequence[MeasuredRun]) -> list[MeasuredRun]:
    return [run for run in runs if run.outcome == "ok"]


def panel(
    runs: Sequence[MeasuredRun], quantity: Quantity, axis: AxisName, predict: Predictor, fitted: frozenset[str] | None
) -> Panel | None:
    """The figure of ``quantity`` against ``axis``, or ``None`` where no two comparable runs differ in it.

    ``fitted`` holds the identifiers of the runs that the law was fitted to (``None`` without a law).
    """
    groups: dict[tuple[Any, ...], list[tuple[float, MeasuredRun]]] = defaultdict(list)
    axis_setting = "model" if axis == "parameters" else axis
    others = [name for name in setting_types() if name != axis_setting]
    for run in completed(runs):
        x = parameters_of(run, predict) if axis == "parameters" else getattr(run.setup, axis)
        if x and getattr(run, quantity.name):
            groups[tuple(getattr(run.setup, name) for name in others)].append((float(x), run))
    wide: list[_Group] = [group for group in groups.values() if len({x for x, _ in group}) > 1]
    if not wide:
        return None
    wide.sort(key=lambda group: (-len({x for x, _ in group}), -len(group)))
    wide = _distinct(wide, quantity)
    # In the order of their size, so that colours run from small to large.
    shown = sorted(
        wide[:MAX_SERIES], key=lambda group: sum(getattr(run, quantity.name) for _, run in group) / len(group)
    )
    setups = [group[0][1].setup for group in shown]
    varied = [name for name in others if len({getattr(setup, name) for setup in setups}) > 1]
    return Panel(
        quantity=quantity,
        axis=axis,
        series=tuple(
            Series(
                label=series_label(group[0][1].setup, varied or [name for name in ("model",) if name in others]),
                points=tuple(
                    Point(
                        x=x,
                        y=float(getattr(run, quantity.name)),
                        unseen=fitted is not None and run.run not in fitted,
                    )
                    for x, run in sorted(group, key=lambda item: item[0])
                ),
                curve=_curve(group, quantity, axis, predict),
            )
            for group in shown
        ),
        left_out=len(wide) - len(shown),
    )


_Group = Sequence[tuple[float, MeasuredRun]]


def _distinct(groups: Sequence[_Group], quantity: Quantity) -> list[_Group]:
    """Without the groups that another one would hide: a checkpoint is the same at every batch and sequence length."""
    kept: list[_Group] = []
    drawn: list[dict[float, float]] = []
    for group in groups:
        values = {x: float(getattr(run, quantity.name)) for x, run in group}
        if not any(all(math.isclose(values[x], other.get(x, 0.0), rel_tol=1e-3) for x in values) for other in drawn):
            kept.append(group)
            drawn.append(values)
    return kept


def series_label(setup: Setup, names: Sequence[str]) -> str:
    """What tells a series from the others: "micro, batch 2, 256 tokens"."""
    texts = []
    for name in names:
        value = getattr(setup, name)
        if value is None:
            continue
        if isinstance(value, str):
            texts.append(value)
        elif name == "seq":
            texts.append(f"{value:,} tokens")
        elif name == "batch":
            texts.append(f"batch {value}")
        else:
            texts.append(f"{name.replace('_', ' ')} {setting_text(value)}")
    return ", ".join(texts) or f"batch {setup.batch}, {setup.seq:,} tokens"


def _curve(group: _Group, quantity: Quantity, axis: AxisName, predict: Predictor) -> Curve | None:
    setup = group[0][1].setup
    if axis == "parameters":
        # Between two models lies no model: the law is asked for the measured ones.
        asked = sorted({(x, run.setup) for x, run in group}, key=lambda item: item[0])
    else:
        low, high = min(x for x, _ in group), max(x for x, _ in group)
        asked = [(float(x), _moved(setup, axis, x)) for x in sample(int(low), int(high), _CURVE_POINTS)]
    found: list[tuple[float, Interval]] = []
    for x, at in asked:
        estimate = predict(at)
        interval = predicted(estimate, quantity) if estimate else None
        if interval is not None:
            found.append((x, interval))
    if len(found) < 2:
        return None
    return Curve(
        xs=tuple(x for x, _ in found),
        ys=tuple(interval.value for _, interval in found),
        lows=tuple(interval.low for _, interval in found),
        highs=tuple(interval.high for _, interval in found),
    )


def _moved(setup: Setup, axis: AxisName, x: int) -> Setup:
    return dataclasses.replace(setup, seq=x) if axis == "seq" else dataclasses.replace(setup, batch=x)


def sample(low: int, high: int, count: int) -> list[int]:
    """Whole numbers from ``low`` to ``high``, both included, in equal ratios; at most ``count``."""
    ratio = high / low
    return sorted({round(low * ratio ** (i / (count - 1))) for i in range(count)})


def residuals(runs: Sequence[MeasuredRun], predict: Predictor, fitted: frozenset[str] | None) -> list[Residual]:
    """Every quantity of every completed run that was both measured and predicted."""
    found = []
    for run in completed(runs):
        estimate = predict(run.setup)
        if estimate is None:
            continue
        for quantity in QUANTITIES:
            measured = getattr(run, quantity.name)
            interval = predicted(estimate, quantity)
            if measured and interval is not None:
                found.append(
                    Residual(
                        run=run,
                        quantity=quantity,
                        predicted=interval,
                        measured=float(measured),
                        parameters=float(run.parameters or estimate.model.parameters),
                        unseen=fitted is None or run.run not in fitted,
                    )
                )
    return found
