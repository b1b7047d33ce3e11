"""The table's rows that state the size of what was measured: no default may stand for a sequence length or a batch."""

from __future__ import annotations

from pathlib import Path

from estimator.measured import MeasuredRun, Skipped
from profiler.store import _read_rows, read_table, table_of

_SIZES = ("seq", "batch")
NOT_STATED = "not stated"
"""What the reason of a row that leaves a size empty starts with."""


def read_sized_table(path: Path) -> tuple[list[MeasuredRun], list[Skipped]]:
    """As ``profiler.store.read_table``, with the rows that leave ``seq`` or ``batch`` empty among the skipped ones."""
    missing = {}
    for row in _read_rows(table_of(path)):
        # Parquet's null, CSV's empty text, and the NaN that pandas writes for either.
        empty = [name for name in _SIZES if row.get(name) in (None, "") or row.get(name) != row.get(name)]
        if empty:
            missing[str(row.get("run"))] = " and ".join(empty)
    runs, skipped = read_table(path)
    unsized = [Skipped(run=run.run, reason=f"{NOT_STATED}: {missing[run.run]}") for run in runs if run.run in missing]
    return [run for run in runs if run.run not in missing], skipped + unsized
