"""The plan that is cheapest: every setup of a space predicted at once, and what none beats in both time and money."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from estimator.errors import InputError
from estimator.estimate import estimate
from estimator.model.catalog import resolve_model
from estimator.planning.bulk import Candidates, predicted
from estimator.planning.space import Space
from estimator.result import Estimate
from estimator.run.cost import RunRequest
from estimator.setup import Setup

if TYPE_CHECKING:
    import numpy

_NOTICEABLE = 0.01
"""A plan that is slower must be cheaper by this share to be worth a line, and a dearer one faster: intervals are many
times wider."""
ASSUMED_TOKENS = 10**9
"""What plans are made for where no data is stated."""


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
    """Those whose device peak fits, and what a machine holds where its memory is known; offloaded ones only where nothing else
    fits as many of the accelerators."""
    least_hours: float
    """Of the fastest that fits, whatever the limits; infinite where nothing does."""
    least_usd: float
    """The same of the cheapest."""
    misses: tuple[Miss, ...]
    """Of each method of which nothing fits the setup that misses by least, the nearest of all first."""
    left_out: Mapping[str, str]
    """Accelerators that no plan could be made of, and what is not known of each."""
    assumed_tokens: int | None
    """Where no data was stated."""

    @property
    def nearest(self) -> Miss | None:
        """Where nothing fits at all: what misses by least."""
        return self.misses[0] if self.misses and not self.fitting else None


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

    assumed = ASSUMED_TOKENS if request.tokens(space.seq) is None else None
    if assumed is not None:
        _check_limits(limits)
        request = dataclasses.replace(request, dataset_tokens=assumed)
    shape = resolve_model(space.given["model"][0])
    found: list[tuple[Candidates, numpy.ndarray]] = []
    searched = fitting = 0
    least_hours = least_usd = math.inf
    closest = dict[str, tuple[float, Setup]]()
    """By method the least that a setup is over, negative where it fits."""
    left_out = dict[str, str]()
    for some in predicted(space, shape, request, left_out):
        over = some.device_bytes - some.capacity_bytes
        good = (over <= 0) & some.host_fits
        searched += len(over)
        held = numpy.where(some.host_fits, over, math.inf)
        least = float(held.min())
        if least < closest.get(some.base.method, (math.inf,))[0]:
            closest[some.base.method] = (least, some.setup(int(held.argmin())))
        if not good.any():
            continue
        fitting += int(good.sum())
        least_hours = min(least_hours, float(some.hours[good].min()))
        least_usd = min(least_usd, float(some.usd[good].min()))
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
        least_hours=least_hours,
        least_usd=least_usd,
        misses=tuple(
            Miss(setup=setup, bytes=round(over))
            for over, setup in sorted(closest.values(), key=lambda c: c[0])
            if over > 0
        ),
        left_out=left_out,
        assumed_tokens=assumed,
    )


def _check_limits(limits: Limits) -> None:
    for flag, most in (("deadline", limits.hours), ("budget", limits.usd)):
        if most is not None:
            raise InputError(
                f"{flag}: nothing is said of how much is trained; write --dataset-tokens N or --samples N as well"
                + (", or ask `vramcalc estimate --budget` what a setup trains for it" if flag == "budget" else "")
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


# --- choosing ---------------------------------------------------------------------------------------------------------


def _front(
    found: list[tuple[Candidates, numpy.ndarray]],
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
        if whole.fits.fits is False or not _keeps(whole, limits):
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
