"""Sweeps with a made-up executor: the plan, resuming, the time left; and kills at many moments."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from estimator.errors import InputError, MissingError
from estimator.measured import MeasuredRun
from estimator.setup import Setup
from harness.fork_server import CallEndedError, Limits
from harness.point import Procedure, run_key, unfinished_run
from harness.sweep import (
    OUT_OF_TIME,
    Executor,
    FreshProcessExecutor,
    PlannedPoint,
    PointLimits,
    SweepProgress,
    plan_sweep,
    run_sweep,
)
from profiler.device import LocalDevice
from profiler.store import TABLE, RunStore, read_runs

DEVICE = LocalDevice(name="cpu", kind="cpu", description="Some CPU", capacity_bytes=2**34, free_bytes=2**33)
PROCEDURE = Procedure()
GRID = tuple(
    Setup(model=model, seq=seq, batch=batch) for model in ("nano", "micro") for seq in (64, 128) for batch in (1, 2)
)


class MadeUp(Executor):
    """Rows without training; some points end otherwise."""

    def __init__(self, outcomes: dict[int, str] | None = None, interrupt_at: int | None = None) -> None:
        self.outcomes = outcomes or {}
        self.interrupt_at = interrupt_at
        self.checked: list[Setup] = []
        self.ran: list[Setup] = []

    def check(self, setups: Sequence[Setup]) -> None:
        self.checked += setups

    def run(self, setup: Setup, scratch: Path, log: Path) -> MeasuredRun:
        position = len(self.ran)
        if position == self.interrupt_at:
            raise KeyboardInterrupt
        self.ran.append(setup)
        log.write_text("what it said\n")
        (scratch / "half a checkpoint").write_text("x")
        outcome = self.outcomes.get(position, "ok")
        if outcome != "ok":
            return unfinished_run(setup, PROCEDURE, DEVICE, outcome=outcome, reason="made up")
        return MeasuredRun(run=run_key(setup, PROCEDURE, DEVICE), setup=setup, step_seconds=0.5)


def plan(
    setups: Sequence[Setup] = GRID, measured: Sequence[MeasuredRun] = (), **options: bool
) -> tuple[PlannedPoint, ...]:
    return plan_sweep(setups, measured, procedure=PROCEDURE, device=DEVICE, **options)


def sweep(
    directory: Path, executor: Executor, setups: Sequence[Setup] = GRID, **options: bool
) -> tuple[MeasuredRun, ...]:
    with RunStore(directory) as store:
        return run_sweep(plan(setups, store.runs, **options), store, executor, steps=PROCEDURE.steps)


def test_a_plan_has_each_point_once_in_the_grids_order() -> None:
    points = plan((*GRID, GRID[0], Setup(model="nano", seq=64, accelerator="cpu", optimizer="adamw-fused")))
    assert [(p.setup.model, p.setup.seq, p.setup.batch) for p in points] == [(s.model, s.seq, s.batch) for s in GRID]
    assert len({point.run for point in points}) == len(GRID)
    assert {point.setup.accelerator for point in points} == {"cpu"}


def test_every_row_is_written_and_returned_in_order(tmp_path: Path) -> None:
    runs = sweep(tmp_path, MadeUp())
    assert [run.run for run in runs] == [point.run for point in plan()]
    assert read_runs(tmp_path) == list(runs)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", TABLE]


def test_a_sweep_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, MadeUp(interrupt_at=3))
    assert len(read_runs(tmp_path)) == 3
    second = MadeUp()
    runs = sweep(tmp_path, second)
    assert len(second.ran) == len(second.checked) == len(GRID) - 3
    assert read_runs(tmp_path) == list(runs)


def test_a_finished_sweep_checks_and_runs_nothing(tmp_path: Path) -> None:
    first = sweep(tmp_path, MadeUp())
    again = MadeUp()
    assert sweep(tmp_path, again) == first
    assert (again.checked, again.ran) == ([], [])


def test_a_larger_grid_runs_only_what_is_new_and_keeps_the_other_rows(tmp_path: Path) -> None:
    sweep(tmp_path, MadeUp(), GRID[:3])
    new = MadeUp()
    runs = sweep(tmp_path, new, GRID[2:5])
    assert (len(new.ran), len(runs), len(read_runs(tmp_path))) == (2, 3, 5)


def test_points_that_ended_badly_are_rows_and_only_retry_runs_them_again(tmp_path: Path) -> None:
    runs = sweep(tmp_path, MadeUp({1: "oom", 2: "failed", 3: "timeout"}))
    assert [run.outcome for run in runs] == ["ok", "oom", "failed", "timeout", "ok", "ok", "ok", "ok"]
    assert sorted(path.stem for path in (tmp_path / "logs").iterdir()) == sorted(run.run for run in runs[1:4])
    again = MadeUp()
    sweep(tmp_path, again)
    assert again.ran == []
    runs = sweep(tmp_path, again, retry=True)
    assert (len(again.ran), {run.outcome for run in runs}) == (3, {"ok"})
    assert read_runs(tmp_path) == list(runs)
    assert not (tmp_path / "logs").exists()


def test_bad_input_that_the_check_finds_runs_no_point(tmp_path: Path) -> None:
    class Refusing(MadeUp):
        def check(self, setups: Sequence[Setup]) -> None:
            raise InputError("data: there is none")

    executor = Refusing()
    with pytest.raises(InputError, match="there is none"):
        sweep(tmp_path, executor)
    assert executor.ran == [] and not (tmp_path / TABLE).exists()


def progress_of(tmp_path: Path, predict: float | None) -> list[SweepProgress]:
    told: list[SweepProgress] = []
    with RunStore(tmp_path) as store:
        points = plan()
        run_sweep(points, store, MadeUp(), steps=10, on_progress=told.append, predict_seconds=lambda setup: predict)
    return told


def test_progress_tells_done_current_and_what_was_written(tmp_path: Path) -> None:
    told = progress_of(tmp_path, 1.0)
    assert [progress.done for progress in told] == list(range(len(GRID) + 1))
    assert {progress.total for progress in told} == {len(GRID)}
    assert [p.current.seq if p.current else None for p in told] == [*(setup.seq for setup in GRID), None]
    assert told[0].finished is None
    assert told[1].finished is not None and told[1].finished.setup == told[0].current


def test_the_time_left_is_the_prediction_and_then_what_was_seen(tmp_path: Path) -> None:
    told = progress_of(tmp_path, 1.0)
    assert told[0].seconds_left == pytest.approx(len(GRID) * (10 * 1.0 + 0.4))
    assert told[1].seconds_left == pytest.approx((len(GRID) - 1) * 0.4)  # the first point took no time at all
    assert told[-1].seconds_left == 0.0


def test_without_predictions_the_time_left_is_unknown_until_a_point_has_ended(tmp_path: Path) -> None:
    told = progress_of(tmp_path, None)
    assert told[0].seconds_left is None
    assert all(progress.seconds_left is not None for progress in told[1:])


def test_points_weigh_as_much_as_their_flops_where_no_seconds_are_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2.4 s for the first point, 0.4 of them for its start: twice the tokens then take 4 s and a bit for attention."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    class Slow(MadeUp):
        def run(self, setup: Setup, scratch: Path, log: Path) -> MeasuredRun:
            clock[0] += 2.4
            return super().run(setup, scratch, log)

    told: list[SweepProgress] = []
    with RunStore(tmp_path) as store:
        run_sweep(plan(GRID[:2]), store, Slow(), steps=10, on_progress=told.append)
    assert told[1].seconds_left == pytest.approx(0.4 + 2 * 2.0, rel=1e-6)  # batch 2: twice the sequences, exactly


def test_limits_are_checked_in_one_line() -> None:
    with pytest.raises(InputError, match="timeout: 0 is not above 0; write --timeout with seconds"):
        PointLimits(timeout_seconds=0)
    with pytest.raises(InputError, match="timeout: nan"):
        PointLimits(timeout_seconds=float("nan"))
    with pytest.raises(InputError, match="memory_limit: 0 is not above 0"):
        PointLimits(memory_bytes=0)


def test_what_one_point_lacks_fails_that_point_alone(tmp_path: Path) -> None:
    from harness.sweep import FreshProcessExecutor

    class Server:
        def call(self, *arguments: object, **options: object) -> object:
            raise MissingError("optimizer: needs a package")

    executor = FreshProcessExecutor(Server(), PROCEDURE, DEVICE, PointLimits())  # type: ignore[arg-type]
    run = executor.run(plan()[0].setup, tmp_path, tmp_path / "log")
    assert (run.outcome, run.reason) == ("failed", "optimizer: needs a package")


KILLED = """
import sys, time
from pathlib import Path
import pyarrow.parquet
sys.path.insert(0, sys.argv[1])
from test_sweep import GRID, MadeUp, sweep

