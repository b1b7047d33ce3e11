"""Memory of a training step on a GPU: the caching allocator's own peaks, and what NVML says of the process."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from profiler.memory import MemoryMeter, MemoryPeaks, PhasePeak, model_bytes
from profiler.nvml import NvmlGpu, first_gpu

if TYPE_CHECKING:
    import torch


class CudaCounters(ABC):
    """What is read of a GPU; tests answer from a recording."""

    @abstractmethod
    def peak_allocated_bytes(self) -> int:
        """Since the last ``reset_peaks``."""

    @abstractmethod
    def peak_reserved_bytes(self) -> int:
        """Since the last ``reset_peaks``."""

    @abstractmethod
    def reset_peaks(self) -> None:
        """Peaks start anew from what is held now."""

    @abstractmethod
    def process_bytes(self) -> int | None:
        """What this process holds of the device now, context and libraries included."""

    @abstractmethod
    def reserved_bytes(self) -> int:
        """What the allocator holds now."""

    @abstractmethod
    def retries(self) -> int:
        """How often the device was full and the allocator gave its cache back to try again, in the process's life."""

    @abstractmethod
    def process_bytes_by(self) -> str:
        """Who says ``process_bytes``: ``nvml process``, ``nvml device`` or ``cuda``."""

    @abstractmethod
    def expandable_segments(self) -> bool | None:
        """Whether the allocator uses them; ``None`` where it does not say."""

    @abstractmethod
    def synchronize(self) -> None:
        """Returns once every kernel has ended."""


class TorchCudaCounters(CudaCounters):
    """The current device.

    Where NVML names no processes (in a container), a process holds what is used now beyond what was used when these
    counters were made: make them before CUDA is initialised, on a GPU that nobody else uses.
    """

    def __init__(self, gpu: NvmlGpu | None) -> None:
        self._gpu = gpu
        self._used_before_bytes = gpu.used_bytes() if gpu else 0

    def peak_allocated_bytes(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated()

    def peak_reserved_bytes(self) -> int:
        import torch

        return torch.cuda.max_memory_reserved()

    def reset_peaks(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()

    def process_bytes(self) -> int | None:
        import torch

        if self._gpu is not None:
            own = self._gpu.process_bytes(os.getpid())
            return own if own is not None else self._gpu.used_bytes() - self._used_before_bytes
        free, total = torch.cuda.mem_get_info()
        return total - free

    def reserved_bytes(self) -> int:
        import torch

        return torch.cuda.memory_reserved()

    def retries(self) -> int:
        import torch

        return int(torch.cuda.memory_stats().get("num_alloc_retries", 0))

    def process_bytes_by(self) -> str:
        if self._gpu is None:
            return "cuda"
        return "nvml device" if self._gpu.process_bytes(os.getpid()) is None else "nvml process"

    def expandable_segments(self) -> bool | None:
        import torch

        settings = torch.cuda.memory._snapshot().get("allocator_settings", {})
        found = settings.get("expandable_segments")
        return None if found is None else bool(found)

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()


class CudaMemoryMeter(MemoryMeter):
    """Peaks are read and reset as each phase begins; the allocator counts on the host, so nothing has to synchronise.

    The process's own memory never falls in a run (the allocator gives segments back only to try an allocation again),
    so its last reading is its peak; it is read while tracing and at the end.
    """

    def __init__(self, counters: CudaCounters | None = None) -> None:
        self._counters = counters if counters is not None else TorchCudaCounters(first_gpu())
        self._tracing = False
        self._phase = "between"
        self._peaks: dict[str, int] = {}
        self._reserved_bytes = 0
        self._device_bytes: int | None = None
        self._loaded_bytes = 0
        self._overhead_bytes: int | None = None
        self._started_overhead_bytes: int | None = None

    def start(self, model: torch.nn.Module) -> None:
        self._loaded_bytes = model_bytes(model)
        self._counters.synchronize()
        self._counters.reset_peaks()
        self._read_process()
        self._started_overhead_bytes = self._overhead_bytes
        self._tracing = True

    def enter(self, phase: str) -> None:
        if self._tracing:
            self._read()
            self._read_process()
            self._counters.reset_peaks()
            self._phase = phase

    def end_tracing(self) -> None:
        self._read()
        self._read_process()
        self._tracing = False

    def stop(self) -> MemoryPeaks:
        if self._tracing:
            self.end_tracing()
        self._reserved_bytes = max(self._reserved_bytes, self._counters.peak_reserved_bytes())
        self._read_process()
        return MemoryPeaks(
            phases=tuple(PhasePeak(phase=name, allocated_bytes=peak) for name, peak in self._peaks.items()),
            loaded_bytes=self._loaded_bytes,
            reserved_bytes=self._reserved_bytes,
            device_bytes=self._device_bytes,
        )

    def synchronize(self) -> None:
        self._counters.synchronize()

    def facts(self) -> Mapping[str, str | float | None]:
        """``overhead_bytes``: of the device beyond the allocator's segments (context, kernels, libraries), once the model
        was loaded and at the end."""
        return {
            "device_bytes_by": self._counters.process_bytes_by(),
            "overhead_at_start_bytes": self._started_overhead_bytes,
            "overhead_bytes": self._overhead_bytes,
            "allocator_retries": self._counters.retries(),
            "allocator_expandable": self._counters.expandable_segments(),
        }

    def _read(self) -> None:
        peak = self._counters.peak_allocated_bytes()
        self._peaks[self._phase] = max(self._peaks.get(self._phase, 0), peak)
        self._reserved_bytes = max(self._reserved_bytes, self._counters.peak_reserved_bytes())

    def _read_process(self) -> None:
        held = self._counters.process_bytes()
        if held is not None:
            self._device_bytes = max(self._device_bytes or 0, held)
            self._overhead_bytes = held - self._counters.reserved_bytes()
