"""Every setup of a space predicted at once: memory, hours and dollars as arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from estimator.errors import InputError
from estimator.grid import SetupGrid, grid_device_bytes, setup_grid
from estimator.hardware import find_accelerator
from estimator.memory.checkpoint import checkpoint_estimate
from estimator.memory.host import host_interval
from estimator.model.shape import ModelShape
from estimator.planning.layouts import candidates, kept
from estimator.planning.space import Space
from estimator.run.cost import RunRequest, run_clock_of
from estimator.run.facts import run_fact
from estimator.run.prices import choose_price
from estimator.run.wall_time import RunClock
from estimator.setup import Setup
from estimator.speed.compute import step_work
from estimator.speed.step_law import formula_seconds
from estimator.units import Interval

if TYPE_CHECKING:
    import numpy

_CHUNK = 50_000
"""Setups of one pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Setups that share all but their numbers, predicted; arrays of one length."""

    base: Setup
    numbers: dict[str, Any]
    device_bytes: numpy.ndarray
    capacity_bytes: int
    host_fits: numpy.ndarray
    """Whether a machine's memory suffices."""
    hours: numpy.ndarray
    usd: numpy.ndarray

    def setup(self, index: int) -> Setup:
        return _setup(self.base, self.numbers, index)


def predicted(space: Space, shape: ModelShape, request: RunRequest, left_out: dict[str, str]) -> Iterator[Candidates]:
    """Every setup of ``space``, in parts that are not empty; ``left_out`` gets the accelerators of which something is not
    known. The request has an amount of data.

    Offloading that was not asked for only where nothing else fits as many of an accelerator: elsewhere it costs time and gives
    nothing.
    """
    import numpy

    clocks = _Clocks(shape, request)
    bases = sorted(space.bases(), key=lambda base: base.offload is not None)
    held = dict[tuple[str | None, ...], set[int]]()
    """Counts of an accelerator that hold the training without offloading, by what else was asked for."""
    for base in bases:
        known = _known(base, space, request, left_out)
        if known is None:
            continue
        counts = held.setdefault(_asked(base, space), set())
        found = candidates(space, shape, base, space.sequences_per_step(request.tokens(space.seq)))
        if base.offload and "offload" not in space.given:
            found = kept(found, ~numpy.isin(found["accelerators"], [*counts]))
        for part in _chunks(found):
            some = _candidates(shape, base, part, request, known, clocks)
            if base.offload is None:
                good = (some.device_bytes <= some.capacity_bytes) & some.host_fits
                counts.update(map(int, numpy.unique(part["accelerators"][good])))
            yield some


def _asked(base: Setup, space: Space) -> tuple[str | None, ...]:
    several = ("method", "precision")
    return (base.accelerator, *(getattr(base, name) for name in several if name in space.given))


def _known(base: Setup, space: Space, request: RunRequest, left_out: dict[str, str]) -> tuple[int, float] | None:
    """Usable bytes and dollars an hour of the accelerator; ``None``, and why in ``left_out``, where it cannot be planned with."""
    assert base.accelerator is not None
    device = find_accelerator(base.accelerator)
    price, usable_bytes = _price(base, space, request), device.usable_low_bytes
    if usable_bytes is None:
        left_out[device.name] = "no usable memory"
    elif device.matrix_flops(base.precision) is None or device.bandwidth_bytes_per_second is None:
        left_out[device.name] = f"no rate for {base.precision}"
    elif price is None:
        left_out[device.name] = "no price"
    else:
        return usable_bytes, price
    return None


def _candidates(
    shape: ModelShape,
    base: Setup,
    part: dict[str, Any],
    request: RunRequest,
    known: tuple[int, float],
    clocks: _Clocks,
) -> Candidates:
    (usable_bytes, price), tokens = known, request.tokens(base.seq)
    assert tokens is not None
    grid = setup_grid(base, **part)
    seconds = step_seconds_in_bulk(shape, grid)
    hours = _run_hours(part, seconds, grid.tokens_per_step, tokens, clocks.of(base, part))
    return Candidates(
        base=base,
        numbers=part,
        device_bytes=grid_device_bytes(shape, grid, reserve_bytes=request.reserve_bytes),
        capacity_bytes=usable_bytes - request.reserve_bytes,
        host_fits=_host_fits(shape, base, part, request),
        hours=hours,
        usd=hours * grid.accelerators * price,
    )


