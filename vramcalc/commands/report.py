"""``vramcalc report``: one HTML file from tables of measured runs, a calibration and a training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    tables: Annotated[
        list[Path],
        typer.Argument(metavar="TABLE...", help="Measured runs: .csv, .parquet, or a directory of `profile`."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The HTML file to write.")] = Path("report.html"),
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="Laws to show and predict with; without it the formulas.")
    ] = None,
    training: Annotated[
        Path | None, typer.Option("--training", help="A directory of `train`, for its losses and its predictions.")
    ] = None,
    title: Annotated[str, typer.Option("--title", help="The report's title.")] = "Measured fine-tunes",
) -> None:
    """Write an HTML report: figures, residuals, laws, bigger models, losses. It opens without a network.

    A run that stands in several tables is shown once, as the last table has it.
    """
    import datetime
    import functools

    from estimator.calibration.file import check_writable, read_calibration
    from estimator.calibration.fitting import matches
    from estimator.errors import InputError
    from estimator.estimate import estimate
    from estimator.measured import MeasuredRun
    from profiler.files import write_whole
    from profiler.store import read_table
    from reports.html import render_report
    from reports.training import read_training

    check_writable(out)
    laws = read_calibration(calibration) if calibration is not None else None
    losses = read_training(training) if training is not None else None
    runs: dict[str, MeasuredRun] = {}
    skipped: list[tuple[str, str]] = []
    for table in tables:
        found, unread = read_table(table)
        runs |= {run.run: run for run in found}
        skipped += [(skip.run, skip.reason) for skip in unread]
    if not runs and losses is None:
        names = ", ".join(map(str, tables))
        first = f"the first, run {skipped[0][0]}: {skipped[0][1]}" if skipped else "they have none"
        raise InputError(f"table: none of the {len(skipped)} rows of {names} can be shown; {first}")
    if laws is not None and runs and not any(matches(laws, run.setup.accelerator) for run in runs.values()):
        measured = ", ".join(sorted({str(run.setup.accelerator) for run in runs.values()}))
        raise InputError(
            f"calibration: {calibration} is of {laws.accelerator}, and the tables hold runs of {measured} only; "
            "write the calibration of one of these, or none"
        )
    html = render_report(
        list(runs.values()),
        predict=functools.partial(estimate, calibration=laws),
        calibration=laws,
        training=losses,
        skipped=skipped,
        title=title,
        created=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
    # Names from elsewhere may hold halves of surrogate pairs, which UTF-8 has no bytes for.
    content = html.encode("utf-8", errors="replace")
    try:
        write_whole(out, content)
    except OSError as error:
        raise InputError(f"out: cannot write {out}: {error.strerror or error}") from None
    typer.echo(f"{out}: {len(runs):,} runs, {len(content) / 1e6:.1f} MB; open it in a browser")
