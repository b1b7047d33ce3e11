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

from estimator.calibration.fitting import FLOP_TERMS, OTHER_TERMS, overlap_exponent, seconds_by_term
from estimator.calibration.law_fitting import Sample
from estimator.calibration.robust import TOLERANCE, soft_l1, soft_l1_slope
from estimator.errors import InputError
from estimator.hardware import Accelerator, find_accelerator

if TYPE_CHECKING:
    from estimator.calibration.robust import Array

_MATMUL_EFFICIENCY, _BANDWIDTH_EFFICIENCY = 0.72, 0.75
"""Shares of the datasheet's rates that training reaches: where the search starts on an accelerator of the catalog."""
_HEAD_TIE, _ATTENTION_TIE, _TYPE_TIE, _TRAFFIC_TIE = 0.3, 0.7, 1.0, 0.5
"""Standard deviations, in factors e: how far the head's and attention's rates lie from the layers' matrix products, the
rates of one type of number from another's, and the traffic of logits and optimizer from that of the layers."""
_CATALOG_WIDTH = 0.4
"""The same for rates and bandwidths that the catalog knows, at the shares of the datasheet that training reaches."""
_UNKNOWN_WIDTH = 1.5
"""For rates that nothing is known of (a CPU): the search starts where all the time would be matrix products."""
_BALANCE, _BALANCE_WIDTH = 8.0, 0.7
"""FLOPs that such a device does while one byte moves, in training: a CPU's 5 to 15."""
_LAUNCH_SECONDS, _LAUNCH_WIDTH = 5e-6, 1.0
"""A kernel's launch from PyTorch takes 3 to 10 microseconds, on a CPU the operator's dispatch as much."""
_STEP_SECONDS, _STEP_WIDTH = 2e-3, 1.0
"""What a training loop spends once a step: data, scheduler, logging."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSample(Sample):
    """A run's step time beside the formula's work."""

    terms: Mapping[str, float]
    """As ``estimator.calibration.fitting.time_terms`` gives them."""
    doubt: float = 0.0
    """Relative standard error of the measured median, from the spread of its steps."""


def doubt_of_median(spread: float | None, steps: int | None) -> float:
    """The relative standard error of a median over ``steps``, whose 5th and 95th percentile lie ``2 spread`` apart.

    As if the steps were normally distributed: their deviation is ``spread / 1.645``, the median's 1.253 / sqrt(n) of it.
    """
    return 0.0 if spread is None or not steps else 1.253 * spread / 1.645 / math.sqrt(steps)


class TimeForm:
    """The sum of coefficient x work and the seconds of a step, launches overlapping with the work on an accelerator.

    Each type that matrix products compute in has coefficients of its own.
    """

    quantity = "step_seconds"
    minimum_runs = 6
    noise = 0.05

    def __init__(self, types: Sequence[str], accelerator: str) -> None:
        self.types = tuple(types)
        self.exponent = overlap_exponent(accelerator)
        self._known = _catalog_entry(accelerator)
        flops = tuple((f"{term}[{kind}]", "s/FLOP") for kind in self.types for term in FLOP_TERMS)
        others = tuple((term, "s" if term == "launches" else "s/B") for term in OTHER_TERMS)
        self.coefficients = (*flops, *others, ("step", "s"))
        self._names = [name for name, _ in self.coefficients]

    def solve(self, samples: Sequence[TimeSample], noise: float, chance: random.Random | None = None) -> list[float]:
        """The most probable logarithms: robust (soft L1) on relative errors of the data, Gaussian on the priors."""
        import numpy as np
        from scipy.optimize import least_squares

        work = np.array([[sample.terms.get(name, 0.0) for name in self._names] for sample in samples])
        measured = np.array([sample.measured for sample in samples])
        logs = np.log(measured)
        # A run whose steps scattered, on a machine that others use, counts for less than one whose steps agreed.
        noise_of_each = np.hypot(noise, np.array([sample.doubt for sample in samples]))
        flops = work[:, : len(FLOP_TERMS) * len(self.types)].sum(axis=1)
        rate = float(np.log(np.median(measured / flops)))
        prior, centre = self._priors(rate)
        if chance is not None:
            centre = centre + [chance.gauss() for _ in centre]

        launches, step = self._names.index("launches"), self._names.index("step")
        power = self.exponent

        def shares_and_total(x: Array) -> tuple[Array, Array]:
            """How much each coefficient moves the step (seconds a factor e), and the step's seconds."""
            shares = work * np.exp(x)
            launching = shares[:, launches]
            busy = shares.sum(axis=1) - launching - shares[:, step]
            both = (busy**power + launching**power) ** (1 / power)
            total = both + shares[:, step]
            slopes = shares * ((busy / both) ** (power - 1))[:, None]
            slopes[:, launches] = launching * (launching / both) ** (power - 1)
            slopes[:, step] = shares[:, step]
            return slopes, total

        def residuals(x: Array) -> Array:
            _, total = shares_and_total(x)
            return np.concatenate([soft_l1((np.log(total) - logs) / noise_of_each), prior @ x - centre])

        def jacobian(x: Array) -> Array:
            shares, total = shares_and_total(x)
            slope = soft_l1_slope((np.log(total) - logs) / noise_of_each) / (total * noise_of_each)
            return np.concatenate([shares * slope[:, None], prior])

        start = np.linalg.lstsq(prior, centre, rcond=None)[0]
        found = least_squares(residuals, start, jac=jacobian, method="lm", ftol=TOLERANCE, xtol=TOLERANCE)
        return [float(x) for x in np.exp(found.x)]

    def predict(self, sample: TimeSample, coefficients: Sequence[float]) -> float:
        work = [sample.terms.get(name, 0.0) for name in self._names]
        return sum(seconds_by_term(self._names, work, coefficients, self.exponent))

    def _priors(self, rate: float) -> tuple[Array, Array]:
        """Rows of (difference of logarithms) and what they should be, both over their standard deviation.

        ``rate`` is the logarithm of the seconds a FLOP would take if all the time were matrix products.
        """
        import numpy as np

        index = {name: i for i, name in enumerate(self._names)}
        rows: list[tuple[dict[str, float], float, float]] = []
        first = f"matmul_flops[{self.types[0]}]"
        for kind in self.types:
            products = f"matmul_flops[{kind}]"
            flops = self._known.matrix_flops(kind) if self._known else None
            if flops:
                rows.append(({products: 1.0}, -math.log(flops * _MATMUL_EFFICIENCY), _CATALOG_WIDTH))
            elif products == first:
                rows.append(({products: 1.0}, rate, _UNKNOWN_WIDTH))
            else:
                rows.append(({products: 1.0, first: -1.0}, 0.0, _TYPE_TIE))
            rows.append(({f"head_flops[{kind}]": 1.0, products: -1.0}, 0.0, _HEAD_TIE))
            rows.append(({f"attention_flops[{kind}]": 1.0, products: -1.0}, 0.0, _ATTENTION_TIE))
        bandwidth = self._known.bandwidth_bytes_per_second if self._known else None
        if bandwidth:
            rows.append(({"elementwise_bytes": 1.0}, -math.log(bandwidth * _BANDWIDTH_EFFICIENCY), _CATALOG_WIDTH))
        else:
            rows.append(({"elementwise_bytes": 1.0, first: -1.0}, math.log(_BALANCE), _BALANCE_WIDTH))
        rows += [
            ({name: 1.0, "elementwise_bytes": -1.0}, 0.0, _TRAFFIC_TIE) for name in ("logits_bytes", "optimizer_bytes")
        ]
        rows.append(({"launches": 1.0}, math.log(_LAUNCH_SECONDS), _LAUNCH_WIDTH))
        rows.append(({"step": 1.0}, math.log(_STEP_SECONDS), _STEP_WIDTH))
        matrix, centre = np.zeros((len(rows), len(index))), np.zeros(len(rows))
        for i, (weights, value, width) in enumerate(rows):
            for name, weight in weights.items():
                matrix[i, index[name]] = weight / width
            centre[i] = value / width
        return matrix, centre


def _catalog_entry(accelerator: str) -> Accelerator | None:
    try:
        return find_accelerator(accelerator)
    except InputError:  # a CPU, or a device that the catalog does not have
        return None
