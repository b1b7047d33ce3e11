"""A model of PyTorch's CUDA caching allocator: the same blocks and segments, without torch and without a device.

``allocated`` counts blocks (requests rounded up, with the slack of blocks that were not split); ``reserved`` counts the
segments that the allocator holds; memory runs out where a segment cannot be had even after the cached ones were given
back. Source: the rules of ``c10/cuda/CUDACachingAllocator.cpp``, checked against recorded traces by
``python -m estimator.allocator TRACE.json.gz``. Not modelled: ``garbage_collection_threshold``, and the private pools of
CUDA graphs. A change proposed to PyTorch in May 2026 breaks ties between free blocks of one size by the age of their segments instead
of by address (pull request 183591); the model keeps the order by address, that of all recorded traces at hand.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence

from estimator.allocator.blocks import (
    ADDRESS_MASK,
    ALLOCATED,
    AWAITING,
    FREE,
    LARGE_SEGMENT_BYTES,
    MIN_BLOCK_BYTES,
    SHIFT,
    SMALL_BYTES,
    STATE_NAMES,
    UNMAPPED,
    Block,
    BlockTable,
    Device,
    LinkedBlock,
    Pool,
    Reservation,
    Segment,
    SimulatedDevice,
    block_pieces,
    round_size,
    segment_size,
)
from estimator.allocator.expandable import ExpandableSegments, grown_size
from estimator.units import GIB


class OutOfMemoryError(RuntimeError):
    """The device has no room for a segment, although every cached segment that was wholly free was given back."""

    def __init__(
        self, *, requested_bytes: int, allocated_bytes: int, reserved_bytes: int, capacity_bytes: int | None
    ) -> None:
        self.requested_bytes = requested_bytes
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes
        self.capacity_bytes = capacity_bytes
        device = "the device" if capacity_bytes is None else f"{capacity_bytes / GIB:.2f} GiB"
        super().__init__(
            f"out of memory: {requested_bytes / GIB:.3f} GiB asked of {device}, "
            f"{allocated_bytes / GIB:.2f} GiB allocated and {reserved_bytes / GIB:.2f} GiB reserved"
        )


class CachingAllocator:
    """Allocations by address, as PyTorch's allocator would place them.

    The counters are plain attributes, so that a caller can draw a timeline by reading them after each event:
    ``allocated_bytes`` (``torch.cuda.memory_allocated``), ``active_bytes`` (with what waits for another stream),
    ``reserved_bytes`` (``memory_reserved``), their peaks since the start or the last ``reset_peaks``, and ``retries``,
    how often the cache was emptied because the device was full.

    capacity_bytes: what the device has left for the allocator; None: without bound.
    max_split_size_bytes: ``max_split_size_mb`` in bytes; blocks from there on are never split.
    roundup_power2_divisions: see ``round_size``.
    device: who hands out memory, in place of a ``SimulatedDevice`` of that capacity.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int | None,
        expandable_segments: bool = False,
        max_split_size_bytes: int | None = None,
        roundup_power2_divisions: Sequence[int] = (),
        device: Device | None = None,
    ) -> None:
        self.allocated_bytes = self.active_bytes = self.reserved_bytes = 0
        self.peak_allocated_bytes = self.peak_active_bytes = self.peak_reserved_bytes = 0
        self.retries = 0
        self._capacity_bytes = capacity_bytes
        self._max_split_bytes = max_split_size_bytes
        self._divisions = tuple(roundup_power2_divisions)
        self._device: Device = SimulatedDevice(capacity_bytes) if device is None else device
        self._small_pools: dict[int, Pool] = {}
        self._large_pools: dict[int, Pool] = {}
        self._table = BlockTable()
        self._blocks = self._table.by_address
        self._awaiting: dict[int, LinkedBlock] = {}
        self._expandable = ExpandableSegments(self._table, self._device, capacity_bytes, self._count_reserved)
        # Then the best fit is the first free block that is large enough, whatever it is a part of.
        self._first_fits = max_split_size_bytes is None
        self._expands = False
        self.expandable_segments = expandable_segments

    @property
    def expandable_segments(self) -> bool:
        """Whether new memory comes from expandable segments; may be changed at any time, as in PyTorch."""
        return self._expands

    @expandable_segments.setter
    def expandable_segments(self, value: bool) -> None:
        self._expands = value
        if value:
            self._first_fits = False

    def malloc(self, size_bytes: int, stream: int = 0) -> int:
        """The address of a block for ``size_bytes`` on ``stream``. Raises OutOfMemoryError."""
        size = round_size(size_bytes, self._divisions)
        small = size <= SMALL_BYTES
        pools = self._small_pools if small else self._large_pools
        pool = pools.get(stream) or self._pool(small, stream)
        index = self._best_fit(pool, size)
        if index is None:
            block = self._new_memory(pool, size, size_bytes)
        else:
            block = self._blocks[pool.free.pop(index) & ADDRESS_MASK]
        remaining = block.size - size
        if remaining and self._splits(small, size, remaining):
            rest = LinkedBlock(block.address + size, remaining, FREE, pool, block.reservation)
            self._table.link_after(block, rest)
            block.size = size
            insort(pool.free, remaining << SHIFT | rest.address)
        block.state = ALLOCATED
        self.allocated_bytes += block.size
        self.active_bytes += block.size
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        if self.active_bytes > self.peak_active_bytes:
            self.peak_active_bytes = self.active_bytes
        return block.address

    def free(self, address: int) -> None:
        """The block at ``address`` can be used again at once."""
        block = self._blocks[address]
        assert block.state == ALLOCATED, f"{address:#x} is not allocated"
        self.allocated_bytes -= block.size
        self.active_bytes -= block.size
        self._table.cache(block)

    def free_later(self, address: int) -> None:
        """No tensor holds the block any more, but another stream still uses it (``record_stream``).

        It no longer counts as allocated, and stays out of the cache until ``complete_free`` or ``empty_cache``.
        """
        block = self._blocks[address]
        assert block.state == ALLOCATED, f"{address:#x} is not allocated"
        block.state = AWAITING
        self._awaiting[address] = block
        self.allocated_bytes -= block.size

    def complete_free(self, address: int) -> None:
        """The other streams are done with a block that ``free_later`` gave up."""
        block = self._awaiting.pop(address)
        self.active_bytes -= block.size
        self._table.cache(block)

    def is_awaiting_free(self, address: int) -> bool:
        """Whether ``free_later`` gave up the block at ``address`` and it is not in the cache yet."""
        return address in self._awaiting

    def empty_cache(self) -> None:
        """Waits for all streams, then gives back wholly free segments, and of expandable segments whole pages."""
        for address in list(self._awaiting):
            self.complete_free(address)
        for pools in (self._large_pools, self._small_pools):
            for _, pool in sorted(pools.items()):
                cached = [self._blocks[key & ADDRESS_MASK] for key in pool.free]
                for block in cached:
                    if block.reservation is None and block.previous is None and block.next is None:
                        self._release(block)
                for block in cached:
                    if block.reservation is not None:
                        self._expandable.unmap(block, block.reservation)

    def has_cached(self, size_bytes: int, stream: int = 0) -> bool:
        """Whether ``malloc`` would be served from the cache."""
        size = round_size(size_bytes, self._divisions)
        return self._best_fit(self._pool(size <= SMALL_BYTES, stream), size) is not None

    def reset_peaks(self) -> None:
        """As ``torch.cuda.reset_peak_memory_stats``."""
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_active_bytes = self.active_bytes
        self.peak_reserved_bytes = self.reserved_bytes

    def snapshot(self) -> tuple[Segment, ...]:
        """Every segment with its blocks, in the order of addresses."""
        segments = []
        for head in sorted(self._blocks.values(), key=lambda block: block.address):
            if head.state == UNMAPPED or (head.previous is not None and head.previous.state != UNMAPPED):
                continue
            blocks = []
            block: LinkedBlock | None = head
            while block is not None and block.state != UNMAPPED:
                blocks.append(Block(address=block.address, size_bytes=block.size, state=STATE_NAMES[block.state]))
                block = block.next
            segments.append(
                Segment(
                    address=head.address,
                    size_bytes=sum(block.size_bytes for block in blocks),
                    stream=head.pool.stream,
                    small=head.pool.small,
                    expandable=head.reservation is not None,
                    blocks=tuple(blocks),
                )
            )
        return tuple(segments)

    def restore(
        self, segments: Iterable[Segment], reservation_starts: Mapping[tuple[int, bool], int] | None = None
    ) -> None:
        """Fills an empty allocator with the segments of a snapshot; its peaks start from there.

        The expandable ranges of one stream and pool become one expandable segment (more if they don't share a grid of
        pages), which starts at the lowest of them or where ``reservation_starts`` says for (stream, small).
        """
        assert not self._blocks, "only an empty allocator can take over a snapshot"
        ranges: dict[tuple[int, bool], list[Segment]] = {}
        for segment in sorted(segments, key=lambda segment: segment.address):
            self.reserved_bytes += segment.size_bytes
            if segment.expandable:
                ranges.setdefault((segment.stream, segment.small), []).append(segment)
            else:
                self._chain(self._pool(segment.small, segment.stream), None, block_pieces(segment))
        for (stream, small), mapped in ranges.items():
            self._first_fits = False
            start = (reservation_starts or {}).get((stream, small), mapped[0].address)
            for reservation, pieces in self._expandable.reservations(small, start, mapped):
                self._chain(self._pool(small, stream), reservation, pieces)
        self.reset_peaks()

    def _chain(self, pool: Pool, reservation: Reservation | None, pieces: list[tuple[int, int, int]]) -> None:
        previous: LinkedBlock | None = None
        start, end = pieces[0][0], pieces[-1][0] + pieces[-1][1]
        used = [(address, size) for address, size, state in pieces if state != UNMAPPED]
        self._device.adopt(start, end - start, sum(used[-1]) - start, sum(size for _, size in used))
        for address, size, state in pieces:
            if not size:
                continue
            block = LinkedBlock(address, size, state, pool, reservation)
            self._blocks[address] = block
            if previous is not None:
                previous.next, block.previous = block, previous
            previous = block
            if state == FREE:
                insort(pool.free, size << SHIFT | address)
            elif state == UNMAPPED:
                insort(pool.unmapped, address)
            else:
                self.active_bytes += size
                if state == ALLOCATED:
                    self.allocated_bytes += size
                else:
                    self._awaiting[address] = block

    def _pool(self, small: bool, stream: int) -> Pool:
        pools = self._small_pools if small else self._large_pools
        pool = pools.get(stream)
        if pool is None:
            pool = pools[stream] = Pool(small, stream)
        return pool

    def _splits(self, small: bool, size: int, remaining: int) -> bool:
        if small or self._expands:
            return remaining >= MIN_BLOCK_BYTES
        return remaining > SMALL_BYTES and (self._max_split_bytes is None or size < self._max_split_bytes)

    def _best_fit(self, pool: Pool, size: int) -> int | None:
        """The index in ``pool.free`` of the smallest block that is large enough, of equals the lowest address."""
        free = pool.free
        index = bisect_left(free, size << SHIFT)
        if index == len(free):
            return None
        if self._first_fits:
            return index
        block = self._blocks[free[index] & ADDRESS_MASK]
        if self._expands:
            # A block at the end of an expandable segment counts as large as it can grow: rather a hole than the end.
            while block.reservation is not None and index + 1 < len(free):
                other = self._blocks[free[index + 1] & ADDRESS_MASK]
                if grown_size(other) >= grown_size(block):
                    break
                index, block = index + 1, other
        elif block.reservation is not None:
            # As PyTorch: once turned off, expandable segments are left alone.
            while block.reservation is not None:
                index += 1
                if index == len(free):
                    return None
                block = self._blocks[free[index] & ADDRESS_MASK]
        limit = self._max_split_bytes
        if limit is not None:
            # An oversize block is not for a small request, nor for one that leaves 20 MiB or more of it unused.
            if size < limit <= block.size:
                return None
            if size >= limit and block.size >= size + LARGE_SEGMENT_BYTES:
                return None
        return index

    def _new_memory(self, pool: Pool, size: int, requested_bytes: int) -> LinkedBlock:
        """A free block, out of the free list, from the driver; gives back cached memory if the device is full."""
        block = self._ask(pool, size)
        if block is None and self._release_oversize(pool, size):
            block = self._ask(pool, size)
        if block is None:
            self.empty_cache()
            self.retries += 1
            block = self._ask(pool, size)
        if block is None:
            raise OutOfMemoryError(
                requested_bytes=requested_bytes,
                allocated_bytes=self.allocated_bytes,
                reserved_bytes=self.reserved_bytes,
                capacity_bytes=self._capacity_bytes,
            )
        return block

    def _ask(self, pool: Pool, size: int) -> LinkedBlock | None:
        if self._expands:
            return self._expandable.expand(pool, size)
        new_bytes = segment_size(size)
        address = self._device.allocate(new_bytes, pool.stream)
        if address is None:
            return None
        self._count_reserved(new_bytes)
        block = self._blocks[address] = LinkedBlock(address, new_bytes, FREE, pool, None)
        return block

    def _count_reserved(self, change: int) -> None:
        self.reserved_bytes += change
        if self.reserved_bytes > self.peak_reserved_bytes:
            self.peak_reserved_bytes = self.reserved_bytes

    def _release(self, block: LinkedBlock) -> None:
        self._table.uncache(block)
        del self._blocks[block.address]
        self._count_reserved(-block.size)
        self._device.release(block.address, block.size)

    def _release_oversize(self, pool: Pool, size: int) -> bool:
        """With a ``max_split_size``: gives back one oversize block that is large enough, or several, largest first.

        False when they don't add up to what is wanted; what was given back stays so.
        """
        limit = self._max_split_bytes
        if limit is None:
            return False
        wanted = max(size, limit)
        index = bisect_left(pool.free, wanted << SHIFT)
        if index < len(pool.free):
            block = self._blocks[pool.free[index] & ADDRESS_MASK]
            if block.reservation is None:
                self._release(block)
                return True
        released = 0
        for key in reversed(pool.free[:index]):
            block = self._blocks[key & ADDRESS_MASK]
            if released >= wanted or block.size < limit:
                break
            if block.reservation is None:
                released += block.size
                self._release(block)
        return released >= wanted
