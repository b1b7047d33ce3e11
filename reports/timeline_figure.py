"""Memory over the step that holds a dry run's peak, as stacked areas: the drawing, and the figures beside it.

The areas are SVG without text, stretched over the plot's box; every word is HTML, so that it stays readable at any width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from estimator.dryrun.result import DryRun, TimelinePoint
from reports import scale

WIDTH, HEIGHT = 1000, 400
_STACK = (
    "parameters", "optimizer", "workspace", "gradients", "activations", "logits", "temporaries", "communication",
)  # fmt: skip
"""From the bottom up: what stays first."""
_CAPACITY_SHOWN = 2.0
"""A capacity beyond this many peaks would leave nothing of them to see."""
_HEADROOM = 1.08


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A category's area and its line in the legend."""

    category: str
    path: str
    """The outline of everything up to this category, in an SVG of WIDTH x HEIGHT."""
    at_peak: str
    share: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A phase's place on the horizontal axis, in percent of the plot."""

    phase: str
    left: float
    width: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A horizontal line or tick: how high, in percent of the plot, and what it says."""

    height: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Everything that the page draws, already in words and percents."""

    bands: tuple[Band, ...]
    """From the top of the stack down."""
    reserved: str
    """The path of the allocator's segments; empty where there are none apart from the tensors."""
    stretches: tuple[Stretch, ...]
    ticks: tuple[Line, ...]
    capacity: Line | None
    peak: Line
    peak_left: float
    moments: str
    """JSON for the page's script: phases, categories, and for each moment its place, phase, and MiB."""
    peak_moment: int
    """Which of the moments is the peak."""
    peak_phase: str
    reserved_at_peak: str
    events: int
    description: str


def timeline_figure(found: DryRun, capacity_bytes: int | None, *, cuda: bool) -> Figure:
    """``capacity_bytes``: what the device has for the allocator; ``None`` where that is unknown."""
    points = found.timeline
    order = [found.categories.index(name) for name in _STACK if name in found.categories]
    order = [i for i in order if any(point.bytes_by_category[i] for point in points)]
    highest = max(found.peak_allocated_bytes, max(point.reserved_bytes for point in points))
    shown = capacity_bytes is not None and capacity_bytes <= _CAPACITY_SHOWN * highest
    top = _HEADROOM * max(highest, (capacity_bytes or 0) if shown else 0)
    lefts = _lefts(points)
    moment = next(i for i, point in enumerate(points) if point.event == found.peak_event)
    stretches = tuple(_stretches(points, lefts))
    return Figure(
        bands=tuple(reversed([*_bands(found, order, lefts, top, moment)])),
        reserved=_outline(lefts, [point.reserved_bytes / top for point in points]) if cuda else "",
        stretches=stretches,
        ticks=_ticks(top),
        capacity=Line(height=100 * capacity_bytes / top, text=scale.memory_text(capacity_bytes))
        if shown and capacity_bytes is not None
        else None,
        peak=Line(
            height=100 * found.peak_allocated_bytes / top, text=f"peak {scale.memory_text(found.peak_allocated_bytes)}"
        ),
        peak_left=100 * lefts[moment],
        moments=_moments(found, order, lefts),
        peak_moment=moment,
        peak_phase=points[moment].phase,
        reserved_at_peak=scale.memory_text(points[moment].reserved_bytes),
        events=points[-1].event - points[0].event,
        description=_describe(found, stretches),
    )


def _lefts(points: Sequence[TimelinePoint]) -> list[float]:
    """Where each moment stands, 0 to 1. A phase is as wide as the cube root of its events: the loss has few, and the peak."""
    runs = [[points[i] for i in run] for run in _phase_runs(points)]
    ends = [run[0].event for run in runs[1:]] + [points[-1].event]
    widths = [(end - run[0].event) ** (1 / 3) for run, end in zip(runs, ends, strict=True)]
    total = sum(widths) or 1.0
    found, start = [], 0.0
    for run, end, width in zip(runs, ends, widths, strict=True):
        events = max(1, end - run[0].event)
        found += [(start + width * (point.event - run[0].event) / events) / total for point in run]
        start += width
    return found


def _phase_runs(points: Sequence[TimelinePoint]) -> list[range]:
    """The stretches of one phase each, by the numbers of their points."""
    starts = [i for i, point in enumerate(points) if i == 0 or point.phase != points[i - 1].phase]
    return [range(start, end) for start, end in pairwise([*starts, len(points)])]


def _bands(found: DryRun, order: Sequence[int], lefts: Sequence[float], top: float, moment: int) -> Iterator[Band]:
    """From the bottom up. Each area reaches down to the axis and is drawn before those below it."""
    level = [0] * len(found.timeline)
    for category in order:
        level = [below + point.bytes_by_category[category] for below, point in zip(level, found.timeline, strict=True)]
        held = found.timeline[moment].bytes_by_category[category]
        yield Band(
            category=found.categories[category],
            path=f"{_outline(lefts, [amount / top for amount in level])}V{HEIGHT}H0Z",
            at_peak=scale.memory_text(held) if held else "–",
            share=f"{held / found.peak_allocated_bytes:.0%}" if held else "",
        )


def _outline(lefts: Sequence[float], heights: Sequence[float]) -> str:
    """Steps: what is held at one moment is held until the next."""
    words: list[str] = []
    before = None
    for left, height in zip(lefts, heights, strict=True):
        y = f"{HEIGHT * (1 - height):.1f}".removesuffix(".0")
        if y != before:
            x = f"{WIDTH * left:.1f}".removesuffix(".0")
            words.append(f"H{x}V{y}" if words else f"M0 {y}")
            before = y
    return "".join(words) + f"H{WIDTH}"


def _stretches(points: Sequence[TimelinePoint], lefts: Sequence[float]) -> Iterator[Stretch]:
    for run in _phase_runs(points):
        left, right = lefts[run.start], lefts[min(run.stop, len(points) - 1)]
        yield Stretch(phase=points[run.start].phase, left=100 * left, width=100 * (right - left))


def _ticks(top: float) -> tuple[Line, ...]:
    size, name = scale.pick_unit(top, scale.MEMORY_UNITS)
    whole = top / size
    power = 10 ** math.floor(math.log10(whole / 4))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= whole / 6)
    return tuple(
        Line(height=100 * i * step / whole, text=f"{i * step:,.6g} {name}" if i else "0")
        for i in range(math.floor(whole / step) + 1)
    )


def _moments(found: DryRun, order: Sequence[int], lefts: Sequence[float]) -> str:
    phases = list(dict.fromkeys(point.phase for point in found.timeline))
    mib = 2**20
    rows = [
        [
            round(left, 5),
            phases.index(point.phase),
            point.event,
            round(point.reserved_bytes / mib, 2),
            *(round(point.bytes_by_category[i] / mib, 2) for i in reversed(order)),
        ]
        for left, point in zip(lefts, found.timeline, strict=True)
    ]
    return json.dumps({"phases": phases, "moments": rows}, separators=(",", ":"))


def _describe(found: DryRun, stretches: Sequence[Stretch]) -> str:
    parts = ", ".join(
        f"{name} {scale.memory_text(amount)}"
        for name, amount in sorted(found.categories_bytes, key=lambda part: -part[1])
    )
    order = ", ".join(dict.fromkeys(stretch.phase for stretch in stretches if stretch.phase != "between"))
    return f"Stacked areas over {order}. At the peak, in {found.peak_phase}: {parts}."
