"""The memory law: the largest phase's parts, each group scaled by a coefficient near 1, plus a constant of the device.

The formula is physical, so each coefficient is held near 1 unless the runs say otherwise, and the closer the better the
part is known: states are counted exactly, temporaries are guessed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from estimator.calibration.fitting import MEMORY_GROUPS
from estimator.calibration.law_fitting import Sample
from estimator.calibration.robust import TOLERANCE, soft_l1, soft_l1_slope
from estimator.memory.formula import PhaseMemory

if TYPE_CHECKING:
    from estimator.calibration.robust import Array

GROUPS = tuple(dict.fromkeys(MEMORY_GROUPS.values()))
_PRIOR_WIDTHS = {"states": 0.01, "activations": 0.15, "logits": 0.1, "temporaries": 0.3}
"""How far from 1 each coefficient is expected to lie (standard deviation)."""
_CONSTANT_WIDTH = 0.1
"""The same for the constant, as a share of the smallest peak."""
_PHASE_WEIGHT = 0.5
"""A phase's own peak counts half of the step's: it is a softer definition, and there are three."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySample(Sample):
    """A run's allocated peaks beside the formula's phases."""

    phases: tuple[tuple[str, tuple[float, ...]], ...]
    """Of each phase, its name and its bytes by group, in the order of ``GROUPS``."""
    phase_peaks: tuple[tuple[str, float], ...] = ()
    """Measured peaks of single phases, in bytes, where they were recorded."""


def phase_groups(phases: Sequence[PhaseMemory]) -> tuple[tuple[str, tuple[float, ...]], ...]:
    """The formula's phases as a ``MemorySample`` holds them."""
    found = []
    for phase in phases:
        sums = dict.fromkeys(GROUPS, 0.0)
        for part in phase.parts:
            sums[MEMORY_GROUPS[part.name]] += part.amount
        found.append((phase.phase, tuple(sums[group] for group in GROUPS)))
    return tuple(found)


class MemoryForm:
    """``max over phases of (sum of coefficient x bytes of the group + constant)``, in bytes."""

    quantity = "peak_allocated_bytes"
    coefficients = (*((group, "") for group in GROUPS), ("constant", "B"))
    minimum_runs = 4
    noise = 0.02

    def solve(self, samples: Sequence[MemorySample], noise: float, chance: random.Random | None = None) -> list[float]:
        """Bounded least squares on relative errors, robust (soft L1) on the data and ridged towards 1."""
        import numpy as np
        from scipy.optimize import least_squares

        targets = [(rows, weight, measured) for sample in samples for rows, weight, measured in _targets(sample)]
        depth = max(len(rows) for rows, _, _ in targets)
        features = np.zeros((len(targets), depth, len(GROUPS)))
        for i, (rows, _, _) in enumerate(targets):
            features[i, : len(rows)] = rows
        scale = min(sample.measured for sample in samples)
        present = np.zeros((len(targets), depth, 1))
        for i, (rows, _, _) in enumerate(targets):
            present[i, : len(rows)] = scale
        features = np.concatenate([features, present], axis=2)
        measured = np.array([value for _, _, value in targets])
        weights = np.array([weight for _, weight, _ in targets]) / noise
        centre = np.array([*(1.0 for _ in GROUPS), 0.0])
        widths = np.array([*(_PRIOR_WIDTHS[group] for group in GROUPS), _CONSTANT_WIDTH])
        if chance is not None:
            centre = centre + widths * [chance.gauss() for _ in widths]
        every = np.arange(len(targets))

        def residuals(x: Array) -> Array:
            errors = (features @ x).max(axis=1) / measured - 1
            return np.concatenate([soft_l1(errors * weights), (x - centre) / widths])

        def jacobian(x: Array) -> Array:
            sums = features @ x
            top = sums.argmax(axis=1)
            errors = (sums[every, top] / measured - 1) * weights
            slope = soft_l1_slope(errors) * weights / measured
            return np.concatenate([features[every, top] * slope[:, None], np.diag(1 / widths)])

        start = np.array([*(1.0 for _ in GROUPS), 1e-3])
        found = least_squares(
            residuals, start, jac=jacobian, bounds=(0, np.inf), x_scale=widths, ftol=TOLERANCE, xtol=TOLERANCE
        )
        return [*(float(x) for x in found.x[:-1]), float(found.x[-1] * scale)]

    def predict(self, sample: MemorySample, coefficients: Sequence[float]) -> float:
        return max(_sum(row, coefficients) for _, row in sample.phases)


def _targets(sample: MemorySample) -> list[tuple[list[tuple[float, ...]], float, float]]:
    """(rows of which the largest is the prediction, weight, measured bytes)."""
    found = [([row for _, row in sample.phases], 1.0, sample.measured)]
    for name, measured in sample.phase_peaks:
        rows = [row for phase, row in sample.phases if phase == name]
        if rows and measured > 0:
            found.append((rows, _PHASE_WEIGHT, measured))
    return found


def _sum(row: Sequence[float], coefficients: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(row, coefficients[:-1], strict=True)) + coefficients[-1]
