"""``vramcalc profile``: short real fine-tunes over a grid, one row of measurements each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from estimator.setup import Setup
from vramcalc.options import grid_options

if TYPE_CHECKING:
    from estimator.measured import MeasuredRun
    from harness.point import Procedure
    from harness.sweep import PlannedPoint, PointLimits
    from profiler.device import LocalDevice
    from profiler.store import RunStore


@grid_options
def profile(
    *,
    setups: tuple[Setup, ...],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Where the rows go (measured_runs.parquet); run again to resume."),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="JSONL, CSV, Parquet, a directory of them, or a hub id.", show_default="an offline set"
        ),
    ] = None,
    warmup_steps: Annotated[int, typer.Option("--warmup-steps", help="Steps before the timed ones.")] = 2,
    timed_steps: Annotated[int, typer.Option("--timed-steps", help="Steps whose time is taken.")] = 5,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds that one point may take.")] = 600.0,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            "--memory-limit",
            metavar="BYTES",
            help="Host memory that a point may take beyond the libraries: 2GiB.",
            show_default="what is free",
        ),
    ] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Run again what ran out of memory, failed or timed out.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Try points that are not expected to fit.")] = False,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="List the points and run none.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the rows as JSON, in base units.")] = False,
) -> None:
    """Run short real fine-tunes over a grid, and record what they take.

    Every setting takes a comma-separated list: --model nano,micro --seq 128,256 --batch 1,2 is eight points. Each runs
    in a process of its own, and its row is on the disk when it ends.
    """
    from estimator.units import parse_bytes
    from harness.forecast import refuse_hopeless_points
    from harness.point import Procedure
    from harness.sweep import PointLimits, plan_sweep
    from profiler.device import local_device
    from profiler.store import RunStore, read_runs, table_of

    procedure = Procedure(data=data, warmup_steps=warmup_steps, timed_steps=timed_steps)
    limits = PointLimits(
        timeout_seconds=timeout,
        memory_bytes=None if memory_limit is None else parse_bytes(memory_limit, "memory_limit"),
    )
    device = local_device()
    if plan_only:
        measured = read_runs(out) if table_of(out).exists() else []
        points = plan_sweep(setups, measured, procedure=procedure, device=device, retry=retry)
        _print_plan(points, json_output=json_output)
        return
    points = plan_sweep(setups, (), procedure=procedure, device=device)  # bad settings leave no directory behind
    if not force:
        refuse_hopeless_points([point.setup for point in points], device)
    with RunStore(out) as store:
        points = plan_sweep(setups, store.runs, procedure=procedure, device=device, retry=retry)
        runs = _run(points, store, procedure, device, limits)
    _print_runs(runs, json_output=json_output)
    _summarize(runs, store.table)


def _run(
    points: tuple[PlannedPoint, ...],
    store: RunStore,
    procedure: Procedure,
    device: LocalDevice,
    limits: PointLimits,
) -> tuple[MeasuredRun, ...]:
    from harness.fork_server import ForkServer
    from harness.sweep import FreshProcessExecutor, run_sweep
    from vramcalc.sweep_display import SweepDisplay

    if all(point.measured is not None for point in points):
        return tuple(point.measured for point in points if point.measured is not None)
    print(f"{len(points)} points on {device.description}; importing torch ...", file=sys.stderr)
    try:
        with ForkServer() as server, SweepDisplay() as display:
            return run_sweep(
                points,
                store,
                FreshProcessExecutor(server, procedure, device, limits),
                steps=procedure.steps,
                on_progress=display.show,
                predict_seconds=_predicted_seconds,
            )
    except KeyboardInterrupt:
        print(f"{len(store.runs)} rows are in {store.table}; the same command goes on from there", file=sys.stderr)
        raise


def _predicted_seconds(setup: Setup) -> float | None:
    from estimator.estimate import estimate
    from vramcalc.calibrations import find_calibration

    laws, name, _ = find_calibration(None, setup)
    time = estimate(setup, calibration=laws, calibration_name=name).time
    return None if time is None else time.step_seconds.value


def _print_runs(runs: tuple[MeasuredRun, ...], *, json_output: bool) -> None:
    if json_output:
        from estimator.measured import to_row
        from reports.document import render_json

        document = {"schema": "vramcalc/profile/1", "runs": [to_row(run) for run in runs]}
        typer.echo(render_json(document), nl=False)
        return
    from rich.console import Console

    from reports.terminal import print_runs

    print_runs(Console(highlight=False), runs)


def _summarize(runs: tuple[MeasuredRun, ...], table: Path) -> None:
    from collections import Counter

    counts = Counter(run.outcome for run in runs)
    ends = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    print(f"{len(runs)} points: {ends}; rows in {table}", file=sys.stderr)
    if counts["ok"] >= 4:
        print(f"next: vramcalc fit {table.parent}", file=sys.stderr)
    if counts["failed"] or counts["timeout"]:
        print(f"what failed said why in {table.parent / 'logs'}; --retry runs it again", file=sys.stderr)


def _print_plan(points: tuple[PlannedPoint, ...], *, json_output: bool) -> None:
    if json_output:
        from reports.document import render_json

        rows = [{"run": p.run, "measured": p.measured is not None, "setup": p.setup.as_dict()} for p in points]
        typer.echo(render_json({"schema": "vramcalc/profile-plan/1", "points": rows}), nl=False)
        return
    from vramcalc.sweep_display import finished_text, point_text

    for point in points:
        state = (
            f"to do     {point_text(point.setup)}"
            if point.measured is None
            else f"measured  {finished_text(point.measured)}"
        )
        typer.echo(f"{point.run}  {state}")
    to_do = sum(point.measured is None for point in points)
    typer.echo(f"{len(points)} points: {len(points) - to_do} measured, {to_do} to do")
