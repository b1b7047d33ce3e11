"""What this machine has for training, and what is missing with the command that installs it; imports nothing heavy."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from estimator.units import GB
from profiler.device import cpu_model, gpu_device, host_memory, usable_cores
from profiler.environment import version
from profiler.nvml import first_gpu

# Distribution, what it is for, the extra that brings it.
_PACKAGES = (
    ("torch", "training, the dry run", "train"),
    ("transformers", "models, Trainer", "train"),
    ("accelerate", "Trainer's devices and precisions", "train"),
    ("datasets", "data files and hub data", "train"),
    ("tokenizers", "the offline tokenizer", "train"),
    ("safetensors", "checkpoints", "train"),
    ("peft", "LoRA, DoRA, QLoRA", "train"),
    ("psutil", "processes and memory", "train"),
    ("nvidia-ml-py", "GPU memory, energy and clocks", "train"),
    ("pandas", "tables of measured runs", "store"),
    ("pyarrow", "Parquet files", "store"),
    ("scipy", "fitting laws", "fit"),
    ("matplotlib", "figures", "report"),
    ("jinja2", "the HTML report", "report"),
)
# Nothing needs these; they allow more.
_OPTIONAL = (("bitsandbytes", "optional: 4 and 8 bits"), ("flash-attn", "optional: --attention flash"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    name: str
    purpose: str
    version: str | None
    """``None`` where it is not installed."""
    install: str | None
    """The command that installs it; ``None`` where nothing needs it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    name: str
    """By the catalog's name where it has one."""
    description: str
    capacity_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkup:
    """The state of the machine. Bytes."""

    toolkit: str
    python: str
    system: str
    cores: int
    packages: tuple[Package, ...]
    devices: tuple[Device, ...]
    disk_path: str
    disk_free_bytes: int
    problems: tuple[str, ...]
    """One line each: what does not work and what to do."""


def checkup(directory: Path | None = None) -> Checkup:
    """Looks at versions, devices, memory, and the disk of ``directory`` (here). torch is looked for, not imported."""
    packages = [
        Package(name=name, purpose=purpose, version=version(name), install=f"pip install 'vramcalc-toolkit[{extra}]'")
        for name, purpose, extra in _PACKAGES
    ]
    packages += [Package(name=n, purpose=purpose, version=version(n), install=None) for n, purpose in _OPTIONAL]
    total, available = host_memory()
    devices = [Device(name="cpu", description=cpu_model(), capacity_bytes=total, free_bytes=available)]
    gpu = first_gpu()
    if gpu is not None:
        found = gpu_device(gpu)
        devices.insert(
            0,
            Device(
                name=found.name,
                description=found.description,
                capacity_bytes=found.capacity_bytes,
                free_bytes=found.free_bytes,
            ),
        )
    place = (directory or Path.cwd()).resolve()
    free = shutil.disk_usage(place).free
    return Checkup(
        toolkit=version("vramcalc-toolkit") or "not installed",
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cores=usable_cores(),
        packages=tuple(packages),
        devices=tuple(devices),
        disk_path=str(place),
        disk_free_bytes=free,
        problems=tuple(_problems(packages, free, has_gpu=gpu is not None)),
    )


def _problems(packages: list[Package], free: int, *, has_gpu: bool) -> list[str]:
    lines = []
    missing = [package.name for package in packages if package.version is None and package.install is not None]
    if missing:
        lines.append(f"not installed: {', '.join(missing)}; pip install 'vramcalc-toolkit[all]'")
    if not has_gpu:
        cuda = any((Path(p) / "nvidia-smi").exists() for p in os.environ.get("PATH", "").split(os.pathsep))
        lines.append(
            "no GPU that NVML can see, though nvidia-smi is there: check the driver"
            if cuda
            else "no GPU: profile and train run on the CPU; estimate needs none"
        )
    elif importlib.util.find_spec("torch") is not None and "+cpu" in (version("torch") or ""):
        lines.append("torch is a CPU build: the GPU is not used; install a CUDA build of torch")
    if free < 10 * GB:
        lines.append(f"{free / GB:.1f} GB free on this disk: checkpoints of a 0.5B model take 5.6 GB each")
    return lines
