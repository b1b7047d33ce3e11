"""Figures as inlined SVG: the same bytes for the same data, text as text, colours from the page's style sheet.

matplotlib draws in marker colours, which are then replaced by CSS variables, so that one drawing serves the light and
the dark theme. Nothing that came from data is drawn: names stand in the page's own legend and captions.
"""

from __future__ import annotations

import functools
import html
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from estimator.errors import MissingError
from reports import scale
from reports.series import AxisName, Panel, Point, Residual
from reports.training import Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES_MARKS = ("o", "s", "^", "D", "v")
_SERIES = tuple(f"#a0000{i}" for i in range(5))
_INK, _MUTED, _RULE, _PAPER, _GOOD, _BAD = "#a00010", "#a00011", "#a00012", "#a00013", "#a00014", "#a00015"
_VARIABLES = {color: f"var(--s{i})" for i, color in enumerate(_SERIES)} | {
    _INK: "var(--ink)", _MUTED: "var(--muted)", _RULE: "var(--rule)", _PAPER: "var(--paper)",
    _GOOD: "var(--good)", _BAD: "var(--bad)",
}  # fmt: skip
_PAINT = re.compile(r"(fill|stroke): (#a000[01][0-9])(?=[;\"])")
_REFERENCE = re.compile(r"(\bid=\"|href=\"#|url\(#)")
_AXIS_LABELS: dict[AxisName, str] = {
    "seq": "tokens of a sequence",
    "batch": "sequences of a batch",
    "parameters": "parameters",
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vramcalc",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "text.color": _MUTED,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "grid.color": _RULE,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "text.parse_math": False,
    "text.usetex": False,
}


@functools.cache
def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise MissingError("report: needs matplotlib; pip install 'vramcalc-toolkit[report]'") from None
    return matplotlib


@contextmanager
def _drawing(width: float, height: float) -> Iterator[tuple[Axes, Callable[[str, str, str], str]]]:
    """Axes of this many inches, and the function that turns them into SVG: ``svg(id, title, description)``."""
    matplotlib = _matplotlib()
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.grid(visible=False, axis="x")

        def svg(name: str, title: str, description: str) -> str:
            buffer = io.StringIO()
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
            return _inline(buffer.getvalue(), name, title, description)

        yield axes, svg


