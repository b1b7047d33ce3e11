"""The plan that is cheapest: every setup of a space predicted at once, and what none beats in both time and money."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from estimator.errors import InputError
from estimator.estimate import estimate
from estimator.grid import SetupGrid, grid_device_bytes, setup_grid
from estimator.hardware import find_accelerator
from estimator.memory.checkpoint import checkpoint_estimate
from estimator.model.catalog import resolve_model
from estimator.model.shape import ModelShape
from estimator.planning.layouts import candidates
from estimator.planning.space import Space
from estimator.result import Estimate
from estimator.run.cost import RunRequest, run_clock_of
from estimator.run.prices import choose_price
from estimator.setup import Setup
from estimator.speed.compute import step_work
from estimator.speed.step_law import formula_seconds
from estimator.units import Interval

if TYPE_CHECKING:
    import numpy

_CHUNK = 50_000
"""Setups of one pass."""
_NOTICEABLE = 0.01
"""A plan that is slower must be cheaper by this share to be worth a line, and a dearer one faster: intervals are many
times wider."""
_ASSUMED_TOKENS = 10**9
"""What plans are compared over where no data is stated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a plan may take; ``None`` is no limit."""

    hours: float | None = None
    usd: float | None = None

    def __post_init__(self) -> None:
        for flag, value in (("deadline", self.hours), ("budget", self.usd)):
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{flag}: {value:g} is out of range; write a number above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """A setup that does not fit."""

    setup: Setup
    bytes: int
    """What its device peak takes beyond the capacity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plans:
    """The outcome of a search."""

    front: tuple[Estimate, ...]
    """Fastest first: each is cheaper than all that are faster."""
    searched: int
    """Setups that were predicted."""
    fitting: int
    """Those whose device peak fits."""
    misses: tuple[Miss, ...]
    """Of each method of which nothing fits the setup that misses by least, the nearest of all first."""
    left_out: Mapping[str, str]
    """Accelerators that no plan could be made of, and what is not known of each."""

    @property
    def nearest(self) -> Miss | None:
        """Where nothing fits at all: what misses by least."""
        return None if self.fitting else self.misses[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidates:
    """Setups that share all but their numbers, predicted; arrays of one length."""

    base: Setup
    numbers: dict[str, Any]
    device_bytes: numpy.ndarray
    capacity_bytes: int
    hours: numpy.ndarray
    usd: numpy.ndarray

    def setup(self, index: int) -> Setup:
        chosen: dict[str, Any] = {name: int(values[index]) for name, values in self.numbers.items()}
        return dataclasses.replace(self.base, data_parallel=None, **chosen).resolved()


def plan(
    space: Space,
    request: RunRequest,
    limits: Limits,
    *,
    fits: Callable[[Setup], bool] | None = None,
) -> Plans:
    """Searches ``space`` for the Pareto front of hours against dollars among what fits and keeps the limits.

    ``fits`` is asked once more for each plan before it is shown (a dry run knows more than the formula); those that it
    denies make way for the next. Raises InputError for a space without any setup.
    """
    import numpy

    shape = resolve_model(space.given["model"][0])
    found: list[tuple[_Candidates, numpy.ndarray]] = []
    searched = fitting = 0
    closest = dict[str, tuple[float, Setup]]()
    """By method the least that a setup is over, negative where it fits."""
    left_out = dict[str, str]()
    for some in _predicted(space, shape, request, left_out):
        over = some.device_bytes - some.capacity_bytes
        searched += len(over)
        good = over <= 0
        fitting += int(good.sum())
        least = float(over.min())
        if least < closest.get(some.base.method, (math.inf,))[0]:
            closest[some.base.method] = (least, some.setup(int(over.argmin())))
        for most, values in ((limits.hours, some.hours), (limits.usd, some.usd)):
            if most is not None:
                good = good & (values <= most)
        if good.any():
            found.append((some, numpy.flatnonzero(good)))
    if not searched:
        raise InputError(_nothing(space, left_out, space.sequences_per_step(request.tokens(space.seq))))
    return Plans(
        front=_front(found, request, limits, fits),
        searched=searched,
        fitting=fitting,
        misses=tuple(
            Miss(setup=setup, bytes=round(over))
            for over, setup in sorted(closest.values(), key=lambda c: c[0])
            if over > 0
        ),
        left_out=left_out,
    )


def _nothing(space: Space, left_out: Mapping[str, str], batch: int | None) -> str:
    for name, reason in left_out.items():
        way = "dollars for one GPU-hour, --price 2.50, or --owned" if "price" in reason else "another --gpu"
        return f"{'price' if 'price' in reason else 'accelerator'}: {reason} of {name} is known; write {way}"
    if batch is not None:
        return (
            f"global_batch: no batch, accumulation and count of devices make {batch} sequences a step; "
            "write another, --global-batch N"
        )
    return "plan: no setup is left to choose from; give fewer settings, or more values of them"


# --- predicting -------------------------------------------------------------------------------------------------------


def _predicted(space: Space, shape: ModelShape, request: RunRequest, left_out: dict[str, str]) -> Iterator[_Candidates]:
    tokens = request.tokens(space.seq)
    sequences = space.sequences_per_step(tokens)
    for base in space.bases():
        assert base.accelerator is not None
        device = find_accelerator(base.accelerator)
        price, usable_bytes = _price(base, space, request), device.usable_low_bytes
        if usable_bytes is None:
            left_out[device.name] = "no usable memory"
        elif device.matrix_flops(base.precision) is None or device.bandwidth_bytes_per_second is None:
            left_out[device.name] = f"no rate for {base.precision}"
        elif price is None:
            left_out[device.name] = "no price"
        if price is None or usable_bytes is None or device.name in left_out:
            continue
        for part in _chunks(candidates(space, shape, base, sequences)):
            grid = setup_grid(base, **part)
            seconds = _step_seconds(shape, grid)
            if tokens is None:
                hours = seconds / grid.tokens_per_step * _ASSUMED_TOKENS / 3600
            else:
                hours = _run_hours(shape, base, part, seconds, request, tokens)
            yield _Candidates(
                base=base,
                numbers=part,
                device_bytes=grid_device_bytes(shape, grid, reserve_bytes=request.reserve_bytes),
                capacity_bytes=usable_bytes - request.reserve_bytes,
                hours=hours,
                usd=hours * grid.accelerators * price,
            )


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
    shape: ModelShape, base: Setup, part: dict[str, Any], seconds: Any, request: RunRequest, tokens: int
) -> Any:
    """Hours of the whole run: of the fastest and the slowest for each count of devices as an estimate has them, of the
    rest in between, since start-up, checkpoints and failures depend on the count and hardly on anything else."""
    import numpy

    grid = setup_grid(base, **part)
    stepping = numpy.ceil(tokens / grid.tokens_per_step) * seconds
    hours = numpy.empty_like(stepping)
    for count in numpy.unique(part["accelerators"]):
        places = numpy.flatnonzero(part["accelerators"] == count)
        ends = places[[stepping[places].argmin(), stepping[places].argmax()]]
        known = []
        for index in ends:
            chosen: dict[str, Any] = {name: int(values[index]) for name, values in part.items()}
            setup = dataclasses.replace(base, data_parallel=None, **chosen).resolved()
            clock = run_clock_of(
                shape, setup, request, Interval.exactly(float(seconds[index])), checkpoint_estimate(shape, setup)
            )
            known.append(clock.middle_seconds(math.ceil(tokens / setup.tokens_per_step)))
        hours[places] = numpy.interp(stepping[places], stepping[ends], known) / 3600
    return hours


