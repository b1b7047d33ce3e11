"""The chart as one SVG file: memory against model size, a line a method, with the accelerators' memories across.

Written by hand: a dozen lines and labels need no plotting library, and the base install has none. Colours follow the
viewer's light or dark theme.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from reports import scale
from reports.runs import printable

if TYPE_CHECKING:
    from estimator.chart import Chart

from estimator.units import GIB

_WIDTH, _HEIGHT = 960, 600
_LINE = 15
"""Pixels from one label to the next."""
_LEFT, _TOP, _BOTTOM = 64, 76, 60
_LETTER = 6.6
"""Pixels of a letter at 12, at most."""
_STYLE = """
svg { font: 12px system-ui, sans-serif; background: #fff; color-scheme: light dark; }
.paper { fill: #fff } .ink { fill: #1c1c1c } .muted { fill: #5f5f5f } .rule { stroke: #e2e2e2 } .room { stroke: #9a9a9a; stroke-dasharray: 2 4 }
.s0 { --c: #1f6fb4 } .s1 { --c: #c8501e } .s2 { --c: #2c8a4b } .s3 { --c: #8a4fb0 } .s4 { --c: #a8780a } .s5 { --c: #b02f5f } .s6 { --c: #36807f } .s7 { --c: #6b6b6b }
.line { fill: none; stroke: var(--c); stroke-width: 2 } .d1 { stroke-dasharray: 7 4 } .d2 { stroke-dasharray: 2 3 } .dot { fill: var(--c) } .name { fill: var(--c) }
.title { font-size: 16px; font-weight: 600 } .rim { paint-order: stroke; stroke: #fff; stroke-width: 4px; stroke-linejoin: round }
@media (prefers-color-scheme: dark) {
svg { background: #16181c } .paper { fill: #16181c } .rim { stroke: #16181c } .ink { fill: #ececec } .muted { fill: #a5a5a5 } .rule { stroke: #33363c } .room { stroke: #6c6f75 }
.s0 { --c: #6db3ee } .s1 { --c: #f08b5d } .s2 { --c: #66c486 } .s3 { --c: #c391e6 } .s4 { --c: #dcb04e } .s5 { --c: #ee7fa6 } .s6 { --c: #6cc4c2 } .s7 { --c: #b5b5b5 }
}
"""
_ROOMS = ((24, "24 GiB"), (80, "80 GiB"), (640, "8 x 80 GiB"))
_COLOURS = 8


def chart_svg(chart: Chart) -> str:
    """The whole file. Both axes are logarithmic; a model's column stands at its parameters."""
    order = sorted(range(len(chart.columns)), key=lambda i: chart.columns[i].parameters)
    labels = [printable(row.label) for row in chart.rows]
    height = max(_HEIGHT, _TOP + _BOTTOM + _LINE * len(labels))
    right = _WIDTH - 24 - _LETTER * min(max(map(len, labels)), 44)
    x = _Axis([chart.columns[i].parameters for i in order], _LEFT + 16, right)
    values = [cell.peak_device_bytes.value / GIB for row in chart.rows for cell in row.cells]
    y = _Axis([*values], height - _BOTTOM, _TOP, ticks=True)
    body = [
        _text(_LEFT - 40, 30, "Memory that one device needs", "ink title"),
        _text(_LEFT - 40, 50, printable(chart.assumptions), "muted"),
    ]
    body += _grid(y, right)
    body += _sizes(x, [chart.columns[i].parameters for i in order], height - _BOTTOM + 22)
    body.append(_text((_LEFT + right) / 2, height - 14, "parameters", "muted", anchor="middle"))
    ends = [y.at(row.cells[order[-1]].peak_device_bytes.value / GIB) for row in chart.rows]
    for number, (row, label, place) in enumerate(
        zip(chart.rows, labels, _spread(ends, _TOP, height - _BOTTOM), strict=True)
    ):
        points = [(x.at(chart.columns[i].parameters), y.at(row.cells[i].peak_device_bytes.value / GIB)) for i in order]
        body.append(_series(number, points, label, right + 12, place))
    starts = [y.at(row.cells[order[0]].peak_device_bytes.value / GIB) for row in chart.rows]
    body += _rooms(y, starts, ends, right)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" role="img" '
        f'aria-label="Memory by method and model size"><style>{_STYLE}</style>'
        f'<rect class="paper" width="{_WIDTH}" height="{height}"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


class _Axis:
    """A logarithmic scale from numbers to pixels, a little wider than the values; with ``ticks`` to whole 1-2-5 steps."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, ticks: bool = False) -> None:
        low, high = min(values), max(values)
        self.low, self.high = (low / 1.25, high * 1.25) if ticks else (low, high)
        if self.low == self.high:
            self.low, self.high = low / 2, high * 2
        self.start, self.end = start, end

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """1, 2, 5, 10 ...; only powers of ten where those would crowd."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if len(decades) <= 5 else (1,)
        found = [step * 10.0**decade for decade in decades for step in steps]
        return [tick for tick in found if self.low <= tick <= self.high]


def _grid(y: _Axis, right: float) -> list[str]:
    """Lines across at round numbers, and dotted ones at memories that are for sale."""
    found = []
    for tick in y.ticks():
        found.append(_rule(y.at(tick), right, "rule"))
        found.append(_text(_LEFT - 8, y.at(tick) + 4, f"{tick:,g}", "muted", anchor="end"))
    found.append(_text(_LEFT - 8, _TOP - 6, "GiB", "muted", anchor="end"))
    return found + [_rule(y.at(room), right, "room") for room, _ in _ROOMS if y.low < room < y.high]


def _rooms(y: _Axis, starts: Sequence[float], ends: Sequence[float], right: float) -> list[str]:
    """The names of the dotted lines, at the side where the series leave more room, with a rim of paper over what is left."""
    found = []
    for room, name in _ROOMS:
        if y.low < room < y.high:
            height = y.at(room) - 4
            left, far = (min(abs(height - 4 - at) for at in side) for side in (starts, ends))
            x, anchor = (_LEFT + 4, "start") if left >= far else (right - 8, "end")
            found.append(_text(x, height, name, "muted rim", anchor=anchor))
    return found


def _sizes(x: _Axis, parameters: Sequence[int], height: float) -> list[str]:
    """The models' sizes under the axis; what lies closer to its neighbour than its name is wide goes without."""
    found, last = [], -math.inf
    for size in parameters:
        if x.at(size) - last > 42:
            last = x.at(size)
            found.append(_text(last, height, scale.count_text(size), "muted", anchor="middle"))
    return found


def _rule(height: float, right: float, style: str) -> str:
    return f'<line class="{style}" x1="{_LEFT}" y1="{height:.1f}" x2="{right:.1f}" y2="{height:.1f}"/>'


def _series(number: int, points: Sequence[tuple[float, float]], label: str, x: float, y: float) -> str:
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
    dots = "".join(f'<circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="3.5"/>' for px, py in points)
    name = label if len(label) <= 44 else label[:43] + "\u2026"
    style, dash = f"s{number % _COLOURS}", f"d{number // _COLOURS % 3}"
    return (
        f'<g class="{style}"><polyline class="line {dash}" points="{path}"/>{dots}{_text(x, y + 4, name, "name")}</g>'
    )


def _text(x: float, y: float, text: str, style: str, *, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _spread(heights: Sequence[float], top: float, bottom: float) -> list[float]:
    """The same order, moved apart so that labels do not overlap, and kept between ``top`` and ``bottom``."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    free = top
    for i in order:  # down from the top, then up from the bottom: each as near to its line as the others let it
        placed[i] = free = max(placed[i], free)
        free += _LINE
    free = bottom
    for i in reversed(order):
        placed[i] = free = min(placed[i], free)
        free -= _LINE
    return placed
