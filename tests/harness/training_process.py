"""Trains as a process of its own, so that a test can kill it: ``python training_process.py OUT CACHE DATA OPTIONS-AS-JSON``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from estimator.result import (
    CheckpointEstimate,
    Estimate,
    FitEstimate,
    MemoryEstimate,
    ModelSummary,
    NaiveEstimate,
)
from estimator.setup import Setup
from estimator.units import Interval
from harness.plan import TrainPlan
from harness.train import train


def some_estimate(setup: Setup, *, device_bytes: float = 1e9, disk_bytes: int = 10**6) -> Estimate:
    """An estimate in which only the device's peak and the disk matter."""
    peak = Interval.within(device_bytes, below=0.1, above=0.1)
    return Estimate(
        setup=setup,
        model=ModelSummary(
            name="nano",
            parameters=1_229_664,
            trainable_parameters=1_229_664,
            active_parameters=1_229_664,
            layers=4,
            hidden=96,
            vocab=8192,
            inferred=False,
        ),
        memory=MemoryEstimate(
            method="formula",
            phase="backward",
            parts=(),
            peak_allocated_bytes=Interval.exactly(0),
            peak_reserved_bytes=peak,
            peak_device_bytes=peak,
            peak_host_bytes=peak,
        ),
        fits=FitEstimate(gpu=None, capacity_bytes=None, fits=None, margin_bytes=None),
        fits_on=(),
        time=None,
        checkpoint=CheckpointEstimate(
            bytes=14_800_000, model_bytes=4_900_000, optimizer_bytes=9_900_000, run_disk_bytes=disk_bytes
        ),
        run=None,
        naive=NaiveEstimate(base={}, vram_bytes=0.0, years=None, reason=""),
        calibration=None,
        notes=(),
    )


def main() -> None:
    out, cache, data, options = sys.argv[1:]
    given = json.loads(options)
    setup = Setup(**given.pop("setup"))
    plan = TrainPlan(setup=setup, out=Path(out), cache=Path(cache), data=data or None, **given)
    train(plan, predict=lambda plan, steps: some_estimate(plan.setup))


if __name__ == "__main__":
    main()
