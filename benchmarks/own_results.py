"""What was measured with these scripts (``benchmarks/results/``), as evidence: two thirds to fit, one third held back.

``python -m benchmarks.own_results DIR [--held-back]`` prints the rows of one part as a table.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from estimator.errors import InputError
from estimator.measured import MeasuredRun, columns, to_row
from profiler.store import read_runs, table_of

RESULTS = Path(__file__).with_name("results")
_OWN_LOAD = 0.5
"""Of the load average beyond the cores: the process that measures others, and what a system does by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnResults:
    """The rows of one directory, ``<accelerator>-<date>``."""

    directory: Path
    fitted: tuple[MeasuredRun, ...]
    """What laws and rules may be fitted to."""
    held_back: tuple[MeasuredRun, ...]
    """What only judges them."""


def is_held_back(run: str) -> bool:
    """The rule: SHA-256 of the run's id, as a number, is divisible by three. A third of all runs, the same ones for ever."""
    return int(hashlib.sha256(run.encode()).hexdigest(), 16) % 3 == 0


def times_count(run: MeasuredRun) -> bool:
    """The rule: by the environment of the row, no more processes wanted a core in its minute than there are cores."""
    facts = json.loads(run.environment or "{}")
    load, cores = facts.get("load_average"), facts.get("cores")
    return load is None or cores is None or load <= cores + _OWN_LOAD


def _without_times(run: MeasuredRun) -> MeasuredRun:
    return dataclasses.replace(
        run,
        step_seconds=None,
        step_seconds_spread=None,
        timed_steps=None,
        tokens_per_second_per_accelerator=None,
        model_tflops_per_accelerator=None,
        checkpoint_seconds=None,
        energy_joules=None,
    )


def own_results(directory: Path = RESULTS) -> list[OwnResults]:
    """Every directory under ``directory`` that holds a table, in the order of their names. Raises InputError for a bad one."""
    found = []
    for path in sorted(path for path in directory.glob("*/") if table_of(path).is_file()):
        runs = read_runs(path)
        found.append(OwnResults(directory=path, fitted=_part(runs, False), held_back=_part(runs, True)))
    return found


def _part(runs: Iterable[MeasuredRun], held_back: bool) -> tuple[MeasuredRun, ...]:
    """What was timed on a machine that others kept busy keeps its memory and its checkpoint alone."""
    chosen = (run for run in runs if is_held_back(run.run) is held_back)
    return tuple(run if times_count(run) else _without_times(run) for run in chosen)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.own_results", description="Prints one part of the rows."
    )
    parser.add_argument("table", type=Path, help="a table of measured runs, or the directory that holds it")
    parser.add_argument("--held-back", action="store_true", help="the third that only judges")
    given = parser.parse_args(arguments)
    runs = _part(read_runs(given.table), given.held_back)
    writer = csv.DictWriter(sys.stdout, columns(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(to_row, runs))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
