"""Expandable segments: ranges of virtual addresses that grow by pages of physical memory, one per stream and pool."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator, Sequence

from estimator.allocator.blocks import (
    FREE,
    LARGE_SEGMENT_BYTES,
    SHIFT,
    SMALL_SEGMENT_BYTES,
    UNMAPPED,
    BlockTable,
    Device,
    LinkedBlock,
    Pool,
    Reservation,
    Segment,
    block_pieces,
)

_UNBOUNDED_PAGES = 2**20


def grown_size(block: LinkedBlock) -> int:
    """What a cached block can grow to by mapping what follows it."""
    following = block.next
    return block.size + (following.size if following is not None and following.state == UNMAPPED else 0)


class ExpandableSegments:
    """Maps and unmaps pages. ``count_reserved`` is told the bytes that were mapped, negative for unmapped."""

    def __init__(
        self, table: BlockTable, device: Device, capacity_bytes: int | None, count_reserved: Callable[[int], None]
    ) -> None:
        self._table = table
        self._device = device
        self._capacity_bytes = capacity_bytes
        self._count_reserved = count_reserved

    def expand(self, pool: Pool, size: int) -> LinkedBlock | None:
        """A free block of at least ``size``, out of the free list, at the lowest address that has room for it.

        Only what is missing is mapped. None when the device is full; what was mapped until then stays cached.
        """
        block = self._lowest_with_room(pool, size)
        if block.state == UNMAPPED:
            mapped = self._map(block, min(block.size, size))
            if mapped is None:
                return None
            block = mapped
        while block.size < size:
            following = block.next
            assert following is not None and following.state == UNMAPPED
            mapped = self._map(following, min(size - block.size, following.size))
            if mapped is None:
                return None
            block = mapped
        self._table.uncache(block)
        return block

    def reservations(
        self, small: bool, start: int, mapped: Sequence[Segment]
    ) -> Iterator[tuple[Reservation, list[tuple[int, int, int]]]]:
        """The expandable segments that ``mapped`` (one pool's, by address) are parts of; the lowest begins at ``start``.

        Each with (address, size, state) of its blocks and of what is unmapped between and above them.
        """
        reservation, parts = Reservation(start, page_bytes(small)), list[Segment]()
        for segment in mapped:
            if reservation.page_ceil(segment.address) != segment.address:
                if parts:
                    yield reservation, self._pieces(reservation, small, parts)
                reservation, parts = Reservation(segment.address, page_bytes(small)), []
            parts.append(segment)
        yield reservation, self._pieces(reservation, small, parts)

    def _pieces(self, reservation: Reservation, small: bool, parts: Sequence[Segment]) -> list[tuple[int, int, int]]:
        pieces: list[tuple[int, int, int]] = []
        position = reservation.start
        for segment in parts:
            pieces.append((position, segment.address - position, UNMAPPED))
            pieces.extend(block_pieces(segment))
            position = segment.address + segment.size_bytes
        end = reservation.start + self._reservation_bytes(small)
        pieces.append((position, max(end - position, 0), UNMAPPED))
        return pieces

    def _reservation_bytes(self, small: bool) -> int:
        # 9/8 of the device, as PyTorch reserves. Without a bound: far more than any request, so that the unmapped end
        # is never the best fit.
        page = page_bytes(small)
        if self._capacity_bytes is None:
            return page * _UNBOUNDED_PAGES
        return -(-(self._capacity_bytes * 9 // 8) // page) * page

    def unmap(self, block: LinkedBlock, reservation: Reservation) -> None:
        """Gives back the whole pages inside a cached block; a segment without any page is given up."""
        start = reservation.page_ceil(block.address)
        end = reservation.page_floor(block.address + block.size)
        if start >= end:
            return
        table, pool = self._table, block.pool
        table.uncache(block)
        after = block.address + block.size - end
        if after:
            table.link_after(block, LinkedBlock(end, after, FREE, pool, reservation))
            insort(pool.free, after << SHIFT | end)
        before = start - block.address
        if before:
            insort(pool.free, before << SHIFT | block.address)
            block.size = before
            middle = LinkedBlock(start, end - start, UNMAPPED, pool, reservation)
            table.link_after(block, middle)
            block = middle
        block.size = end - start
        block.state = UNMAPPED
        self._count_reserved(-block.size)
        self._device.unmap(start, block.size)
        self._merge_unmapped(block)

    def _merge_unmapped(self, block: LinkedBlock) -> None:
        table, pool = self._table, block.pool
        previous, following = block.previous, block.next
        if following is not None and following.state == UNMAPPED:
            pool.unmapped.remove(following.address)
            table.absorb_next(block)
        if previous is not None and previous.state == UNMAPPED:
            table.absorb_next(previous)
            block = previous
        else:
            insort(pool.unmapped, block.address)
        if block.previous is None and block.next is None:
            pool.unmapped.remove(block.address)
            del table.by_address[block.address]
            self._device.unreserve(block.address, block.size)

    def _lowest_with_room(self, pool: Pool, size: int) -> LinkedBlock:
        blocks = self._table.by_address
        for address in pool.unmapped:
            first = blocks[address]
            if first.previous is not None and first.previous.state == FREE:
                first = first.previous
            room = 0
            block: LinkedBlock | None = first
            while room < size and block is not None and block.state in (FREE, UNMAPPED):
                room += block.size
                block = block.next
            if room >= size:
                return first
        # A request beyond 9/8 of the device fails when it is mapped.
        reserved = max(self._reservation_bytes(pool.small), -(-size // page_bytes(pool.small)) * page_bytes(pool.small))
        reservation = Reservation(self._device.reserve(reserved, pool.stream), page_bytes(pool.small))
        new = LinkedBlock(reservation.start, reserved, UNMAPPED, pool, reservation)
        blocks[new.address] = new
        insort(pool.unmapped, new.address)
        return new

    def _map(self, block: LinkedBlock, size: int) -> LinkedBlock | None:
        """Maps the pages of ``size`` bytes at the start of an unmapped block; returns the cached block they join."""
        reservation, unmapped = block.reservation, block.pool.unmapped
        assert reservation is not None and block.state == UNMAPPED
        mapped = reservation.page_ceil(block.address + size) - block.address
        if not self._device.map(block.address, mapped):
            return None
        unmapped.remove(block.address)
        if mapped < block.size:
            rest = LinkedBlock(block.address + mapped, block.size - mapped, UNMAPPED, block.pool, reservation)
            self._table.link_after(block, rest)
            block.size = mapped
            insort(unmapped, rest.address)
        self._count_reserved(mapped)
        return self._table.cache(block)


def page_bytes(small: bool) -> int:
    """The unit in which a pool's expandable segments are mapped."""
    return SMALL_SEGMENT_BYTES if small else LARGE_SEGMENT_BYTES
