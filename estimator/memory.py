"""Peak memory in closed form: named parts, phase by phase, from a shape and a setup.  (being written)"""

from __future__ import annotations

from dataclasses import dataclass

from estimator.result import Part
from estimator.setup import Setup
from estimator.shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseMemory:
    """What is allocated at the highest moment of one phase, in bytes per device."""

    phase: str
    """``forward``, ``backward``, ``optimizer`` or ``evaluation``."""
    parts: tuple[Part, ...]
    """Named from PART_NAMES; integers."""

    @property
    def bytes(self) -> int:
        return int(sum(part.amount for part in self.parts))


PART_NAMES = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "temporaries",
    "workspace",
    "communication",
)


def memory_phases(shape: ModelShape, setup: Setup) -> tuple[PhaseMemory, ...]:
    """Every phase of a step (``setup`` resolved); the peak is the largest of their sums."""
    raise NotImplementedError
