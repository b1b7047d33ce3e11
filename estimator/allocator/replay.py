"""Replays a recorded allocator trace through the model and says how much of it the model places as PyTorch did.

Of the trace the model is told the requests, the addresses of new segments (when it asks for that size), and the moments
at which the cache was emptied or the device was full; everything else is compared with what it does by itself.
"""

from __future__ import annotations

import json
import sys
from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from estimator.allocator.blocks import Segment
from estimator.allocator.caching import CachingAllocator, OutOfMemoryError
from estimator.allocator.start import device_bytes, initial_segments, reservation_starts, untouched
from estimator.allocator.trace import ADDRESS_LIMIT, BLOCK_ACTIONS, SEGMENT_ACTIONS, Event, Trace, read_trace
from estimator.errors import InputError

_GROWTH = ("segment_alloc", "segment_map")
_SHRINKING = ("segment_free", "segment_unmap")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """What a replay found. Segments are new segments, and new mapped parts of expandable segments."""

    segments_actual: int
    segments_predicted: int
    segments_matched: int
    """Asked for at the same request, in the same size; mapped parts also at the same address."""
    allocations: int
    allocations_at_recorded_address: int
    final_layout_matches: bool
    """Every block at the end: address, size and state."""
    peak_allocated_bytes: int
    peak_reserved_bytes_actual: int
    peak_reserved_bytes_predicted: int


def replay(trace: Trace) -> ReplayResult:
    """Replays from the state in which the recording began. Raises InputError for a contradictory trace.

    A snapshot also shows the segments of other devices and of private pools, and does not tell them apart. Segments that
    no event lies in are part of the state until that contradicts the trace: the model uses one for a request for which
    PyTorch asked the driver, or gives one back that PyTorch kept. Those are left out, and the replay starts again.
    """
    initial = initial_segments(trace)
    suspects = untouched(initial, trace)
    foreign: set[int] = set()
    while True:
        run = _Replay(trace, [segment for segment in initial if segment.address not in foreign], suspects - foreign)
        run.play()
        if not run.contradicted:
            return run.result(foreign)
        foreign |= run.contradicted


class _RecordedDevice:
    """Answers as the recorded device did: with its addresses, and full where the trace shows memory given back."""

    def __init__(self) -> None:
        self.queue: list[Event] = []
        """What the trace says of segments between the last request and the next event."""
        self.out_of_memory = False
        self.asked = 0
        self.matched = 0
        self.released: list[int] = []
        # For memory that PyTorch did not ask for.
        self._next_address = ADDRESS_LIMIT
        # Segments, and expandable segments as far as they were ever mapped and one byte more: there they go on.
        self._held: list[int] = []
        self._ends: dict[int, int] = {}

    def adopt(self, address: int, size_bytes: int, extent_bytes: int, used_bytes: int) -> None:
        self._hold(address, extent_bytes + (extent_bytes < size_bytes))

    def allocate(self, size_bytes: int, stream: int) -> int | None:
        if self._is_full():
            return None
        self.asked += 1
        address = self._invent(size_bytes)
        if self.queue and self.queue[0][:2] == ("segment_alloc", size_bytes) and self.queue[0].stream == stream:
            recorded = self.queue.pop(0).address
            # A model that went astray may still hold what PyTorch gave back there.
            if not self._holds(recorded, size_bytes):
                self.matched += 1
                address = recorded
        self._hold(address, size_bytes)
        return address

    def release(self, address: int, size_bytes: int) -> None:
        self.released.append(address)
        self._held.remove(address)
        self._forget("segment_free", address, size_bytes)

    def reserve(self, size_bytes: int, stream: int) -> int:
        for event in self.queue:
            if event.action == "segment_map" and not self._holds(event.address, event.size + 1):
                self._hold(event.address, 1)
                return event.address
        address = self._invent(size_bytes)
        self._hold(address, 1)
        return address

    def unreserve(self, address: int, size_bytes: int) -> None:
        self._held.remove(address)

    def map(self, address: int, size_bytes: int) -> bool:
        if self._is_full():
            return False
        self.asked += 1
        if self.queue and self.queue[0][:3] == ("segment_map", size_bytes, address):
            self.matched += 1
            del self.queue[0]
        index = bisect_right(self._held, address) - 1
        end = address + size_bytes
        if index + 1 < len(self._held) and self._held[index + 1] <= end:
            raise InputError(f"events: an expandable segment grows into another at address {self._held[index + 1]}")
        start = self._held[index]
        self._ends[start] = max(self._ends[start], end + 1)
        return True

    def unmap(self, address: int, size_bytes: int) -> None:
        self._forget("segment_unmap", address, size_bytes)

    def _is_full(self) -> bool:
        return self.queue[0].action in _SHRINKING if self.queue else self.out_of_memory

    def _forget(self, action: str, address: int, size_bytes: int) -> None:
        for i, event in enumerate(self.queue):
            if event.action not in _SHRINKING:
                return
            if event[:3] == (action, size_bytes, address):
                del self.queue[i]
                return

    def _invent(self, size_bytes: int) -> int:
        self._next_address += size_bytes
        return self._next_address - size_bytes

    def _hold(self, address: int, size_bytes: int) -> None:
        insort(self._held, address)
        self._ends[address] = address + size_bytes

    def _holds(self, address: int, size_bytes: int) -> bool:
        index = bisect_left(self._held, address + size_bytes) - 1
        return index >= 0 and self._ends[self._held[index]] > address


