"""How good predictions were: errors, coverage of intervals, fits against out-of-memory. Pure functions, fractions throughout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

QUANTITIES = ("peak_allocated", "peak_reserved", "peak_device", "step_seconds", "tokens_per_second", "checkpoint")
"""What is scored, in the order in which it is shown; tokens per second are per accelerator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One quantity of one run, in its base unit: what was predicted, with its 90% interval, and what happened."""

    predicted: float
    low: float
    high: float
    measured: float

    @property
    def error(self) -> float:
        """Signed relative error: predicted / measured - 1."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The relative errors of ``n`` predictions. ``ape`` is the absolute relative error."""

    n: int
    median_ape: float
    p90_ape: float
    p95_ape: float
    max_ape: float
    bias: float
    """The median signed error, predicted / measured - 1."""
    coverage_90: float
    """The share of measured values inside their 90% interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitsTable:
    """Said to fit or not, against what happened. ``false_fit`` was said to fit and ran out of memory."""

    true_fit: int
    false_fit: int
    true_oom: int
    false_oom: int


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0 to 1) of ``values`` lie, interpolated linearly between neighbours.

    The same rule as numpy's default. ``values`` need not be sorted and must not be empty.
    """
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def score(comparisons: Sequence[Comparison]) -> Score | None:
    """The score of some comparisons of one quantity; ``None`` where there are none."""
    if not comparisons:
        return None
    errors = [one.error for one in comparisons]
    sizes = [abs(error) for error in errors]
    covered = sum(one.low <= one.measured <= one.high for one in comparisons)
    return Score(
        n=len(comparisons),
        median_ape=percentile(sizes, 0.5),
        p90_ape=percentile(sizes, 0.9),
        p95_ape=percentile(sizes, 0.95),
        max_ape=max(sizes),
        bias=percentile(errors, 0.5),
        coverage_90=covered / len(comparisons),
    )


def count_fits(answers: Iterable[tuple[bool, bool]]) -> FitsTable:
    """The confusion table of (said to fit, did fit) pairs."""
    pairs = list(answers)
    return FitsTable(
        true_fit=pairs.count((True, True)),
        false_fit=pairs.count((True, False)),
        true_oom=pairs.count((False, False)),
        false_oom=pairs.count((False, True)),
    )


def source_name(source: str) -> str:
    """What groups a run in the scores: its source up to the first colon."""
    return source.partition(":")[0].strip()
