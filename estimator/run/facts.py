"""Figures of whole runs that no setup states - failures, restarts, disks, power, grids - each with its interval and source."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from estimator.model.catalog import read_data
from estimator.units import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFact:
    value: Interval
    source: str


@functools.cache
def _facts() -> dict[str, RunFact]:
    return {
        row["name"]: RunFact(
            value=Interval(value=float(row["value"]), low=float(row["low"]), high=float(row["high"])),
            source=row["source"],
        )
        for row in read_data("run_facts.csv")
    }


def run_fact(name: str) -> RunFact:
    """By the name in ``run_facts.csv``, in the unit that the name states."""
    return _facts()[name]
