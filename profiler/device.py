"""The device that trains on this machine: the first CUDA GPU that torch can use, else the CPU."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from estimator.hardware import accelerators
from profiler.nvml import NvmlGpu, first_gpu

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalDevice:
    """What trains here."""

    name: str
    """The catalog's name where it is there (``RTX-3090``), the driver's otherwise; ``cpu`` for the CPU."""
    kind: str
    """``cuda`` or ``cpu``."""
    description: str
    """The model as the vendor writes it."""
    capacity_bytes: int
    """What the driver reports, or the memory that this process may use."""
    free_bytes: int


def local_device() -> LocalDevice:
    """The device, without making a CUDA context. torch is imported only where the driver shows a GPU."""
    gpu = first_gpu()
    if gpu is not None and _torch_has_cuda():
        return gpu_device(gpu)
    total, available = host_memory()
    return LocalDevice(name="cpu", kind="cpu", description=cpu_model(), capacity_bytes=total, free_bytes=available)


def gpu_device(gpu: NvmlGpu) -> LocalDevice:
    """One GPU as a device, by the catalog's name."""
    capacity = gpu.capacity_bytes()
    return LocalDevice(
        name=catalog_name(gpu.name(), capacity),
        kind="cuda",
        description=gpu.name(),
        capacity_bytes=capacity,
        free_bytes=gpu.free_bytes(),
    )


def catalog_name(vendor_name: str, capacity_bytes: int) -> str:
    """The accelerator catalog's name of ``NVIDIA A100-SXM4-80GB`` and the like; the vendor's where it has none.

    Every word of a catalog name must be among the vendor's words (SXM4 is SXM), the memory aside, which must be
    within a tenth; of several that fit, the one of the most words.
    """
    words = _words(vendor_name)
    best, best_words = vendor_name, 0
    for accelerator in accelerators().values():
        memory_bytes = accelerator.usable_bytes or accelerator.marketing_bytes
        named = {word for word in _words(accelerator.name) if not word.endswith("GB")}
        fits = memory_bytes is not None and abs(capacity_bytes / memory_bytes - 1) < 0.1
        if named <= words and fits and len(named) > best_words:
            best, best_words = accelerator.name, len(named)
    return best


def _words(name: str) -> set[str]:
    words = {"SXM" if word.startswith("SXM") else word for word in re.split(r"[^A-Z0-9]+", name.upper())}
    # The driver calls the SXM form "NVIDIA H100 80GB HBM3", and names the form only of the others.
    return words | {"SXM"} if "HBM3" in words and not words & {"PCIE", "NVL"} else words


def _torch_has_cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.version.cuda is not None


def cpu_model() -> str:
    """As the kernel names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def host_memory(*, meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> tuple[int, int]:
    """(total, available) bytes of the host, or of the container (cgroup v2) where that allows less."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        total = int(lines["MemTotal"].split()[0]) * 1024
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        available = total
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        # The page cache of read files counts as used, but is given back on demand.
        used -= int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return total, available
    return min(total, limit), max(min(available, limit - used), 0)
