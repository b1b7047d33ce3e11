"""Laws of one line, ``constant + ratio x base``: reserved and device memory over allocated, checkpoints over the formula."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from estimator.calibration.law_fitting import Sample
from estimator.calibration.robust import TOLERANCE, soft_l1, soft_l1_slope

if TYPE_CHECKING:
    from estimator.calibration.robust import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSample(Sample):
    base: float
    """What the quantity is proportional to, in its unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearForm:
    """``constant + ratio x base``, the constant 0 or more, the ratio ``least_ratio`` or more and near ``ratio``."""

    quantity: str
    ratio: float
    ratio_width: float
    """How far from ``ratio`` the fitted one is expected to lie (standard deviation)."""
    least_ratio: float
    noise: float
    minimum_runs: int = 3

    @property
    def coefficients(self) -> tuple[tuple[str, str], ...]:
        return ("constant", "B"), ("ratio", "")

    def solve(self, samples: Sequence[LinearSample], noise: float, chance: random.Random | None = None) -> list[float]:
        """Bounded least squares on relative errors, robust (soft L1) on the data."""
        import numpy as np
        from scipy.optimize import least_squares

        base = np.array([sample.base for sample in samples])
        measured = np.array([sample.measured for sample in samples])
        scale = measured.min()
        columns = np.stack([np.full_like(base, scale), base], axis=1) / (measured * noise)[:, None]
        prior = np.array([[0.0, 1 / self.ratio_width]])
        ratio = self.ratio + (self.ratio_width * chance.gauss() if chance is not None else 0.0)

        def residuals(x: Array) -> Array:
            return np.concatenate([soft_l1(columns @ x - 1 / noise), (x[1:] - ratio) / self.ratio_width])

        def jacobian(x: Array) -> Array:
            return np.concatenate([columns * soft_l1_slope(columns @ x - 1 / noise)[:, None], prior])

        start = np.array([0.01, max(self.ratio, self.least_ratio + 1e-6)])
        found = least_squares(
            residuals, start, jac=jacobian, bounds=([0, self.least_ratio], np.inf), ftol=TOLERANCE, xtol=TOLERANCE
        )
        return [float(found.x[0] * scale), float(found.x[1])]

    def predict(self, sample: LinearSample, coefficients: Sequence[float]) -> float:
        return coefficients[0] + coefficients[1] * sample.base
