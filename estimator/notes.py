"""What an estimate assumes, and what would make it better: one line each for the reader."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.hardware import find_accelerator, is_cpu
from estimator.model.shape import ModelShape, count_parameters
from estimator.result import TimeEstimate
from estimator.run.cost import RunRequest
from estimator.run.prices import choose_price
from estimator.setup import Setup
from estimator.speed.step_law import unseen
from estimator.units import GIB

if TYPE_CHECKING:
    from estimator.calibration.fitting import Calibration
    from estimator.dryrun.result import DryRun


def notes_of(
    shape: ModelShape,
    setup: Setup,
    request: RunRequest,
    time: TimeEstimate | None,
    calibration: Calibration | None,
    *,
    dry_run: DryRun | None,
) -> tuple[str, ...]:
    notes = []
    if shape.inferred:
        notes.append(
            f"shape inferred from the count: {shape.layers} layers of {shape.hidden}, {shape.vocab:,} vocabulary, Llama-like; "
            "write --model for a known one"
        )
    if shape.guessed:
        notes.append(
            "the config's type is of no known family: "
            + (
                ("memory" if time is None else "memory, and time by operators,") + " from its own code"
                if dry_run
                else f"read as {shape.family}'s; --dry-run runs its own code"
            )
        )
    if dry_run is not None and dry_run.reference_code and not is_cpu(setup.accelerator):
        notes.append(
            f"{', '.join(dry_run.reference_code)}: transformers' own PyTorch code was run, as where the package is not installed; "
            "with it a GPU runs other kernels, which hold other tensors"
        )
    notes.append(
        f"assumes {setup.framework}, {setup.precision}, {setup.optimizer}, {setup.attention} attention, "
        f"checkpointing {setup.checkpointing}, {setup.loss} loss, "
        + ("no evaluation" if setup.eval_batch is None else f"evaluation at batch {setup.eval_batch}")
    )
    notes += _expected_memory(setup.accelerator)
    if not setup.pack:
        notes.append(
            f"padded: each sequence takes the time and memory of {setup.seq:,} tokens, and attention a mask of it"
        )
    if setup.accelerator is None:
        notes.append("no accelerator given: no time or cost; write --gpu NAME")
    elif time is None and shape.code_only:
        notes.append("no time: nothing was measured of such layers")
    elif time is None:
        what = (
            "a CPU has no datasheet rate"
            if is_cpu(setup.accelerator)
            else f"no rate of {setup.accelerator} for {setup.precision} is known"
        )
        notes.append(f"no time: {what}; measure with `vramcalc profile` and `vramcalc fit`")
    elif time.method == "formula" and (new := unseen(shape, setup, find_accelerator(setup.accelerator))):
        # Of a framework that runs elsewhere told of, this accelerator may be known from others.
        named = [
            f"{setup.framework} on this accelerator"
            if what == "accelerator" and "framework" not in new
            else f"this {what}"
            for what in new
        ]
        notes.append(
            f"time: no published run told the law of {', '.join(named)}: general coefficients and a wider interval; "
            "measure with `vramcalc profile` and `vramcalc fit`"
        )
    if _has_no_price(setup, request, time):
        notes.append(f"no cost: the catalog has no price for {setup.accelerator}; write --price 2.50")
    if request.tokens(setup.seq) is None:
        notes.append("no data given: no run; write --dataset-tokens N or --samples N, and --epochs")
    if calibration is not None:
        from estimator.calibration.applying import caveats

        notes += caveats(calibration, setup, count_parameters(shape).total)
    return tuple(notes)


def _has_no_price(setup: Setup, request: RunRequest, time: TimeEstimate | None) -> bool:
    """Whether a run is predicted that would cost something, nobody knows what."""
    if time is None or request.tokens(setup.seq) is None or setup.accelerator is None or is_cpu(setup.accelerator):
        return False
    given = request.price_usd_per_gpu_hour
    return choose_price(setup.accelerator, given=given, provider=request.provider, spot=request.spot) is None


def _expected_memory(accelerator: str | None) -> list[str]:
    if accelerator is None or is_cpu(accelerator):
        return []
    device = find_accelerator(accelerator)
    if not device.usable_is_expected:
        return []
    assert device.usable_bytes is not None and device.usable_low_bytes is not None
    expected, least = device.usable_bytes / GIB, device.usable_low_bytes / GIB
    return [
        f"no source states what the driver of {device.name} reports: {expected:.1f} GiB expected, {least:.1f} at least"
    ]
