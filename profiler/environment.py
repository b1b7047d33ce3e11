"""Under what a run was measured: versions, device, host, clocks; one JSON object beside every row."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from profiler.device import LocalDevice, cpu_model, host_memory, usable_cores
from profiler.nvml import first_gpu

FORMAT = 1
LIBRARIES = (
    "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors", "bitsandbytes", "numpy", "vramcalc-toolkit",
)  # fmt: skip


def version(distribution: str) -> str | None:
    """Of an installed distribution, without importing it; ``None`` where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def environment_json(device: LocalDevice, **further: str | float | None) -> str:
    """The environment of this process as JSON with sorted keys; bytes, MHz and watts as their names say.

    ``further`` is what the caller knows (the data's name, the steps). What cannot be read is null. Nothing that names
    the host, its user or its network is in it.
    """
    import torch

    total, _ = host_memory()
    facts: dict[str, Any] = {
        "format": FORMAT,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "device": device.description,
        "device_kind": device.kind,
        "capacity_bytes": device.capacity_bytes,
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "load_average": _load_average(),
        "host_memory_bytes": total,
        "cpu_megahertz": _cpu_megahertz(),
        "cuda": torch.version.cuda,
        "allocator_settings": os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF"),
    }
    gpu = first_gpu() if device.kind == "cuda" else None
    if gpu is not None:
        facts |= {
            "driver": gpu.driver(),
            "gpu_megahertz": gpu.clock_megahertz(),
            "power_limit_watts": gpu.power_limit_watts(),
        }
    return json.dumps(facts | further, sort_keys=True)


def _load_average() -> float | None:
    """Of the last minute: how busy others kept the cores."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _cpu_megahertz() -> float | None:
    """The first core's clock now."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        with Path("/proc/cpuinfo").open() as file:
            for line in file:
                if line.startswith("cpu MHz"):
                    return float(line.split(":", 1)[1])
    except (OSError, ValueError):
        pass
    return None
