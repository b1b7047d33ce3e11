"""Laws fitted to measured runs, as data, and how to apply them: no numpy, no scipy.

``estimator.calibration.laws.fit`` makes a ``Calibration``, ``estimator.calibration.file`` keeps it, ``estimate`` applies it. A prediction's
interval joins three things: the spread of the law over bootstrap draws, the law's error on the runs that it was fitted
to, and, beyond the largest of those, the error that it made when the largest model was left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from estimator.errors import InputError
from estimator.hardware import find_accelerator, is_cpu
from estimator.memory.formula import PhaseMemory
from estimator.result import Part
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
_TIME_PARTS = {
    "matmul_flops": "matrix products", "head_flops": "head", "attention_flops": "attention",
    "elementwise_bytes": "elementwise", "logits_bytes": "logits", "optimizer_bytes": "optimizer",
    "launches": "launches", "step": "loop",
}  # fmt: skip
"""The parts of a step's seconds, named as in ``estimator.speed.compute``; the loop is what a step costs whatever it computes."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedMemory:
    """The peak by the memory law."""

    peak_allocated_bytes: Interval
    phase: str
    parts: tuple[Part, ...]
    """Whole bytes; they sum exactly to ``peak_allocated_bytes.value``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedTime:
    """The step by the time law."""

    step_seconds: Interval
    parts: tuple[Part, ...]
    """Seconds; they sum to ``step_seconds.value``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedCheckpoint:
    """The checkpoint by its law; what is neither model nor optimizer is the law's constant."""

    bytes: Interval
    model_bytes: int
    optimizer_bytes: int


def apply_memory(calibration: Calibration, phases: Sequence[PhaseMemory]) -> FittedMemory | None:
    """The allocated peak of one device from the formula's ``phases``; ``None`` without a memory law.

    The law's constant is added to the part ``workspace``. More bytes in any phase never lower the peak.
    """
    law = calibration.memory
    if law is None:
        return None
    names = [coefficient.name for coefficient in law.coefficients]
    rows = [_memory_row(phase, names) for phase in phases]
    values = [coefficient.value for coefficient in law.coefficients]
    sums = [_dot(row, values) for row in rows]
    top = sums.index(max(sums))
    by_name = dict(zip(names, values, strict=True))
    parts = [
        dataclasses.replace(
            part,
            amount=round(part.amount * by_name[MEMORY_GROUPS[part.name]]),
            formula=f"{by_name[MEMORY_GROUPS[part.name]]:.4g} x ({part.formula})",
            source=f"{part.source}; scaled by the law fitted to {law.runs} runs",
        )
        for part in phases[top].parts
    ]
    parts = _add_constant(parts, round(by_name["constant"]), law)
    peak = sum(part.amount for part in parts)
    drawn = [max(_dot(row, draw) for row in rows) for draw in law.draws]
    return FittedMemory(
        peak_allocated_bytes=interval_of(law, float(peak), drawn), phase=phases[top].phase, parts=tuple(parts)
    )


def apply_reserved(calibration: Calibration, allocated: Interval) -> Interval | None:
    """Peak reserved bytes from the allocated peak; ``None`` where it was never measured."""
    return _on_top(calibration.reserved, allocated)


def apply_device(calibration: Calibration, allocated: Interval) -> Interval | None:
    """Peak device bytes (context and libraries included) from the allocated peak; ``None`` where never measured."""
    return _on_top(calibration.device_memory, allocated)


def apply_time(calibration: Calibration, work: StepWork, setup: Setup) -> FittedTime | None:
    """The seconds of one optimizer step on one device; ``None`` where the law does not hold.

    That is: no time was measured, none in the type that ``setup`` computes in (see ``compute_type``), or the step spans
    several devices, whose communication no single device can teach.
    """
    law = calibration.time
    if law is None or setup.accelerators > 1 or compute_type(setup) not in time_types(law):
        return None
    terms = time_terms(work, compute_type(setup))
    names = [coefficient.name for coefficient in law.coefficients]
    row = [terms.get(name, 0.0) for name in names]
    exponent = overlap_exponent(calibration.accelerator)
    amounts = seconds_by_term(names, row, [coefficient.value for coefficient in law.coefficients], exponent)
    parts = tuple(
        Part(
            name=_TIME_PARTS[coefficient.name.partition("[")[0]],
            amount=seconds,
            formula=f"{coefficient.value:.4g} {coefficient.unit} x {amount:.4g}"
            + (", what exceeds the work" if coefficient.name == "launches" and exponent > 1 else ""),
            source=f"law fitted to {law.runs} runs",
        )
        for coefficient, amount, seconds in zip(law.coefficients, row, amounts, strict=True)
        if amount
    )
    total = sum(part.amount for part in parts)
    drawn = [sum(seconds_by_term(names, row, draw, exponent)) for draw in law.draws]
    return FittedTime(step_seconds=interval_of(law, total, drawn), parts=parts)


