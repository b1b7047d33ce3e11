"""Arithmetic that takes plain numbers and numpy arrays alike: what lets one formula answer one setup or a million.

Branches on numbers that a grid varies (batch, seq, accumulation, accelerators, the parallel degrees) are written with
these functions. numpy is imported only where an array comes in.
"""

from __future__ import annotations

import math
from typing import Any

Number = Any
"""A number, or an array of them."""


_PLAIN = (int, float)


def is_plain(value: Number) -> bool:
    """Whether ``value`` is one number (or truth value), not an array."""
    return isinstance(value, _PLAIN)


def maximum(first: Number, second: Number) -> Number:
    """The larger, element by element."""
    if isinstance(first, _PLAIN) and isinstance(second, _PLAIN):
        return first if first >= second else second
    import numpy

    return numpy.maximum(first, second)


def minimum(first: Number, second: Number) -> Number:
    """The smaller, element by element."""
    if isinstance(first, _PLAIN) and isinstance(second, _PLAIN):
        return first if first <= second else second
    import numpy

    return numpy.minimum(first, second)


def where(condition: Number, true: Number, false: Number) -> Number:
    """``true`` where the condition holds, else ``false``; both are computed."""
    if is_plain(condition):
        return true if condition else false
    import numpy

    return numpy.where(condition, true, false)


def either(first: Number, second: Number) -> Number:
    """Logical or."""
    if isinstance(first, _PLAIN) and isinstance(second, _PLAIN):
        return bool(first or second)
    import numpy

    return numpy.logical_or(first, second)


def ceil(value: Number) -> Number:
    """The next whole number."""
    if is_plain(value):
        return math.ceil(value)
    import numpy

    return numpy.ceil(value)


def whole(value: Number) -> Number:
    """The nearest whole number (halves to even, as Python rounds)."""
    if is_plain(value):
        return round(value)
    import numpy

    return numpy.rint(value)
