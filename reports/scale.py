"""Scales base units for people: the one place where bytes become GiB and seconds become days.

Memory is written in binary units (GiB, as drivers and PyTorch report it), disk space in decimal ones (GB, as disks are
sold and file managers count). The text is ASCII, so that it can be printed anywhere.
"""

from __future__ import annotations

import math

from estimator.units import GB, GIB, KB, KIB, MB, MIB, TB, Interval

MEMORY_UNITS: tuple[tuple[float, str], ...] = ((1, "B"), (KIB, "KiB"), (MIB, "MiB"), (GIB, "GiB"))
DISK_UNITS: tuple[tuple[float, str], ...] = ((1, "B"), (KB, "kB"), (MB, "MB"), (GB, "GB"), (TB, "TB"))
TIME_UNITS: tuple[tuple[float, str], ...] = (
    (1e-6, "us"), (1e-3, "ms"), (1, "s"), (60, "min"), (3600, "h"), (86400, "days"), (365.25 * 86400, "years"),
)  # fmt: skip
COUNT_UNITS: tuple[tuple[float, str], ...] = ((1, ""), (1e3, "k"), (1e6, "M"), (1e9, "B"), (1e12, "T"))
_SI_UNITS: tuple[tuple[float, str], ...] = (
    (1, ""), (1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T"), (1e15, "P"), (1e18, "E"),
)  # fmt: skip
_ENERGY_UNITS: tuple[tuple[float, str], ...] = ((1e-3, "Wh"), (1, "kWh"), (1e3, "MWh"), (1e6, "GWh"))
_MASS_UNITS: tuple[tuple[float, str], ...] = ((1e-3, "g"), (1, "kg"), (1e3, "t"))
_LEAST_OF_UNIT = (1, 1, 1, 2, 2, 2, 2)


def digits(value: float, significant: int = 3) -> str:
    """``value`` with this many significant digits, whole digits never dropped: 0.0123, 1.23, 123, 12,345.

    What would not fit a table's column any more is written as 1.23e+16.
    """
    if value == 0:
        return "0"
    if not math.isfinite(value):  # the inverse of what is next to nothing
        return str(value)
    scientific = f"{value:.{significant - 1}e}"
    exponent = int(scientific.split("e")[1])
    if not -6 <= exponent < 15:
        return scientific
    return f"{value:,.{max(0, significant - 1 - exponent)}f}"


def pick_unit(value: float, units: tuple[tuple[float, str], ...]) -> tuple[float, str]:
    """The largest unit in which ``value`` does not read below 1; the smallest one for less."""
    chosen = units[0]
    for unit in units[1:]:
        if abs(value) >= 0.9995 * unit[0]:
            chosen = unit
    return chosen


def time_unit(seconds: float) -> tuple[float, str]:
    """The unit of a duration: a larger one only from two of it on (90 s, 45 min, 36 h)."""
    chosen = TIME_UNITS[0]
    for (size, name), least in zip(TIME_UNITS[1:], _LEAST_OF_UNIT[1:], strict=True):
        if abs(seconds) >= least * size * 0.9995:
            chosen = (size, name)
    return chosen


def _in_unit(value: float, unit: tuple[float, str], significant: int = 3) -> str:
    size, name = unit
    if name == "B":  # a fraction of a byte is nothing that anyone could hold
        return f"{value:,.0f} B"
    return f"{digits(value / size, significant)} {name}".rstrip()


def memory_text(amount: float, *, like: float | None = None) -> str:
    """Bytes of memory: "14.9 GiB". ``like`` is the value whose unit is used, so that a column shares one unit."""
    unit = pick_unit(amount if like is None else like, MEMORY_UNITS)
    if like is None:
        return _in_unit(amount, unit)
    return f"{amount / unit[0]:,.{_shared_decimals(like / unit[0])}f} {unit[1]}"


def margin_text(amount: int, *, fits: bool) -> str:
    """What is left of a device's memory, or missing, in bytes: ``1.2 GiB to spare``."""
    if not amount:
        return "with nothing to spare"
    return f"{memory_text(abs(amount))} {'to spare' if fits else 'too much'}"


def _shared_decimals(value: float) -> int:
    return 2 if abs(value) < 100 else 1


def disk_text(amount: float) -> str:
    """Bytes on a disk: "5.57 GB"."""
    return _in_unit(amount, pick_unit(amount, DISK_UNITS))


def seconds_text(seconds: float) -> str:
    """A duration: "340 ms", "45.0 min", "3.20 days", "32,106 years"."""
    return _in_unit(seconds, time_unit(seconds)) if seconds else "0 s"


def count_text(count: float) -> str:
    """A count: "512", "8.03B", "3.00T"."""
    size, name = pick_unit(count, COUNT_UNITS)
    if size == 1:
        return f"{count:,.0f}" if float(count).is_integer() else digits(count)
    number = digits(count / size)
    return (number.rstrip("0").rstrip(".") if "." in number else number) + name


def flops_text(flops: float) -> str:
    """Floating-point operations: "1.23 PFLOP"."""
    size, name = pick_unit(flops, _SI_UNITS)
    return f"{digits(flops / size)} {name}FLOP"


def rate_text(per_second: float) -> str:
    """Tokens per second: "12,345 tokens/s"."""
    return f"{digits(per_second)} tokens/s"


def dollars_text(dollars: float) -> str:
    """US dollars: "$0.042", "$12.30", "$1,234", "$1.25M"."""
    if dollars < 1:
        return f"${digits(dollars, 2)}"
    if dollars < 999.995:
        return f"${dollars:.2f}"
    if dollars < 1e6:
        return f"${dollars:,.0f}"
    size, name = pick_unit(dollars, COUNT_UNITS)
    return f"${digits(dollars / size)}{name}"


def energy_text(kilowatt_hours: float) -> str:
    """Energy from kWh: "850 Wh", "1.20 MWh"."""
    return _in_unit(kilowatt_hours, pick_unit(kilowatt_hours, _ENERGY_UNITS))


def mass_text(kilograms: float) -> str:
    """A mass from kg: "850 g", "1.20 t"."""
    return _in_unit(kilograms, pick_unit(kilograms, _MASS_UNITS))


def percent_text(fraction: float, *, sign: bool = False) -> str:
    """A fraction as "0.12%", "4.2%", "38%"; with ``sign`` "+4.2%"."""
    percent = fraction * 100
    size = abs(percent)
    if 0 < size < 0.005 and not sign:
        return "<0.01%"
    decimals = 2 if size < 0.995 else 1 if size < 9.95 else 0
    if percent == 0:
        return "0%"
    if size < 0.005:
        return "0.00%"
    return f"{percent:{'+' if sign else ''},.{decimals}f}%"


def value_text(value: float, unit: str) -> str:
    """``value`` in one of the base units that comparisons and laws use; an unknown unit is written behind the number."""
    writers = {
        "bytes": memory_text,
        "disk_bytes": disk_text,
        "seconds": seconds_text,
        "tokens/s": rate_text,
        "hours": lambda hours: seconds_text(hours * 3600),
        "usd": dollars_text,
        "kwh": energy_text,
        "kg": mass_text,
        "fraction": percent_text,
        "count": count_text,
    }
    return writers[unit](value) if unit in writers else f"{digits(value)} {unit}".rstrip()


def interval_text(interval: Interval, unit: str) -> str:
    """The value, followed by its 90% interval where it is not exact: "14.9 GiB (14.1 to 15.8 GiB)"."""
    value = value_text(interval.value, unit)
    bounds = bounds_text(interval, unit)
    return f"{value} ({bounds})" if bounds else value


def bounds_text(interval: Interval, unit: str) -> str:
    """The 90% interval alone, "14.1 to 15.8 GiB"; empty where the value is exact."""
    return "" if interval.low == interval.high else range_text(interval.low, interval.high, unit)


def range_text(low: float, high: float, unit: str) -> str:
    """From ``low`` to ``high``, the unit written once where both share it."""
    first, last = value_text(low, unit), value_text(high, unit)
    if first == last:
        return first
    number, space, name = first.rpartition(" ")
    if space and name == last.rpartition(" ")[2]:
        first = number
    return f"{first} to {last}"
