"""Measures short real fine-tunes on the GPU at hand, in the order of their value, and scores the predictions of them.

    python -m benchmarks.gpu_truth --minutes 8

Run it again to go on. Without a GPU the same points run in a tiny form on the CPU. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.own_results import RESULTS
from benchmarks.truth_points import EDGE, MATRIX, LeftOut, TruthPoint, missing_edges, truth_points
from estimator.errors import InputError, MissingError
from estimator.measured import MeasuredRun
from estimator.setup import Setup
from estimator.units import GIB, parse_bytes
from harness.cuda_process import device_facts
from harness.fork_server import CallEndedError, ForkServer, Limits
from harness.point import Procedure, run_key
from harness.sweep import OUT_OF_TIME, FreshProcessExecutor, PointLimits, plan_sweep, run_sweep
from profiler.device import LocalDevice, local_device
from profiler.files import write_whole
from profiler.store import CSV_TABLE, RunStore, read_runs
from vramcalc.sweep_display import SweepDisplay

TRACES = "traces"
ENVIRONMENT = "environment.json"
_SMALL_CHECKPOINT_BYTES = 4 * GIB
_DISK_SHARE = 0.8
_DISK_BYTES_PER_SECOND = 5e8
"""At least, of any disk that such a machine has."""
_CHECKPOINT_SETTINGS = (
    "framework", "model", "method", "lora_rank", "lora_targets", "trainable_layers", "base_quantization", "precision", "optimizer",
)  # fmt: skip
_LEAST_SECONDS = {"cuda": 12.0, "cpu": 3.0}
"""What must be left for another point to be begun."""


def main(arguments: Sequence[str] | None = None) -> int:
    begun = time.monotonic()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded, and nobody asks the hub for half a minute
    given = _parser().parse_args(arguments)
    device = local_device()
    tiny = given.tiny or device.kind != "cuda"
    points, left_out = truth_points(device, tiny=tiny, matrix=given.matrix)
    points = points[: given.points]
    _print_left_out(left_out)
    out = given.out or results_directory(device)
    end = None if given.minutes is None else begun + 60 * given.minutes
    procedure = Procedure(
        warmup_steps=given.warmup_steps,
        timed_steps=given.timed_steps,
        checkpoint_limit_bytes=None
        if given.checkpoint_limit is None
        else parse_bytes(given.checkpoint_limit, "checkpoint_limit"),
        cache=given.cache,
    )
    if given.list:
        for point in points:
            print(f"{point.why:12} {_text(point.setup)}{'  traced' if point.traced else ''}")
        return 0
    runs = _measure(points, device, procedure, out, end=end, timeout=given.timeout)
    _report(runs, max(len(points), len(runs)), out)
    return 0


def results_directory(device: LocalDevice) -> Path:
    """``benchmarks/results/<accelerator>-<date>``."""
    name = "".join(c if c.isalnum() else "-" for c in device.name.lower()).strip("-")
    return RESULTS / f"{name}-{datetime.date.today().isoformat()}"


def _measure(
    points: Sequence[TruthPoint],
    device: LocalDevice,
    procedure: Procedure,
    out: Path,
    *,
    end: float | None,
    timeout: float,
) -> tuple[MeasuredRun, ...]:
    traced = {point.setup for point in points if point.traced} if device.kind == "cuda" else set[Setup]()
    least = _LEAST_SECONDS[device.kind]

    def goes_on() -> bool:
        return end is None or time.monotonic() + least < end

    with RunStore(out, table=CSV_TABLE) as store, contextlib.ExitStack() as opened:
        # What the end of the time cut off has not been measured.
        known = [run for run in store.runs if not (run.reason or "").startswith(OUT_OF_TIME)]
        setups, edges = [point.setup for point in points], [point.setup for point in points if point.why == EDGE]
        executor: _TruthExecutor | None = None
        while True:
            planned = plan_sweep(setups, known, procedure=procedure, device=device)
            measured = tuple(point.measured for point in planned if point.measured is not None)
            if len(measured) < len(planned):
                if not goes_on():
                    return measured
                if executor is None:
                    print(f"{len(planned)} points on {device.description}; importing torch ...", file=sys.stderr)
                    executor = _TruthExecutor(
                        opened.enter_context(_server(device, out)),
                        procedure,
                        device,
                        PointLimits(timeout_seconds=timeout, end=end),
                        trace=lambda s: (
                            out.resolve() / TRACES / f"{run_key(s, procedure, device)}.json.gz" if s in traced else None
                        ),
                    )
                    executor.have_written(known)
                    display = opened.enter_context(SweepDisplay())
                measured = run_sweep(
                    planned, store, executor, steps=procedure.steps, on_progress=display.show, goes_on=goes_on
                )
            ended = {run.run: run.outcome for run in measured}
            further = missing_edges(edges, {point.setup: ended.get(point.run) for point in planned})
            if not further:
                return measured
            known, setups, edges = [*known, *measured], setups + further, edges + further


class _TruthExecutor(FreshProcessExecutor):
    """A point that cannot be run is a row that says so: nothing is built beforehand, and the first point reads the data.

    Without a limit of the procedure's own, large checkpoints are written once of each kind: what is in them does not depend
    on the batch, and they take longer than the steps.
    """

    def __init__(self, *arguments: Any, **further: Any) -> None:
        super().__init__(*arguments, **further)
        self._given = self._procedure
        self._written: set[tuple[object, ...]] = set()

    def have_written(self, runs: Sequence[MeasuredRun]) -> None:
        """The checkpoints of ``runs`` need not be written again."""
        self._written |= {_checkpoint_kind(run.setup) for run in runs if run.checkpoint_bytes}

    def check(self, setups: Sequence[Setup]) -> None:
        pass

    def run(self, setup: Setup, scratch: Path, log: Path) -> MeasuredRun:
        if self._given.checkpoint_limit_bytes is None:
            known = _checkpoint_kind(setup) in self._written
            limit = checkpoint_limit_bytes(shutil.disk_usage(scratch).free, self._limits.timeout_seconds, known=known)
            self._procedure = replace(self._given, checkpoint_limit_bytes=limit)
        run = super().run(setup, scratch, log)
        self.have_written([run])
        return run


def checkpoint_limit_bytes(free_bytes: int, timeout_seconds: float, *, known: bool) -> int:
    """The largest checkpoint to write: most of what is free, and what is written in half of a point's time. known: one of
    the same kind was written, so that only a small one is worth its time."""
    most = min(_DISK_SHARE * free_bytes, _DISK_BYTES_PER_SECOND * timeout_seconds / 2)
    return round(min(most, _SMALL_CHECKPOINT_BYTES) if known else most)


def _checkpoint_kind(setup: Setup) -> tuple[object, ...]:
    """What a checkpoint's size depends on."""
    return tuple(getattr(setup, name) for name in _CHECKPOINT_SETTINGS)


