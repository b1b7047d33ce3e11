"""The allocator model against PyTorch's documented rules: expected numbers are worked out by hand from

https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-alloc-conf and the comments of
``c10/cuda/CUDACachingAllocator.cpp`` (blocks of 512 B, small pool to 1 MiB, segments of 2 and 20 MiB).
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from estimator.allocator import CachingAllocator, OutOfMemoryError
from estimator.allocator.blocks import SimulatedDevice, round_size, segment_size
from estimator.units import GIB, KIB, MIB


def layout(allocator: CachingAllocator) -> list[list[tuple[int, str]]]:
    return [[(block.size_bytes, block.state) for block in segment.blocks] for segment in allocator.snapshot()]


@pytest.mark.parametrize(
    ("requested", "block"), [(1, 512), (511, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)]
)
def test_a_request_is_rounded_up_to_512_bytes(requested: int, block: int) -> None:
    assert round_size(requested) == block


@pytest.mark.parametrize(
    ("requested", "block"),
    # The documentation's example is 1200 with 4 divisions, which becomes 1280: here a thousand and 24 times that.
    [
        (1200 * KIB, 1280 * KIB),
        (1280 * KIB, 1280 * KIB),
        (2 * MIB, 2 * MIB),
        (2 * MIB + 1, 2560 * KIB),
        (2048, 2048),
        (2049, 2560),
    ],
)
def test_power_of_two_divisions_round_to_a_quarter_of_the_power(requested: int, block: int) -> None:
    assert round_size(requested, (4,) * 16) == block


@pytest.mark.parametrize(
    ("block", "segment"),
    [(512, 2), (MIB, 2), (MIB + 512, 20), (10 * MIB - 512, 20), (10 * MIB, 10), (10 * MIB + 512, 12), (33 * MIB, 34)],
)
def test_segments_are_2_or_20_mib_or_the_request_in_steps_of_2_mib(block: int, segment: int) -> None:
    assert segment_size(block) == segment * MIB


def test_a_small_block_is_split_when_512_bytes_remain() -> None:
    allocator = CachingAllocator(capacity_bytes=None)
    allocator.malloc(MIB - 512)
    allocator.malloc(MIB)
    assert layout(allocator) == [[(MIB - 512, "active_allocated"), (MIB, "active_allocated"), (512, "inactive")]]


@pytest.mark.parametrize(
    ("second", "blocks"),
    [
        (10 * MIB, [(9 * MIB, "active_allocated"), (11 * MIB, "active_allocated")]),
        (
            10 * MIB - 512,
            [(9 * MIB, "active_allocated"), (10 * MIB - 512, "active_allocated"), (MIB + 512, "inactive")],
        ),
    ],
)
def test_a_large_block_keeps_up_to_1_mib_as_slack_which_counts_as_allocated(
    second: int, blocks: list[tuple[int, str]]
) -> None:
    allocator = CachingAllocator(capacity_bytes=None)
    allocator.malloc(9 * MIB)
    allocator.malloc(second)
    assert layout(allocator) == [blocks]
    assert allocator.allocated_bytes == sum(size for size, state in blocks if state == "active_allocated")


def test_the_smallest_block_that_fits_is_taken_and_of_equals_the_lowest() -> None:
    allocator = CachingAllocator(capacity_bytes=None)
    sizes = [64 * KIB, 1 * KIB, 32 * KIB, 1 * KIB, 32 * KIB, 1 * KIB]
    blocks = [allocator.malloc(size) for size in sizes]
    for i in (0, 4, 2):
        allocator.free(blocks[i])
    assert allocator.malloc(20 * KIB) == blocks[2]
    assert allocator.malloc(32 * KIB) == blocks[4]
    assert allocator.malloc(32 * KIB) == blocks[0]


def test_a_freed_block_joins_both_neighbours() -> None:
    allocator = CachingAllocator(capacity_bytes=None)
    blocks = [allocator.malloc(512 * KIB) for _ in range(4)]
    for i in (0, 2, 1):
        allocator.free(blocks[i])
    assert layout(allocator) == [[(1536 * KIB, "inactive"), (512 * KIB, "active_allocated")]]
    allocator.free(blocks[3])
    assert layout(allocator) == [[(2 * MIB, "inactive")]]


def test_a_stream_does_not_use_what_another_freed() -> None:
    allocator = CachingAllocator(capacity_bytes=None)
    first = allocator.malloc(MIB, stream=7)
    allocator.free(first)
    assert allocator.malloc(MIB, stream=8) != first
    assert allocator.malloc(MIB, stream=7) == first
    assert allocator.reserved_bytes == 4 * MIB


def test_emptying_the_cache_releases_only_wholly_free_segments() -> None:
    allocator = CachingAllocator(capacity_bytes=None)
    kept, dropped = allocator.malloc(3 * MIB), allocator.malloc(30 * MIB)
    allocator.free(allocator.malloc(4 * MIB))
    allocator.free(dropped)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * MIB
    assert allocator.peak_reserved_bytes == 50 * MIB
    allocator.free(kept)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


def test_a_full_device_gives_back_its_cache_before_it_is_out_of_memory() -> None:
    allocator = CachingAllocator(capacity_bytes=64 * MIB)
    allocator.free(allocator.malloc(40 * MIB))
    allocator.malloc(42 * MIB)
    assert (allocator.retries, allocator.reserved_bytes) == (1, 42 * MIB)
    with pytest.raises(OutOfMemoryError) as caught:
        allocator.malloc(23 * MIB)
    assert caught.value.requested_bytes == 23 * MIB
    assert caught.value.reserved_bytes == 42 * MIB
    assert caught.value.capacity_bytes == 64 * MIB
    assert allocator.malloc(22 * MIB)


def test_free_room_in_split_segments_does_not_help_a_large_request() -> None:
    allocator = CachingAllocator(capacity_bytes=60 * MIB)
    blocks = [allocator.malloc(9 * MIB) for _ in range(6)]
    for block in blocks[::2]:
        allocator.free(block)
    assert allocator.allocated_bytes < 40 * MIB
    with pytest.raises(OutOfMemoryError):
        allocator.malloc(12 * MIB)


def test_what_another_stream_uses_is_active_but_neither_allocated_nor_reused() -> None:
    allocator = CachingAllocator(capacity_bytes=None)
    block = allocator.malloc(MIB)
    allocator.free_later(block)
    assert (allocator.allocated_bytes, allocator.active_bytes) == (0, MIB)
    assert allocator.malloc(MIB) != block
    allocator.complete_free(block)
    assert allocator.active_bytes == MIB
    assert allocator.malloc(MIB) == block


def test_emptying_the_cache_waits_for_other_streams() -> None:
    allocator = CachingAllocator(capacity_bytes=None)
    allocator.free_later(allocator.malloc(12 * MIB))
    allocator.empty_cache()
    assert (allocator.active_bytes, allocator.reserved_bytes) == (0, 0)


def test_oversize_blocks_are_neither_split_nor_given_to_small_requests() -> None:
    allocator = CachingAllocator(capacity_bytes=None, max_split_size_bytes=50 * MIB)
    oversize = allocator.malloc(80 * MIB)
    allocator.free(oversize)
    assert allocator.malloc(30 * MIB) != oversize
    assert allocator.malloc(60 * MIB) != oversize, "it would leave 20 MiB unused"
    assert allocator.malloc(60 * MIB + 512) == oversize
    assert allocator.allocated_bytes == (30 + 60 + 80) * MIB


def test_a_full_device_gives_back_no_more_oversize_blocks_than_needed() -> None:
    allocator = CachingAllocator(capacity_bytes=300 * MIB, max_split_size_bytes=50 * MIB)
    blocks = [allocator.malloc(size * MIB) for size in (60, 90, 120)]
    for block in blocks:
        allocator.free(block)
    allocator.malloc(40 * MIB)
    assert allocator.retries == 0
    assert allocator.reserved_bytes == (90 + 120 + 40) * MIB


def test_an_expandable_segment_maps_only_what_is_missing_in_pages_of_20_mib() -> None:
    allocator = CachingAllocator(capacity_bytes=GIB, expandable_segments=True)
    first = allocator.malloc(30 * MIB)
    assert allocator.reserved_bytes == 40 * MIB
    assert allocator.allocated_bytes == 30 * MIB
    assert allocator.malloc(15 * MIB) == first + 30 * MIB
    assert allocator.reserved_bytes == 60 * MIB
    small = allocator.malloc(MIB)
    assert not first <= small < first + GIB
    assert allocator.reserved_bytes == 62 * MIB


def test_what_is_free_at_the_end_of_an_expandable_segment_is_not_mapped_again() -> None:
    allocator = CachingAllocator(capacity_bytes=GIB, expandable_segments=True)
    allocator.malloc(30 * MIB)
    allocator.malloc(25 * MIB)
    # 10 of the 25 MiB were mapped; 15 are missing, one page.
    assert allocator.reserved_bytes == 60 * MIB


def test_an_expandable_segment_reserves_the_addresses_of_nine_eighths_of_the_device() -> None:
    class Watched(SimulatedDevice):
        def reserve(self, size_bytes: int, stream: int) -> int:
            reserved.append(size_bytes)
            return super().reserve(size_bytes, stream)

    reserved: list[int] = []
    allocator = CachingAllocator(capacity_bytes=800 * MIB, expandable_segments=True, device=Watched(800 * MIB))
    allocator.malloc(2 * MIB)
    allocator.malloc(2 * MIB, stream=1)
    assert reserved == [900 * MIB, 900 * MIB]


def test_expandable_segments_give_back_whole_pages_and_fill_the_lowest_hole_first() -> None:
    allocator = CachingAllocator(capacity_bytes=GIB, expandable_segments=True)
    blocks = [allocator.malloc(25 * MIB) for _ in range(4)]
    allocator.free(blocks[1])
    allocator.empty_cache()
    # 25 to 50 MiB is free; of the pages from 20, 40 and 60 MiB on none lies wholly in it.
    assert allocator.reserved_bytes == 100 * MIB
    allocator.free(blocks[0])
    allocator.empty_cache()
    assert allocator.reserved_bytes == 60 * MIB
    assert layout(allocator) == [
        [(10 * MIB, "inactive"), (25 * MIB, "active_allocated"), (25 * MIB, "active_allocated")]
    ]
    assert allocator.malloc(25 * MIB) == blocks[0]
    assert allocator.reserved_bytes == 100 * MIB


def test_an_expandable_segment_without_pages_is_given_up() -> None:
    allocator = CachingAllocator(capacity_bytes=GIB, expandable_segments=True)
    allocator.free(allocator.malloc(30 * MIB))
    allocator.empty_cache()
    assert (allocator.snapshot(), allocator.reserved_bytes) == ((), 0)


def test_a_hole_is_preferred_to_the_end_of_an_expandable_segment() -> None:
    allocator = CachingAllocator(capacity_bytes=GIB, expandable_segments=True)
    hole = allocator.malloc(18 * MIB)
    allocator.malloc(6 * MIB)
    allocator.free(hole)
    # The end is 16 MiB, a better fit than the hole, but it could grow.
    assert allocator.malloc(15 * MIB) == hole


def test_expandable_segments_run_out_of_memory_where_their_pages_do() -> None:
    allocator = CachingAllocator(capacity_bytes=100 * MIB, expandable_segments=True)
    allocator.malloc(50 * MIB)
    allocator.free(allocator.malloc(30 * MIB))
    allocator.malloc(50 * MIB)
    with pytest.raises(OutOfMemoryError):
        allocator.malloc(2 * MIB)


def test_an_allocator_restored_from_a_snapshot_goes_on_alike() -> None:
    for expandable in (False, True):
        allocator = CachingAllocator(capacity_bytes=None, expandable_segments=expandable)
        blocks = [allocator.malloc(size * 300 * KIB, stream=size % 2) for size in range(1, 60)]
        for block in blocks[::3]:
            allocator.free(block)
        allocator.free_later(blocks[1])
        twin = CachingAllocator(capacity_bytes=None, expandable_segments=expandable)
        twin.restore(allocator.snapshot())
        assert twin.snapshot() == allocator.snapshot()
        assert (twin.allocated_bytes, twin.active_bytes) == (allocator.allocated_bytes, allocator.active_bytes)
        assert [twin.malloc(size * 100 * KIB) for size in range(20)] == [
            allocator.malloc(size * 100 * KIB) for size in range(20)
        ]


def test_the_model_needs_neither_torch_nor_numpy() -> None:
    command = "import sys, estimator.allocator.replay; print({'torch', 'numpy'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    assert printed == "set()\n"
