"""A stream of events through the model of the allocator: peaks, what holds them, and the timeline of the last step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from estimator.allocator import CachingAllocator, OutOfMemoryError
from estimator.dryrun.events import BIRTH, PHASE, Stream
from estimator.dryrun.result import DryHolder, DryPhase, DryRun, TimelinePoint
from estimator.memory import PART_NAMES

_HOLDERS, _TIMELINE_POINTS = 12, 600


class Allocator(Protocol):
    """What the replay needs of an allocator."""

    allocated_bytes: int
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
        self._sizes: list[int] = []

    def malloc(self, size_bytes: int, stream: int = 0) -> int:
        self._sizes.append(size_bytes)
        self.allocated_bytes += size_bytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        self.peak_reserved_bytes = self.peak_allocated_bytes
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
    out_of_memory = None
    for position, event in enumerate(stream.events):
        if event.kind == BIRTH:
            storage = storages[event.index]
            try:
                addresses[event.index] = allocator.malloc(storage.bytes, storage.stream)
            except OutOfMemoryError as error:
                out_of_memory = f"{error}, in {phase}, {storage.holder or 'outside modules'}"
                break
            if allocator.allocated_bytes > peak:
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
    last = max(
        (i for i, e in enumerate(stream.events[: peak_at + 1]) if _starts_step(stream, e.kind, e.index)), default=0
    )
    timeline, categories = _timeline(stream, last, peak_at)
    return DryRun(
        peak_allocated_bytes=peak,
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        peak_phase=peak_phase,
        categories_bytes=_categories(stream, peak_at, peak),
        phases=tuple(DryPhase(phase=name, peak_allocated_bytes=value) for name, value in peaks.items()),
        holders=_holders(stream, peak_at),
        timeline=timeline,
        categories=categories,
        peak_event=peak_at,
        retries=allocator.retries,
        out_of_memory=out_of_memory,
        layers_run=layers_run,
    )


def _starts_step(stream: Stream, kind: int, index: int) -> bool:
    """A forward phase that follows the load or another step (not one more micro-batch)."""
    return kind == PHASE and stream.phases[index] == "forward" and stream.phases[index - 1] in ("load", "between")


def _live(stream: Stream, until: int) -> Iterable[int]:
    live: dict[int, None] = {}
    for event in stream.events[: until + 1]:
        if event.kind == BIRTH:
            live[event.index] = None
        elif event.kind != PHASE:
            del live[event.index]
    return live


def _categories(stream: Stream, at: int, peak: int) -> tuple[tuple[str, int], ...]:
    """By category; what the blocks are larger than the requests is shared out in proportion, so that the sum is the peak."""
    amounts = dict.fromkeys(PART_NAMES, 0)
    for index in _live(stream, at):
        amounts[stream.storages[index].category] += stream.storages[index].bytes
    total = sum(amounts.values())
    slack = peak - total
    shares = {name: amount + slack * amount // total for name, amount in amounts.items() if amount} if total else {}
    if shares:
        largest = max(shares, key=lambda name: shares[name])
        shares[largest] += peak - sum(shares.values())
    return tuple(shares.items())


def _holders(stream: Stream, at: int) -> tuple[DryHolder, ...]:
    held: dict[tuple[str, str], int] = {}
    for index in _live(stream, at):
        storage = stream.storages[index]
        key = (storage.holder, storage.category)
        held[key] = held.get(key, 0) + storage.bytes
    largest = sorted(held.items(), key=lambda item: -item[1])[:_HOLDERS]
    return tuple(DryHolder(module=module, category=category, bytes=size) for (module, category), size in largest)


def _timeline(stream: Stream, start: int, peak_at: int) -> tuple[tuple[TimelinePoint, ...], tuple[str, ...]]:
    """The step of the peak, thinned to some hundred moments of which the peak is one."""
    end = next(
        (i for i in range(peak_at + 1, len(stream.events)) if _starts_step(stream, stream.events[i].kind, stream.events[i].index)),
        len(stream.events),
    )  # fmt: skip
    stride = max(1, (end - start) // _TIMELINE_POINTS)
    categories = tuple(name for name in PART_NAMES if any(s.category == name for s in stream.storages))
    place = {name: i for i, name in enumerate(categories)}
    level, phase, points = [0] * len(categories), "load", []
    for position, event in enumerate(stream.events[:end]):
        if event.kind == PHASE:
            phase = stream.phases[event.index]
        else:
            storage = stream.storages[event.index]
            level[place[storage.category]] += event.kind * storage.bytes
        if position >= start and (position == peak_at or (position - start) % stride == 0):
            points.append(TimelinePoint(event=position, phase=phase, bytes_by_category=tuple(level)))
    return tuple(points), categories
