"""What all laws share: solve, judge the residuals, bootstrap by run, leave the largest model out.

A law's form says what is summed (``Form``); this module turns it and some samples into a ``Law``. numpy and scipy load
in the functions that use them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from estimator.calibration.fitting import Coefficient, HeldOut, Law, interval_of
from estimator.score import Comparison, percentile, score

_SMALLEST_ERROR = 0.001
"""No law claims to be better than this: bytes are rounded to blocks, timers to ticks."""
_UNTESTED_DRIFT = 0.05
"""Growth of the error for each factor e of extrapolation that is assumed where nothing could be left out."""
_FOLDS = 12
_INNER_DRAWS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One run as a law sees it; subclasses add what the formula says about it."""

    run: str
    model: str
    parameters: int
    tokens: int
    """Of a micro-batch."""
    measured: float
    """In the unit of the law's quantity."""


S = TypeVar("S", bound=Sample)
S_contra = TypeVar("S_contra", bound=Sample, contravariant=True)


class Form(Protocol[S_contra]):
    """The form of a law: what is multiplied with which coefficient, and how the coefficients are found."""

    @property
    def quantity(self) -> str: ...
    @property
    def coefficients(self) -> tuple[tuple[str, str], ...]:
        """(name, unit) of each."""

    @property
    def minimum_runs(self) -> int: ...
    @property
    def noise(self) -> float:
        """The relative error of a measurement that is assumed before any is seen."""

    def solve(self, samples: Sequence[S_contra], noise: float, chance: random.Random | None = None) -> list[float]:
        """Coefficients, none negative, for samples of this relative noise; with ``chance`` the priors' centres are
        drawn from the priors."""

    def predict(self, sample: S_contra, coefficients: Sequence[float]) -> float:
        """In the quantity's unit."""


def fit_law(form: Form[S], samples: Sequence[S], *, draws: int, seed: int = 0) -> Law | None:
    """The law of ``form`` with ``draws`` bootstrap refits, or ``None`` for too few samples."""
    if len(samples) < form.minimum_runs:
        return None
    held_out, drift = _leave_largest_out(form, samples, seed=seed)
    return _fit(form, samples, draws=draws, seed=seed, drift=drift, held_out=held_out)


def _fit(
    form: Form[S],
    samples: Sequence[S],
    *,
    draws: int,
    seed: int,
    drift: float | None,
    held_out: HeldOut | None,
) -> Law:
    values, noise = _solve(form, samples)
    drawn = _bootstrap(form, samples, noise, draws=draws, seed=seed)
    residual = max(_unseen_error(form, samples, noise), _SMALLEST_ERROR)
    return Law(
        quantity=form.quantity,
        coefficients=tuple(
            _coefficient(name, unit, value, [draw[i] for draw in drawn])
            for i, ((name, unit), value) in enumerate(zip(form.coefficients, values, strict=True))
        ),
        draws=tuple(tuple(_rounded(x) for x in draw) for draw in drawn),
        runs=len(samples),
        residual=residual,
        # An error that has not been seen to grow may still do so: by one residual for each decade, at least.
        drift=max(_UNTESTED_DRIFT if drift is None else drift, residual / math.log(10)),
        largest=max(sample.measured for sample in samples),
        held_out=held_out,
    )


def _solve(form: Form[S], samples: Sequence[S]) -> tuple[list[float], float]:
    """Coefficients and the noise that the residuals show (their median size, as that of a normal distribution)."""
    values = form.solve(samples, form.noise)
    sizes = [abs(_log_error(form, sample, values)) for sample in samples]
    noise = min(max(1.4826 * percentile(sizes, 0.5), form.noise / 4), form.noise * 4)
    return form.solve(samples, noise), noise


def _bootstrap(form: Form[S], samples: Sequence[S], noise: float, *, draws: int, seed: int) -> list[list[float]]:
    """Refits to runs drawn with replacement, each with priors drawn from the priors.

    Resampling alone would leave a coefficient that the runs say nothing about at its prior's centre in every draw, as
    if it were known exactly; so the draws spread as far as the prior where the data do not decide
    (randomize-then-optimize: Bardsley et al., SIAM J. Sci. Comput. 36, 2014).
    """
    chance = random.Random(seed)
    return [form.solve(chance.choices(samples, k=len(samples)), noise, chance) for _ in range(draws)]


