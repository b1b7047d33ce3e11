"""The memory meter of a device."""

from __future__ import annotations

import os

from profiler.device import LocalDevice
from profiler.memory import MemoryMeter


def memory_meter(device: LocalDevice, number: int = 0) -> MemoryMeter:
    """Of GPU ``number`` among several. Make it before the device is touched: on some GPUs it takes what is used now as what others use."""
    if device.kind == "cuda":
        from profiler.cuda_memory import CudaMemoryMeter, TorchCudaCounters
        from profiler.nvml import first_gpu

        return CudaMemoryMeter(TorchCudaCounters(first_gpu(number)))
    # torch's profiler announces its start and end on stderr; 6 is the first level that silences these lines too.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from profiler.cpu_memory import CpuMemoryMeter

    return CpuMemoryMeter()
