"""The plan that is cheapest: every setup of a space predicted at once, and what none beats in both time and money."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from estimator.catalog import resolve_model
from estimator.compute import step_work
from estimator.cost import RunRequest
from estimator.errors import InputError
from estimator.estimate import estimate
from estimator.grid import SetupGrid, grid_device_bytes, setup_grid
from estimator.hardware import find_accelerator
from estimator.planning.layouts import candidates
from estimator.planning.space import Space
from estimator.prices import choose_price
from estimator.result import Estimate
from estimator.setup import Setup
from estimator.shape import ModelShape
from estimator.step_law import formula_seconds

if TYPE_CHECKING:
    import numpy

_CHUNK = 50_000
"""Setups of one pass."""
_NOTICEABLE = 0.01
"""A plan that is slower must be cheaper by this share to be worth a line: intervals are many times wider."""
_ASSUMED_TOKENS = 10**9
"""What plans are compared over where no data is stated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a plan may take; ``None`` is no limit."""

    hours: float | None = None
    usd: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plans:
    """The outcome of a search."""

    front: tuple[Estimate, ...]
    """Fastest first: each is cheaper than all that are faster."""
    searched: int
    """Setups that were predicted."""
    fitting: int
    """Those whose device peak fits."""
    nearest: Setup | None
    """Where none fits: the one that misses by least."""
    nearest_bytes: int
    """What its device peak takes beyond the capacity."""
    unpriced: tuple[str, ...]
    """Accelerators that were left out since no rate or price of them is known."""


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
    nearest: tuple[float, Setup | None] = (float("inf"), None)
    unpriced = dict[str, None]()
    for some in _predicted(space, shape, request, unpriced):
        over = some.device_bytes - some.capacity_bytes
        searched += len(over)
        good = over <= 0
        fitting += int(good.sum())
        if not fitting and float(over.min()) < nearest[0]:
            nearest = (float(over.min()), some.setup(int(over.argmin())))
        for most, values in ((limits.hours, some.hours), (limits.usd, some.usd)):
            if most is not None:
                good = good & (values <= most)
        if good.any():
            found.append((some, numpy.flatnonzero(good)))
    if not searched:
        raise InputError(_nothing(space, tuple(unpriced)))
    return Plans(
        front=tuple(_front(found, request, limits, fits)),
        searched=searched,
        fitting=fitting,
        nearest=None if fitting else nearest[1],
        nearest_bytes=0 if fitting else round(nearest[0]),
        unpriced=tuple(unpriced),
    )


def _nothing(space: Space, unpriced: tuple[str, ...]) -> str:
    if unpriced:
        return f"price: no price or rate of {unpriced[0]} is known; write dollars for one GPU-hour, --price 2.50, or --owned"
    batch = space.global_batch
    if batch is not None:
        return f"global_batch: no batch, accumulation and count of devices make {batch} sequences a step; write another"
    return "plan: no setup is left to choose from; give fewer settings, or more values of them"


# --- predicting -------------------------------------------------------------------------------------------------------


def _predicted(
    space: Space, shape: ModelShape, request: RunRequest, unpriced: dict[str, None]
) -> Iterator[_Candidates]:
    tokens = request.tokens(space.seq)
    sequences = space.sequences_per_step(tokens)
    for base in space.bases():
        price = _price(base, space, request)
        assert base.accelerator is not None
        device = find_accelerator(base.accelerator)
        if price is None or device.usable_bytes is None or device.matrix_flops(base.precision) is None:
            unpriced[device.name] = None
            continue
        for part in _chunks(candidates(space, shape, base, sequences)):
            grid = setup_grid(base, **part)
            seconds = _step_seconds(shape, grid)
            hours = seconds / grid.tokens_per_step * (tokens or _ASSUMED_TOKENS) / 3600
            yield _Candidates(
                base=base,
                numbers=part,
                device_bytes=grid_device_bytes(shape, grid, reserve_bytes=request.reserve_bytes),
                capacity_bytes=device.usable_bytes - request.reserve_bytes,
                hours=hours,
                usd=hours * grid.accelerators * price,
            )


def _price(base: Setup, space: Space, request: RunRequest) -> float | None:
    if space.owned:
        return 0.0
    price = choose_price(
        base.accelerator, given=request.price_usd_per_gpu_hour, provider=request.provider, spot=request.spot
    )
    return None if price is None else price.usd_per_gpu_hour.value


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
) -> Iterator[Estimate]:
    """Fastest first, each noticeably cheaper than the last; equals are decided by headroom."""
    import numpy

    if not found:
        return
    owner = numpy.concatenate([numpy.full(len(kept), index) for index, (_, kept) in enumerate(found)])
    place = numpy.concatenate([kept for _, kept in found])
    hours, usd, taken = (
        numpy.concatenate([getattr(candidates, name)[kept] for candidates, kept in found])
        for name in ("hours", "usd", "device_bytes")
    )
    cheapest = float("inf")
    for index in numpy.lexsort((taken, usd, hours)):
        if not usd[index] < cheapest * (1 - _NOTICEABLE):
            continue
        setup = found[owner[index]][0].setup(int(place[index]))
        if fits is not None and not fits(setup):
            continue
        whole = estimate(setup, request=request)
        if _keeps(whole, limits):
            cheapest = float(usd[index])
            yield whole


def _keeps(whole: Estimate, limits: Limits) -> bool:
    """Whether the run keeps the limits with all that surrounds its steps."""
    if whole.run is None:
        return True
    hours, cost = whole.run.hours.value, whole.run.cost_usd
    if limits.hours is not None and hours > limits.hours:
        return False
    return limits.usd is None or cost is None or cost.value <= limits.usd
