"""The time law: seconds for each FLOP, byte and launch of a step, and for the step itself.

Few runs must do: a sweep of a dozen points cannot tell apart eight rates that grow together. The coefficients are
therefore fitted as logarithms (none is ever negative) with priors that tie what is physically alike - the two kinds of
matrix products, the three kinds of memory traffic - unless the runs say otherwise; what extrapolates is then mostly the
rate of the matrix products, which the runs know best.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from estimator.calibration import FLOP_TERMS, OTHER_TERMS
from estimator.law_fitting import Sample
from estimator.robust import TOLERANCE, soft_l1, soft_l1_slope

if TYPE_CHECKING:
    from estimator.robust import Array

_HEAD_TIE, _ATTENTION_TIE, _TYPE_TIE = 0.3, 0.7, 1.0
"""Standard deviations, in factors e: how far the head's and attention's rates lie from the layers' matrix products, and
the rates of one type of number from another's."""
_TRAFFIC_TIE = 0.5
"""The same for the traffic of logits and optimizer against that of the layers."""
_BALANCE = {"cpu": 8.0, "gpu": 100.0}
"""FLOPs done while one byte moves, in training and not by datasheet: where the search for the traffic's cost starts."""
_BALANCE_WIDTH = 0.7
_RATE_WIDTH = 1.5
_LAUNCH_SECONDS, _LAUNCH_WIDTH = 5e-6, 1.0
"""A kernel's launch from PyTorch takes 3 to 10 microseconds, on a CPU the operator's dispatch as much."""
_STEP_SECONDS, _STEP_WIDTH = 2e-3, 1.0
"""What a training loop spends once a step: data, scheduler, logging."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSample(Sample):
    """A run's step time beside the formula's work."""

    terms: Mapping[str, float]
    """As ``estimator.calibration.time_terms`` gives them."""
    doubt: float = 0.0
    """Relative standard error of the measured median, from the spread of its steps."""


def doubt_of_median(spread: float | None, steps: int | None) -> float:
    """The relative standard error of a median over ``steps``, whose 5th and 95th percentile lie ``2 spread`` apart.

    As if the steps were normally distributed: their deviation is ``spread / 1.645``, the median's 1.253 / sqrt(n) of it.
    """
    return 0.0 if spread is None or not steps else 1.253 * spread / 1.645 / math.sqrt(steps)


class TimeForm:
    """``sum of coefficient x work + seconds of a step``, a coefficient for each type that matrix products compute in."""

    quantity = "step_seconds"
    minimum_runs = 6
    noise = 0.05

    def __init__(self, types: Sequence[str], *, cpu: bool) -> None:
        self.types = tuple(types)
        self.cpu = cpu
        flops = tuple((f"{term}[{kind}]", "s/FLOP") for kind in self.types for term in FLOP_TERMS)
        units = {"launches": "s"}
        others = tuple((term, units.get(term, "s/B")) for term in OTHER_TERMS)
        self.coefficients = (*flops, *others, ("step", "s"))

    def solve(self, samples: Sequence[TimeSample], noise: float, chance: random.Random | None = None) -> list[float]:
        """The most probable logarithms: robust (soft L1) on relative errors of the data, Gaussian on the priors."""
        import numpy as np
        from scipy.optimize import least_squares

        names = [name for name, _ in self.coefficients]
        work = np.array([[sample.terms.get(name, 0.0) for name in names] for sample in samples])
        measured = np.array([sample.measured for sample in samples])
        logs = np.log(measured)
        # A run whose steps scattered, on a machine that others use, counts for less than one whose steps agreed.
        noise_of_each = np.hypot(noise, np.array([sample.doubt for sample in samples]))
        flops = work[:, : len(FLOP_TERMS) * len(self.types)].sum(axis=1)
        rate = float(np.log(np.median(measured / flops)))
        prior, centre = self._priors(rate)
        if chance is not None:
            centre = centre + [chance.gauss() for _ in centre]

        def residuals(x: Array) -> Array:
            return np.concatenate([soft_l1((np.log(work @ np.exp(x)) - logs) / noise_of_each), prior @ x - centre])

        def jacobian(x: Array) -> Array:
            shares = work * np.exp(x)
            total = shares.sum(axis=1)
            slope = soft_l1_slope((np.log(total) - logs) / noise_of_each) / (total * noise_of_each)
            return np.concatenate([shares * slope[:, None], prior])

        start = np.linalg.lstsq(prior, centre, rcond=None)[0]
        found = least_squares(residuals, start, jac=jacobian, method="lm", ftol=TOLERANCE, xtol=TOLERANCE)
        return [float(x) for x in np.exp(found.x)]

    def predict(self, sample: TimeSample, coefficients: Sequence[float]) -> float:
        names = [name for name, _ in self.coefficients]
        return sum(sample.terms.get(name, 0.0) * x for name, x in zip(names, coefficients, strict=True))

    def _priors(self, rate: float) -> tuple[Array, Array]:
        """Rows of (difference of logarithms) and what they should be, both over their standard deviation."""
        import numpy as np

        index = {name: i for i, (name, _) in enumerate(self.coefficients)}
        first = self.types[0]
        rows: list[tuple[dict[str, float], float, float]] = [({f"matmul_flops[{first}]": 1.0}, rate, _RATE_WIDTH)]
        for kind in self.types:
            products = f"matmul_flops[{kind}]"
            rows.append(({f"head_flops[{kind}]": 1.0, products: -1.0}, 0.0, _HEAD_TIE))
            rows.append(({f"attention_flops[{kind}]": 1.0, products: -1.0}, 0.0, _ATTENTION_TIE))
            if kind != first:
                rows.append(({products: 1.0, f"matmul_flops[{first}]": -1.0}, 0.0, _TYPE_TIE))
        balance = np.log(_BALANCE["cpu" if self.cpu else "gpu"])
        rows.append(({"elementwise_bytes": 1.0, f"matmul_flops[{first}]": -1.0}, float(balance), _BALANCE_WIDTH))
        rows += [
            ({name: 1.0, "elementwise_bytes": -1.0}, 0.0, _TRAFFIC_TIE) for name in ("logits_bytes", "optimizer_bytes")
        ]
        rows.append(({"launches": 1.0}, float(np.log(_LAUNCH_SECONDS)), _LAUNCH_WIDTH))
        rows.append(({"step": 1.0}, float(np.log(_STEP_SECONDS)), _STEP_WIDTH))
        matrix, centre = np.zeros((len(rows), len(index))), np.zeros(len(rows))
        for i, (weights, value, width) in enumerate(rows):
            for name, weight in weights.items():
                matrix[i, index[name]] = weight / width
            centre[i] = value / width
        return matrix, centre
