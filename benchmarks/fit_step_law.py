"""Fits the step law to a table of measured runs: ``python benchmarks/fit_step_law.py TABLE`` (``make laws``).

Writes ``estimator/data/step_law.json`` and prints how well rows predict that the fit has not seen.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script is run by its path
from benchmarks.step_law_coverage import Kinds, coverage, half_widths, unseen_of
from benchmarks.step_law_problem import NAMES, Array, Problem, Row, read_rows
from estimator.score import source_name
from estimator.speed.step_law import COEFFICIENTS, layout

LAW = Path(__file__).resolve().parents[1] / "estimator" / "data" / "step_law.json"


# --- how well rows are predicted that the fit has not seen -------------------------------------------------------------


def cross_validate(
    problem: Problem, start: Array, groups: Sequence[Any], folds: int | None = None
) -> tuple[Array, list[Kinds]]:
    """Relative errors (predicted / measured - 1, of seconds) of every row, each from a fit without its fold, and what that fit
    had not seen of the row.

    Rows of one group stay together; ``folds`` groups them further, at random (seeded).
    """
    kinds = list(dict.fromkeys(groups))
    random.Random(0).shuffle(kinds)
    fold_of = {kind: index % (folds or len(kinds)) for index, kind in enumerate(kinds)}
    fold = np.array([fold_of[group] for group in groups])
    errors = np.zeros(len(groups))
    unknown: list[Kinds] = [()] * len(groups)
    for index in range(max(fold) + 1):
        left = fold == index
        x, _ = problem.solve(~left, _without(problem, start, ~left))
        errors[left] = (problem.predicted(problem.logarithms(x)) - problem.measured)[left]
        kinds_of = unseen_of(problem, ~left)
        for row in np.flatnonzero(left):
            unknown[row] = kinds_of[row]
    return np.exp(errors) - 1, unknown


def _without(problem: Problem, start: Array, used: Array) -> Array:
    """A start that knows nothing of levels that only the left-out rows have."""
    x = start.copy()
    x[len(NAMES) :][problem.member[:, used].sum(axis=1) == 0] = 0.0
    return x


def near_duplicates(row: Row) -> tuple[Any, ...]:
    """What repeats of one published setup share: all but the version and what no column states; of a sweep over lengths
    and batches, blocks of neighbours."""
    setup = row.setup
    tokens = setup.batch * setup.seq
    block = (setup.seq // 256, setup.batch // 3) if row.framework == "hf-trainer+deepspeed" else tokens
    return (
        row.framework, setup.model, row.accelerator.name, setup.accelerators, setup.precision, setup.method, setup.checkpointing,
        setup.tensor_parallel, setup.pipeline_parallel, setup.context_parallel, setup.expert_parallel, setup.base_quantization,
        setup.loss, setup.compile, setup.offload, block,
    )  # fmt: skip


SPLITS: dict[str, tuple[Callable[[Row], Any], int | None]] = {
    "random rows": (lambda row: row.run.run, 10),
    "near-duplicates together": (near_duplicates, 10),
    "models": (lambda row: row.setup.model, 12),
    "sources": (lambda row: source_name(row.run.source), None),
    "frameworks": (lambda row: row.framework, None),
    "accelerators": (lambda row: row.accelerator.name, None),
}
"""What is left out together, and into how many folds it is gathered (``None``: each by itself)."""


def scores(errors: Array) -> str:
    size = np.abs(errors)
    return f"n {len(size):4d}  median {np.median(size):6.1%}  p90 {np.quantile(size, 0.9):6.1%}  bias {np.median(errors):+6.1%}"


def report(title: str, rows: Sequence[Row], errors: Array, group: Callable[[Row], Any] | None = None) -> None:
    dense = np.array([not row.shape.experts for row in rows])
    print(f"{title:34s} {scores(errors)}")
    print(f"{'  dense':34s} {scores(errors[dense])}")
    if (~dense).any():
        print(f"{'  mixtures of experts':34s} {scores(errors[~dense])}")
    if group is None:
        return
    labels = np.array([str(group(row)) for row in rows])
    found = {label: errors[labels == label] for label in sorted(set(labels))}
    medians = [float(np.median(np.abs(of))) for of in found.values()]
    print(f"{'  median of the groups':34s} n {len(medians):4d}  median {np.median(medians):6.1%}")
    for label, of in found.items():
        print(f"    {label:30s} {scores(of)}")


# --- writing it ---------------------------------------------------------------------------------------------------------


def left_out(rows: Sequence[Row], errors: dict[str, Array]) -> dict[str, dict[str, dict[str, float]]]:
    """Scores of the rows that each split's fits left out: all, dense models, mixtures of experts."""
    experts = np.array([bool(row.shape.experts) for row in rows])
    found: dict[str, dict[str, dict[str, float]]] = {}
    for title, (group, folds) in SPLITS.items():
        labels = np.array([str(group(row)) for row in rows])
        for kind, of in (("all", experts | True), ("dense", ~experts), ("mixtures of experts", experts)):
            size = np.abs(errors[title][of])
            values = {
                "n": len(size),
                "median": float(np.median(size)),
                "p90": float(np.quantile(size, 0.9)),
                "bias": float(np.median(errors[title][of])),
            }
            if folds is None:
                values["groups"] = float(np.median([np.median(size[labels[of] == label]) for label in set(labels[of])]))
            found.setdefault(title, {})[kind] = {name: round(value, 4) for name, value in values.items()}
    return found


