"""The speed part of docs/accuracy.md: by framework, accelerator and size, rows left out of the fit, and the worst ones."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path

from estimator.measured import MeasuredRun
from estimator.model.catalog import resolve_model
from estimator.model.shape import active_parameters
from estimator.score import Comparison, Score, score, source_name
from estimator.setup import Setup
from estimator.validation import Validation

_REASONS = Path(__file__).with_name("worst_speeds.csv")
SPEEDS = ("step_seconds", "tokens_per_second")
LEFT_OUT = """## Speed

The step law is fitted to {rows} of these rows (`make laws`, {made}), so that the tables after this one say how well it describes them. How well it predicts what it has not seen say fits that left rows out:
errors of the step time, each row predicted by a fit without it and without all that is named with it; the last column is the median of the groups' medians.
"""
WORST = """### The worst speeds

The rows that are furthest off. The fourth column holds what other rows of the same setup (whatever their sharding) measured: where it differs from the third, no column states what made the difference - a release, a kernel. The last column holds what the row's own
notes, or its neighbours, say of it (`benchmarks/worst_speeds.csv`); where it is empty we know no reason."""
SIZES = (
    (1e9, "below 1B"),
    (8.5e9, "1B to 8B"),
    (35e9, "9B to 34B"),
    (110e9, "35B to 109B"),
    (float("inf"), "110B and more"),
)


def speed_sections(
    validation: Validation,
    runs: dict[str, MeasuredRun],
    table: Callable[[Iterable[str], Iterable[Iterable[str]]], str],
    cells: Callable[[Score], list[str]],
    percent: Callable[..., str],
) -> list[str]:
    """The sections; ``table``, ``cells`` and ``percent`` are those of the rest of the page."""
    law = json.loads((resources.files("estimator.data") / "step_law.json").read_text("utf-8"))
    lines = [
        [what, kind, str(found["n"]), percent(found["median"]), percent(found["p90"]), percent(found["bias"], sign=True),
         percent(found["groups"]) if "groups" in found else ""]
        for what, kinds in law["left_out"].items()
        for kind, found in kinds.items()
    ]  # fmt: skip
    found = [
        LEFT_OUT.format(rows=law["rows"], made=law["made"]).strip(),
        table(["left out together", "of", "n", "median", "p90", "bias", "median of the groups"], lines),
    ]
    judged = [
        (runs[row.run], comparison)
        for row in validation.rows
        for quantity, comparison in row.quantities
        if quantity in SPEEDS
    ]
    for title, group in (("framework", _framework), ("accelerator", _accelerator), ("size", _size)):
        found += [
            f"### By {title}",
            table([title, "n", "median", "p90", "worst", "bias", "in 90%"], _by(group, judged, cells)),
        ]
    return [*found, WORST, _worst(judged, table, percent)]


def _by(
    group: Callable[[Setup], str], judged: list[tuple[MeasuredRun, Comparison]], cells: Callable[[Score], list[str]]
) -> list[list[str]]:
    groups: dict[str, list[Comparison]] = {}
    for run, comparison in judged:
        groups.setdefault(group(run.setup), []).append(comparison)
    lines = []
    for name in sorted(groups, key=lambda name: (_SIZE_ORDER.get(name, 0), name)):
        result = score(groups[name])
        assert result is not None
        lines.append([name, *cells(result)])
    return lines


def _framework(setup: Setup) -> str:
    return setup.framework


def _accelerator(setup: Setup) -> str:
    return str(setup.accelerator)


def _size(setup: Setup) -> str:
    shape = resolve_model(setup.model)
    name = next(name for most, name in SIZES if active_parameters(shape) < most)
    return f"{name}{', active of a mixture' if shape.experts else ''}"


_SIZE_ORDER = {
    f"{name}{suffix}": index + 1 for index, (_, name) in enumerate(SIZES) for suffix in ("", ", active of a mixture")
}


def _worst(
    judged: list[tuple[MeasuredRun, Comparison]],
    table: Callable[[Iterable[str], Iterable[Iterable[str]]], str],
    percent: Callable[..., str],
) -> str:
    with _REASONS.open(encoding="utf-8", newline="") as file:
        reasons = {row["run"]: row["reason"] for row in csv.DictReader(file)}
    same: dict[Setup, list[float]] = {}
    for run, comparison in judged:
        same.setdefault(_but_sharding(run.setup), []).append(comparison.measured)
    lines = []
    for run, comparison in sorted(judged, key=lambda item: -abs(item[1].error))[:15]:
        setup = run.setup
        others = sorted({measured for measured in same[_but_sharding(setup)] if measured != comparison.measured})
        what = f"{setup.model}, {setup.framework}, {setup.method}, {setup.precision}, {setup.accelerators} x {setup.accelerator}, batch {setup.batch} x {setup.seq}"
        said = " ".join(f"{measured:,.6g}" for measured in others)
        lines.append(
            [
                run.run,
                percent(comparison.error, sign=True),
                f"{comparison.measured:,.6g}",
                said,
                what,
                source_name(run.source),
                reasons.get(run.run, ""),
            ]
        )
    return table(["run", "error", "measured", "same setup measured", "setup", "source", "why"], lines)


def _but_sharding(setup: Setup) -> Setup:
    return dataclasses.replace(setup, sharding=None)
