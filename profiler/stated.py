"""Which settings a table's rows leave empty: a default must not stand for the size of what was measured."""

from __future__ import annotations

from pathlib import Path

from profiler.store import _read_rows, table_of

_SIZES = ("seq", "batch")


def unstated_sizes(path: Path) -> dict[str, tuple[str, ...]]:
    """By run, those of ``seq`` and ``batch`` that its row leaves empty; rows that state both are not there.

    Raises as ``profiler.store.read_table``.
    """
    found = {}
    for row in _read_rows(table_of(path)):
        # Parquet's null, CSV's empty text, and the NaN that pandas writes for either.
        missing = tuple(name for name in _SIZES if row.get(name) in (None, "") or row.get(name) != row.get(name))
        if missing:
            found[str(row.get("run"))] = missing
    return found