class _Replay:
    def __init__(self, trace: Trace, initial: Sequence[Segment], suspects: Collection[int]) -> None:
        self._trace = trace
        self._suspects = sorted(suspects)
        self._ends = {segment.address: segment.address + segment.size_bytes for segment in initial}
        self._reserved_at_start = sum(segment.size_bytes for segment in initial)
        self._device = _RecordedDevice()
        self._allocator = CachingAllocator(
            capacity_bytes=device_bytes(trace, initial),
            expandable_segments=trace.expandable_segments,
            max_split_size_bytes=trace.max_split_size_bytes,
            roundup_power2_divisions=trace.roundup_power2_divisions,
            device=self._device,
        )
        self._allocator.restore(initial, reservation_starts(trace, initial))
        self._placed = {
            block.address: block.address for segment in initial for block in segment.blocks if block.state != "inactive"
        }
        """The model's address of the block now at a recorded address."""
        self._at_recorded_address = 0
        self._waiting: list[int] = []
        """The model's addresses of blocks whose free was completed since the last request or free."""
        self.contradicted: set[int] = set()

    def play(self) -> None:
        events = self._trace.events
        for i, event in enumerate(events):
            if event.action in SEGMENT_ACTIONS:
                self._device.queue.append(event)
            elif event.action == "free_completed" and not _completes_at_once(events, i):
                self._waiting.append(self._placed.pop(event.address))
            elif event.action in BLOCK_ACTIONS or event.action == "oom":
                self._settle(event)
                self._step(event)
        self._settle(None)

    def result(self, foreign: Collection[int]) -> ReplayResult:
        actual = peak = self._reserved_at_start
        for event in self._trace.events:
            if event.action in _GROWTH:
                actual += event.size
                peak = max(peak, actual)
            elif event.action in _SHRINKING:
                actual -= event.size
        final = tuple(segment for segment in self._trace.final_segments if segment.address not in foreign)
        return ReplayResult(
            segments_actual=sum(event.action in _GROWTH for event in self._trace.events),
            segments_predicted=self._device.asked,
            segments_matched=self._device.matched,
            allocations=sum(event.action == "alloc" for event in self._trace.events),
            allocations_at_recorded_address=self._at_recorded_address,
            final_layout_matches=self._allocator.snapshot() == final,
            peak_allocated_bytes=self._allocator.peak_allocated_bytes,
            peak_reserved_bytes_actual=peak,
            peak_reserved_bytes_predicted=self._allocator.peak_reserved_bytes,
        )

    def _settle(self, event: Event | None) -> None:
        """Before ``event``: completes frees, and empties the cache where that was not part of a request on a full device."""
        queue = self._device.queue
        if not any(recorded.action in _SHRINKING for recorded in queue):
            for address in self._waiting:
                self._complete(address)
            self._waiting.clear()
        elif event is None or event.action not in ("alloc", "oom") or self._emptied_before(event):
            # Completes all frees by itself, as PyTorch does; the trace shows those just before the segments.
            self._empty_cache()
            self._waiting.clear()

    def _emptied_before(self, event: Event) -> bool:
        """Whether the cache was emptied by the program rather than by this request, when the device was full.

        A request empties it only after it found nothing in it, and then asks the driver again.
        """
        if event.action == "oom" or self._device.queue[0].action not in _SHRINKING:
            return False
        asked_again = any(recorded.action in _GROWTH for recorded in self._device.queue)
        return not asked_again or self._allocator.has_cached(event.size, event.stream)

    def _step(self, event: Event) -> None:
        if event.action == "alloc":
            self._allocate(event)
        elif event.action == "free_requested":
            self._allocator.free_later(self._placed[event.address])
        elif event.action == "free_completed":
            self._complete(self._placed.pop(event.address))
        elif event.action == "oom":
            self._fail(event)
        self._device.queue.clear()
        # A request on a full device that got by without waiting for all streams leaves some of these.
        for address in self._waiting:
            self._complete(address)
        self._waiting.clear()

    def _allocate(self, event: Event) -> None:
        queue, allocator = self._device.queue, self._allocator
        growth = next((recorded.action for recorded in queue if recorded.action in _GROWTH), None)
        if growth is not None:
            # A program may switch expandable segments on and off.
            allocator.expandable_segments = growth == "segment_map"
        asks = bool(queue) and queue[0].action in _GROWTH
        self._device.released.clear()
        try:
            address = allocator.malloc(event.size, event.stream)
        except OutOfMemoryError:
            # The model has not given back all that the trace shows, and would see a full device for ever.
            queue[:] = [recorded for recorded in queue if recorded.action in _GROWTH]
            address = allocator.malloc(event.size, event.stream)
        self._contradict(self._device.released)
        if asks:
            self._contradict([address])
        self._at_recorded_address += address == event.address
        self._placed[event.address] = address

    def _fail(self, event: Event) -> None:
        self._device.out_of_memory = True
        self._device.released.clear()
        try:
            # PyTorch records the rounded size, which rounds to itself.
            address = self._allocator.malloc(event.size, event.stream)
        except OutOfMemoryError:
            self._contradict(self._device.released)
        else:
            self._contradict([address])
            self._allocator.free(address)
        self._device.out_of_memory = False

    def _empty_cache(self) -> None:
        self._device.released.clear()
        self._allocator.empty_cache()
        self._contradict(self._device.released)
        queue = self._device.queue
        queue[:] = [recorded for recorded in queue if recorded.action in _GROWTH]

    def _complete(self, address: int) -> None:
        # The model has already done so where it emptied the cache.
        if self._allocator.is_awaiting_free(address):
            self._allocator.complete_free(address)

    def _contradict(self, addresses: Sequence[int]) -> None:
        for address in addresses:
            index = bisect_right(self._suspects, address) - 1
            if index >= 0 and address < self._ends[self._suspects[index]]:
                self.contradicted.add(self._suspects[index])


def _completes_at_once(events: Sequence[Event], i: int) -> bool:
    return i > 0 and events[i - 1].action == "free_requested" and events[i - 1].address == events[i].address


def main(arguments: Sequence[str]) -> int:
    """``python -m estimator.allocator TRACE.json.gz``: prints the result as JSON. Returns the exit code."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m estimator.allocator TRACE.json.gz", file=sys.stderr)
        return 2
    try:
        result = replay(read_trace(Path(arguments[0])))
    except InputError as error:
        print(f"error: {arguments[0]}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(result)))
    return 0
