"""The first visible NVIDIA GPU through NVML: no CUDA context is made, so looking costs the GPU nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmlGpu:
    """One GPU. ``library`` is pynvml, or whatever answers like it."""

    library: Any
    handle: Any

    def name(self) -> str:
        return _text(self.library.nvmlDeviceGetName(self.handle))

    def driver(self) -> str:
        return _text(self.library.nvmlSystemGetDriverVersion())

    def capacity_bytes(self) -> int:
        return int(self.library.nvmlDeviceGetMemoryInfo(self.handle).total)

    def used_bytes(self) -> int:
        """By every process, and by the driver."""
        return int(self.library.nvmlDeviceGetMemoryInfo(self.handle).used)

    def free_bytes(self) -> int:
        return int(self.library.nvmlDeviceGetMemoryInfo(self.handle).free)

    def process_bytes(self, pid: int) -> int | None:
        """What one process holds. ``None`` where NVML does not say: in a container it sees other process ids."""
        try:
            processes = self.library.nvmlDeviceGetComputeRunningProcesses(self.handle)
        except self.library.NVMLError:
            return None
        for process in processes:
            if process.pid == pid and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
        return None

    def energy_joules(self) -> float | None:
        """Since the driver was loaded; ``None`` before Volta."""
        try:
            return float(self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1000
        except self.library.NVMLError:
            return None

    def clock_megahertz(self) -> int | None:
        """The SM clock now."""
        try:
            return int(self.library.nvmlDeviceGetClockInfo(self.handle, self.library.NVML_CLOCK_SM))
        except self.library.NVMLError:
            return None

    def power_limit_watts(self) -> float | None:
        try:
            return float(self.library.nvmlDeviceGetEnforcedPowerLimit(self.handle)) / 1000
        except self.library.NVMLError:
            return None


def first_gpu(number: int = 0) -> NvmlGpu | None:
    """The GPU that CUDA would call device 0, or ``number`` (``CUDA_VISIBLE_DEVICES`` is heeded), or ``None`` without one."""
    try:
        import pynvml
    except ImportError:
        return None
    return first_gpu_of(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"), number)


def first_gpu_of(library: Any, visible: str | None, number: int = 0) -> NvmlGpu | None:
    """As ``first_gpu``, with NVML and the variable given."""
    listed = [str(number)] if visible is None else [name.strip() for name in visible.split(",")][number:]
    first = listed[0] if listed else ""
    try:
        library.nvmlInit()
        if first.isdigit():
            index = int(first)
            if index >= library.nvmlDeviceGetCount():
                return None
            handle = library.nvmlDeviceGetHandleByIndex(index)
        elif first.startswith("GPU-"):
            handle = library.nvmlDeviceGetHandleByUUID(first)
        else:  # empty or -1: CUDA sees none
            return None
    except library.NVMLError:
        return None
    return NvmlGpu(library=library, handle=handle)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
