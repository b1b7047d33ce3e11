"""``vramcalc fit``: fits the laws of a device to tables of measured runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def fit(
    tables: Annotated[
        list[Path],
        typer.Argument(metavar="TABLE...", help="Measured runs: .csv, .parquet, or a directory of `profile`."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Where the calibration goes; without it, where `estimate` finds it on this machine."
        ),
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="With --out: save it for this machine as well.")] = False,
    accelerator: Annotated[
        str | None, typer.Option("--accelerator", help="Of several in the tables, the accelerator (or device) to fit.")
    ] = None,
    draws: Annotated[
        int, typer.Option("--draws", min=20, max=5000, help="Bootstrap refits behind the intervals.")
    ] = 200,
    json_output: Annotated[bool, typer.Option("--json", help="Print the calibration as JSON.")] = False,
) -> None:
    """Fit the laws of one device - memory, step time, checkpoints - to measured runs."""
    from estimator.calibration import laws
    from estimator.calibration.file import check_writable, default_path, to_document, write_calibration
    from profiler.stated import read_sized_table

    if out is not None:
        check_writable(out)
    runs, unreadable = [], []
    for table in tables:
        found, skipped = read_sized_table(table)
        runs += found
        unreadable += [(skip.run, skip.reason) for skip in skipped]
    calibration = laws.fit(runs, unreadable=unreadable, accelerator=accelerator, draws=draws)
    paths = [out] if out is not None else []
    if save or out is None:
        paths.append(default_path(calibration.accelerator))
    for path in paths:
        write_calibration(path, calibration)
    if json_output:
        from reports.document import render_json

        typer.echo(render_json(to_document(calibration)), nl=False)
    else:
        from rich.console import Console

        from reports.fitting import print_calibration

        print_calibration(Console(highlight=False), calibration)
    for path in paths:
        typer.echo(f"saved: {path}", err=True)
