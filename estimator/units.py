"""Base units in, base units out: parsing what people type, and values that carry an interval."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from estimator.errors import InputError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12

_BYTE_UNITS: dict[str, float] = {
    "": 1, "b": 1, "k": KB, "kb": KB, "m": MB, "mb": MB, "g": GB, "gb": GB, "t": TB, "tb": TB,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB,
}  # fmt: skip
_COUNT_UNITS: dict[str, float] = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_HOUR_UNITS: dict[str, float] = {
    "": 1, "m": 1 / 60, "min": 1 / 60, "minutes": 1 / 60, "h": 1, "hours": 1, "hour": 1, "d": 24, "days": 24, "day": 24,
    "w": 168, "weeks": 168, "week": 168,
}  # fmt: skip
_MOST = 1e24
"""Beyond every count and size that anyone could mean, and far from where products of several would overflow."""
_NUMBER = re.compile(r"([0-9]+(?:[_,][0-9]{3})*(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?)\s*([a-z]*)", re.IGNORECASE)


def _parse(text: str, field: str, units: dict[str, float], example: str) -> float:
    match = _NUMBER.fullmatch(text.strip())
    scale = units.get(match[2].lower()) if match else None
    if match is None or scale is None:
        raise InputError(f"{field}: {text!r} is not a number I can read; write for example {example}")
    number = float(match[1].replace("_", "").replace(",", "")) * scale
    if number > _MOST:
        raise InputError(f"{field}: {text!r} is too large; write for example {example}")
    return number


def parse_bytes(text: str, field: str) -> int:
    """Bytes from ``"2GiB"``, ``"24 GB"`` or a plain number. Raises InputError."""
    return round(_parse(text, field, _BYTE_UNITS, "2GiB"))


def parse_count(text: str, field: str) -> int:
    """A count from ``"8e9"``, ``"8B"``, ``"3T"`` or ``"12_000"``. Raises InputError."""
    return round(_parse(text, field, _COUNT_UNITS, "8e9"))


def parse_hours(text: str, field: str) -> float:
    """Hours from ``"36h"``, ``"90 days"``, ``"45min"`` or a plain number of hours. Raises InputError."""
    return _parse(text, field, _HOUR_UNITS, "36h")


def parse_dollars(text: str, field: str) -> float:
    """Dollars from ``"$1,000"``, ``"2.5k"`` or a plain number. Raises InputError."""
    return _parse(text.strip().removeprefix("$"), field, _COUNT_UNITS, "1000")


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An uncertain value with its 90% interval, in the unit that the field's name gives."""

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        assert self.low <= self.value <= self.high, (self.low, self.value, self.high)

    @classmethod
    def exactly(cls, value: float) -> Interval:
        return cls(value=value, low=value, high=value)

    @classmethod
    def within(cls, value: float, *, below: float, above: float) -> Interval:
        """``value`` with relative half-widths: ``within(100, below=0.1, above=0.2)`` is 90 to 120."""
        return cls(value=value, low=value * (1 - below), high=value * (1 + above))

    def scaled(self, factor: float) -> Interval:
        """Multiplied by a non-negative factor."""
        return Interval(value=self.value * factor, low=self.low * factor, high=self.high * factor)

    def times(self, other: Interval) -> Interval:
        """The product of two positive ones that vary independently: their relative widths add in squares."""

        def end(name: str) -> float:
            ratios = (getattr(self, name) / self.value, getattr(other, name) / other.value)
            if not all(ratios):
                return 0.0
            spread = math.hypot(*(math.log(ratio) for ratio in ratios))
            return self.value * other.value * math.exp(spread if name == "high" else -spread)

        if not self.value or not other.value:
            return Interval.exactly(0.0)
        return Interval(value=self.value * other.value, low=end("low"), high=end("high"))

    def inverse(self, numerator: float) -> Interval:
        """``numerator / self``: the bounds change places."""
        return Interval(value=numerator / self.value, low=numerator / self.high, high=numerator / self.low)
