"""Laws fitted to measured runs, as data: no numpy, no scipy.

``laws.fit`` makes a ``Calibration``, ``file`` keeps it, ``applying`` predicts by it. A prediction's
interval joins three things: the spread of the law over bootstrap draws, the law's error on the runs that it was fitted
to, and, beyond the largest of those, the error that it made when the largest model was left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from estimator.errors import InputError
from estimator.hardware import find_accelerator, is_cpu
from estimator.score import Score, percentile
from estimator.setup import Setup
from estimator.speed.compute import StepWork
from estimator.units import Interval

MEMORY_GROUPS = {
    "parameters": "states", "gradients": "states", "optimizer": "states", "workspace": "states",
    "activations": "activations", "logits": "logits", "temporaries": "temporaries", "communication": "temporaries",
}  # fmt: skip
"""Which coefficient scales each part of the memory formula. What is counted exactly (states, library workspaces) shares one."""

FLOP_TERMS = ("matmul_flops", "head_flops", "attention_flops")
"""Work whose rate depends on the type that is computed in: each has a coefficient for each such type."""
OTHER_TERMS = ("elementwise_bytes", "logits_bytes", "optimizer_bytes", "launches")


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficient:
    """One fitted number, never negative, with its 90% interval over the bootstrap draws."""

    name: str
    unit: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """The honest test: fit without some runs, predict those."""

    what: str
    """In words, what was left out: the largest model, or the largest token count."""
    runs: tuple[str, ...]
    fitted_runs: int
    """How many runs were left to fit."""
    reach: float
    """The largest measured value left out, over the largest one that was fitted."""
    score: Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """A quantity as a sum of coefficients times what the formula computes."""

    quantity: str
    """The column of the table of measured runs that was fitted, which names the unit."""
    coefficients: tuple[Coefficient, ...]
    draws: tuple[tuple[float, ...], ...]
    """The coefficients of each bootstrap refit, in the order of ``coefficients``."""
    runs: int
    residual: float
    """Relative error on the fitted runs that 90% of them stay under."""
    drift: float
    """What the relative error grows by for each factor e beyond ``largest``."""
    largest: float
    """The largest measured value that was fitted, in the quantity's unit."""
    held_out: HeldOut | None

    def error_at(self, value: float) -> float:
        """The relative 90% error to expect of a prediction of ``value``, its draws aside."""
        beyond = math.log(value / self.largest) if value > self.largest else 0.0
        return self.residual + self.drift * beyond


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """What the fitted runs covered."""

    parameters_low: int
    parameters_high: int
    tokens_low: int
    """Tokens of a micro-batch: batch x seq."""
    tokens_high: int
    models: tuple[str, ...]
    precisions: tuple[str, ...]
    methods: tuple[str, ...]
    frameworks: tuple[str, ...]
    optimizers: tuple[str, ...]
    checkpointings: tuple[str, ...]
    attentions: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A run that a law did not use, and why; ``quantity`` is ``all`` where no law used it."""

    run: str
    quantity: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The laws of one device."""

    accelerator: str
    device: str | None
    """The device as it names itself, where the runs recorded it."""
    environment: str | None
    """JSON: libraries and device of the last run."""
    created: str
    """ISO 8601, UTC."""
    runs: tuple[str, ...]
    """Identifiers of the runs that at least one law used."""
    dropped: tuple[Dropped, ...]
    range: Range
    memory: Law | None
    """Peak allocated bytes: the largest phase's parts, each group scaled, plus a constant."""
    reserved: Law | None
    """Peak reserved bytes: a constant plus a multiple (1 or more) of the allocated peak."""
    device_memory: Law | None
    """Peak device bytes, in the same form."""
    time: Law | None
    """Step seconds: seconds for each FLOP, byte and launch of the step's work."""
    checkpoint: Law | None
    """Checkpoint bytes: a constant plus a multiple near 1 of what the formula says."""

    @property
    def laws(self) -> tuple[Law, ...]:
        """The laws that could be fitted."""
        every = (self.memory, self.reserved, self.device_memory, self.time, self.checkpoint)
        return tuple(law for law in every if law is not None)


def matches(calibration: Calibration, accelerator: str | None) -> bool:
    """Whether the laws are of this accelerator, under any of its names."""
    return accelerator is not None and canonical_name(accelerator) == canonical_name(calibration.accelerator)


def canonical_name(accelerator: str) -> str:
    """The catalog's name in lower case; the given one for a device that is not in the catalog."""
    try:
        return find_accelerator(accelerator).name.lower()
    except InputError:
        return accelerator.strip().lower()


def compute_type(setup: Setup) -> str:
    """The type that the matrix products compute in: fp32, bf16, fp16, fp8, mxfp8 or nvfp4."""
    if setup.autocast:
        return setup.autocast
    return setup.precision.removesuffix("-mixed")


def time_types(law: Law) -> tuple[str, ...]:
    """The types that a time law knows a rate for."""
    named = [coefficient.name for coefficient in law.coefficients if coefficient.name.startswith("matmul_flops[")]
    return tuple(name[len("matmul_flops[") : -1] for name in named)


def time_terms(work: StepWork, kind: str) -> dict[str, float]:
    """The work of a step by the name of the coefficient that it is multiplied with."""
    terms = {f"{name}[{kind}]": getattr(work, name) for name in FLOP_TERMS}
    return terms | {name: getattr(work, name) for name in OTHER_TERMS} | {"step": 1.0}


def overlap_exponent(accelerator: str) -> float:
    """How launches and work join: as the sum of this power of both, and its root.

    A CPU launches and computes in turn: they add up. An accelerator's launches run ahead of its work, so that mostly
    the longer of the two shows.
    """
    return 1.0 if is_cpu(accelerator) else 4.0


def seconds_by_term(
    names: Sequence[str], work: Sequence[float], coefficients: Sequence[float], exponent: float
) -> list[float]:
    """Seconds of each term, in the order of ``names``; their sum is the step's. Launches count as what they add to the work."""
    seconds = [amount * coefficient for amount, coefficient in zip(work, coefficients, strict=True)]
    launches = names.index("launches")
    busy = sum(seconds) - seconds[launches] - seconds[names.index("step")]
    longer = max(busy, seconds[launches])
    if longer > 0:
        both = longer * ((busy / longer) ** exponent + (seconds[launches] / longer) ** exponent) ** (1 / exponent)
        seconds[launches] = max(both - busy, 0.0)
    return seconds


def interval_of(law: Law, value: float, drawn: Sequence[float]) -> Interval:
    """The 90% interval around ``value``: the draws' spread and the law's error, as independent."""
    if value <= 0:
        return Interval.exactly(max(value, 0.0))
    error = law.error_at(value)
    low = percentile(drawn, 0.05) if drawn else value
    high = percentile(drawn, 0.95) if drawn else value
    down = math.hypot(max(value / low - 1, 0.0) if low > 0 else 0.0, error)
    up = math.hypot(max(high / value - 1, 0.0), error)
    return Interval(value=value, low=value / (1 + down), high=value * (1 + up))
