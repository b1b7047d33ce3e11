"""The largest micro-batch at a sequence length, and the longest sequence at a micro-batch of one, that a space can hold."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from estimator.grid import grid_device_bytes, setup_grid
from estimator.hardware import find_accelerator
from estimator.model.catalog import resolve_model
from estimator.planning.bulk import host_suffices
from estimator.planning.layouts import layouts
from estimator.planning.space import Space
from estimator.setup import Setup

_MOST = {"batch": 2**16, "seq": 2**24}
_PRECISION = {"batch": 1, "seq": 64}
"""Steps in which the largest value is sought where each try is a dry run; large values in coarser ones, of 1/32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Largest:
    """What fits at most; ``None`` where not even one sequence does."""

    batch: int | None
    """Sequences of a micro-batch at the space's sequence length."""
    batch_setup: Setup | None
    seq: int | None
    """Tokens of the longest sequence, alone in its micro-batch."""
    seq_setup: Setup | None


def largest(
    space: Space,
    reserve_bytes: int,
    *,
    host_memory_bytes: int | None = None,
    fits: Callable[[Setup], bool] | None = None,
) -> Largest:
    """By the formula; with ``fits`` (a dry run) the answer is moved until it fits and the next one does not.

    Offloading, which takes host memory and time, counts only where it was asked for or nothing fits without.
    """
    if "offload" not in space.given:
        plain = dataclasses.replace(space, given={**space.given, "offload": (None,)})
        found = largest(plain, reserve_bytes, fits=fits)
        if found.batch is not None or found.seq is not None:
            return found
    batch, batch_setup = _largest(space, reserve_bytes, host_memory_bytes, "batch", fits)
    seq, seq_setup = _largest(space, reserve_bytes, host_memory_bytes, "seq", fits)
    return Largest(batch=batch, batch_setup=batch_setup, seq=seq, seq_setup=seq_setup)


def _largest(
    space: Space,
    reserve_bytes: int,
    host_memory_bytes: int | None,
    axis: str,
    fits: Callable[[Setup], bool] | None,
) -> tuple[int | None, Setup | None]:
    best: tuple[int, Setup | None] = (0, None)
    shape = resolve_model(space.given["model"][0])
    for base, usable_bytes in _roomiest(space):
        numbers = layouts(space, shape, base)
        if not len(numbers["accelerators"]):
            continue
        values = _bisected(shape, base, numbers, axis, usable_bytes, reserve_bytes)
        if axis == "seq":  # in such steps, where that is no loss
            values -= values % _PRECISION[axis] * (values >= 16 * _PRECISION[axis])
        index = int(values.argmax())
        if values[index] > best[0]:
            chosen: dict[str, Any] = {name: int(column[index]) for name, column in numbers.items()}
            there = dataclasses.replace(
                base, data_parallel=None, **chosen, **_point(axis, int(values[index]))
            ).resolved()
            if host_suffices(shape, there, host_memory_bytes):
                best = (int(values[index]), there)
    value, setup = best
    if fits is not None:
        tried = setup or (_smallest(space, axis) if host_memory_bytes is None else None)
        if tried is None:
            return None, None
        value = _moved(tried, axis, max(value, 1), fits)
        setup = dataclasses.replace(tried, **_point(axis, max(value, 1)))
    return (value, setup) if value else (None, None)


def _roomiest(space: Space) -> list[tuple[Setup, int]]:
    """Each combination on the accelerator with most memory: the others hold the same, in less."""
    found: dict[Setup, tuple[Setup, int]] = {}
    for base in space.bases():
        assert base.accelerator is not None
        usable = find_accelerator(base.accelerator).usable_low_bytes
        anywhere = dataclasses.replace(base, accelerator=None)
        if usable is not None and (anywhere not in found or found[anywhere][1] < usable):
            found[anywhere] = (base, usable)
    return list(found.values())


def _point(axis: str, value: int) -> dict[str, Any]:
    return {axis: value, "accumulation": 1} | ({"batch": 1} if axis == "seq" else {})


def _smallest(space: Space, axis: str) -> Setup | None:
    """What a dry run may still find to fit where the formula says that nothing does."""
    base = next(space.bases(), None)
    if base is None:
        return None
    return dataclasses.replace(base, **_point(axis, 1))


def _bisected(
    shape: Any, base: Setup, numbers: dict[str, Any], axis: str, usable_bytes: int, reserve_bytes: int
) -> Any:
    """The largest value of ``axis`` that fits each layout; 0 where 1 does not. More never takes less."""
    import numpy

    low = numpy.zeros(len(numbers["accelerators"]), dtype=numpy.int64)
    high = numpy.full_like(low, _MOST[axis] + 1)
    fixed = {"accumulation": 1} | ({"batch": 1} if axis == "seq" else {})
    while (high - low > 1).any():
        middle = numpy.maximum((low + high) // 2, 1)
        grid = setup_grid(base, **numbers, **fixed, **{axis: middle})
        fit = grid_device_bytes(shape, grid, reserve_bytes=reserve_bytes) <= usable_bytes - reserve_bytes
        low, high = numpy.where(fit, middle, low), numpy.where(fit, high, middle)
    return low


def _moved(setup: Setup, axis: str, start: int, fits: Callable[[Setup], bool]) -> int:
    """The largest multiple of the axis's precision that fits, near ``start``; 0 for none."""
    step = max(_PRECISION[axis], start // 32 // _PRECISION[axis] * _PRECISION[axis])

    @functools.cache
    def alone(units: int) -> bool:
        return fits(dataclasses.replace(setup, **_point(axis, units * step)))

    def good(units: int) -> bool:
        """With the one below it: fragments may spare a larger batch than one that they do not, and nobody counts on that."""
        return alone(units) and (units == 1 or axis == "seq" or alone(units - 1))

    known_bad: int | None = None
    units = max(start // step, 1)
    stride = max(units // 16, 1)
    while not good(units):
        known_bad = units
        if units == 1:
            return 0
        units, stride = max(units - stride, 1), stride * 2
    low = units
    stride = max(units // 16, 1)
    while known_bad is None:
        if good(low + stride):
            low, stride = low + stride, stride * 2
        else:
            known_bad = low + stride
    while known_bad - low > 1:
        middle = (low + known_bad) // 2
        if good(middle):
            low = middle
        else:
            known_bad = middle
    return low * step
