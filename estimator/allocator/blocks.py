"""The parts of the allocator model: rounding, blocks and their free lists, and the device that hands out memory."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from estimator.units import MIB

MIN_BLOCK_BYTES = 512
SMALL_BYTES = MIB
"""The largest block, after rounding, that comes from the small pool."""
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
_MIN_OWN_SEGMENT_BYTES = 10 * MIB
_ROUND_SEGMENT_BYTES = 2 * MIB

# A free list is a sorted list of integers, size in the high bits and address in the low: the order of best fit.
SHIFT = 64
ADDRESS_MASK = (1 << SHIFT) - 1

BlockState = Literal["active_allocated", "active_awaiting_free", "inactive"]
FREE, ALLOCATED, AWAITING, UNMAPPED = range(4)
STATE_NAMES: dict[int, BlockState] = {
    FREE: "inactive",
    ALLOCATED: "active_allocated",
    AWAITING: "active_awaiting_free",
}
_STATE_CODES = {name: code for code, name in STATE_NAMES.items()}


def round_size(requested_bytes: int, divisions: Sequence[int] = ()) -> int:
    """The block that a request needs, in bytes: a multiple of 512, at least 512.

    ``divisions``: ``roundup_power2_divisions``, one for each power of two from 1 MiB on, the last for all above; a
    request larger than 512 times its division is rounded up to the next division of its power of two.
    """
    if requested_bytes <= MIN_BLOCK_BYTES:
        return MIN_BLOCK_BYTES
    if divisions:
        power = requested_bytes.bit_length() - 1
        count = divisions[min(max(power - 20, 0), len(divisions) - 1)]
        if count > 1 and requested_bytes > MIN_BLOCK_BYTES * count:
            step = (1 << power) >> (count.bit_length() - 1)
            return -(-requested_bytes // step) * step
    return (requested_bytes + MIN_BLOCK_BYTES - 1) & -MIN_BLOCK_BYTES


def segment_size(block_bytes: int) -> int:
    """The (not expandable) segment asked of the driver for a block, in bytes, when no cached block fits."""
    if block_bytes <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if block_bytes < _MIN_OWN_SEGMENT_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-block_bytes // _ROUND_SEGMENT_BYTES) * _ROUND_SEGMENT_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A part of a segment."""

    address: int
    size_bytes: int
    state: BlockState


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Memory had from the driver: one segment, or of an expandable segment one contiguous mapped range."""

    address: int
    size_bytes: int
    stream: int
    small: bool
    expandable: bool
    blocks: tuple[Block, ...]
    """In the order of addresses, without gaps."""


def block_pieces(segment: Segment) -> list[tuple[int, int, int]]:
    """(address, size, state code) of each block."""
    return [(block.address, block.size_bytes, _STATE_CODES[block.state]) for block in segment.blocks]


class Device(Protocol):
    """What the allocator asks of the driver."""

    def adopt(self, address: int, size_bytes: int, extent_bytes: int, used_bytes: int) -> None:
        """The allocator took over addresses had before, backed up to an extent, with so much memory in all."""

    def allocate(self, size_bytes: int, stream: int) -> int | None:
        """The address of a new segment, or None when the device is full."""

    def release(self, address: int, size_bytes: int) -> None:
        """A segment is given back."""

    def reserve(self, size_bytes: int, stream: int) -> int:
        """The address of a range of virtual addresses, for an expandable segment."""

    def unreserve(self, address: int, size_bytes: int) -> None:
        """Such a range, with no memory behind it, is given up."""

    def map(self, address: int, size_bytes: int) -> bool:
        """Backs a part of such a range by memory; False when the device is full."""

    def unmap(self, address: int, size_bytes: int) -> None:
        """That memory is given back."""


class SimulatedDevice:
    """A device of ``capacity_bytes`` (None: without bound) that hands out rising addresses."""

    def __init__(self, capacity_bytes: int | None) -> None:
        self._capacity_bytes = capacity_bytes
        self._used_bytes = 0
        self._next_address = 0x7000_0000_0000

    def adopt(self, address: int, size_bytes: int, extent_bytes: int, used_bytes: int) -> None:
        self._used_bytes += used_bytes
        self._next_address = max(self._next_address, address + size_bytes)

    def allocate(self, size_bytes: int, stream: int) -> int | None:
        return self.reserve(size_bytes, stream) if self.map(self._next_address, size_bytes) else None

    def release(self, address: int, size_bytes: int) -> None:
        self._used_bytes -= size_bytes

    def reserve(self, size_bytes: int, stream: int) -> int:
        address = self._next_address
        self._next_address += size_bytes
        return address

    def unreserve(self, address: int, size_bytes: int) -> None:
        """Addresses are never used twice."""

    def map(self, address: int, size_bytes: int) -> bool:
        if self._capacity_bytes is not None and self._used_bytes + size_bytes > self._capacity_bytes:
            return False
        self._used_bytes += size_bytes
        return True

    def unmap(self, address: int, size_bytes: int) -> None:
        self._used_bytes -= size_bytes


class Pool:
    """The cached blocks of one size class on one stream."""

    __slots__ = ("free", "small", "stream", "unmapped")

    def __init__(self, small: bool, stream: int) -> None:
        self.small = small
        self.stream = stream
        self.free: list[int] = []
        self.unmapped: list[int] = []
        """Sorted addresses of the parts of expandable segments that no memory backs."""


class Reservation:
    """The virtual addresses of an expandable segment, mapped in whole pages."""

    __slots__ = ("page_bytes", "start")

    def __init__(self, start: int, page_bytes: int) -> None:
        self.start = start
        self.page_bytes = page_bytes

    def page_floor(self, address: int) -> int:
        return address - (address - self.start) % self.page_bytes

    def page_ceil(self, address: int) -> int:
        return address + (self.start - address) % self.page_bytes


class LinkedBlock:
    """A block while the allocator works on it: linked to its neighbours in the segment."""

    __slots__ = ("address", "next", "pool", "previous", "reservation", "size", "state")

    def __init__(self, address: int, size: int, state: int, pool: Pool, reservation: Reservation | None) -> None:
        self.address = address
        self.size = size
        self.state = state
        self.pool = pool
        self.reservation = reservation
        self.previous: LinkedBlock | None = None
        self.next: LinkedBlock | None = None


class BlockTable:
    """Every block by its address, and the operations on neighbours and free lists."""

    __slots__ = ("by_address",)

    def __init__(self) -> None:
        self.by_address: dict[int, LinkedBlock] = {}

    def link_after(self, block: LinkedBlock, new: LinkedBlock) -> None:
        following = block.next
        new.previous, new.next, block.next = block, following, new
        if following is not None:
            following.previous = new
        self.by_address[new.address] = new

    def absorb_next(self, block: LinkedBlock) -> None:
        absorbed = block.next
        assert absorbed is not None
        following = absorbed.next
        block.size += absorbed.size
        block.next = following
        if following is not None:
            following.previous = block
        del self.by_address[absorbed.address]

    def cache(self, block: LinkedBlock) -> LinkedBlock:
        """Puts a block into its free list, merged with free neighbours; returns what it became part of."""
        free = block.pool.free
        previous = block.previous
        if previous is not None and previous.state == FREE:
            del free[bisect_left(free, previous.size << SHIFT | previous.address)]
            self.absorb_next(previous)
            block = previous
        following = block.next
        if following is not None and following.state == FREE:
            del free[bisect_left(free, following.size << SHIFT | following.address)]
            self.absorb_next(block)
        block.state = FREE
        insort(free, block.size << SHIFT | block.address)
        return block

    def uncache(self, block: LinkedBlock) -> None:
        free = block.pool.free
        del free[bisect_left(free, block.size << SHIFT | block.address)]
