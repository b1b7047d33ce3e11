"""Predicted against measured: one quantity, its prediction with the interval, and what happened."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One row of "predicted against measured", in base units. A bound or a value that is unknown is ``None``."""

    quantity: str
    """As people read it: "peak allocated", "step time", "checkpoint"."""
    unit: str
    """Of all four numbers: a unit that ``reports.scale.value_text`` knows (bytes, disk_bytes, seconds, tokens/s, hours)."""
    predicted: float | None
    low: float | None
    high: float | None
    measured: float | None

    @property
    def error(self) -> float | None:
        """predicted / measured - 1, as a fraction."""
        if self.predicted is None or not self.measured:
            return None
        return self.predicted / self.measured - 1

    @property
    def within(self) -> bool | None:
        """Whether the measurement lies inside the 90% interval."""
        if self.low is None or self.high is None or self.measured is None:
            return None
        return self.low <= self.measured <= self.high