def _server(device: LocalDevice, out: Path) -> ForkServer:
    """A server whose children can use the GPU; writes what the first one found as ``environment.json``.

    Raises MissingError where CUDA cannot be used at all.
    """
    reason = ""
    for preload in (True, False):
        server = ForkServer(preload=preload)
        try:
            facts: dict[str, object] = server.call(
                device_facts, device, limits=Limits(timeout_seconds=180), log=out.resolve() / "probe.log"
            )
        except (CallEndedError, MissingError) as error:
            server.close()
            reason = str(error)
            if device.kind != "cuda":
                break
            print(f"a child of the preloaded process cannot use the GPU: {error}", file=sys.stderr)
            continue
        (out / "probe.log").unlink(missing_ok=True)
        write_whole(out / ENVIRONMENT, (json.dumps(facts | {"preloaded": preload}, indent=1) + "\n").encode())
        return server
    raise MissingError(f"device: {device.description} cannot be used: {reason}; see {out / 'probe.log'}")


def _report(runs: Sequence[MeasuredRun], planned: int, out: Path) -> None:
    """What there is now, and how good the formulas' predictions of it are."""
    from rich.console import Console

    from estimator.estimate import estimate
    from estimator.validation import validate
    from reports.validation import print_validation

    counts = {outcome: sum(run.outcome == outcome for run in runs) for outcome in ("ok", "oom", "failed", "timeout")}
    ends = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
    print(f"{len(runs)} of {planned} points measured ({ends or 'none'}), in {out / CSV_TABLE}", file=sys.stderr)
    for run in runs:
        if run.outcome in ("failed", "timeout"):
            print(f"  {run.run} {_text(run.setup)}: {run.outcome}: {run.reason}", file=sys.stderr)
    if runs:
        # As a table, so that what is scored is what was kept.
        print_validation(Console(highlight=False), validate(read_runs(out / CSV_TABLE), estimate))


def _print_left_out(left_out: Sequence[LeftOut]) -> None:
    for row in left_out:
        print(f"left out: {_text(row.setup)}: {row.reason}", file=sys.stderr)


def _text(setup: Setup) -> str:
    """A point by what differs from the defaults."""
    defaults = Setup(model=setup.model)
    named = ("model", "accelerator", "seq", "batch", "sharding", "data_parallel", "zero_grad")
    further = [
        f"{name}={value}"
        for name, value in setup.as_dict().items()
        if name not in named and value != getattr(defaults, name)
    ]
    return f"{setup.model} {setup.batch} x {setup.seq} {' '.join(further)}"


def positive_count(text: str) -> int:
    """Of an option; argparse makes one line of its ValueError."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is too few; write 1 or more")
    return int(text)


def minutes(text: str) -> float:
    """Of an option. 0 only shows what there is."""
    if not float(text) >= 0:
        raise argparse.ArgumentTypeError(f"{text} is no time; write for example 8")
    return float(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_truth", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=minutes, help="stop after this long (default: when all is measured)")
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/<accelerator>-<date>; resumes what is there"
    )
    parser.add_argument("--points", type=positive_count, help="only the first N of the matrix")
    parser.add_argument("--timeout", type=float, default=90.0, help="seconds that one point may take (default 90)")
    parser.add_argument("--warmup-steps", type=int, default=2)
    parser.add_argument("--timed-steps", type=int, default=5)
    parser.add_argument(
        "--checkpoint-limit",
        help="larger checkpoints are not written (default: by the free disk; above 4 GiB one of each kind)",
    )
    parser.add_argument("--matrix", type=Path, default=MATRIX)
    parser.add_argument("--cache", type=Path, help="where the tokens are kept")
    parser.add_argument("--tiny", action="store_true", help="the CPU's form on a GPU too")
    parser.add_argument("--list", action="store_true", help="print the points and run none")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (InputError, MissingError) as error:
        sys.exit(f"error: {error}")
