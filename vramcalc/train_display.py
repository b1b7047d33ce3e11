"""The progress of a training on stderr: a bar on a terminal, a line at each evaluation elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from estimator.result import Estimate
from harness.train import TrainProgress
from reports.scale import disk_text, interval_text, seconds_text


class TrainDisplay:
    """A context: the bar is gone when it ends, however it ends."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=None),
                TextColumn("{task.fields[step]}  {task.fields[losses]}  {task.fields[left]}", markup=False),
                console=self._console,
                transient=True,
                expand=True,
            )
        self._evaluated: float | None = None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show_estimate(self, estimate: Estimate) -> None:
        """What the training is expected to take, before it starts."""
        memory, run = estimate.memory.peak_device_bytes, estimate.run
        parts = [f"{interval_text(memory, 'bytes')} of memory"]
        if run is not None:
            parts.append(interval_text(run.hours, "hours"))
        parts.append(f"{disk_text(estimate.checkpoint.run_disk_bytes)} of disk")
        print(f"expected: {', '.join(parts)}", file=sys.stderr)

    def show(self, progress: TrainProgress) -> None:
        step = f"step {progress.step:,}/{progress.steps:,}"
        left = "" if progress.seconds_left is None else f"{seconds_text(progress.seconds_left)} left"
        if self._bar is None:
            if progress.evaluation_loss is not None and progress.evaluation_loss != self._evaluated:
                print(f"{step}  {_losses(progress)}  {left}".rstrip(), file=sys.stderr)
        elif self._task is None:
            self._task = self._bar.add_task(
                "", total=progress.steps, completed=progress.step, step=step, losses=_losses(progress), left=left
            )
        else:
            self._bar.update(self._task, completed=progress.step, step=step, losses=_losses(progress), left=left)
        self._evaluated = progress.evaluation_loss


def _losses(progress: TrainProgress) -> str:
    known = (("loss", progress.loss), ("held out", progress.evaluation_loss))
    return ", ".join(f"{name} {value:.4f}" for name, value in known if value is not None)
