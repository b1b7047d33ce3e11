"""What the laws of a calibration predict, for ``estimate``: no numpy, no scipy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from estimator.calibration.fitting import (
    MEMORY_GROUPS,
    Calibration,
    Law,
    compute_type,
    interval_of,
    overlap_exponent,
    seconds_by_term,
    time_terms,
    time_types,
)
from estimator.memory.formula import PhaseMemory
from estimator.result import Part
from estimator.setup import Setup
from estimator.speed.compute import StepWork
from estimator.units import Interval

_TIME_PARTS = {
    "matmul_flops": "matrix products", "head_flops": "head", "attention_flops": "attention",
    "elementwise_bytes": "elementwise", "logits_bytes": "logits", "optimizer_bytes": "optimizer",
    "launches": "launches", "step": "loop",
}  # fmt: skip
"""The parts of a step's seconds, named as in ``estimator.speed.compute``; the loop is what a step costs whatever it computes."""


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


def _dot(row: Sequence[float], coefficients: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(row, coefficients, strict=True))
