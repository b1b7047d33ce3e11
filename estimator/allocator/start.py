"""The state in which a recording of the caching allocator began: its final state, with the events undone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from estimator.allocator.blocks import (
    LARGE_SEGMENT_BYTES,
    SMALL_BYTES,
    SMALL_SEGMENT_BYTES,
    Block,
    BlockState,
    Segment,
    round_size,
)
from estimator.allocator.expandable import page_bytes
from estimator.allocator.trace import BLOCK_ACTIONS, Trace, touched_segments
from estimator.errors import InputError

# The states that a block may be in when an action comes, None being an address without one, and the state that follows.
_BEFORE: dict[str, tuple[BlockState | None, ...]] = {
    "alloc": (None, "inactive"),
    "free_requested": ("active_allocated",),
    "free_completed": ("active_awaiting_free",),
}
_AFTER: dict[str, BlockState] = {
    "alloc": "active_allocated",
    "free_requested": "active_awaiting_free",
    "free_completed": "inactive",
}


class _LiveBlock(NamedTuple):
    """A block that was there at the start of a recording."""

    requested_bytes: int
    block_bytes: int | None
    """None: not recorded."""
    state: BlockState


def initial_segments(trace: Trace) -> tuple[Segment, ...]:
    """The segments when the recording began, with their blocks: the final ones, with the events undone.

    Live at the start is what was freed without an earlier allocation, and what is live at the end and was never allocated.
    Where a block ended that was freed since isn't recorded: it has its rounded size, plus, in a large pool, what follows
    up to the next live block if that is too little for a block of its own. Raises InputError for a contradictory trace.
    """
    segments = _plain_segments(trace) + _mapped_ranges(trace)
    segments.sort(key=lambda segment: segment.address)
    for below, above in pairwise(segments):
        if below.address + below.size_bytes > above.address:
            raise InputError(f"events: at the start two segments would overlap at address {above.address}")
    starts = [segment.address for segment in segments]
    live: list[dict[int, _LiveBlock]] = [{} for _ in segments]
    for address, block in _live_at_start(trace).items():
        index = bisect_right(starts, address) - 1
        if index < 0 or address >= starts[index] + segments[index].size_bytes:
            raise InputError(f"events: the block at address {address} lies in no segment that existed then")
        live[index][address] = block
    return tuple(_with_blocks(segment, blocks, trace) for segment, blocks in zip(segments, live, strict=True))


def reservation_starts(trace: Trace, initial: Sequence[Segment]) -> dict[tuple[int, bool], int]:
    """Where the expandable segments at the start begin, by (stream, small): at the lowest page that is mapped in them.

    An expandable segment whose last page is unmapped is given up: what is mapped afterwards is another's.
    """
    starts: dict[tuple[int, bool], int] = {}
    mapped: dict[tuple[int, bool], int] = {}
    for segment in initial:
        if segment.expandable:
            key = segment.stream, segment.small
            starts[key] = min(starts.get(key, segment.address), segment.address)
            mapped[key] = mapped.get(key, 0) + segment.size_bytes
    is_small = _pool_by_address(trace)
    for event in trace.events:
        if event.action not in ("segment_map", "segment_unmap"):
            continue
        key = event.stream, is_small(event.address)
        if not mapped.get(key):
            continue
        if event.action == "segment_map":
            if (event.address - starts[key]) % page_bytes(key[1]) == 0:
                starts[key] = min(starts[key], event.address)
            mapped[key] += event.size
        else:
            mapped[key] -= event.size
    return starts


def device_bytes(trace: Trace, initial: Sequence[Segment]) -> int | None:
    """What the device has for the allocator, where the trace shows it running out of memory; else None.

    It bounds the virtual addresses of an expandable segment, and with them what the best fit makes of holes. An ``oom``
    event has the bytes that were still free in place of the address.
    """
    reserved = sum(segment.size_bytes for segment in initial)
    known = 0
    for event in trace.events:
        if event.action in ("segment_alloc", "segment_map"):
            reserved += event.size
        elif event.action in ("segment_free", "segment_unmap"):
            reserved -= event.size
        elif event.action == "oom":
            known = max(known, reserved + event.address)
    return known or None


def untouched(segments: Sequence[Segment], trace: Trace) -> frozenset[int]:
    """The addresses of those (not expandable) segments that no event of the trace lies in."""
    return frozenset(segment.address for segment in segments if not segment.expandable) - touched_segments(
        segments, trace.events
    )


def _plain_segments(trace: Trace) -> list[Segment]:
    segments = {segment.address: segment for segment in trace.final_segments if not segment.expandable}
    for event in reversed(trace.events):
        if event.action == "segment_alloc":
            segments.pop(event.address, None)
        elif event.action == "segment_free":
            small = event.size <= SMALL_SEGMENT_BYTES
            segments[event.address] = _empty_segment(event.address, event.size, event.stream, small, expandable=False)
    return list(segments.values())


def _mapped_ranges(trace: Trace) -> list[Segment]:
    ranges: dict[tuple[int, bool], list[tuple[int, int]]] = {}
    is_small = _pool_by_address(trace)
    for segment in trace.final_segments:
        if segment.expandable:
            key = segment.stream, segment.small
            ranges.setdefault(key, []).append((segment.address, segment.address + segment.size_bytes))
    for event in reversed(trace.events):
        start, end = event.address, event.address + event.size
        if event.action == "segment_map":
            for mapped in ranges.values():
                mapped[:] = [piece for low, high in mapped for piece in _without(low, high, start, end)]
        elif event.action == "segment_unmap":
            ranges.setdefault((event.stream, is_small(event.address)), []).append((start, end))
    segments = []
    for (stream, small), mapped in ranges.items():
        joined: list[tuple[int, int]] = []
        for low, high in sorted(mapped):
            if joined and joined[-1][1] == low:
                joined[-1] = joined[-1][0], high
            else:
                joined.append((low, high))
        for low, high in joined:
            if (high - low) % page_bytes(small):
                raise InputError(f"events: {high - low} bytes mapped at address {low} are not whole pages")
            segments.append(_empty_segment(low, high - low, stream, small, expandable=True))
    return segments


def _pool_by_address(trace: Trace) -> Callable[[int], bool]:
    """Whether a mapped address is in a small pool.

    Events don't say so. Ranges that touch are one pool's; the small pool maps pages of 2 MiB one by one, the large one
    pages of 20 MiB.
    """
    ranges = [
        (segment.address, segment.address + segment.size_bytes, segment.small)
        for segment in trace.final_segments
        if segment.expandable
    ]
    ranges += [
        (event.address, event.address + event.size, event.size % LARGE_SEGMENT_BYTES != 0)
        for event in trace.events
        if event.action in ("segment_map", "segment_unmap")
    ]
    joined: list[tuple[int, int, bool]] = []
    for low, high, small in sorted(ranges):
        if joined and low <= joined[-1][1]:
            start, end, known = joined[-1]
            joined[-1] = start, max(end, high), known or small
        else:
            joined.append((low, high, small))
    starts = [low for low, _, _ in joined]
    return lambda address: joined[bisect_right(starts, address) - 1][2]


def _without(low: int, high: int, start: int, end: int) -> list[tuple[int, int]]:
    return [(a, b) for a, b in ((low, min(high, start)), (max(low, end), high)) if a < b]


def _empty_segment(address: int, size: int, stream: int, small: bool, *, expandable: bool) -> Segment:
    return Segment(address=address, size_bytes=size, stream=stream, small=small, expandable=expandable, blocks=())


def _live_at_start(trace: Trace) -> dict[int, _LiveBlock]:
    live: dict[int, _LiveBlock] = {}
    state: dict[int, BlockState] = {}
    """Of the block now at an address; inactive: there was one before."""
    from_start: set[int] = set()
    """Addresses whose present block was there at the start."""
    for i, (action, size, address, _) in enumerate(trace.events):
        if action not in BLOCK_ACTIONS:
            continue
        now = state.get(address)
        if now is None and action != "alloc":
            now = "active_allocated" if action == "free_requested" else "active_awaiting_free"
            live[address] = _LiveBlock(size, None, now)
            from_start.add(address)
        if now not in _BEFORE[action]:
            raise InputError(
                f"events[{i}]: {action} at address {address}, where the block is {now} after earlier events"
            )
        state[address] = _AFTER[action]
        if action == "alloc":
            from_start.discard(address)
    for segment in trace.final_segments:
        for block in segment.blocks:
            if block.state == "inactive":
                continue
            if block.address not in state:
                live[block.address] = _LiveBlock(block.size_bytes, block.size_bytes, block.state)
            elif block.address in from_start and state[block.address] != "inactive":
                live[block.address] = live[block.address]._replace(block_bytes=block.size_bytes)
    return live


def _with_blocks(segment: Segment, live: dict[int, _LiveBlock], trace: Trace) -> Segment:
    blocks: list[Block] = []
    position, end = segment.address, segment.address + segment.size_bytes
    addresses = sorted(live)
    for i, address in enumerate(addresses):
        if address < position:
            raise InputError(f"events: the block at address {address} overlaps the one before it")
        if address > position:
            blocks.append(Block(address=position, size_bytes=address - position, state="inactive"))
        requested, size, state = live[address]
        if size is None:
            size = round_size(requested, trace.roundup_power2_divisions)
            following = addresses[i + 1] if i + 1 < len(addresses) else end
            slack = following - address - size
            limit = trace.max_split_size_bytes
            never_split = limit is not None and size >= limit
            if not (segment.small or segment.expandable) and (0 < slack <= SMALL_BYTES or never_split):
                size += slack
        blocks.append(Block(address=address, size_bytes=size, state=state))
        position = address + size
    if position > end:
        raise InputError(f"events: the block at address {addresses[-1]} reaches beyond its segment")
    if position < end:
        blocks.append(Block(address=position, size_bytes=end - position, state="inactive"))
    return Segment(
        address=segment.address,
        size_bytes=segment.size_bytes,
        stream=segment.stream,
        small=segment.small,
        expandable=segment.expandable,
        blocks=tuple(blocks),
    )
