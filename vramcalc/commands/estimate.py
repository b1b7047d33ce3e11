"""``vramcalc estimate``: predicts one setup."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from estimator.setup import Setup
from vramcalc.options import setup_options


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
    check: Annotated[bool, typer.Option("--check", help="Exit with 3 if it does not fit the accelerator.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the estimate as JSON, in base units.")] = False,
) -> None:
    """Predict memory, time, checkpoints and cost of a fine-tune."""
    from estimator.cost import RunRequest
    from estimator.errors import InputError
    from estimator.estimate import estimate as predict
    from estimator.units import parse_bytes, parse_count

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
    )
    laws, name = None, None
    if not no_calibration:
        from vramcalc.calibrations import find_calibration

        laws, name, setup = find_calibration(calibration, setup)
    if check and setup.accelerator is None and host_memory is None:
        raise InputError("check: there is nothing to check against; write --gpu NAME, or --host-memory BYTES")
    result = predict(setup, request=request, calibration=laws, calibration_name=name, dry_run=dry_run)
    if json_output:
        from reports.document import estimate_document, render_json

        typer.echo(render_json(estimate_document(result)), nl=False)
    else:
        from reports.screen import Screen
        from reports.terminal import print_estimate

        print_estimate(Screen(), result)
    if check:
        from estimator.estimate import refuse_what_does_not_fit

        refuse_what_does_not_fit(result)