def _unseen_error(form: Form[S], samples: Sequence[S], noise: float) -> float:
    """The relative error that 90% of the runs stay under when they are left out, one (or one twelfth) at a time."""
    folds = min(_FOLDS, len(samples))
    errors = []
    for fold in range(folds):
        rest = [sample for i, sample in enumerate(samples) if i % folds != fold]
        values = form.solve(rest, noise)
        errors += [abs(math.expm1(_log_error(form, sample, values))) for sample in samples[fold::folds]]
    return percentile(errors, 0.9)


def split_off_largest(samples: Sequence[S]) -> tuple[list[S], list[S], str] | None:
    """(rest, left out, in words what): the largest model, or with one size the largest token count; ``None`` with one of each.

    Sizes within a tenth count as one, so that two families of a size go together.
    """
    for measure, what in (("parameters", "the largest model"), ("tokens", "the largest token count")):
        top = max(getattr(sample, measure) for sample in samples)
        out = [sample for sample in samples if getattr(sample, measure) > 0.9 * top]
        rest = [sample for sample in samples if getattr(sample, measure) <= 0.9 * top]
        if rest:
            if measure == "parameters":
                what = f"{what}, {' and '.join(sorted({sample.model for sample in out}))} ({top:.3g} parameters)"
            else:
                what = f"{what} ({top} tokens in a micro-batch; there is one model size only)"
            return rest, out, what
    return None


def _leave_largest_out(form: Form[S], samples: Sequence[S], *, seed: int) -> tuple[HeldOut | None, float | None]:
    """The honest score, and what the error grows by for each factor e of extrapolation; ``None`` if it can't be had."""
    split = split_off_largest(samples)
    if split is None or len(split[0]) < form.minimum_runs:
        return None, None
    rest, out, what = split
    # The law under test gets its own drift the same way, from the largest of what is left.
    inner = split_off_largest(rest)
    inner_drift = None
    if inner is not None and len(inner[0]) >= form.minimum_runs:
        inner_drift = _drift(form, inner[0], inner[1], _solve(form, inner[0])[0])
    law = _fit(form, rest, draws=_INNER_DRAWS, seed=seed, drift=inner_drift, held_out=None)
    values = [coefficient.value for coefficient in law.coefficients]
    judged = []
    for sample in out:
        value = form.predict(sample, values)
        interval = interval_of(law, value, [form.predict(sample, draw) for draw in law.draws])
        judged.append(Comparison(predicted=value, low=interval.low, high=interval.high, measured=sample.measured))
    result = score(judged)
    assert result is not None
    held_out = HeldOut(
        what=what,
        runs=tuple(sample.run for sample in out),
        fitted_runs=len(rest),
        reach=max(sample.measured for sample in out) / law.largest,
        score=result,
    )
    return held_out, _drift(form, rest, out, values)


def _drift(form: Form[S], rest: Sequence[S], out: Sequence[S], values: Sequence[float]) -> float:
    """How much larger the error is on what was left out, for each factor e beyond what was fitted."""
    seen = percentile([abs(math.expm1(_log_error(form, sample, values))) for sample in rest], 0.9)
    unseen = percentile([abs(math.expm1(_log_error(form, sample, values))) for sample in out], 0.9)
    reach = max(sample.measured for sample in out) / max(sample.measured for sample in rest)
    return max(unseen - seen, 0.0) / math.log(max(reach, 1.5))


def _log_error(form: Form[S], sample: S, values: Sequence[float]) -> float:
    return math.log(form.predict(sample, values) / sample.measured)


def _coefficient(name: str, unit: str, value: float, drawn: Sequence[float]) -> Coefficient:
    low = min(percentile(drawn, 0.05), value) if drawn else value
    high = max(percentile(drawn, 0.95), value) if drawn else value
    return Coefficient(name=name, unit=unit, value=value, low=low, high=high)


def _rounded(number: float) -> float:
    """Six digits are beyond what any draw knows, and keep the file small."""
    return float(f"{number:.6g}")