def apply_checkpoint(calibration: Calibration, model_bytes: int, optimizer_bytes: int) -> FittedCheckpoint | None:
    """A checkpoint's bytes from what the formula says; ``None`` where none was measured."""
    law = calibration.checkpoint
    if law is None:
        return None
    total = _on_top(law, Interval.exactly(model_bytes + optimizer_bytes))
    assert total is not None
    ratio = next(coefficient.value for coefficient in law.coefficients if coefficient.name == "ratio")
    return FittedCheckpoint(
        bytes=total, model_bytes=round(model_bytes * ratio), optimizer_bytes=round(optimizer_bytes * ratio)
    )


def caveats(calibration: Calibration, setup: Setup, parameters: int) -> tuple[str, ...]:
    """What separates a setup from the runs behind the laws, one line each: size, tokens, settings never measured."""
    covered = calibration.range
    notes = []
    tokens = setup.batch * setup.seq
    for what, value, high in (
        ("parameters", parameters, covered.parameters_high),
        ("tokens in a micro-batch", tokens, covered.tokens_high),
    ):
        if value > high:
            notes.append(
                f"extrapolated: {value:.3g} {what}, {value / high:.3g} times the largest measured ({high:.3g})"
            )
    for name, seen in (
        ("precision", covered.precisions),
        ("method", covered.methods),
        ("framework", covered.frameworks),
        ("optimizer", covered.optimizers),
        ("checkpointing", covered.checkpointings),
        ("attention", covered.attentions),
    ):
        value = getattr(setup.resolved(), name)
        if value not in seen:
            notes.append(f"{name} {value} was never measured on this device (only {', '.join(seen)})")
    if setup.accelerators > 1:
        notes.append("the time law is of one device; several are predicted by the formula")
    return tuple(notes)


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


def _memory_row(phase: PhaseMemory, names: Sequence[str]) -> list[float]:
    sums = dict.fromkeys(names, 0.0) | {"constant": 1.0}
    for part in phase.parts:
        sums[MEMORY_GROUPS[part.name]] += part.amount
    return [sums[name] for name in names]


def _add_constant(parts: list[Part], constant: int, law: Law) -> list[Part]:
    if not constant:
        return parts
    for i, part in enumerate(parts):
        if part.name == "workspace":
            grown = dataclasses.replace(
                part, amount=part.amount + constant, formula=f"{part.formula} + {constant} B measured"
            )
            return [*parts[:i], grown, *parts[i + 1 :]]
    source = f"law fitted to {law.runs} runs"
    return [*parts, Part(name="workspace", amount=constant, formula="a constant of this device", source=source)]


def _on_top(law: Law | None, below: Interval) -> Interval | None:
    """``constant + ratio x below``, with the relative half-widths of both joined."""
    if law is None:
        return None
    names = [coefficient.name for coefficient in law.coefficients]
    row = [{"constant": 1.0, "ratio": below.value}[name] for name in names]
    value = float(round(_dot(row, [coefficient.value for coefficient in law.coefficients])))
    own = interval_of(law, value, [_dot(row, draw) for draw in law.draws])
    if value <= 0 or below.low <= 0:
        return own
    down = math.hypot(value / own.low - 1, below.value / below.low - 1)
    up = math.hypot(own.high / value - 1, below.high / below.value - 1)
    return Interval(value=value, low=value / (1 + down), high=value * (1 + up))


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


def _dot(row: Sequence[float], coefficients: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(row, coefficients, strict=True))
