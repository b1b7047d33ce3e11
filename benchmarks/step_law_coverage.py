"""The step law's 90% intervals: how wide they must be, and how many of the rows that a fit had left out they hold.

What a fit has not seen of a row (its model, its framework, its accelerator) is worked out for every fold as the product does it
for a setup, so that each kind of interval is calibrated and judged on the errors of rows that would get it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.step_law_problem import Array, Problem, Row
from estimator.speed.step_law import StepLaw, interval_half_width, layout, unseen

Kinds = tuple[str, ...]
"""What a fit has not seen of a row."""

SHRINKING = 8.0
"""Rows that a framework's own spread must have to count as much as everybody's."""
SHARE = 0.91
"""Of the rows that an interval is to hold where it is calibrated: one in a hundred more than it says."""


def unseen_of(problem: Problem, used: Array) -> list[Kinds]:
    """What a fit to the ``used`` rows has not seen of each row."""
    effects: dict[str, dict[str, dict[str, float]]] = {}
    for (name, factor, level), member in zip(problem.effects, problem.member, strict=True):
        if member[used].any():
            effects.setdefault(name, {}).setdefault(factor, {})[level] = 0.0
    models = frozenset(layout(row.shape) for row, is_used in zip(problem.rows, used, strict=True) if is_used)
    law = StepLaw(coefficients={}, effects=effects, half_widths={}, models=models)
    return [unseen(row.shape, row.setup, row.accelerator, law) for row in problem.rows]


def half_width(sizes: Array, share: float = SHARE) -> float:
    """The size that this share stays within; of few, the next larger one."""
    ordered = np.sort(sizes)
    return float(ordered[min(len(ordered) - 1, int(np.ceil(share * (len(ordered) + 1))) - 1)])


def half_widths(
    rows: Sequence[Row], errors: Mapping[str, Array], kinds: Mapping[str, Sequence[Kinds]]
) -> dict[str, dict[str, float]]:
    """Of the 90% interval in factors e, dense models and mixtures of experts apart: by framework where all of a setup is
    known, and for all where its model, framework or accelerator is not.

    Frameworks differ in how much goes unsaid of a run: each has its own spread, shrunk towards everybody's, and the
    multiple of it that nine in ten rows stay within is common.
    """
    experts = np.array([bool(row.shape.experts) for row in rows])
    frameworks = np.array([row.framework for row in rows])
    sizes = {title: np.abs(np.log1p(found)) for title, found in errors.items()}
    known = sizes["near-duplicates together"]
    found: dict[str, dict[str, float]] = {}
    for kind, of in (("dense", ~experts), ("experts", experts)):
        common = float(np.mean(known[of]))
        spread = {}
        for framework in sorted({row.framework for row in rows}):
            own = known[of & (frameworks == framework)]
            spread[framework] = float((own.sum() + SHRINKING * common) / (len(own) + SHRINKING))
        multiple = half_width(known[of] / np.array([spread[framework] for framework in frameworks[of]]))
        found[kind] = {framework: round(multiple * value, 4) for framework, value in spread.items()}
        for what in ("model", "framework", "accelerator"):
            alone = np.array([unknown == (what,) for unknown in kinds[f"{what}s"]])
            found[kind][f"unknown {what}"] = round(half_width(sizes[f"{what}s"][of & alone]), 4)
    return found


def coverage(
    rows: Sequence[Row],
    errors: Mapping[str, Array],
    kinds: Mapping[str, Sequence[Kinds]],
    widths: Mapping[str, Mapping[str, float]],
) -> dict[str, dict[str, list[float]]]:
    """By split, and within it by what was unknown, [rows, share held]: with the half-widths that the law will have."""
    found: dict[str, dict[str, list[float]]] = {}
    for title, split in errors.items():
        held: dict[str, list[bool]] = {}
        for row, error, unknown in zip(rows, split, kinds[title], strict=True):
            width = interval_half_width(widths["experts" if row.shape.experts else "dense"], row.framework, unknown)
            inside = abs(math.log1p(error)) <= width
            for name in (
                "all",
                "experts" if row.shape.experts else "dense",
                "unknown: " + (", ".join(unknown) or "nothing"),
            ):
                held.setdefault(name, []).append(inside)
        found[title] = {name: [len(of), round(float(np.mean(of)), 4)] for name, of in sorted(held.items())}
    return found
