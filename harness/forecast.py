"""Before a training: what the estimator says of it, and whether that can be."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from estimator.errors import DoesNotFitError
from estimator.estimate import estimate
from estimator.result import Estimate
from estimator.run.cost import RunRequest
from estimator.setup import Setup
from estimator.units import GB, GIB
from harness.plan import Schedule, TrainPlan
from profiler.device import LocalDevice
from profiler.disk import checkpoint_size

if TYPE_CHECKING:
    from estimator.calibration.fitting import Calibration


def forecast(
    plan: TrainPlan,
    steps: Schedule,
    device: LocalDevice,
    *,
    calibration: Calibration | None = None,
    calibration_name: str | None = None,
) -> Estimate:
    """The estimate of exactly the steps that will be run, on what is free of this device's memory."""
    whole_epochs = steps.steps % steps.steps_per_epoch == 0
    return estimate(
        plan.setup,
        request=RunRequest(
            samples=steps.samples if whole_epochs else steps.steps * (steps.samples // steps.steps_per_epoch),
            epochs=steps.epochs if whole_epochs else 1.0,
            reserve_bytes=max(device.capacity_bytes - device.free_bytes, 0),
            kept_checkpoints=plan.keep,
        ),
        calibration=calibration,
        calibration_name=calibration_name,
        capacity_bytes=device.capacity_bytes,
    )


def refuse_hopeless_points(setups: Iterable[Setup], device: LocalDevice) -> None:
    """Raises DoesNotFitError for the first of a sweep's points whose peak is beyond the free memory at the very least: a
    point that may end either way is worth a run, and building one that cannot fit takes the machine's memory."""
    for setup in setups:
        peak = estimate(setup, capacity_bytes=device.capacity_bytes).memory.peak_device_bytes
        if peak.low > device.free_bytes:
            raise DoesNotFitError(
                f"memory: {setup.model}, {setup.batch} x {setup.seq}, needs {peak.low / GIB:.1f} to {peak.high / GIB:.1f} GiB of "
                f"the device and {device.name} has {device.free_bytes / GIB:.1f} GiB free; leave it out, or write --force to try "
                "all the same"
            )


def refuse_what_does_not_fit(predicted: Estimate, out: Path) -> None:
    """Raises DoesNotFitError, with the numbers, for a peak beyond the device's free memory or files beyond the disk's.

    What ``out`` already holds of the run counts as free: it is part of what was predicted.
    """
    peak, fit = predicted.memory.peak_device_bytes, predicted.fits
    if fit.fits is False and fit.capacity_bytes is not None:
        raise DoesNotFitError(
            f"memory: a step needs {peak.value / GIB:.2f} GiB of the device (90%: {peak.low / GIB:.2f} to "
            f"{peak.high / GIB:.2f}) and {fit.gpu} has {fit.capacity_bytes / GIB:.2f} GiB free; write a smaller --batch or "
            "--seq, --checkpointing full or --method lora, or --force to try all the same"
        )
    needed = predicted.checkpoint.run_disk_bytes
    free = shutil.disk_usage(out).free + checkpoint_size(out).total_bytes
    if needed > free:
        raise DoesNotFitError(
            f"disk: checkpoints and model take {needed / GB:.2f} GB ({predicted.checkpoint.bytes / GB:.2f} each) and "
            f"{out} has {free / GB:.2f} GB free; write a smaller --keep, or --out on another disk, or --force to try all "
            "the same"
        )
