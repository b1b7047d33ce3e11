"""Peak memory of a run by phase: what a meter of any device answers, and how its caller tells it the phases."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STEP_PHASES = ("forward", "backward", "optimizer")
"""The phases that hold a step's peak. What happens ``between`` steps counts in the peak, but is not one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePeak:
    """The most that tensors held while one phase ran, over every traced step; what was there as it began counts."""

    phase: str
    allocated_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPeaks:
    """What one run needed, in bytes on one device. ``None`` is "this device does not say"."""

    phases: tuple[PhasePeak, ...]
    loaded_bytes: int
    """Parameters and buffers of the loaded model, each storage once."""
    reserved_bytes: int | None
    """What the allocator took from the system."""
    device_bytes: int | None
    """What the process occupied: on a GPU as nvidia-smi shows it, on a CPU the resident set."""

    @property
    def allocated_bytes(self) -> int:
        return max(peak.allocated_bytes for peak in self.phases)

    @property
    def peak_phase(self) -> str:
        """The phase of a step that held the most; the later of two that held the same."""
        ranked = [peak for peak in self.phases if peak.phase in STEP_PHASES] or list(self.phases)
        return max(reversed(ranked), key=lambda peak: peak.allocated_bytes).phase

    def of(self, phase: str) -> int | None:
        """The allocated peak of one phase, or ``None`` where it never ran."""
        return next((peak.allocated_bytes for peak in self.phases if peak.phase == phase), None)


class MemoryMeter(ABC):
    """Watches one device from a loaded model to the last step.

    ``start`` once the model is on the device; ``enter`` as each phase begins; ``end_tracing`` after the steps whose
    tensors are traced (these are slower and must not be timed); ``stop`` after the last step.
    """

    @abstractmethod
    def start(self, model: torch.nn.Module) -> None:
        """Traces from here on; what ``model`` holds is the baseline."""

    @abstractmethod
    def enter(self, phase: str) -> None:
        """A phase begins. Cheap once tracing has ended."""

    @abstractmethod
    def end_tracing(self) -> None:
        """The steps that follow run as if nobody watched."""

    @abstractmethod
    def stop(self) -> MemoryPeaks:
        """The peaks so far."""

    @abstractmethod
    def synchronize(self) -> None:
        """Returns once the device has done everything it was given: call it around what is timed."""

    def facts(self) -> Mapping[str, str | float | None]:
        """What else it saw by the end, for the row's environment: names with their units."""
        return {}


def model_bytes(model: torch.nn.Module) -> int:
    """Bytes of the storages of a model's parameters and buffers, shared ones once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