def _host_fits(shape: ModelShape, base: Setup, part: dict[str, Any], request: RunRequest) -> Any:
    """Whether a machine's memory suffices, by the first setup of each count of devices: what its ranks hold of a model there
    depends on their count and hardly on anything else."""
    import numpy

    suffices = numpy.ones(len(part["batch"]), dtype=bool)
    if request.host_memory_bytes is not None or base.offload:
        for count in numpy.unique(part["accelerators"]):
            places = numpy.flatnonzero(part["accelerators"] == count)
            suffices[places] = host_suffices(shape, _setup(base, part, int(places[0])), request.host_memory_bytes)
    return suffices


def host_suffices(shape: ModelShape, setup: Setup, host_memory_bytes: int | None) -> bool:
    """Whether a machine holds what its ranks keep there; where its memory is not stated, what offloading needs of a usual one."""
    most = host_memory_bytes
    if most is None:
        if setup.offload is None:
            return True
        ranks = min(setup.accelerators, setup.gpus_per_node)
        most = round(ranks * run_fact("host_bytes_per_accelerator").value.value)
    return host_interval(shape, setup, Interval.exactly(0.0)).value <= most


def _setup(base: Setup, numbers: dict[str, Any], index: int) -> Setup:
    chosen: dict[str, Any] = {name: int(values[index]) for name, values in numbers.items()}
    return dataclasses.replace(base, data_parallel=None, **chosen).resolved()


def _price(base: Setup, space: Space, request: RunRequest) -> float | None:
    if space.owned:
        return 0.0
    try:
        price = choose_price(
            base.accelerator, given=request.price_usd_per_gpu_hour, provider=request.provider, spot=request.spot
        )
    except InputError:  # one that was not asked for by name makes way for those that the provider has
        if len(space.accelerator_names()) == 1:
            raise
        return None
    return None if price is None else price.usd_per_gpu_hour.value


def _run_hours(
    part: dict[str, Any], seconds: Any, tokens_per_step: Any, tokens: int, clock: Callable[[int], RunClock]
) -> Any:
    """Hours of the whole run: of the fastest and the slowest for each count of devices as an estimate has them, of the
    rest in between, since start-up, checkpoints and failures depend on the count and hardly on anything else. ``clock``: of
    the setup at a place."""
    import numpy

    steps = numpy.ceil(tokens / tokens_per_step)
    stepping = steps * seconds
    hours = numpy.empty_like(stepping)
    for count in numpy.unique(part["accelerators"]):
        places = numpy.flatnonzero(part["accelerators"] == count)
        ends = places[[stepping[places].argmin(), stepping[places].argmax()]]
        pace = clock(int(places[0]))
        known = [pace.middle_seconds(int(steps[index]), float(seconds[index])) for index in ends]
        hours[places] = numpy.interp(stepping[places], stepping[ends], known) / 3600
    return hours


class _Clocks:
    """Of each combination and count of devices one: accelerators differ in nothing but the length of a step."""

    def __init__(self, shape: ModelShape, request: RunRequest) -> None:
        self._shape, self._request = shape, request
        self._known = dict[Setup, dict[int, RunClock]]()

    def of(self, base: Setup, part: dict[str, Any]) -> Callable[[int], RunClock]:
        known = self._known.setdefault(dataclasses.replace(base, accelerator=None), {})

        def clock(index: int) -> RunClock:
            count = int(part["accelerators"][index])
            if count not in known:
                setup = _setup(base, part, index)
                checkpoint = checkpoint_estimate(self._shape, setup)
                known[count] = run_clock_of(self._shape, setup, self._request, Interval.exactly(1.0), checkpoint)
            return known[count]

        return clock


def step_seconds_in_bulk(shape: ModelShape, grid: SetupGrid) -> Any:
    """Seconds of a step of every setup of ``grid``, whose accelerator has rates."""
    assert grid.accelerator is not None
    parts = formula_seconds(step_work(shape, grid), grid, find_accelerator(grid.accelerator))
    assert parts is not None
    total: Any = sum(part.amount for part in parts)
    return total


def _chunks(numbers: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for first in range(0, len(numbers["batch"]), _CHUNK):
        yield {name: values[first : first + _CHUNK] for name, values in numbers.items()}
