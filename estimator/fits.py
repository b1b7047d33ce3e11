"""Whether a predicted peak fits: the accelerator that was asked for, and each of the catalog."""

from __future__ import annotations

import dataclasses
import os

from estimator.errors import DoesNotFitError, InputError
from estimator.hardware import accelerators, context_bytes, find_accelerator, is_cpu
from estimator.memory.device import formula_interval, reserved_interval
from estimator.memory.formula import memory_phases, peak_phase
from estimator.model.shape import ModelShape
from estimator.result import Estimate, FitEstimate, MemoryEstimate
from estimator.run.cost import RunRequest
from estimator.setup import Setup
from estimator.units import GIB, Interval


def fits_by_peak(
    accelerator: str | None, device: Interval, reserve_bytes: int, capacity_bytes: int | None
) -> FitEstimate:
    if accelerator is None:
        return FitEstimate(gpu=None, capacity_bytes=None, fits=None, margin_bytes=None)
    capacity = capacity_bytes
    if capacity is None:
        capacity = _host_memory_bytes() if is_cpu(accelerator) else find_accelerator(accelerator).usable_bytes
    if capacity is None:
        return FitEstimate(gpu=accelerator, capacity_bytes=None, fits=None, margin_bytes=None)
    capacity -= reserve_bytes
    margin = capacity - round(device.value)
    return FitEstimate(gpu=accelerator, capacity_bytes=capacity, fits=margin >= 0, margin_bytes=margin)


def check_reserve(accelerator: str | None, reserve_bytes: int) -> None:
    """Raises InputError where something else holds all that the accelerator has."""
    if accelerator is None or is_cpu(accelerator):
        return
    device = find_accelerator(accelerator)
    if device.usable_bytes is not None and reserve_bytes >= device.usable_bytes:
        raise InputError(
            f"reserve: {reserve_bytes / GIB:.1f} GiB leave nothing of the {device.usable_bytes / GIB:.1f} GiB of {device.name}; "
            "write a smaller --reserve, or a larger --gpu"
        )


def fits_replayed(setup: Setup, device: Interval, reserve_bytes: int, capacity_bytes: int | None) -> FitEstimate:
    """As ``fits_by_peak``; where the peak is beyond the capacity, the steps are replayed on a device of that size: the allocator
    gives its cache back before it fails, and fragments may keep it from finding what is free in all."""
    plain = fits_by_peak(setup.accelerator, device, reserve_bytes, capacity_bytes)
    if plain.fits is not False or is_cpu(setup.accelerator):
        return plain
    from estimator.dryrun.run import dry_run

    assert plain.capacity_bytes is not None
    context = round(context_bytes(setup.accelerator).value)
    found = dry_run(setup, capacity_bytes=max(plain.capacity_bytes - context, 0))
    if found.out_of_memory is not None:
        return plain
    return dataclasses.replace(
        plain, fits=True, margin_bytes=plain.capacity_bytes - context - found.peak_reserved_bytes
    )


def fits_by_dry_run(setup: Setup, *, reserve_bytes: int = 0) -> bool:
    """Whether steps on fake tensors end on the setup's accelerator, whose memory is known, less what is reserved.

    Raises InputError for what cannot be dry-run, MissingError without torch.
    """
    from estimator.dryrun.run import dry_run

    assert setup.accelerator is not None
    usable = find_accelerator(setup.accelerator).usable_bytes
    assert usable is not None
    room = usable - reserve_bytes - round(context_bytes(setup.accelerator).value)
    return dry_run(setup, capacity_bytes=max(room, 0)).out_of_memory is None


def with_host(fit: FitEstimate, memory: MemoryEstimate, request: RunRequest) -> FitEstimate:
    if request.host_memory_bytes is None:
        return fit
    margin = request.host_memory_bytes - round(memory.peak_host_bytes.value)
    fits = fit.fits if margin >= 0 else False
    return dataclasses.replace(fit, fits=fits, host_margin_bytes=margin)


def refuse_what_does_not_fit(estimate: Estimate) -> None:
    """Raises DoesNotFitError with the numbers; nothing where it fits or the capacity is unknown."""
    fit = estimate.fits
    if fit.fits is not False:
        return
    if fit.host_margin_bytes is not None and fit.host_margin_bytes < 0:
        raise DoesNotFitError(
            f"host memory: a machine needs {estimate.memory.peak_host_bytes.value / GIB:.1f} GiB, "
            f"{-fit.host_margin_bytes / GIB:.1f} GiB more than it has"
        )
    assert fit.margin_bytes is not None and fit.capacity_bytes is not None
    raise DoesNotFitError(
        f"memory: a device needs {estimate.memory.peak_device_bytes.value / GIB:.1f} GiB and {fit.gpu} has "
        f"{fit.capacity_bytes / GIB:.1f} GiB for it, {-fit.margin_bytes / GIB:.1f} GiB too little"
    )


def _host_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fits_on_each(shape: ModelShape, setup: Setup, reserve_bytes: int) -> tuple[FitEstimate, ...]:
    """Every accelerator whose memory is known, smallest first, by the formula."""
    found = []
    known = setup.accelerator is not None and not is_cpu(setup.accelerator)
    own = find_accelerator(str(setup.accelerator)) if known else None
    by_workspace: dict[bool, tuple[Interval, Interval]] = {}
    """What the allocator reserves with all the room, and with none: accelerators differ only in their libraries' workspaces."""
    for accelerator in accelerators().values():
        if accelerator.usable_bytes is None:
            continue
        large = accelerator.large_workspace
        if large not in by_workspace:
            same = own is not None and own.large_workspace == large
            there = setup if same else dataclasses.replace(setup, accelerator=accelerator.name)
            allocated = formula_interval(shape, there, peak_phase(memory_phases(shape, there)))
            free, full = (reserved_interval(shape, there, allocated, room) for room in (None, 0))
            by_workspace[large] = free, full
        capacity, context = accelerator.usable_bytes - reserve_bytes, context_bytes(accelerator.name).value
        reserved = _in_room(*by_workspace[large], max(capacity - round(context), 0))
        margin = capacity - round(round(reserved.value) + context)
        found.append(FitEstimate(gpu=accelerator.name, capacity_bytes=capacity, fits=margin >= 0, margin_bytes=margin))
    return tuple(sorted(found, key=lambda fit: fit.capacity_bytes or 0))


def _in_room(free: Interval, full: Interval, room_bytes: int | None) -> Interval:
    """``reserved_interval`` in a room, from what it is where there is all the room and where there is none."""

    def held(most: float, least: float) -> float:
        return most if room_bytes is None or most <= room_bytes else max(least, room_bytes)

    return Interval(value=held(free.value, full.value), low=held(free.low, full.low), high=held(free.high, full.high))
