"""What holds for any sequence of requests, and agreement with a plain restatement of the documented rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.allocator import CachingAllocator, OutOfMemoryError
from estimator.units import KIB, MIB

SIZES = st.one_of(
    st.integers(1, 4 * KIB),
    st.integers(1, 2 * MIB),
    st.integers(MIB, 24 * MIB),
    st.sampled_from([MIB, 10 * MIB, 20 * MIB]),
)
STREAMS = st.integers(0, 2)
# A request and its stream, or the index of what is freed, or None: the cache is emptied.
STEPS = st.lists(st.one_of(st.tuples(SIZES, STREAMS), st.integers(0, 50), st.none()), max_size=120)


def run(allocator: CachingAllocator, steps: list[tuple[int, int] | int | None]) -> list[int]:
    """What is live at the end."""
    live: list[int] = []
    for step in steps:
        if step is None:
            allocator.empty_cache()
        elif isinstance(step, int):
            if live:
                allocator.free(live.pop(step % len(live)))
        else:
            try:
                live.append(allocator.malloc(*step))
            except OutOfMemoryError:
                continue
        check(allocator, live)
    return live


def check(allocator: CachingAllocator, live: list[int]) -> None:
    segments = allocator.snapshot()
    assert allocator.allocated_bytes <= allocator.reserved_bytes <= allocator.peak_reserved_bytes
    assert allocator.reserved_bytes == sum(segment.size_bytes for segment in segments)
    for below, above in pairwise(segments):
        assert below.address + below.size_bytes <= above.address
    used = []
    for segment in segments:
        position = segment.address
        for block in segment.blocks:
            assert block.address == position
            assert block.size_bytes > 0
            position += block.size_bytes
        assert position == segment.address + segment.size_bytes
        for first, second in pairwise(segment.blocks):
            assert "inactive" not in (first.state, second.state) or first.state != second.state
        used += [block for block in segment.blocks if block.state != "inactive"]
    assert sorted(live) == [block.address for block in used]
    assert allocator.allocated_bytes == sum(block.size_bytes for block in used)


@pytest.mark.parametrize("expandable", [False, True], ids=["plain", "expandable"])
@given(steps=STEPS, capacity=st.sampled_from([None, 60 * MIB, 200 * MIB]))
@settings(max_examples=60, deadline=None)
def test_blocks_tile_their_segments_and_everything_can_be_given_back(
    expandable: bool, steps: list[tuple[int, int] | int | None], capacity: int | None
) -> None:
    allocator = CachingAllocator(capacity_bytes=capacity, expandable_segments=expandable)
    for address in run(allocator, steps):
        allocator.free(address)
    assert allocator.allocated_bytes == 0
    if not expandable:
        assert all(len(segment.blocks) == 1 for segment in allocator.snapshot()), "a free segment is one block again"
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0
    assert allocator.snapshot() == ()
    assert capacity is None or allocator.peak_reserved_bytes <= capacity


@given(steps=STEPS, split=st.sampled_from([21 * MIB, 30 * MIB]))
@settings(max_examples=40, deadline=None)
def test_with_a_max_split_size_blocks_tile_their_segments_too(
    steps: list[tuple[int, int] | int | None], split: int
) -> None:
    run(CachingAllocator(capacity_bytes=100 * MIB, max_split_size_bytes=split), steps)


@dataclass
class Piece:
    offset: int
    size: int
    free: bool = True


@dataclass
class Restated:
    """The rules in the words of PyTorch's comments, by looking at every block each time."""

    segments: list[tuple[int, bool, list[Piece]]] = field(default_factory=list)

    def malloc(self, size: int, stream: int) -> tuple[int, int]:
        size = max(512, -(-size // 512) * 512)
        small = size <= MIB
        fits = [
            (piece.size, i, piece.offset)
            for i, (of_stream, of_small, pieces) in enumerate(self.segments)
            for piece in pieces
            if piece.free and piece.size >= size and (of_stream, of_small) == (stream, small)
        ]
        if fits:
            _, i, offset = min(fits)
        else:
            total = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            self.segments.append((stream, small, [Piece(0, total)]))
            i, offset = len(self.segments) - 1, 0
        pieces = self.segments[i][2]
        at = next(k for k, piece in enumerate(pieces) if piece.offset == offset)
        rest = pieces[at].size - size
        if rest >= 512 if small else rest > MIB:
            pieces[at : at + 1] = [Piece(offset, size), Piece(offset + size, rest)]
        pieces[at].free = False
        return i, offset

    def free(self, place: tuple[int, int]) -> None:
        pieces = self.segments[place[0]][2]
        next(piece for piece in pieces if piece.offset == place[1]).free = True
        for k in range(len(pieces) - 1, 0, -1):
            if pieces[k].free and pieces[k - 1].free:
                pieces[k - 1].size += pieces.pop(k).size


@given(steps=st.lists(st.one_of(st.tuples(SIZES, STREAMS), st.integers(0, 50)), max_size=150))
@settings(max_examples=100, deadline=None)
def test_every_block_lies_where_a_plain_restatement_of_the_rules_puts_it(
    steps: list[tuple[int, int] | int],
) -> None:
    allocator, restated = CachingAllocator(capacity_bytes=None), Restated()
    starts: list[int] = []
    live: list[tuple[int, tuple[int, int]]] = []
    for step in steps:
        if isinstance(step, int):
            if live:
                address, place = live.pop(step % len(live))
                allocator.free(address)
                restated.free(place)
            continue
        address, place = allocator.malloc(*step), restated.malloc(*step)
        if place[0] == len(starts):
            starts.append(address)
        # The simulated device hands out rising addresses: the order of segments is that of their making.
        assert address == starts[place[0]] + place[1]
        live.append((address, place))
    assert allocator.reserved_bytes == sum(piece.size for _, _, pieces in restated.segments for piece in pieces)
