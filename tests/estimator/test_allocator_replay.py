"""Replaying allocator traces: recorded ones, some written by hand, and some recorded from the model itself.

The recorded ones are the judges of the rules; those of the model only judge that a replay, begun anywhere, follows.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from estimator.allocator import CachingAllocator, OutOfMemoryError
from estimator.allocator.blocks import Device, Segment, round_size
from estimator.allocator.replay import ReplayResult, main, replay
from estimator.allocator.trace import read_trace
from estimator.errors import InputError
from estimator.units import MIB

OWN_TRACES = Path(__file__).parents[1] / "data" / "allocator_traces"
EVIDENCE = (
    Path(os.environ.get("VRAMCALC_EVIDENCE", Path(__file__).parents[3] / "shared" / "evidence")) / "allocator_traces"
)

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


def run_at_random(allocator: RecordedAllocator, seed: int, steps: int, streams: int = 2) -> None:
    """Requests and frees of sizes that models have, on several streams, with the cache emptied now and then."""
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


def is_exact(result: ReplayResult) -> bool:
    return (
        result.segments_actual == result.segments_predicted == result.segments_matched
        and result.allocations == result.allocations_at_recorded_address
        and result.final_layout_matches
        and result.peak_reserved_bytes_actual == result.peak_reserved_bytes_predicted
    )


def allocation(size: int, address: int, stream: int = 0) -> list[Any]:
    return ["alloc", size, address, stream]


def freed(size: int, address: int, stream: int = 0) -> list[list[Any]]:
    return [["free_requested", size, address, stream], ["free_completed", size, address, stream]]


def segment(address: int, size: int, *blocks: tuple[int, str], kind: str = "large", **more: Any) -> dict[str, Any]:
    rows = []
    for block_size, state in blocks:
        rows.append([address + sum(row[1] for row in rows), block_size, block_size, state])
    record = {"address": address, "total_size": size, "stream": 0, "segment_type": kind, "is_expandable": False}
    return record | {"blocks": rows} | more


def replayed(path: Path, events: list[Any], final: list[Any], **settings: Any) -> ReplayResult:
    document = {"settings": settings, "events": events, "final_segments": final}
    return replay(read_trace(write_trace(path / "trace.json.gz", document)))


USED, FREE = "active_allocated", "inactive"


@pytest.mark.parametrize("path", sorted(OWN_TRACES.glob("*.json.gz")), ids=lambda path: path.name.split(".")[0])
def test_recorded_traces_are_reproduced_exactly(path: Path) -> None:
    result = replay(read_trace(path))
    assert result.allocations > 2_000
    assert is_exact(result), result


def test_every_trace_of_the_evidence_is_reproduced_exactly() -> None:
    paths = sorted(EVIDENCE.glob("*.json.gz"))
    if not paths:
        pytest.skip(f"no traces in {EVIDENCE}; set VRAMCALC_EVIDENCE to the folder of the evidence")
    inexact = {path.name: result for path in paths if not is_exact(result := replay(read_trace(path)))}
    assert not inexact


def test_a_trace_written_by_hand_is_followed_to_its_end(tmp_path: Path) -> None:
    base, other = 0x7F00_0000_0000, 0x7E00_0000_0000
    events = [
        ["segment_alloc", 20 * MIB, base, 0],
        allocation(3 * MIB, base),
        allocation(5 * MIB - 100, base + 3 * MIB),
        *freed(3 * MIB, base),
        ["segment_alloc", 24 * MIB, other, 0],
        allocation(23 * MIB, other),
        allocation(2 * MIB, base),
        *freed(5 * MIB - 100, base + 3 * MIB),
    ]
    # 2 MiB out of a hole of 3: 1 MiB would remain, so the block keeps it. 23 MiB in 24: likewise.
    final = [
        segment(other, 24 * MIB, (24 * MIB, USED)),
        segment(base, 20 * MIB, (3 * MIB, USED), (17 * MIB, FREE)),
    ]
    assert replayed(tmp_path, events, final) == ReplayResult(
        segments_actual=2,
        segments_predicted=2,
        segments_matched=2,
        allocations=4,
        allocations_at_recorded_address=4,
        final_layout_matches=True,
        peak_allocated_bytes=(24 + 3 + 5) * MIB,
        peak_reserved_bytes_actual=44 * MIB,
        peak_reserved_bytes_predicted=44 * MIB,
    )


def test_what_the_recording_did_otherwise_is_counted_as_a_miss(tmp_path: Path) -> None:
    base, other = 0x7F00_0000_0000, 0x7E00_0000_0000
    events = [
        ["segment_alloc", 20 * MIB, base, 0],
        allocation(3 * MIB, base),
        *freed(3 * MIB, base),
        # By the rules both of these fit into the first segment, from its start.
        allocation(3 * MIB, base + 4 * MIB),
        ["segment_alloc", 20 * MIB, other, 0],
        allocation(4 * MIB, other),
    ]
    final = [
        segment(other, 20 * MIB, (4 * MIB, USED), (16 * MIB, FREE)),
        segment(base, 20 * MIB, (4 * MIB, FREE), (3 * MIB, USED), (13 * MIB, FREE)),
    ]
    result = replayed(tmp_path, events, final)
    assert (result.segments_actual, result.segments_predicted, result.segments_matched) == (2, 1, 1)
    assert (result.allocations, result.allocations_at_recorded_address) == (3, 1)
    assert not result.final_layout_matches
    assert result.peak_reserved_bytes_predicted == 20 * MIB


def test_a_recording_may_begin_in_the_middle_of_a_run(tmp_path: Path) -> None:
    base, small = 0x7F00_0000_0000, 0x7D00_0000_0000
    events = [
        # 2 MiB, and 1 MiB to the next live block: too little for a block of its own, so slack.
        *freed(2 * MIB, base + 3 * MIB),
        ["free_completed", 1000, small, 0],
        allocation(900, small),
        ["segment_free", 30 * MIB, 0x7C00_0000_0000, 0],
    ]
    final = [
        segment(small, 2 * MIB, (1024, USED), (2 * MIB - 1024, FREE), kind="small"),
        segment(base, 20 * MIB, (3 * MIB, USED), (3 * MIB, FREE), (14 * MIB, USED)),
    ]
    result = replayed(tmp_path, events, final)
    assert is_exact(result), result
    assert result.peak_reserved_bytes_actual == 52 * MIB
    assert result.peak_allocated_bytes == 20 * MIB


def test_segments_of_another_device_are_told_by_what_was_not_done_with_them(tmp_path: Path) -> None:
    base, unused, kept = 0x7F00_0000_0000, 0x7E00_0000_0000, 0x7D00_0000_0000
    events = [
        ["segment_alloc", 20 * MIB, base, 0],
        allocation(3 * MIB, base),
        *freed(3 * MIB, base),
        ["segment_free", 20 * MIB, base, 0],
        ["segment_alloc", 20 * MIB, base, 0],
        allocation(8 * MIB, base),
    ]
    final = [
        # Has room for both requests, and is wholly free when the cache is emptied.
        segment(kept, 4 * MIB, (4 * MIB, FREE)),
        segment(unused, 30 * MIB, (10 * MIB, USED), (20 * MIB, FREE)),
        segment(base, 20 * MIB, (8 * MIB, USED), (12 * MIB, FREE)),
    ]
    result = replayed(tmp_path, events, final)
    assert is_exact(result), result
    assert result.peak_reserved_bytes_actual == 20 * MIB


def test_expandable_ranges_that_no_event_touches_are_another_devices(tmp_path: Path) -> None:
    base, foreign = 0x3_0200_0000, 0x30_0000_0000
    events = [["segment_map", 40 * MIB, base, 0], allocation(25 * MIB, base)]
    final = [
        segment(base, 40 * MIB, (25 * MIB, USED), (15 * MIB, FREE), is_expandable=True),
        segment(foreign, 40 * MIB, (40 * MIB, FREE), is_expandable=True),
    ]
    result = replayed(tmp_path, events, final, expandable_segments=True)
    assert is_exact(result), result
    assert result.peak_reserved_bytes_predicted == 40 * MIB


def test_annotations_and_snapshots_change_nothing(tmp_path: Path) -> None:
    base = 0x7F00_0000_0000
    events = [
        ["user_defined", 0, None, None],
        ["segment_alloc", 20 * MIB, base, 0],
        allocation(3 * MIB, base),
        ["snapshot", 3 * MIB, 0, 0],
        allocation(2 * MIB, base + 3 * MIB),
    ]
    final = [segment(base, 20 * MIB, (3 * MIB, USED), (2 * MIB, USED), (15 * MIB, FREE))]
    assert is_exact(replayed(tmp_path, events, final))


def test_power_of_two_divisions_are_read_from_the_configuration(tmp_path: Path) -> None:
    base = 0x7F00_0000_0000
    events = [["segment_alloc", 20 * MIB, base, 0], allocation(4 * MIB + 1, base), allocation(9 * MIB, base + 5 * MIB)]
    final = [segment(base, 20 * MIB, (5 * MIB, USED), (9 * MIB, USED), (6 * MIB, FREE))]
    configuration = "expandable_segments:False,roundup_power2_divisions:[2:1,4:4,>:1]"
    assert is_exact(replayed(tmp_path, events, final, PYTORCH_CUDA_ALLOC_CONF=configuration))


@pytest.mark.parametrize("capacity", [None, 300 * MIB])
@pytest.mark.parametrize("settings", [{}, {"max_split_size_bytes": 25 * MIB}], ids=["plain", "max_split_size"])
@pytest.mark.parametrize("seed", range(5))
def test_streams_retries_and_out_of_memory_are_followed(
    tmp_path: Path, seed: int, settings: dict[str, Any], capacity: int | None
) -> None:
    allocator = RecordedAllocator(capacity_bytes=capacity, seed=seed, **settings)
    run_at_random(allocator, seed, 600)
    assert capacity is None or allocator.retries > 0
    result = replay(read_trace(write_trace(tmp_path / "trace.json.gz", allocator.document())))
    assert result.allocations > 250
    assert is_exact(result), result


@pytest.mark.parametrize("since", [0, 400])
@pytest.mark.parametrize("seed", range(8))
def test_expandable_segments_are_followed_from_anywhere_in_a_run(tmp_path: Path, seed: int, since: int) -> None:
    allocator = RecordedAllocator(capacity_bytes=None, seed=seed, expandable_segments=True)
    run_at_random(allocator, seed, 600)
    result = replay(read_trace(write_trace(tmp_path / "trace.json.gz", allocator.document(since))))
    assert result.segments_actual > 0
    assert is_exact(result), result


@pytest.mark.parametrize("seed", range(3))
def test_damaged_traces_are_refused_or_replayed_but_never_crash(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    allocator = RecordedAllocator(capacity_bytes=300 * MIB, seed=seed, expandable_segments=seed == 1)
    run_at_random(allocator, seed, 150)
    refused = 0
    for _ in range(60):
        document = json.loads(json.dumps(allocator.document()))
        events = document["events"]
        for _ in range(draw.randrange(1, 5)):
            i = draw.randrange(len(events))
            events[i][draw.randrange(4)] = draw.choice(events)[draw.randrange(4)]
        try:
            replay(read_trace(write_trace(tmp_path / "trace.json.gz", document)))
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 20


def test_an_expandable_segment_that_grows_into_another_is_refused(tmp_path: Path) -> None:
    base = 0x3_0200_0000
    events = [
        ["segment_map", 2 * MIB, base + 2 * MIB, 1],
        allocation(MIB, base + 2 * MIB, 1),
        *freed(512, base + 4 * MIB),
    ]
    expandable: dict[str, Any] = {"kind": "small", "is_expandable": True}
    final = [
        segment(base, 4 * MIB, (2 * MIB, USED), (MIB, USED), (MIB, FREE), stream=1, **expandable),
        segment(base + 4 * MIB, 2 * MIB, (2 * MIB, FREE), **expandable),
    ]
    with pytest.raises(InputError, match="grows into another"):
        replayed(tmp_path, events, final)


GOOD: dict[str, Any] = {"events": [], "final_segments": [segment(512, 2 * MIB, (2 * MIB, USED))]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"not gzip", "not a gzipped trace"),
        (gzip.compress(b"x" * 10_000, mtime=0)[:-9], "damaged gzip file"),
        (gzip.compress(b"not JSON", mtime=0), "not JSON"),
        (gzip.compress(b"\xff\xfe", mtime=0), "not JSON"),
        ([], "expected an object"),
        ({"events": []}, "'final_segments' is missing"),
        ({"final_segments": []}, "'events' is missing"),
        (GOOD | {"events": {}}, "'events' must be a list"),
        (GOOD | {"events": [["alloc", 1, 2]]}, "events[0]: expected [action, size, address, stream]"),
        (GOOD | {"events": [["alloc", "1", 2, 3]]}, "events[0]: size, address and stream"),
        (GOOD | {"events": [["alloc", True, 2, 3]]}, "events[0]: size, address and stream"),
        (GOOD | {"events": [["alloc", 1, -2, 3]]}, "events[0]: size, address and stream"),
        (GOOD | {"events": [["alloc", 1, 2**64, 3]]}, "beyond the addresses"),
        (GOOD | {"events": [["borrow", 1, 2, 3]]}, "unknown action 'borrow'"),
        (GOOD | {"events": freed(512, 2**40)}, "lies in no segment"),
        (GOOD | {"events": [allocation(512, 2**40)] * 2}, "events[1]: alloc at address"),
        (GOOD | {"events": [["segment_free", 4 * MIB, 1024, 0]]}, "two segments would overlap"),
        (GOOD | {"settings": {"max_split_size": "big"}}, "settings.max_split_size"),
        (GOOD | {"settings": {"PYTORCH_CUDA_ALLOC_CONF": "roundup_power2_divisions:x"}}, "roundup_power2_divisions:x"),
        ({"events": [], "final_segments": [{"address": 1}]}, "'total_size' is missing"),
        ({"events": [], "final_segments": [segment(0, 9, (9, "free"))]}, "state 'free'"),
        ({"events": [], "final_segments": [segment(0, 9, (8, USED))]}, "add up to 8 bytes"),
        ({"events": [], "final_segments": [segment(0, 9, (9, USED), kind="tiny")]}, "'tiny'"),
        ({"events": [], "final_segments": [segment(0, 9, (9, USED)), segment(5, 9, (9, USED))]}, "overlap"),
    ],
)
def test_a_bad_trace_is_answered_in_one_line_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: object, says: str
) -> None:
    path = tmp_path / "trace.json.gz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_trace(path, content)
    assert main([str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith(f"error: {path}: ")
    assert says in printed.err


def test_a_missing_file_and_wrong_usage_are_answered_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([], ["a", "b"], ["--help"], [str(tmp_path / "none.json.gz")], [str(tmp_path)]):
        assert main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_command_prints_the_result_as_json() -> None:
    command = [sys.executable, "-m", "estimator.allocator", str(OWN_TRACES / "cs336_small_step.json.gz")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    # Counted in the file: 9 segment_alloc and 3,221 alloc events.
    assert json.loads(done.stdout) == {
        "segments_actual": 9,
        "segments_predicted": 9,
        "segments_matched": 9,
        "allocations": 3221,
        "allocations_at_recorded_address": 3221,
        "final_layout_matches": True,
        "peak_allocated_bytes": 764083200,
        "peak_reserved_bytes_actual": 937426944,
        "peak_reserved_bytes_predicted": 937426944,
    }
