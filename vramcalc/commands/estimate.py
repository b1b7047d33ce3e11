"""``vramcalc estimate``: predicts one setup."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from estimator.setup import Setup
from vramcalc.options import setup_options

if TYPE_CHECKING:
    from estimator.result import Estimate


@setup_options
def estimate(
    *,
    setup: Setup,
    dataset_tokens: Annotated[
        str | None, typer.Option("--dataset-tokens", metavar="N", help="Tokens of one epoch: 1e9, 3T.")
    ] = None,
    samples: Annotated[str | None, typer.Option("--samples", metavar="N", help="Sequences of one epoch.")] = None,
    epochs: Annotated[float, typer.Option("--epochs", help="How often the data is seen.")] = 1.0,
    price: Annotated[
        float | None, typer.Option("--price", help="Dollars for one GPU-hour.", show_default="catalog median")
    ] = None,
    provider: Annotated[
        str | None, typer.Option("--provider", metavar="NAME", help="Take this provider's price from the catalog.")
    ] = None,
    spot: Annotated[bool, typer.Option("--spot", help="Prices of machines that can be taken back.")] = False,
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="DOLLARS", help="What could be trained for this sum? 1000.")
    ] = None,
    grid_gco2: Annotated[
        float | None,
        typer.Option("--grid-gco2", help="Grams of CO2 a kWh of the grid.", show_default="the world's average"),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(
            "--save-every",
            metavar="STEPS",
            help="Steps between checkpoints.",
            show_default="an epoch, or what failures need",
        ),
    ] = None,
    eval_samples: Annotated[
        str | None,
        typer.Option("--eval-samples", metavar="N", help="Sequences of one evaluation.", show_default="none"),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option("--eval-every", metavar="STEPS", help="Steps between evaluations.", show_default="an epoch"),
    ] = None,
    disk_bandwidth: Annotated[
        str | None,
        typer.Option("--disk-bandwidth", metavar="BYTES", help="Bytes a second that one machine writes: 2GB."),
    ] = None,
    reserve: Annotated[
        str | None, typer.Option("--reserve", metavar="BYTES", help="Device memory that something else holds: 2GiB.")
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option("--host-memory", metavar="BYTES", help="Memory of one machine, to be checked as well.")
    ] = None,
    keep: Annotated[int, typer.Option("--keep", help="Checkpoints that the run keeps.")] = 2,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help="Laws of `vramcalc fit`; else those saved for this accelerator."),
    ] = None,
    no_calibration: Annotated[bool, typer.Option("--no-calibration", help="The formulas alone.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Memory from the real model code on fake tensors (needs torch).")
    ] = False,
    timeline: Annotated[
        Path | None,
        typer.Option(
            "--timeline",
            metavar="FILE.html",
            help="Write a page: memory over a step, what holds the peak. With --dry-run.",
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 3 if it does not fit the accelerator.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the estimate as JSON, in base units.")] = False,
) -> None:
    """Predict memory, time, checkpoints and cost of a fine-tune."""
    from estimator.errors import InputError
    from estimator.estimate import estimate as predict
    from estimator.fits import check_reserve
    from estimator.run.cost import RunRequest
    from estimator.units import parse_bytes, parse_count, parse_dollars

    if calibration is not None and no_calibration:
        raise InputError("no_calibration: give --calibration or --no-calibration, not both")
    request = RunRequest(
        dataset_tokens=None if dataset_tokens is None else parse_count(dataset_tokens, "dataset_tokens"),
        samples=None if samples is None else parse_count(samples, "samples"),
        epochs=epochs,
        price_usd_per_gpu_hour=price,
        reserve_bytes=0 if reserve is None else parse_bytes(reserve, "reserve"),
        host_memory_bytes=None if host_memory is None else parse_bytes(host_memory, "host_memory"),
        kept_checkpoints=keep,
        save_every_steps=save_every,
        eval_samples=None if eval_samples is None else parse_count(eval_samples, "eval_samples"),
        eval_every_steps=eval_every,
        disk_bytes_per_second=None if disk_bandwidth is None else parse_bytes(disk_bandwidth, "disk_bandwidth"),
        provider=provider,
        spot=spot,
        budget_usd=None if budget is None else parse_dollars(budget, "budget"),
        grid_gco2_per_kwh=grid_gco2,
    )
    check_reserve(setup.accelerator, request.reserve_bytes)
    laws, name = None, None
    if not no_calibration:
        from vramcalc.calibrations import find_calibration

        laws, name, setup = find_calibration(calibration, setup)
    if check and setup.accelerator is None and host_memory is None:
        raise InputError("check: there is nothing to check against; write --gpu NAME, or --host-memory BYTES")
    if timeline is not None:
        from estimator.calibration.file import check_writable

        check_writable(timeline, "timeline")
    try:
        result = predict(
            setup,
            request=request,
            calibration=laws,
            calibration_name=name,
            dry_run=dry_run or timeline is not None,
            remedies=True,
        )
    except InputError as error:
        if dry_run or timeline is None:
            raise
        raise InputError(str(error).replace("--dry-run", "--timeline")) from None  # the flag that was written
    if timeline is not None:
        _write_timeline(timeline, result)
    if json_output:
        from reports.document import estimate_document, render_json

        typer.echo(render_json(estimate_document(result)), nl=False)
    else:
        from reports.screen import Screen
        from reports.terminal import print_estimate

        print_estimate(Screen(), result)
    if check:
        from estimator.fits import refuse_what_does_not_fit

        refuse_what_does_not_fit(result)


def _write_timeline(path: Path, result: Estimate) -> None:
    from estimator.errors import InputError
    from profiler.files import write_whole
    from reports.timeline import render_timeline

    content = render_timeline(result).encode("utf-8", errors="replace")
    try:
        write_whole(path, content)
    except OSError as error:
        raise InputError(f"timeline: cannot write {path}: {error.strerror or error}") from None
    typer.echo(f"{path}: {len(content) / 1e6:.1f} MB; open it in a browser", err=True)
