"""A sweep: points over a grid of setups, each in a fresh process, each row on the disk as soon as its point ends."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from estimator.errors import InputError, MissingError
from estimator.measured import MeasuredRun
from estimator.model.catalog import resolve_model
from estimator.setup import Setup
from estimator.speed.compute import step_work
from estimator.units import MIB
from harness.fork_server import CallEndedError, ForkServer, Limits
from harness.point import Procedure, check_points, local_setup, run_key, run_point, unfinished_run
from profiler.device import LocalDevice, host_memory
from profiler.store import RunStore

_SCRATCH = ".scratch-"
LOGS = "logs"
START_SECONDS = 0.4
"""Of a point on the CPU beyond its training: fork, build, the Trainer, the checkpoint's fixed part (0.3 to 0.5 s measured)."""
_MEMORY_MARGIN_BYTES = 256 * MIB
_MEMORY_MARGIN = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPoint:
    """One point of a sweep."""

    run: str
    setup: Setup
    measured: MeasuredRun | None
    """Its row where it has been measured before; then it is not run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepProgress:
    """Where a sweep is, told as a point begins, and once more at the end."""

    done: int
    total: int
    current: Setup | None
    """``None`` at the end."""
    seconds_left: float | None
    """``None`` while nothing is known of how long points take."""
    finished: MeasuredRun | None
    """The row that was just written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PointLimits:
    """What each point may use."""

    timeout_seconds: float = 600.0
    memory_bytes: int | None = None
    """Of the host's memory, beyond the libraries; ``None`` is what is available as the point starts, less a margin (on a GPU: no limit)."""
    end: float | None = None
    """The moment (``time.monotonic``) at which a point that still runs is ended."""

    def __post_init__(self) -> None:
        if not self.timeout_seconds > 0:
            raise InputError(f"timeout: {self.timeout_seconds:g} is not above 0; write --timeout with seconds")
        if self.memory_bytes is not None and self.memory_bytes <= 0:
            raise InputError(f"memory_limit: {self.memory_bytes} is not above 0; write for example --memory-limit 2GiB")


class Executor(ABC):
    """Runs points; tests answer without training."""

    @abstractmethod
    def check(self, setups: Sequence[Setup]) -> None:
        """Called once before the first point. Raises InputError or MissingError for what keeps every point from running."""

    @abstractmethod
    def run(self, setup: Setup, scratch: Path, log: Path) -> MeasuredRun:
        """One point's row, whatever became of it. ``scratch`` is an empty directory; what it prints goes to ``log``."""


class FreshProcessExecutor(Executor):
    """Each point in a process forked from one that has imported torch and transformers.

    ``trace`` names the file that gets a point's allocator trace (on a GPU); ``None`` is none.
    """

    def __init__(
        self,
        server: ForkServer,
        procedure: Procedure,
        device: LocalDevice,
        limits: PointLimits,
        trace: Callable[[Setup], Path | None] = lambda setup: None,
    ) -> None:
        self._server = server
        self._procedure = procedure
        self._device = device
        self._limits = limits
        self._trace = trace

    def check(self, setups: Sequence[Setup]) -> None:
        """Builds each model without memory, and reads the data; the points then find the tokens in the cache."""
        with tempfile.NamedTemporaryFile(prefix="vramcalc-") as log:
            try:
                self._server.call(check_points, tuple(setups), self._procedure, limits=_UNLIMITED, log=Path(log.name))
            except CallEndedError as error:
                raise RuntimeError(f"the points could not be checked: {error}") from None

    def run(self, setup: Setup, scratch: Path, log: Path) -> MeasuredRun:
        memory = self._limits.memory_bytes
        if memory is None and self._device.kind == "cpu":  # a CUDA driver maps far more than it uses
            memory = memory_for_a_point()
        seconds, end = self._limits.timeout_seconds, self._limits.end
        left = seconds if end is None else max(end - time.monotonic(), 0.0)
        limits = Limits(timeout_seconds=min(seconds, left), memory_bytes=memory)
        arguments = (setup, self._procedure, self._device, scratch, self._trace(setup))
        if self._device.kind == "cuda":
            _wait_for_free_memory(self._device)
        try:
            run = self._server.call(run_point, *arguments, limits=limits, log=log)
            assert isinstance(run, MeasuredRun)
            return run
        except CallEndedError as error:
            outcome, reason = error.outcome, str(error)
            if outcome == "timeout" and left < seconds:
                reason = f"{OUT_OF_TIME} after {left:.0f} s"
            if outcome == "oom" and memory is not None:
                reason += f" (limit {memory:,} bytes beyond the libraries)"
        except (InputError, MissingError) as error:  # this point's own: the others may still run
            outcome, reason = "failed", str(error)
        except BaseException:  # a Ctrl-C: end the point before its scratch directory is removed
            self._server.close()
            raise
        return unfinished_run(setup, self._procedure, self._device, outcome=outcome, reason=reason)


OUT_OF_TIME = "the sweep's time was over"
"""What the reason of a point starts with that was ended by ``PointLimits.end``."""
_UNLIMITED = Limits(timeout_seconds=24 * 3600.0)
_GPU_SECONDS = 5.0
_GPU_MARGIN_BYTES = 64 * MIB


