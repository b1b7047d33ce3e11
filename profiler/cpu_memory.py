"""Memory of a training step on the CPU: every allocation of a tensor, the C library's allocator, the resident set."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profiler.memory import MemoryMeter, MemoryPeaks, PhasePeak, model_bytes

if TYPE_CHECKING:
    import torch

_MARK = "vramcalc phase: "


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """One event of the CPU allocator: ``bytes`` are negative when memory is given back."""

    nanoseconds: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseMark:
    """The moment at which a phase began, on the clock of the allocations."""

    nanoseconds: int
    phase: str


def peaks_by_phase(
    baseline_bytes: int, allocations: Iterable[Allocation], marks: Iterable[PhaseMark]
) -> tuple[PhasePeak, ...]:
    """The highest level of each phase, in the order in which phases first ran; ``between`` before the first mark.

    The level starts at ``baseline_bytes`` and follows every allocation. A phase that ran several times has its
    highest. What a phase finds as it begins counts in it, as ``torch.cuda.reset_peak_memory_stats`` has it.
    """
    # A mark and an allocation of the same nanosecond: the mark is first, since whoever marks allocates afterwards.
    moments: list[tuple[int, int, Allocation | PhaseMark]] = [(mark.nanoseconds, 0, mark) for mark in marks]
    moments += [(allocation.nanoseconds, 1, allocation) for allocation in allocations]
    moments.sort(key=lambda moment: moment[:2])
    level, phase = baseline_bytes, "between"
    peaks = {phase: level}
    for _, _, event in moments:
        if isinstance(event, PhaseMark):
            phase = event.phase
        else:
            level += event.bytes
        peaks[phase] = max(peaks.get(phase, 0), level)
    return tuple(PhasePeak(phase=name, allocated_bytes=peak) for name, peak in peaks.items())


class CpuMemoryMeter(MemoryMeter):
    """Allocated: torch's profiler reports every allocation of the CPU allocator. Two things it does not see:

    - memory from before it started, nor that memory being given back; hence the baseline, taken of the loaded model,
      none of which is given back in training;
    - buffers that kernels take from elsewhere (oneDNN's scratch, OpenMP stacks); these are in the other two figures.

    Reserved: what malloc holds of the system, free memory included, less what was in use when this meter was made: the
    interpreter and the libraries, 200 MB that no model has to do with. Make it right before the model. It is read at each
    phase's beginning, since glibc keeps no peak. Device: the kernel's own peak of the resident set, everything included.
    Both are of the steps after ``end_tracing``: the profiler's records would be in them.
    """

    def __init__(self) -> None:
        held = allocator_state()
        self._used_before_bytes = held.used_bytes if held else 0
        self._profile: torch.profiler.profile | None = None
        self._baseline_bytes = 0
        self._phases: tuple[PhasePeak, ...] = ()
        self._reserved_bytes: int | None = None

    def start(self, model: torch.nn.Module) -> None:
        import torch

        gc.collect()
        self._baseline_bytes = model_bytes(model)
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def enter(self, phase: str) -> None:
        if self._profile is not None:
            import torch

            with torch.profiler.record_function(_MARK + phase):
                pass
            return
        held = allocator_state()
        if held is not None:
            self._reserved_bytes = max(self._reserved_bytes or 0, held.held_bytes - self._used_before_bytes)

    def end_tracing(self) -> None:
        assert self._profile is not None, "start comes first"
        self._profile.stop()
        allocations, marks = _events(self._profile)
        self._phases = peaks_by_phase(self._baseline_bytes, allocations, marks)
        self._profile = None
        del allocations, marks
        gc.collect()
        _trim()
        reset_resident_peak()

    def stop(self) -> MemoryPeaks:
        if self._profile is not None:
            self.end_tracing()
        return MemoryPeaks(
            phases=self._phases,
            loaded_bytes=self._baseline_bytes,
            reserved_bytes=self._reserved_bytes,
            device_bytes=resident_peak_bytes(),
        )

    def synchronize(self) -> None:
        """The CPU has done what it was given by the time a call returns."""


def _events(profile: torch.profiler.profile) -> tuple[list[Allocation], list[PhaseMark]]:
    # The public way to these events is a Chrome trace, which is these numbers written out as JSON: 11 MB for two steps
    # of a model of 125M, read into 60 MB of objects.
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    allocations, marks = [], []
    for event in results.events():
        name = event.name()
        if name == "[memory]" and event.device_type().name == "CPU":
            allocations.append(Allocation(nanoseconds=event.start_ns(), bytes=event.nbytes()))
        elif name.startswith(_MARK):
            marks.append(PhaseMark(nanoseconds=event.start_ns(), phase=name.removeprefix(_MARK)))
    return allocations, marks


class _MallInfo(ctypes.Structure):
    """``struct mallinfo2`` of malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorState:
    """malloc's memory, all arenas and mapped blocks together."""

    held_bytes: int
    """Taken from the system, in use or not."""
    used_bytes: int


def allocator_state() -> AllocatorState | None:
    """From glibc's ``mallinfo2`` (2.33 or later); ``None`` where the C library does not say (musl, macOS)."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return None
    mallinfo2.restype = _MallInfo
    info = mallinfo2()
    return AllocatorState(held_bytes=info.arena + info.hblkhd, used_bytes=info.uordblks + info.hblkhd)


def _trim() -> None:
    """Gives back what malloc holds unused at the top, such as the profiler's records."""
    if sys.platform.startswith("linux"):
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (AttributeError, OSError):
            return


def reset_resident_peak() -> bool:
    """Starts the kernel's peak of the resident set anew. False where that is not allowed (or not Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_peak_bytes() -> int | None:
    """The most that was resident since ``reset_resident_peak``, or in the process's life where it could not be reset."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        pass
    else:
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