def _inline(svg: str, name: str, title: str, description: str) -> str:
    """The ``<svg>`` element alone, its colours variables, its identifiers unique in the page, and described."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = _PAINT.sub(lambda match: f"{match[1]}: {_VARIABLES[match[2]]}", svg)
    svg = _REFERENCE.sub(rf"\g<1>{name}-", svg)
    opening = svg.index(">") + 1
    view = re.search(r'viewBox="[^"]*"', svg[:opening])
    assert view is not None
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {view[0]} role="img" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{html.escape(title)}</title>'
        f'<desc id="{name}-desc">{html.escape(description)}</desc>{svg[opening:].strip()}'
    )


def panel_figure(panel: Panel, name: str) -> str:
    """Measured points and fitted curves, as SVG; hollow points are runs that the law had not seen."""
    ys = [point.y for series in panel.series for point in series.points]
    xs = [point.x for series in panel.series for point in series.points]
    highs = [high for series in panel.series if series.curve for high in series.curve.ys]
    log_y = max(ys) / min(ys) > 30
    # Over decades, the unit that most values read well in; else that of the largest.
    unit = _unit(panel.quantity.unit, sorted(ys)[len(ys) // 2] if log_y else max(ys + highs))
    size = 5.0 if len(ys) <= 60 else 3.2
    with _drawing(3.7, 2.75) as (axes, svg):
        for number, series in enumerate(panel.series):
            color, mark = _SERIES[number], SERIES_MARKS[number]
            if series.curve is not None:
                curve = series.curve
                axes.plot(curve.xs, [y / unit[0] for y in curve.ys], color=color, zorder=2)
                if curve.lows != curve.highs:
                    lows, highs_ = ([y / unit[0] for y in bound] for bound in (curve.lows, curve.highs))
                    axes.fill_between(curve.xs, lows, highs_, color=color, alpha=0.13, linewidth=0, zorder=1)
            for unseen in (False, True):
                points = [point for point in series.points if point.unseen == unseen]
                _points(axes, points, unit[0], color, mark, hollow=unseen, size=size)
        _x_axis(axes, panel.axis, xs)
        top = max(max(ys), max(highs, default=0.0)) / unit[0]
        if log_y:
            _log_y(axes, [y / unit[0] for y in ys + highs])
        else:
            axes.set_ylim(0, top * 1.12)
            axes.yaxis.set_major_locator(_locator(5))
        axes.yaxis.set_major_formatter(_formatter(_number))
        axes.set_ylabel(unit[1])
        title = f"{panel.quantity.title} against {_AXIS_LABELS[panel.axis]}"
        return svg(name, title, _describe(panel))


def _describe(panel: Panel) -> str:
    sentences = []
    for series in panel.series:
        first, last = series.points[0], series.points[-1]
        y_text = functools.partial(scale.value_text, unit=panel.quantity.unit)
        sentences.append(
            f"{series.label}: {len(series.points)} measured, {y_text(first.y)} at {scale.count_text(first.x)}, "
            f"{y_text(last.y)} at {scale.count_text(last.x)}"
        )
    return "; ".join(sentences) + "."


def _points(
    axes: Axes, points: Sequence[Point], divisor: float, color: str, mark: str, *, hollow: bool, size: float = 5.0
) -> None:
    if points:
        axes.plot(
            [point.x for point in points],
            [point.y / divisor for point in points],
            linestyle="none",
            marker=mark,
            markersize=size,
            markerfacecolor=_PAPER if hollow else color,
            markeredgecolor=color,
            markeredgewidth=1.5 if hollow else 0.8,
            zorder=3,
            clip_on=False,
        )


def residual_figure(residuals: Sequence[Residual], name: str) -> str:
    """The errors of one quantity against the model's size, as SVG; hollow points are runs that the law had not seen."""
    errors = [residual.error * 100 for residual in residuals]
    with _drawing(3.7, 2.3) as (axes, svg):
        for unseen, color in ((False, _SERIES[0]), (True, _SERIES[1])):
            points = [
                Point(x=residual.parameters, y=residual.error * 100, unseen=unseen)
                for residual in residuals
                if residual.unseen == unseen
            ]
            _points(axes, points, 1.0, color, "D" if unseen else "o", hollow=unseen)
        axes.axhline(0, color=_INK, linewidth=1.0, zorder=1)
        _x_axis(axes, "parameters", [residual.parameters for residual in residuals])
        reach = max(max(abs(error) for error in errors) * 1.2, 0.01)
        axes.set_ylim(-reach, reach)
        axes.yaxis.set_major_locator(_locator(5))
        axes.yaxis.set_major_formatter(_formatter(_signed))
        axes.set_ylabel("error, %")
        quantity = residuals[0].quantity
        description = f"{len(residuals)} runs, errors from {min(errors):+.2f}% to {max(errors):+.2f}%."
        return svg(name, f"{quantity.title}: predicted against measured, error by model size", description)