def _wait_for_free_memory(device: LocalDevice) -> None:
    """Until the GPU has given back what the process before held, as long as it still does."""
    from profiler.nvml import first_gpu

    deadline, before = time.monotonic() + _GPU_SECONDS, -1
    while (gpu := first_gpu()) is not None and time.monotonic() < deadline:
        free = gpu.free_bytes()
        if free >= device.free_bytes - _GPU_MARGIN_BYTES or free <= before:
            return
        before = free
        time.sleep(0.1)


def memory_for_a_point() -> int:
    """What is available now, less a margin for everything else on the machine."""
    total, available = host_memory()
    return max(available - max(_MEMORY_MARGIN_BYTES, round(_MEMORY_MARGIN * total)), _MEMORY_MARGIN_BYTES)


def plan_sweep(
    setups: Iterable[Setup],
    measured: Iterable[MeasuredRun],
    *,
    procedure: Procedure,
    device: LocalDevice,
    retry: bool = False,
) -> tuple[PlannedPoint, ...]:
    """The points of a grid in its order, each once, with the rows of those in ``measured``.

    Points that ran out of memory, failed or took too long count as measured, unless ``retry``. Raises InputError for
    a setup that this machine cannot run.
    """
    rows = {run.run: run for run in measured if run.outcome == "ok" or not retry}
    points: dict[str, PlannedPoint] = {}
    for setup in setups:
        resolved = local_setup(setup, device)
        run = run_key(resolved, procedure, device)
        points.setdefault(run, PlannedPoint(run=run, setup=resolved, measured=rows.get(run)))
    return tuple(points.values())


def run_sweep(
    points: Sequence[PlannedPoint],
    store: RunStore,
    executor: Executor,
    *,
    steps: int,
    on_progress: Callable[[SweepProgress], None] = lambda progress: None,
    predict_seconds: Callable[[Setup], float | None] = lambda setup: None,
    goes_on: Callable[[], bool] = lambda: True,
) -> tuple[MeasuredRun, ...]:
    """Runs what is not measured yet and returns the row of every point, in the order of ``points``.

    ``goes_on`` is asked before each point; from its first no on, what is not measured has no row.

    For the time left, ``steps`` are those of one point and ``predict_seconds`` gives the seconds of one step; where it
    gives ``None`` for some, points are weighed by their FLOPs once one has ended. Kill it at any moment: what had ended is in the store. The log of a point that is
    not ``ok`` stays in ``logs/``.
    """
    _remove_scratch(store.directory)
    to_do = [point for point in points if point.measured is None]
    forecast = _Forecast(to_do, steps, predict_seconds)
    done, finished = len(points) - len(to_do), None
    rows = {point.run: point.measured for point in points if point.measured is not None}
    if to_do:
        executor.check([point.setup for point in to_do])
    for position, point in enumerate(to_do):
        if not goes_on():
            break
        on_progress(
            SweepProgress(
                done=done + position,
                total=len(points),
                current=point.setup,
                seconds_left=forecast.seconds_left(position),
                finished=finished,
            )
        )
        started = time.monotonic()
        with _point_files(store.directory, point.run) as (scratch, log):
            finished = executor.run(point.setup, scratch, log)
            assert finished.run == point.run, "an executor answers for the point that it was given"
            if finished.outcome == "ok":
                log.unlink(missing_ok=True)
        store.add(finished)
        rows[point.run] = finished
        forecast.ended(position, time.monotonic() - started)
    on_progress(SweepProgress(done=len(rows), total=len(points), current=None, seconds_left=0.0, finished=finished))
    return tuple(rows[point.run] for point in points if point.run in rows)


class _Forecast:
    """How long the remaining points take: predicted, and corrected by how the ended ones compared."""

    def __init__(
        self, points: Sequence[PlannedPoint], steps: int, predict_seconds: Callable[[Setup], float | None]
    ) -> None:
        seconds = [predict_seconds(point.setup) for point in points]
        self._in_seconds = None not in seconds
        self._work = [step * steps for step in seconds if step is not None]
        if not self._in_seconds:
            self._work = [
                step_work(resolve_model(point.setup.model), point.setup).model_flops * steps for point in points
            ]
        self._ended_work, self._ended_seconds = 0.0, 0.0

    def ended(self, position: int, seconds: float) -> None:
        self._ended_work += self._work[position]
        self._ended_seconds += max(seconds - START_SECONDS, 0.0)

    def seconds_left(self, position: int) -> float | None:
        """For the points from ``position`` on."""
        left = self._work[position:]
        if not self._ended_work and not self._in_seconds:
            return None
        pace = self._ended_seconds / self._ended_work if self._ended_work else 1.0
        return len(left) * START_SECONDS + pace * sum(left)


@contextlib.contextmanager
def _point_files(directory: Path, run: str) -> Iterator[tuple[Path, Path]]:
    """A scratch directory beside the table (on its disk), and the log's path; OSErrors become InputErrors."""
    try:
        (directory / LOGS).mkdir(exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=directory, prefix=_SCRATCH))
    except OSError as error:
        raise InputError(f"out: cannot write in {directory}: {error.strerror or error}; write another --out") from None
    try:
        yield scratch, directory / LOGS / f"{run}.log"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):
            (directory / LOGS).rmdir()  # where no log is left


def _remove_scratch(directory: Path) -> None:
    """What a killed sweep left; the store's lock says that no other is running."""
    for path in directory.glob(_SCRATCH + "*"):
        shutil.rmtree(path, ignore_errors=True)
