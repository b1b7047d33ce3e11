"""The CUDA meter on a recording: peaks as torch's counters would give them, through the same interface."""

from __future__ import annotations

import types
from typing import Any

import torch

from profiler.cuda_memory import CudaCounters, CudaMemoryMeter
from profiler.nvml import NvmlGpu, first_gpu_of


class RecordedCounters(CudaCounters):
    """Plays levels of allocated bytes; reserved is the highest so far in segments of 20, as on a device."""

    def __init__(self, *, context_bytes: int | None) -> None:
        self.level = 0
        self._peak = 0
        self._reserved = 0
        self._context_bytes = context_bytes
        self.synchronized = 0

    def play(self, *levels: int) -> None:
        for level in levels:
            self.level = level
            self._peak = max(self._peak, level)
            self._reserved = max(self._reserved, -(-level // 20) * 20)

    def peak_allocated_bytes(self) -> int:
        return self._peak

    def peak_reserved_bytes(self) -> int:
        return self._reserved

    def reset_peaks(self) -> None:
        self._peak = self.level

    def process_bytes(self) -> int | None:
        return None if self._context_bytes is None else self._context_bytes + self._reserved

    def reserved_bytes(self) -> int:
        return self._reserved

    def retries(self) -> int:
        return 3

    def process_bytes_by(self) -> str:
        return "a recording"

    def expandable_segments(self) -> bool | None:
        return None

    def synchronize(self) -> None:
        self.synchronized += 1


def test_peaks_are_read_phase_by_phase_over_all_traced_steps() -> None:
    counters = RecordedCounters(context_bytes=500)
    meter = CudaMemoryMeter(counters)
    counters.play(100)
    meter.start(torch.nn.Linear(5, 5))
    for highest in (150, 170):
        meter.enter("forward")
        counters.play(highest, 120)
        meter.enter("backward")
        counters.play(210, 130)
        meter.enter("optimizer")
        counters.play(160, 140)
        meter.enter("between")
    meter.end_tracing()
    peaks = meter.stop()
    assert {peak.phase: peak.allocated_bytes for peak in peaks.phases} == {
        "between": 140,
        "forward": 170,
        "backward": 210,
        "optimizer": 160,
    }
    assert (peaks.allocated_bytes, peaks.peak_phase, peaks.reserved_bytes) == (210, "backward", 220)
    assert (peaks.device_bytes, peaks.loaded_bytes) == (720, 30 * 4)
    facts = meter.facts()
    assert (facts["overhead_at_start_bytes"], facts["overhead_bytes"], facts["allocator_retries"]) == (500, 500, 3)


def test_steps_after_tracing_read_nothing_by_phase_but_raise_the_reserved_peak() -> None:
    counters = RecordedCounters(context_bytes=None)
    meter = CudaMemoryMeter(counters)
    meter.start(torch.nn.Linear(5, 5))
    meter.enter("forward")
    counters.play(50)
    meter.end_tracing()
    meter.enter("backward")
    counters.play(90)
    peaks = meter.stop()
    assert (peaks.of("backward"), peaks.allocated_bytes, peaks.reserved_bytes) == (None, 50, 100)
    assert peaks.device_bytes is None


class NVMLError(Exception):
    pass


def fake_nvml(**answers: Any) -> Any:
    def device_count() -> int:
        return 2

    def refuse(*args: Any) -> None:
        raise NVMLError

    library = types.SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=device_count,
        nvmlDeviceGetHandleByIndex=lambda index: f"gpu {index}",
        nvmlDeviceGetHandleByUUID=lambda uuid: f"gpu {uuid}",
        nvmlDeviceGetComputeRunningProcesses=refuse,
        nvmlDeviceGetTotalEnergyConsumption=refuse,
        nvmlDeviceGetClockInfo=refuse,
        nvmlDeviceGetEnforcedPowerLimit=refuse,
    )
    for name, answer in answers.items():
        setattr(library, name, answer)
    return library


def test_the_first_gpu_is_the_first_that_cuda_would_see() -> None:
    library = fake_nvml()
    handles = {visible: first_gpu_of(library, visible) for visible in (None, "1,0", "GPU-ab12", "", "-1", "7")}
    found = {visible: gpu.handle if gpu else None for visible, gpu in handles.items()}
    assert found == {None: "gpu 0", "1,0": "gpu 1", "GPU-ab12": "gpu GPU-ab12", "": None, "-1": None, "7": None}


def test_without_a_driver_there_is_no_gpu() -> None:
    def fail() -> None:
        raise NVMLError

    assert first_gpu_of(fake_nvml(nvmlInit=fail), None) is None


def test_nvml_that_does_not_name_the_process_says_so() -> None:
    process = types.SimpleNamespace(pid=41, usedGpuMemory=7)
    gpu = NvmlGpu(library=fake_nvml(nvmlDeviceGetComputeRunningProcesses=lambda handle: [process]), handle="gpu 0")
    assert (gpu.process_bytes(41), gpu.process_bytes(42)) == (7, None)
    assert NvmlGpu(library=fake_nvml(), handle="gpu 0").process_bytes(41) is None


def test_figures_that_a_gpu_does_not_give_are_none() -> None:
    gpu = NvmlGpu(library=fake_nvml(), handle="gpu 0")
    assert (gpu.energy_joules(), gpu.clock_megahertz(), gpu.power_limit_watts()) == (None, None, None)
    modern = NvmlGpu(library=fake_nvml(nvmlDeviceGetTotalEnergyConsumption=lambda handle: 2500), handle="gpu 0")
    assert modern.energy_joules() == 2.5