def document(
    problem: Problem,
    x: Array,
    deviations: Array,
    errors: dict[str, Array],
    unknown: dict[str, list[Kinds]],
    made: str,
) -> dict[str, Any]:
    """The law as it is stored. Levels that moved nothing are kept: that they were seen narrows the interval."""
    widths = half_widths(problem.rows, errors, unknown)
    effects: dict[str, dict[str, dict[str, list[float]]]] = {}
    for (name, factor, level), shift, error in zip(
        problem.effects, x[len(NAMES) :], deviations[len(NAMES) :], strict=True
    ):
        effects.setdefault(name, {}).setdefault(factor, {})[level] = [round(float(shift), 4), round(float(error), 4)]
    return {
        "schema": "vramcalc/step-law/1",
        "made": made,
        "command": "python benchmarks/fit_step_law.py TABLE",
        "rows": len(problem.rows),
        "sources": sorted({source_name(row.run.source) for row in problem.rows}),
        "left_out": left_out(problem.rows, errors),
        "half_widths": widths,
        "coverage": coverage(problem.rows, errors, unknown, widths),
        "models": sorted({layout(row.shape) for row in problem.rows}),
        "coefficients": {
            coefficient.name: {
                "value": float(f"{coefficient.prior * np.exp(shift):.5g}"),
                "relative_error": round(float(error), 4),
                "meaning": coefficient.meaning,
            }
            for coefficient, shift, error in zip(COEFFICIENTS, x, deviations, strict=False)
        },
        "effects": effects,
    }


def main(arguments: Iterable[str]) -> None:
    given = [argument for argument in arguments if not argument.startswith("--")]
    if len(given) != 1:
        sys.exit("usage: python benchmarks/fit_step_law.py TABLE [--no-write]")
    rows = read_rows(Path(given[0]))
    problem = Problem(rows)
    every = np.ones(len(rows), dtype=bool)
    x, deviations = problem.solve(every)
    report(
        "fitted",
        rows,
        np.exp(problem.predicted(problem.logarithms(x)) - problem.measured) - 1,
        lambda row: source_name(row.run.source),
    )
    errors, unknown = {}, {}
    for title, (group, folds) in SPLITS.items():
        errors[title], unknown[title] = cross_validate(problem, x, [group(row) for row in rows], folds)
        report(f"left out: {title}", rows, errors[title], None if folds else group)
    law = document(problem, x, deviations, errors, unknown, date.today().isoformat())
    print("half-widths of the 90% interval, in factors e:", law["half_widths"])
    for title, held in law["coverage"].items():
        print(f"held of {title}:", ", ".join(f"{name} {share:.0%} of {count}" for name, (count, share) in held.items()))
    if "--no-write" not in arguments:
        LAW.write_text(json.dumps(law, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
