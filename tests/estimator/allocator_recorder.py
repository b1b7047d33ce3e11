"""Records what the allocator model does in the format of the evidence's traces, as PyTorch's memory history would."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

from estimator.allocator import CachingAllocator
from estimator.allocator_blocks import Device, Segment, round_size
from estimator.units import MIB

_SLOT_BYTES = 2**46


class ScatteringDevice(Device):
    """Hands out addresses in no order, as drivers do, and writes down what it is asked for."""

    def __init__(self, capacity_bytes: int | None, events: list[list[Any]], seed: int) -> None:
        self._free_bytes = 2**60 if capacity_bytes is None else capacity_bytes
        self._events = events
        self._slots = list(range(1, 4000))
        random.Random(seed).shuffle(self._slots)
        self._streams: dict[int, int] = {}

    def allocate(self, size_bytes: int, stream: int) -> int | None:
        address = self.reserve(size_bytes, stream)
        return address if self._take("segment_alloc", size_bytes, address) else None

    def release(self, address: int, size_bytes: int) -> None:
        self._give_back("segment_free", size_bytes, address)

    def reserve(self, size_bytes: int, stream: int) -> int:
        slot = self._slots.pop()
        self._streams[slot] = stream
        return slot * _SLOT_BYTES

    def unreserve(self, address: int, size_bytes: int) -> None:
        del self._streams[address // _SLOT_BYTES]

    def map(self, address: int, size_bytes: int) -> bool:
        return self._take("segment_map", size_bytes, address)

    def unmap(self, address: int, size_bytes: int) -> None:
        self._give_back("segment_unmap", size_bytes, address)

    def _take(self, action: str, size_bytes: int, address: int) -> bool:
        if size_bytes > self._free_bytes:
            return False
        self._free_bytes -= size_bytes
        self._events.append([action, size_bytes, address, self._streams[address // _SLOT_BYTES]])
        return True

    def _give_back(self, action: str, size_bytes: int, address: int) -> None:
        self._free_bytes += size_bytes
        self._events.append([action, size_bytes, address, self._streams[address // _SLOT_BYTES]])


class RecordedAllocator(CachingAllocator):
    """An allocator whose ``events`` are its history."""

    def __init__(self, *, capacity_bytes: int | None, seed: int = 0, **settings: Any) -> None:
        self.events: list[list[Any]] = []
        self.settings = settings
        self._sizes: dict[int, tuple[int, int]] = {}
        device = ScatteringDevice(capacity_bytes, self.events, seed)
        super().__init__(capacity_bytes=capacity_bytes, device=device, **settings)

    def malloc(self, size_bytes: int, stream: int = 0) -> int:
        address = super().malloc(size_bytes, stream)
        self._sizes[address] = size_bytes, stream
        self.events.append(["alloc", size_bytes, address, stream])
        return address

    def free(self, address: int) -> None:
        self.free_later(address)
        self.complete_free(address)

    def free_later(self, address: int) -> None:
        size, stream = self._sizes[address]
        self.events.append(["free_requested", size, address, stream])
        super().free_later(address)

    def complete_free(self, address: int) -> None:
        size, stream = self._sizes[address]
        self.events.append(["free_completed", size, address, stream])
        super().complete_free(address)

    def document(self, since: int = 0) -> dict[str, Any]:
        """The trace from event number ``since`` on."""
        split = self.settings.get("max_split_size_bytes")
        return {
            "settings": {
                "expandable_segments": self.expandable_segments,
                "max_split_size": -1 if split is None else split,
            },
            "events": self.events[since:],
            "final_segments": [segment_record(segment) for segment in self.snapshot()],
        }


def segment_record(segment: Segment) -> dict[str, Any]:
    return {
        "address": segment.address,
        "total_size": segment.size_bytes,
        "stream": segment.stream,
        "segment_type": "small" if segment.small else "large",
        "is_expandable": segment.expandable,
        "blocks": [[block.address, block.size_bytes, block.size_bytes, block.state] for block in segment.blocks],
    }


def write_trace(path: Path, document: object) -> Path:
    path.write_bytes(gzip.compress(json.dumps(document).encode()))
    return path


def train_at_random(allocator: RecordedAllocator, seed: int, steps: int, streams: int = 2) -> None:
    """Requests and frees of sizes that models have, on several streams, with the cache emptied now and then."""
    from estimator.allocator import OutOfMemoryError

    draw = random.Random(seed)
    live: list[int] = []
    for _ in range(steps):
        action = draw.random()
        if action < 0.5 or not live:
            size = draw.choice([100, 512, 5000, 200_000, MIB, MIB + 1, 3 * MIB, 9 * MIB, 11 * MIB, 30 * MIB, 45 * MIB])
            stream = draw.randrange(streams)
            try:
                live.append(allocator.malloc(size + draw.randrange(3) * 70_000, stream))
            except OutOfMemoryError as error:
                free = (error.capacity_bytes or 0) - error.reserved_bytes
                allocator.events.append(["oom", round_size(error.requested_bytes), free, stream])
        elif action < 0.88:
            allocator.free(live.pop(draw.randrange(len(live))))
        elif action < 0.95:
            allocator.free_later(live.pop(draw.randrange(len(live))))
        elif action < 0.99:
            waiting = [address for address in allocator._sizes if allocator.is_awaiting_free(address)]
            if waiting:
                allocator.complete_free(draw.choice(waiting))
        else:
            allocator.empty_cache()
