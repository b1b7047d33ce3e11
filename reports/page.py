"""Lines of a report on a screen: headings, aligned rows and wrapped paragraphs."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from reports import scale
from reports.runs import printable
from reports.screen import Screen

if TYPE_CHECKING:
    from estimator.units import Interval


class Page:
    """Lines of a report: headings, aligned rows of label and columns, wrapped paragraphs."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self.width = max(40, min(screen.width, 100))
        self._first = True

    def line(self, text: str, style: str = "") -> None:
        self._screen.line(printable(text.rstrip()), style)

    def heading(self, text: str, aside: str = "") -> None:
        if not self._first:
            self.line("")
        self._first = False
        for number, line in enumerate(textwrap.wrap(f"{text} ({aside})" if aside else text, self.width)):
            self.line(line if number == 0 else "  " + line, "bold")

    def row(self, label: str, value: str, aside: str = "", style: str = "") -> None:
        """``  label      value  aside``: values end in one column; an aside that does not fit goes below."""
        start = f"  {label:<13} {value:>15}"
        if not aside:
            self.line(start, style)
        elif len(start) + 2 + len(aside) <= self.width:
            self.line(f"{start}  {aside}", style)
        else:
            self.line(start, style)
            self.paragraph(aside, indent=" " * 6)

    def interval(self, label: str, interval: Interval, unit: str, note: str = "", style: str = "") -> None:
        bounds = scale.bounds_text(interval, unit)
        aside = "; ".join(text for text in (bounds, note) if text)
        self.row(label, scale.value_text(interval.value, unit), aside, style)

    def paragraph(self, text: str, *, indent: str = "  ", bullet: str = "", break_on_hyphens: bool = True) -> None:
        """break_on_hyphens: not in a command, whose flags have to survive being copied."""
        first, rest = indent + bullet, indent + " " * len(bullet)
        for line in textwrap.wrap(
            text, self.width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=break_on_hyphens
        ):
            self.line(line)

    def bar(self, fraction: float, width: int) -> str:
        glyph = "\u2588" if self._screen.draws_blocks else "#"
        return glyph * round(fraction * width)