def _step_seconds(shape: ModelShape, grid: SetupGrid) -> Any:
    assert grid.accelerator is not None
    parts = formula_seconds(step_work(shape, grid), grid, find_accelerator(grid.accelerator))
    assert parts is not None
    total: Any = sum(part.amount for part in parts)
    return total


def _chunks(numbers: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for first in range(0, len(numbers["batch"]), _CHUNK):
        yield {name: values[first : first + _CHUNK] for name, values in numbers.items()}


# --- choosing ---------------------------------------------------------------------------------------------------------


def _front(
    found: list[tuple[_Candidates, numpy.ndarray]],
    request: RunRequest,
    limits: Limits,
    fits: Callable[[Setup], bool] | None,
) -> tuple[Estimate, ...]:
    """Fastest first, each noticeably cheaper than the last; equals are decided by price, then by headroom."""
    import numpy

    if not found:
        return ()
    front: list[Estimate] = []
    owner = numpy.concatenate([numpy.full(len(kept), index) for index, (_, kept) in enumerate(found)])
    place = numpy.concatenate([kept for _, kept in found])
    hours, usd, taken = (
        numpy.concatenate([getattr(candidates, name)[kept] for candidates, kept in found])
        for name in ("hours", "usd", "device_bytes")
    )
    cheapest = float("inf")
    equals = numpy.floor(numpy.log(hours) / math.log1p(_NOTICEABLE))
    for index in numpy.lexsort((taken, hours, usd, equals)):
        if not usd[index] < cheapest * (1 - _NOTICEABLE):
            continue
        setup = found[owner[index]][0].setup(int(place[index]))
        if fits is not None and not fits(setup):
            continue
        whole = estimate(setup, request=request)
        if not _keeps(whole, limits):
            continue
        cheapest = float(usd[index])
        # Hours in bulk are rounded a little: what turns out slower than a cheaper one goes.
        while front and _hours(front[-1]) >= _hours(whole) > 0:
            front.pop()
        front.append(whole)
    return tuple(front)


def _hours(whole: Estimate) -> float:
    return 0.0 if whole.run is None else whole.run.hours.value


def _keeps(whole: Estimate, limits: Limits) -> bool:
    """Whether the run keeps the limits with all that surrounds its steps."""
    if whole.run is None:
        return True
    hours, cost = whole.run.hours.value, whole.run.cost_usd
    if limits.hours is not None and hours > limits.hours:
        return False
    return limits.usd is None or cost is None or cost.value <= limits.usd