class Slow(MadeUp):
    def run(self, *arguments):
        print("a point begins", flush=True)
        time.sleep(0.01)
        return super().run(*arguments)

sweep(Path(sys.argv[2]), Slow(), GRID)
"""


def test_a_sweep_killed_at_any_moment_loses_no_row(tmp_path: Path) -> None:
    """No row lost, none twice, none half-written: killed ever later in its second point, in the end not at all."""
    out = tmp_path / "out"
    before: list[MeasuredRun] = []
    kills = 0
    while len(before) < len(GRID):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(out)], stdout=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdout is not None
            for _ in range(2):
                process.stdout.readline()  # the second point begins once the first one's row is on the disk
            time.sleep(0.004 * kills)
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        rows = read_runs(out)
        assert rows[: len(before)] == before, "rows that were there are there, unchanged"
        assert len(rows) > len(before), "the first point's row was on the disk as the second began"
        before = rows
    assert kills >= 4
    runs = sweep(out, MadeUp())
    assert [run.run for run in before] == [run.run for run in runs] == [point.run for point in plan()]
    assert sorted(path.name for path in out.iterdir()) == [".lock", TABLE]


def test_a_sweep_that_may_not_go_on_returns_what_it_has_and_goes_on_later(tmp_path: Path) -> None:
    executor, told = MadeUp(), list[SweepProgress]()
    with RunStore(tmp_path) as store:
        runs = run_sweep(
            plan(),
            store,
            executor,
            steps=PROCEDURE.steps,
            on_progress=told.append,
            goes_on=lambda: len(executor.ran) < 3,
        )
    assert [run.run for run in runs] == [point.run for point in plan()][:3]
    assert (told[-1].done, told[-1].total, told[-1].current) == (3, len(GRID), None)
    assert len(sweep(tmp_path, MadeUp())) == len(GRID)


def test_a_point_that_the_sweeps_end_cut_off_says_so_and_one_that_was_slow_says_that(tmp_path: Path) -> None:
    class Server:
        """Ends every call for its time, and notes how much that was."""

        def call(self, *arguments: object, limits: Limits, log: Path) -> object:
            self.seconds = limits.timeout_seconds
            raise CallEndedError("timeout", f"took longer than {limits.timeout_seconds:g} s")

    server = Server()
    for end, seconds, reason in ((time.monotonic() + 40, 40, OUT_OF_TIME), (None, 90, "took longer than 90 s")):
        limits = PointLimits(timeout_seconds=90, end=end)
        executor = FreshProcessExecutor(server, PROCEDURE, DEVICE, limits)  # type: ignore[arg-type]
        run = executor.run(plan()[0].setup, tmp_path, tmp_path / "log")
        assert server.seconds == pytest.approx(seconds, abs=1)
        assert run.outcome == "timeout" and (run.reason or "").startswith(reason)
