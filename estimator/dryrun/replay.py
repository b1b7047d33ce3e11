"""A stream of events through the model of the allocator: peaks, what holds them, and the timeline of the last step."""

from __future__ import annotations

from typing import Protocol

from estimator.allocator import CachingAllocator, OutOfMemoryError
from estimator.dryrun.events import BIRTH, PHASE, Stream
from estimator.dryrun.result import DryPhase, DryRun
from estimator.dryrun.timeline import by_category, holders, live_at, timeline


class Allocator(Protocol):
    """What the replay needs of an allocator."""

    allocated_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    retries: int

    def malloc(self, size_bytes: int, stream: int = 0) -> int: ...
    def free(self, address: int) -> None: ...
    def empty_cache(self) -> None: ...


class ExactAllocator:
    """Memory by the byte, as torch's profiler counts it on a CPU: nothing is rounded, nothing is cached."""

    def __init__(self) -> None:
        self.allocated_bytes = self.peak_allocated_bytes = self.peak_reserved_bytes = self.retries = 0
        self.reserved_bytes = 0
        self._sizes: list[int] = []

    def malloc(self, size_bytes: int, stream: int = 0) -> int:
        self._sizes.append(size_bytes)
        self.allocated_bytes += size_bytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        self.reserved_bytes = self.peak_reserved_bytes = self.peak_allocated_bytes
        return len(self._sizes) - 1

    def free(self, address: int) -> None:
        self.allocated_bytes -= self._sizes[address]

    def empty_cache(self) -> None:
        """Nothing is cached."""


def replay(
    stream: Stream,
    *,
    cuda: bool,
    capacity_bytes: int | None,
    expandable_segments: bool,
    empties_cache: bool,
    layers_run: int,
) -> DryRun:
    """Every birth a ``malloc``, every death a ``free``.

    empties_cache: whether the loop gives cached memory back as each step ends.
    """
    allocator: Allocator = (
        CachingAllocator(capacity_bytes=capacity_bytes, expandable_segments=expandable_segments)
        if cuda
        else ExactAllocator()
    )
    storages, addresses = stream.storages, dict[int, int]()
    phase, peaks = "load", dict[str, int]()
    peak, peak_at, peak_phase = 0, 0, "load"
    out_of_memory, until = None, len(stream.events)
    blocks = [0] * len(storages)
    reserved: list[tuple[int, int]] = [(0, 0)]
    for position, event in enumerate(stream.events):
        if event.kind == BIRTH:
            storage, before = storages[event.index], allocator.allocated_bytes
            try:
                addresses[event.index] = allocator.malloc(storage.bytes, storage.stream)
            except OutOfMemoryError as error:
                out_of_memory = f"{error}, in {phase}, {storage.holder or 'outside modules'}"
                until = position
                break
            blocks[event.index] = allocator.allocated_bytes - before
            # The last of equal peaks: that of the step in which every state exists already.
            if allocator.allocated_bytes >= peak:
                peak, peak_at, peak_phase = allocator.allocated_bytes, position, phase
            if allocator.allocated_bytes > peaks.get(phase, 0):
                peaks[phase] = allocator.allocated_bytes
        elif event.kind == PHASE:
            phase = stream.phases[event.index]
            peaks[phase] = max(peaks.get(phase, 0), allocator.allocated_bytes)
            if phase == "between" and empties_cache:
                allocator.empty_cache()
        else:
            allocator.free(addresses.pop(event.index))
        if allocator.reserved_bytes != reserved[-1][1]:
            reserved.append((position, allocator.reserved_bytes))
    points, categories = timeline(stream, blocks, reserved, peak_at=peak_at, until=until)
    live = live_at(stream, peak_at)
    return DryRun(
        peak_allocated_bytes=peak,
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        peak_phase=peak_phase,
        categories_bytes=by_category(stream, live, blocks),
        phases=tuple(DryPhase(phase=name, peak_allocated_bytes=value) for name, value in peaks.items()),
        holders=holders(stream, live, blocks),
        timeline=points,
        categories=categories,
        peak_event=peak_at,
        retries=allocator.retries,
        out_of_memory=out_of_memory,
        layers_run=layers_run,
        reference_code=tuple(sorted(stream.packages)),
    )
