"""From a finished run to its result: losses, times, and predicted against measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from estimator.result import Estimate
from estimator.setup import Setup
from estimator.units import Interval
from harness.data import TokenData
from harness.plan import Schedule, TrainPlan
from harness.run_directory import MODEL_DIRECTORY
from harness.train_result import PredictedMeasured, TrainResult
from harness.training_log import LogEntry, median_step_seconds, overfit_epoch
from profiler.device import LocalDevice
from profiler.disk import CheckpointSize
from profiler.memory import MemoryPeaks

_EVALUATION_TOKENS = 32_768
_EVALUATION_SHARE = 4
_EVALUATION_SEQUENCES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A plan, with all that is known once data and device are."""

    plan: TrainPlan
    setup: Setup
    """Resolved, for this device."""
    device: LocalDevice
    data: TokenData
    steps: Schedule
    predicted: Estimate

    @property
    def evaluated(self) -> int:
        """Held-out sequences that an evaluation reads: enough to see a trend, few beside an epoch.

        At most 32,768 tokens and a quarter of an epoch's sequences, but eight sequences if there are so many.
        """
        wanted = min(_EVALUATION_TOKENS // self.setup.seq, self.steps.samples // _EVALUATION_SHARE)
        return min(len(self.data.evaluation), max(wanted, _EVALUATION_SEQUENCES))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was seen since the run was started or last resumed; ``None`` where nothing ran that shows it."""

    peaks: MemoryPeaks | None
    """Of the first rank."""
    allocated_by_rank: tuple[int, ...]
    """The allocated peak of each rank."""
    settled: bool
    """Untraced steps ran: on a CPU, reserved and resident memory are of those alone, since a trace takes memory."""
    host_peak_bytes: int | None
    checkpoint: CheckpointSize | None
    checkpoint_seconds: float | None


def outcome(run: Run, entries: Sequence[LogEntry], measured: Measured) -> TrainResult:
    """The result of a run whose log is complete."""
    trained = [entry for entry in entries if entry.kind == "train"]
    evaluated = [entry for entry in entries if entry.kind == "eval"]
    best = min(evaluated, key=lambda entry: (entry.loss, entry.step))
    return TrainResult(
        setup=run.setup.as_dict(),
        data=run.data.name,
        samples=run.steps.samples,
        steps=run.steps.steps,
        epochs=run.steps.epochs,
        tokens=run.steps.steps * run.setup.tokens_per_step,
        device=run.device.description,
        first_loss=trained[0].loss,
        final_loss=trained[-1].loss,
        final_evaluation_loss=evaluated[-1].loss,
        best_evaluation_loss=best.loss,
        best_epoch=best.epoch,
        best_checkpoint=f"checkpoint-{best.step}",
        last_checkpoint=f"checkpoint-{run.steps.steps}",
        model=MODEL_DIRECTORY,
        overfit_epoch=overfit_epoch(entries),
        training_seconds=_training_seconds(trained),
        evaluation_seconds=sum(entry.seconds for entry in evaluated),
        checkpoint_seconds=measured.checkpoint_seconds,
        peak_phase=measured.peaks.peak_phase if measured.peaks else None,
        allocated_by_rank=measured.allocated_by_rank,
        comparisons=(
            *_memory(run, measured),
            *_time(run, trained),
            PredictedMeasured(
                quantity="checkpoint",
                unit="disk_bytes",
                predicted=Interval.exactly(run.predicted.checkpoint.bytes),
                measured=measured.checkpoint.total_bytes if measured.checkpoint else None,
            ),
        ),
    )


def _training_seconds(trained: Sequence[LogEntry]) -> float:
    median = median_step_seconds(trained)
    return sum(median if entry.traced and median is not None else entry.seconds for entry in trained)


def _memory(run: Run, measured: Measured) -> tuple[PredictedMeasured, ...]:
    memory, peaks = run.predicted.memory, measured.peaks
    settled = peaks if measured.settled else None
    rows = [
        ("peak allocated", memory.peak_allocated_bytes, max(measured.allocated_by_rank, default=None)),
        ("peak reserved", memory.peak_reserved_bytes, settled.reserved_bytes if settled else None),
        ("peak device", memory.peak_device_bytes, settled.device_bytes if settled else None),
    ]
    if run.device.kind != "cpu":  # a CPU's host memory is the device's own figure
        rows.append(("peak host", memory.peak_host_bytes, measured.host_peak_bytes if settled else None))
    return tuple(
        PredictedMeasured(quantity=quantity, unit="bytes", predicted=interval, measured=value)
        for quantity, interval, value in rows
    )


def _time(run: Run, trained: Sequence[LogEntry]) -> tuple[PredictedMeasured, ...]:
    time, whole = run.predicted.time, run.predicted.run
    median = median_step_seconds(trained)
    return (
        PredictedMeasured(
            quantity="step time", unit="seconds", predicted=time.step_seconds if time else None, measured=median
        ),
        PredictedMeasured(
            quantity="throughput",
            unit="tokens/s",
            predicted=time.tokens_per_second if time else None,
            measured=run.setup.tokens_per_step / median if median else None,
        ),
        PredictedMeasured(
            quantity="training time",
            unit="hours",
            predicted=whole.training_hours if whole else None,
            measured=_training_seconds(trained) / 3600,
        ),
    )
