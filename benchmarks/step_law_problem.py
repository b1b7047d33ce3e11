"""The fit of the step law: published rows as arrays, and the most probable coefficients given them.

The error is robust (pseudo-Huber on logarithms); the general coefficients have Gaussian priors, and the effects of levels
are shrunk towards none, each kind by its own width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from estimator.errors import InputError
from estimator.hardware import Accelerator, find_accelerator, is_cpu
from estimator.measured import MeasuredRun
from estimator.model.catalog import resolve_model
from estimator.model.shape import ModelShape
from estimator.score import source_name
from estimator.setup import Setup
from estimator.speed.compute import StepWork, is_megatron, step_work
from estimator.speed.rates import Rates, rates
from estimator.speed.step_law import COEFFICIENTS, HYBRID, levels, seconds_by_kind
from profiler.stated import read_sized_table

Array = Any

NOISE = 0.06
"""What rows of one setup differ by: repeats are 3% off in the median, 20% at the 90th percentile."""
WIDTHS = {
    "matmul": 0.15, "expert": 0.4, "attention": 0.3, "elementwise": 0.3, "logits": 0.3, "dequantize": 0.4, "optimizer": 0.3,
    "launches": 0.4, "routing": 0.4, "gathered": 0.4, "bubble": 0.7, "total": 0.08,
}  # fmt: skip
"""Standard deviations of the effects on each coefficient, in factors e; chosen by the cross-validation below."""
HYBRID_WIDTH = 0.3
"""The same of what hybrids have of their own in each kind of work."""
NAMES = tuple(coefficient.name for coefficient in COEFFICIENTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A published speed, and all that the law knows of it."""

    run: MeasuredRun
    setup: Setup
    shape: ModelShape
    accelerator: Accelerator
    work: StepWork
    rates: Rates
    seconds: float
    framework: str


def read_rows(path: Path) -> list[Row]:
    """Rows with a step time or a speed, a known shape, a known rate, and every size stated.

    Left out by rule: sources whose sequences are of varying length, so that ``seq`` is not what was multiplied (litgpt,
    peft).
    """
    found = []
    for run in read_sized_table(path)[0]:
        speed = run.tokens_per_second_per_accelerator
        if run.outcome != "ok" or not (run.step_seconds or speed) or source_name(run.source) in VARYING_LENGTHS:
            continue
        if run.setup.accelerator is None or is_cpu(run.setup.accelerator):
            continue
        setup = run.setup.resolved()
        try:
            shape, accelerator = resolve_model(setup.model), find_accelerator(run.setup.accelerator)
        except InputError:
            continue
        at = rates(setup, accelerator)
        if at is None:
            continue
        seconds = run.step_seconds or setup.tokens_per_step / setup.accelerators / (speed or 1.0)
        of = levels(setup, accelerator, megatron=bool(is_megatron(setup)))
        found.append(
            Row(run=run, setup=setup, shape=shape, accelerator=accelerator, work=step_work(shape, setup), rates=at,
                seconds=seconds, framework=of["total"][0][1])
        )  # fmt: skip
    return found


VARYING_LENGTHS = ("Lightning-AI/litgpt", "huggingface/peft")


class Problem:
    """The rows as arrays, and the columns of the unknowns: general coefficients first, then effects."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.work = StepWork(**_stacked([row.work for row in rows]))
        self.rates = Rates(**_stacked([row.rates for row in rows]))
        self.measured = np.log([row.seconds for row in rows])
        members: dict[tuple[str, str, str], list[int]] = {}
        for index, row in enumerate(rows):
            of = levels(
                row.setup, row.accelerator, megatron=bool(is_megatron(row.setup)), hybrid=row.shape.mixer is not None
            )
            for name, pairs in of.items():
                for factor, level in pairs:
                    members.setdefault((name, factor, level), []).append(index)
        self.effects = list(members)
        self.member = np.zeros((len(members), len(rows)))
        for place, indices in enumerate(members.values()):
            self.member[place, indices] = 1.0
        self.widths = np.array(
            [coefficient.width for coefficient in COEFFICIENTS]
            + [HYBRID_WIDTH if (factor, level) == HYBRID else WIDTHS[name] for name, factor, level in self.effects]
        )
        self.owner = np.array([NAMES.index(name) for name, _, _ in self.effects])

    def logarithms(self, x: Array) -> Array:
        """Of every coefficient of every row: (coefficients, rows)."""
        general = np.log([coefficient.prior for coefficient in COEFFICIENTS]) + x[: len(NAMES)]
        logs = np.repeat(general[:, None], len(self.rows), axis=1)
        np.add.at(logs, self.owner, x[len(NAMES) :, None] * self.member)
        return logs

    def predicted(self, logs: Array) -> Array:
        """Logarithm of the seconds of every row."""
        by = dict(zip(NAMES, np.exp(logs), strict=True))
        return np.log(sum(seconds_by_kind(self.work, self.rates, by).values()))

    def solve(self, used: Array, start: Array | None = None) -> tuple[Array, Array]:
        """The most probable unknowns given the ``used`` rows, and their standard errors."""
        x = np.zeros(len(self.widths)) if start is None else start.copy()
        damping = 1e-3
        cost, residual, slopes, weight = self._around(x, used)
        for _ in range(60):
            normal = (slopes * weight) @ slopes.T + np.diag(self.widths**-2.0)
            gradient = (slopes * weight) @ residual + x / self.widths**2
            step = -cho_solve(cho_factor(normal + damping * np.diag(np.diag(normal))), gradient)
            found = self._around(x + step, used)
            if found[0] < cost:
                done = cost - found[0] < 1e-4
                x, (cost, residual, slopes, weight) = x + step, found
                damping = max(damping / 5, 1e-6)
                if done:
                    break
            else:
                damping *= 10
                if damping > 1e6:
                    break
        normal = (slopes * weight) @ slopes.T + np.diag(self.widths**-2.0)
        return x, np.sqrt(np.diag(np.linalg.inv(normal)))

    def _around(self, x: Array, used: Array) -> tuple[float, Array, Array, Array]:
        """Cost, residuals, their slopes (unknowns, rows) and the robust weights at ``x``."""
        logs = self.logarithms(x)
        base = self.predicted(logs)
        residual = base - self.measured
        scaled = np.sqrt(1 + (residual / NOISE) ** 2)
        cost = float(np.sum((scaled - 1)[used]) + 0.5 * np.sum((x / self.widths) ** 2))
        general = np.empty_like(logs)
        for index in range(len(NAMES)):
            moved = logs.copy()
            moved[index] += 1e-5
            general[index] = (self.predicted(moved) - base) / 1e-5
        slopes = np.concatenate([general, general[self.owner] * self.member])
        return cost, residual, slopes, np.where(used, 1 / (NOISE**2 * scaled), 0.0)


def _stacked(records: Sequence[Any]) -> dict[str, Array]:
    return {
        spec.name: np.array([float(getattr(record, spec.name)) for record in records])
        for spec in dataclasses.fields(records[0])
    }
