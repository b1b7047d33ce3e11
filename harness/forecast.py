"""Before a training: what the estimator says of it, and whether that can be."""

from __future__ import annotations

import shutil
from pathlib import Path

from estimator.errors import DoesNotFitError
from estimator.result import Estimate
from estimator.units import GB, GIB
from harness.plan import Schedule, TrainPlan
from profiler.device import LocalDevice
from profiler.disk import checkpoint_size


def forecast(plan: TrainPlan, steps: Schedule) -> Estimate:
    """The estimate of exactly the steps that will be run, with the calibration saved for this machine if there is one."""
    raise NotImplementedError


def kept_at_once(keep: int) -> int:
    """Checkpoints on the disk while one is being written: the newest ``keep`` with the new one, and the best."""
    return max(keep, 2) + 1


def refuse_what_does_not_fit(predicted: Estimate, device: LocalDevice, out: Path) -> None:
    """Raises DoesNotFitError, with the numbers, for a peak beyond the device's free memory or files beyond the disk's.

    What ``out`` already holds of the run counts as free: it is part of what was predicted.
    """
    peak = predicted.memory.peak_device_bytes
    if peak.value > device.free_bytes:
        raise DoesNotFitError(
            f"memory: a step needs {peak.value / GIB:.2f} GiB of the device (90%: {peak.low / GIB:.2f} to "
            f"{peak.high / GIB:.2f}) and {device.name} has {device.free_bytes / GIB:.2f} of "
            f"{device.capacity_bytes / GIB:.2f} GiB free; write a smaller --batch or --seq, --checkpointing full or "
            "--method lora, or --force to try all the same"
        )
    needed = predicted.checkpoint.run_disk_bytes
    held = checkpoint_size(out).total_bytes if out.is_dir() else 0
    free = shutil.disk_usage(out).free + held
    if needed > free:
        raise DoesNotFitError(
            f"disk: checkpoints and model take {needed / GB:.2f} GB ({predicted.checkpoint.bytes / GB:.2f} each) and "
            f"{out} has {free / GB:.2f} GB free; write a smaller --keep, or --out on another disk, or --force to try all "
            "the same"
        )
