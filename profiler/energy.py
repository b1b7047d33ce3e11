"""Energy: the counters of a GPU (NVML) or of the CPU packages (Linux's RAPL), where they can be read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

from profiler.nvml import NvmlGpu, first_gpu

RAPL = Path("/sys/class/powercap")


class EnergyMeter(ABC):
    """A counter of joules. Only differences mean something."""

    @abstractmethod
    def joules(self) -> float:
        """Since some fixed moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmlEnergy(EnergyMeter):
    """The whole board, other processes included."""

    gpu: NvmlGpu

    def joules(self) -> float:
        joules = self.gpu.energy_joules()
        assert joules is not None, "energy_meter made sure of it"
        return joules


@dataclass(slots=True, kw_only=True)
class RaplEnergy(EnergyMeter):
    """All CPU packages, other processes included. A package's counter starts again at its ``max_energy_range_uj``."""

    packages: tuple[Path, ...]
    _last: dict[Path, int] = field(default_factory=dict, init=False)
    _total_microjoules: int = field(default=0, init=False)

    def joules(self) -> float:
        for package in self.packages:
            now = _whole(package / "energy_uj")
            before = self._last.get(package, now)
            wrapped = _whole(package / "max_energy_range_uj") if now < before else 0
            self._total_microjoules += now - before + wrapped
            self._last[package] = now
        return self._total_microjoules / 1e6


def energy_meter(kind: str, *, rapl: Path = RAPL) -> EnergyMeter | None:
    """The meter of a device of ``kind`` ``cuda`` or ``cpu``, or ``None`` where nothing can be read (RAPL: mostly by root)."""
    if kind == "cuda":
        gpu = first_gpu()
        return NvmlEnergy(gpu=gpu) if gpu is not None and gpu.energy_joules() is not None else None
    # intel-rapl:0 is a package, intel-rapl:0:1 a part of it. AMD's packages have the same names.
    packages = tuple(sorted(path for path in rapl.glob("intel-rapl:*") if path.name.count(":") == 1))
    try:
        for package in packages:
            _whole(package / "energy_uj")
            _whole(package / "max_energy_range_uj")
    except (OSError, ValueError):
        return None
    return RaplEnergy(packages=packages) if packages else None


def _whole(path: Path) -> int:
    return int(path.read_text())
