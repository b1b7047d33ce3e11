"""``vramcalc validate``: predicts every row of a table of measured runs and scores the predictions."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer


def validate(
    table: Annotated[
        Path, typer.Argument(metavar="TABLE", help="Measured runs: .csv, .parquet, or a directory of `profile`.")
    ],
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help="Laws to use; without it the formulas alone, whatever is saved."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Memory by dry runs; rows that none executes are skipped (needs torch).")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the document vramcalc/validate/1.")] = False,
) -> None:
    """Predict every row of a table of measured runs, and score the predictions."""
    from estimator.calibration.file import read_calibration
    from estimator.estimate import estimate
    from estimator.validation import refuse_nothing_predicted, unreadable_row
    from estimator.validation import validate as score_rows
    from profiler.stated import read_sized_table

    laws = read_calibration(calibration) if calibration is not None else None
    runs, skipped = read_sized_table(table)
    validation = score_rows(
        runs,
        functools.partial(estimate, calibration=laws, dry_run=dry_run),
        unreadable=[unreadable_row(skip.run, "", skip.reason) for skip in skipped],
    )
    if json_output:
        from reports.document import render_json
        from reports.validation import validation_document

        typer.echo(render_json(validation_document(validation)), nl=False)
    else:
        from rich.console import Console

        from reports.validation import print_validation

        print_validation(Console(highlight=False), validation)
    refuse_nothing_predicted(validation, table)
