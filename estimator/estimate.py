"""One setup in, one estimate out: the formulas put together, or the laws fitted to this device where there are any."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from estimator.fits import fits_by_peak, fits_on_each, fits_replayed, with_host
from estimator.hardware import find_accelerator, is_cpu
from estimator.memory.checkpoint import checkpoint_estimate
from estimator.memory.device import (
    allocator_room_bytes,
    device_interval,
    formula_interval,
    reserved_interval,
    whole_interval,
)
from estimator.memory.formula import memory_phases, peak_phase
from estimator.memory.host import host_interval, host_memory
from estimator.memory.states import trainable_parameters
from estimator.model.catalog import resolve_model
from estimator.model.shape import ModelShape, active_parameters, count_parameters
from estimator.notes import notes_of
from estimator.possible import check_by_code, check_possible
from estimator.result import (
    CheckpointEstimate,
    Estimate,
    FitEstimate,
    MemoryEstimate,
    ModelSummary,
    Part,
    TimeEstimate,
)
from estimator.run.cost import RunRequest, budgeted, naive_estimate, run_estimate
from estimator.setup import Setup
from estimator.speed.compute import StepWork, step_work
from estimator.speed.step_law import formula_seconds, step_interval
from estimator.units import Interval

if TYPE_CHECKING:
    from estimator.calibration.fitting import Calibration
    from estimator.dryrun.result import DryRun
    from estimator.remedies import Remedy

# Relative 90% half-widths (below, above) of a dry run's allocated peak: exact on the A+ rows and within 0.11% of real CPU
# steps; published runs of other versions of the libraries spread more. And above its reserved peak.
_DRY_RUN, _DRY_RUN_CPU, _DRY_RUN_RESERVED = (0.03, 0.05), (0.002, 0.004), 0.25
_DRY_SOURCE = "dry run of the model's code on fake tensors, replayed through a model of the allocator"


def estimate(
    setup: Setup,
    *,
    request: RunRequest | None = None,
    calibration: Calibration | None = None,
    calibration_name: str | None = None,
    capacity_bytes: int | None = None,
    dry_run: bool = False,
    remedies: bool = False,
) -> Estimate:
    """Predicts memory, time, checkpoint and the run. Raises InputError for what cannot be.

    ``capacity_bytes`` replaces the catalog's memory of the accelerator (for the device at hand). A calibration is used
    only where it is of the setup's accelerator. ``dry_run`` takes the memory from the real model code on fake tensors
    (needs torch; MissingError), and the time of a model that no family describes from its operators. ``remedies``: where it does not fit, what would make it fit.
    """
    request = request or RunRequest()
    setup = _canonical(setup).resolved()
    shape = resolve_model(setup.model)
    if dry_run and shape.guessed:
        from estimator.dryrun.counted_shape import counted_shape

        shape = counted_shape(shape)
    check_possible(shape, setup)
    by_code = dry_run and shape.code_only
    if by_code:
        check_by_code(shape, setup)
    parameters = count_parameters(shape).total
    if calibration is not None:
        from estimator.calibration.fitting import matches

        if not matches(calibration, setup.accelerator):
            calibration = None
    room = allocator_room_bytes(setup, request.reserve_bytes, capacity_bytes)
    memory = _dry_memory(shape, setup) if dry_run else _memory(shape, setup, calibration, room)
    time = None if by_code else _time(shape, setup, calibration, by_operators=dry_run and shape.guessed)
    checkpoint = _checkpoint(shape, setup, calibration, request)
    fits = (
        fits_replayed(setup, memory.peak_device_bytes, request.reserve_bytes, capacity_bytes)
        if dry_run
        else fits_by_peak(setup.accelerator, memory.peak_device_bytes, request.reserve_bytes, capacity_bytes)
    )
    fits_on = () if by_code else fits_on_each(shape, setup, request.reserve_bytes)
    if dry_run:  # no second opinion on the accelerator that was asked for
        fits_on = tuple(fits if other.gpu == fits.gpu else other for other in fits_on)
    return Estimate(
        setup=setup,
        model=ModelSummary(
            name=shape.name,
            parameters=parameters,
            trainable_parameters=trainable_parameters(shape, setup),
            active_parameters=active_parameters(shape),
            layers=shape.layers,
            hidden=shape.hidden,
            vocab=shape.vocab,
            inferred=shape.inferred,
        ),
        memory=memory,
        fits=with_host(fits, memory, request),
        fits_on=fits_on,
        time=time,
        checkpoint=checkpoint,
        run=run_estimate(shape, setup, request, time, checkpoint),
        budget=budgeted(shape, setup, request, time, checkpoint),
        naive=naive_estimate(parameters, setup, request),
        calibration=None if calibration is None else calibration_name,
        notes=notes_of(shape, setup, request, time, calibration, dry_run=memory.dry_run),
        remedies=_remedies(shape, setup, memory, fits, fits_on, request.reserve_bytes, calibration)
        if remedies and not by_code
        else (),
    )


def _canonical(setup: Setup) -> Setup:
    """The accelerator by its catalog name."""
    if setup.accelerator is None or is_cpu(setup.accelerator):
        return setup
    return dataclasses.replace(setup, accelerator=find_accelerator(setup.accelerator).name)


# --- memory -----------------------------------------------------------------------------------------------------------


def _memory(shape: ModelShape, setup: Setup, calibration: Calibration | None, room_bytes: int | None) -> MemoryEstimate:
    phases = memory_phases(shape, setup)
    if calibration is not None:
        from estimator.calibration import applying as laws

        fitted = laws.apply_memory(calibration, phases)
        if fitted is not None:
            allocated = fitted.peak_allocated_bytes
            reserved = laws.apply_reserved(calibration, allocated) or reserved_interval(
                shape, setup, allocated, room_bytes
            )
            device = laws.apply_device(calibration, allocated) or device_interval(setup, reserved)
            return _memory_estimate(shape, setup, "measured", fitted.phase, fitted.parts, allocated, reserved, device)
    peak = peak_phase(phases)
    allocated = formula_interval(shape, setup, peak)
    reserved = reserved_interval(shape, setup, allocated, room_bytes)
    device = device_interval(setup, reserved)
    return _memory_estimate(shape, setup, "formula", peak.phase, peak.parts, allocated, reserved, device)


def _dry_memory(shape: ModelShape, setup: Setup) -> MemoryEstimate:
    from estimator.dryrun.run import dry_run

    found = dry_run(setup)
    allocated = float(found.peak_allocated_bytes)
    below, above = _DRY_RUN_CPU if is_cpu(setup.accelerator) else _DRY_RUN
    within = whole_interval(allocated, allocated * (1 - below), allocated * (1 + above))
    if is_cpu(setup.accelerator):
        reserved = reserved_interval(shape, setup, within, None)
    else:
        # What the replay does not know: memory that other streams and libraries keep, and what came before the steps.
        replayed = float(found.peak_reserved_bytes)
        reserved = whole_interval(replayed, replayed * (1 - below), replayed * (1 + _DRY_RUN_RESERVED))
    parts = tuple(
        Part(name=name, amount=amount, formula="live in the allocator's blocks at the peak", source=_DRY_SOURCE)
        for name, amount in found.categories_bytes
        if amount
    )
    device = device_interval(setup, reserved)
    return _memory_estimate(shape, setup, "dry-run", found.peak_phase, parts, within, reserved, device, found)


def _memory_estimate(
    shape: ModelShape,
    setup: Setup,
    method: str,
    phase: str,
    parts: tuple[Part, ...],
    allocated: Interval,
    reserved: Interval,
    device: Interval,
    dry_run: DryRun | None = None,
) -> MemoryEstimate:
    return MemoryEstimate(
        method=method,
        phase=phase,
        parts=parts,
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=reserved,
        peak_device_bytes=device,
        peak_host_bytes=host_interval(shape, setup, device),
        host=None if is_cpu(setup.accelerator) else host_memory(shape, setup),
        dry_run=dry_run,
    )


# --- what fits --------------------------------------------------------------------------------------------------------


def _remedies(
    shape: ModelShape,
    setup: Setup,
    memory: MemoryEstimate,
    fits: FitEstimate,
    fits_on: tuple[FitEstimate, ...],
    reserve_bytes: int,
    calibration: Calibration | None,
) -> tuple[Remedy, ...]:
    if fits.fits is not False:
        return ()
    from estimator.remedies import find_remedies

    def step_seconds(changed: Setup) -> float | None:
        if calibration is not None and changed.accelerator != setup.accelerator:
            return None  # a law and a formula are not compared
        time = _time(shape, changed, calibration)
        return None if time is None else time.step_seconds.value

    return find_remedies(
        shape,
        setup,
        fits,
        device_peak_bytes=memory.peak_device_bytes.value,
        by_formula=memory.method == "formula",
        reserve_bytes=reserve_bytes,
        larger=fits_on,
        step_seconds=step_seconds,
    )


# --- time and checkpoint ----------------------------------------------------------------------------------------------


def _time(
    shape: ModelShape, setup: Setup, calibration: Calibration | None, *, by_operators: bool = False
) -> TimeEstimate | None:
    nowhere = setup.accelerator is None or is_cpu(setup.accelerator)
    if calibration is None and nowhere:
        return None
    if by_operators:
        from estimator.dryrun.work import operator_step_work

        work = operator_step_work(shape, setup)
    else:
        work = step_work(shape, setup)
    if calibration is not None:
        from estimator.calibration.applying import apply_time

        fitted = apply_time(calibration, work, setup)
        if fitted is not None:
            return _time_estimate(setup, work, fitted.step_seconds, fitted.parts, "measured")
    if setup.accelerator is None or nowhere:
        return None
    accelerator = find_accelerator(setup.accelerator)
    parts = formula_seconds(work, setup, accelerator)
    if parts is None:
        return None
    total = sum(part.amount for part in parts)
    seconds = step_interval(total, shape, setup, accelerator)
    return _time_estimate(setup, work, seconds, parts, "formula")


def _time_estimate(
    setup: Setup, work: StepWork, seconds: Interval, parts: tuple[Part, ...], method: str
) -> TimeEstimate:
    tokens = seconds.inverse(setup.tokens_per_step)
    peak = None
    if setup.accelerator is not None and not is_cpu(setup.accelerator):
        peak = find_accelerator(setup.accelerator).matrix_flops(setup.precision)
    return TimeEstimate(
        step_seconds=seconds,
        tokens_per_second=tokens,
        tokens_per_second_per_gpu=tokens.scaled(1 / setup.accelerators),
        model_flops_per_step=work.model_flops,
        mfu=None if peak is None else seconds.inverse(work.model_flops / (peak * setup.accelerators)),
        parts=parts,
        method=method,
    )


def _checkpoint(
    shape: ModelShape, setup: Setup, calibration: Calibration | None, request: RunRequest
) -> CheckpointEstimate:
    by_formula = checkpoint_estimate(shape, setup, kept=request.kept_checkpoints)
    if calibration is None:
        return by_formula
    from estimator.calibration.applying import apply_checkpoint

    fitted = apply_checkpoint(calibration, by_formula.model_bytes, by_formula.optimizer_bytes)
    if fitted is None:
        return by_formula
    total = round(fitted.bytes.value)
    return CheckpointEstimate(
        bytes=total,
        model_bytes=fitted.model_bytes,
        optimizer_bytes=fitted.optimizer_bytes,
        run_disk_bytes=round(by_formula.run_disk_bytes * total / by_formula.bytes),
    )
