"""A sweep as it runs, on stderr: a bar with the current point and the time left, or a line a point in a pipe."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from estimator.measured import MeasuredRun
from estimator.setup import Setup

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from harness.sweep import SweepProgress


class SweepDisplay:
    """Call ``show`` with each SweepProgress; a context manager."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._left: tuple[float, float] | None = None
        """(the moment of the forecast, seconds left then)."""
        if sys.stderr.isatty():
            self._bar = self._make_bar()

    def _make_bar(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
        from rich.table import Column
        from rich.text import Text

        display = self

        class Left(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text(display._left_text())

        current = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
        return Progress(
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            current,
            Left(),
            console=Console(stderr=True),
            transient=True,
            expand=True,
        )

    def _left_text(self) -> str:
        if self._left is None:
            return ""
        moment, seconds = self._left
        left = max(seconds - (time.monotonic() - moment), 0.0)
        minutes, whole = divmod(round(left), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{whole:02} left" if minutes >= 60 else f"{minutes}:{whole:02} left"

    def show(self, progress: SweepProgress) -> None:
        if self._bar is None:
            if progress.finished is not None:
                print(f"{progress.done}/{progress.total} {finished_text(progress.finished)}", file=sys.stderr)
            return
        self._left = None if progress.seconds_left is None else (time.monotonic(), progress.seconds_left)
        description = "" if progress.current is None else point_text(progress.current)
        if self._task is None:
            self._task = self._bar.add_task(description, total=progress.total)
        self._bar.update(self._task, completed=progress.done, description=description, refresh=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def point_text(setup: Setup) -> str:
    """One point in a few words: ``micro, 2 x 128, lora``."""
    method = "" if setup.method == "full" else f", {setup.method}"
    return f"{setup.model}, {setup.batch} x {setup.seq:,}{method}"


def finished_text(run: MeasuredRun) -> str:
    """What became of a point: its step time, or why there is none."""
    if run.outcome == "ok" and run.step_seconds is not None:
        return f"{point_text(run.setup)}: {run.step_seconds:.3g} s a step"
    return f"{point_text(run.setup)}: {run.outcome}: {run.reason}"
