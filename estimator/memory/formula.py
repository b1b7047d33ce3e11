"""Peak memory in closed form: named parts, phase by phase, from a shape and a setup.

What persists is in ``states``, what the layers hold in ``activations`` and ``held``, the vocabulary's chain in ``logits``;
``phases`` puts them together at the moments that can be the highest, and ``segments`` says what the allocator reserves.
"""

from __future__ import annotations

from dataclasses import dataclass

from estimator.arrays import Number, maximum, whole
from estimator.errors import InputError
from estimator.memory.ledger import PART_NAMES, Ledger, Moment
from estimator.memory.phases import PHASES, moments
from estimator.memory.remembered import remembered
from estimator.memory.segments import segment_bytes
from estimator.model.shape import ModelShape
from estimator.result import Part
from estimator.setup import Setup

__all__ = [
    "PART_NAMES",
    "PHASES",
    "PhaseMemory",
    "memory_phases",
    "peak_and_segment_bytes",
    "peak_bytes",
    "peak_phase",
]

_CODE = "transformers 5 modelling code and torch autograd, read; checked on CPU allocator events"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseMemory:
    """What is allocated at the highest moment of one phase, in bytes per device."""

    phase: str
    """One of PHASES."""
    parts: tuple[Part, ...]
    """Named from PART_NAMES, whole bytes; a part that is 0 is left out."""

    @property
    def bytes(self) -> int:
        return int(sum(part.amount for part in self.parts))


@remembered
def _walk(shape: ModelShape, setup: Setup) -> tuple[Ledger, tuple[Moment, ...]]:
    if shape.code_only:
        raise InputError(
            f"model {shape.name}: no formula knows its layers, which carry a state or are of its own kind; write --dry-run, which runs its code"
        )
    ledger = Ledger.of(shape, setup)
    return ledger, moments(ledger)


@remembered
def memory_phases(shape: ModelShape, setup: Setup) -> tuple[PhaseMemory, ...]:
    """Every candidate for the peak of a step (``setup`` resolved); a phase can appear twice, at its start and end.

    More tokens, parameters or sequences never lower any of them.
    """
    ledger, found = _walk(shape, setup)
    return tuple(_described(ledger, moment) for moment in found)


def peak_bytes(shape: ModelShape, setup: Setup) -> Number:
    """The allocated peak alone, per device; an array where the setup's numbers are arrays."""
    return _highest(_walk(shape, setup)[1])


@remembered
def peak_and_segment_bytes(shape: ModelShape, setup: Setup) -> tuple[Number, Number]:
    """The allocated peak, and what the caching allocator's segments add up to while the device has room; per device.

    Arrays where the setup's numbers are arrays.
    """
    ledger, found = _walk(shape, setup)
    peak = _highest(found)
    return peak, maximum(segment_bytes(ledger, found), peak)


def peak_phase(phases: tuple[PhaseMemory, ...]) -> PhaseMemory:
    """The highest."""
    return max(phases, key=lambda phase: phase.bytes)


def _highest(found: tuple[Moment, ...]) -> Number:
    peak: Number = 0
    for moment in found:
        peak = maximum(peak, sum(whole(amount) for amount in moment.amounts))
    return peak


def _described(ledger: Ledger, moment: Moment) -> PhaseMemory:
    """With each part's formula and source."""
    setup, states, tokens = ledger.setup, ledger.states, f"{ledger.tokens:,.0f} tokens"
    descriptions = (
        (f"{states.total:,.0f} parameters, {setup.precision}", _CODE),
        (f"{states.trainable:,.0f} trained x {states.gradient_width:g} B", _CODE),
        (f"{setup.optimizer} states of the trained parameters", _CODE),
        (f"{ledger.layers} layers x {tokens}, checkpointing {setup.checkpointing}", _CODE),
        (f"{tokens} x {ledger.shape.vocab:,} vocabulary, {setup.loss} loss", _CODE),
        ("casts of weights, the optimizer's square roots, or a second table gradient", _CODE),
        ("cuBLAS workspaces of two threads", "PyTorch CUDABlas defaults by architecture"),
        (f"{setup.sharding} over {setup.data_ranks} ranks", "framework defaults"),
    )
    parts = tuple(
        Part(name=name, amount=round(amount), formula=formula, source=source)
        for name, amount, (formula, source) in zip(PART_NAMES, moment.amounts, descriptions, strict=True)
        if round(amount)
    )
    return PhaseMemory(phase=moment.phase, parts=parts)