def loss_figure(training: Training, name: str) -> str:
    """Training and evaluation loss by epoch, the best evaluation marked, overfitting shaded, as SVG."""
    with _drawing(7.2, 3.3) as (axes, svg):
        if training.train:
            axes.plot(
                [point.epoch for point in training.train],
                [point.loss for point in training.train],
                color=_SERIES[0],
                linewidth=1.2,
                zorder=2,
            )
        if training.evaluation:
            axes.plot(
                [point.epoch for point in training.evaluation],
                [point.loss for point in training.evaluation],
                color=_SERIES[1],
                marker="o",
                markersize=5,
                markeredgecolor=_SERIES[1],
                zorder=3,
            )
        epochs = [point.epoch for point in training.train + training.evaluation]
        low, high = min(epochs), max(epochs)
        if low == high:
            low, high = low - 0.5, high + 0.5
        axes.set_xlim(low, high + 0.02 * (high - low))
        sentences = [f"{len(training.train)} training and {len(training.evaluation)} evaluation losses"]
        best = training.best
        if best is not None:
            axes.axvline(best.epoch, color=_GOOD, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
            _flag(axes, "best", best.epoch, (low, high), _GOOD, row=0)
            sentences.append(f"best evaluation loss {best.loss:.4g} at epoch {best.epoch:.3g}")
        if training.overfit_epoch is not None:
            start = training.overfit_epoch
            axes.axvspan(start, high + 0.02 * (high - low), color=_BAD, alpha=0.09, linewidth=0, zorder=0)
            _flag(axes, "overfitting", start, (low, high), _BAD, row=1)
            sentences.append(f"overfitting from epoch {start:.3g} on")
        axes.xaxis.set_major_locator(_locator(8))
        axes.xaxis.set_major_formatter(_formatter(_number))
        axes.yaxis.set_major_locator(_locator(6))
        axes.yaxis.set_major_formatter(_formatter(_number))
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss")
        return svg(name, "Loss of the training and of its evaluations", "; ".join(sentences) + ".")


def _flag(axes: Axes, text: str, x: float, bounds: tuple[float, float], color: str, *, row: int) -> None:
    """A word at the top of the figure beside ``x``, on the side where there is room."""
    left = x > (bounds[0] + bounds[1]) / 2 and row == 0
    axes.annotate(
        text,
        (x, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-4 if left else 4, -2 - 12 * row),
        textcoords="offset points",
        ha="right" if left else "left",
        va="top",
        color=color,
    )


def _x_axis(axes: Axes, axis: AxisName, xs: Sequence[float]) -> None:
    """Ticks at measured values, as many as there is room for; equal ratios are equal distances over wide ranges."""
    from matplotlib.ticker import FixedLocator, NullLocator

    values = sorted(set(xs))
    low, high = values[0], values[-1]
    log = high / low >= 6
    place: Callable[[float], float] = math.log if log else float
    if log:
        axes.set_xscale("log")
    span = place(high) - place(low)
    ticks: list[float] = []
    for value in values:
        if not ticks or place(value) - place(ticks[-1]) >= 0.16 * span:
            ticks.append(value)
    if len(values) == 1:
        axes.set_xlim(low * 0.5, low * 1.5)
    elif log:
        axes.set_xlim(low / (high / low) ** 0.04, high * (high / low) ** 0.04)
    else:
        axes.set_xlim(low - 0.04 * span, high + 0.04 * span)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(_formatter(_count if axis == "parameters" else _whole))
    axes.set_xlabel(_AXIS_LABELS[axis])


def _log_y(axes: Axes, ys: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.set_ylim(min(ys) / 1.5, max(ys) * 1.5)
    decades = math.log10(max(ys) / min(ys))
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 3.0) if decades < 3 else (1.0,)))
    axes.yaxis.set_minor_locator(NullLocator())


def _unit(unit: str, largest: float) -> tuple[float, str]:
    if unit == "bytes":
        return scale.pick_unit(largest, scale.MEMORY_UNITS)
    if unit == "disk_bytes":
        return scale.pick_unit(largest, scale.DISK_UNITS)
    return scale.time_unit(largest)


def _locator(count: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count, steps=[1, 2, 2.5, 5, 10])


def _formatter(write: Callable[[float], str]) -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: write(value))


def _number(value: float) -> str:
    return f"{value:,.6g}"


def _signed(value: float) -> str:
    return "0" if value == 0 else f"{value:+.4g}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _count(value: float) -> str:
    size, name = scale.pick_unit(value, scale.COUNT_UNITS)
    return f"{value / size:.3g}{name}"
