"""Recording an allocator: a snapshot as torch gives it becomes a trace that the allocator's model replays exactly."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from estimator.allocator.replay import replay
from estimator.allocator.trace import read_trace
from profiler.allocator_recording import RecordingMeter, trace_document, write_trace
from profiler.memory import MemoryMeter, MemoryPeaks, PhasePeak

MIB = 2**20
LARGE, SMALL = 0x7F0000000000, 0x7F1000000000


def event(action: str, address: int, size: int) -> dict[str, Any]:
    return {"action": action, "addr": address, "size": size, "stream": 0, "time_us": 7, "frames": [{"name": "f"}]}


def freed(address: int, size: int) -> list[dict[str, Any]]:
    return [event("free_requested", address, size), event("free_completed", address, size)]


def block(address: int, size: int, requested: int, state: str) -> dict[str, Any]:
    return {"address": address, "size": size, "requested_size": requested, "state": state, "frames": []}


def segment(address: int, size: int, kind: str, *blocks: dict[str, Any], device: int = 0) -> dict[str, Any]:
    return {
        "device": device, "address": address, "total_size": size, "stream": 0, "segment_type": kind, "is_expandable": False,
        "allocated_size": 0, "active_size": 0, "segment_pool_id": (0, 0), "frames": [], "blocks": list(blocks),
    }  # fmt: skip


def snapshot() -> dict[str, Any]:
    """Of two devices. On the first: 4 and 8 MiB in one segment of 20, the first freed and partly used again; 1,000 B."""
    events = [
        event("segment_alloc", LARGE, 20 * MIB),
        event("alloc", LARGE, 4 * MIB),
        event("alloc", LARGE + 4 * MIB, 8 * MIB),
        event("segment_alloc", SMALL, 2 * MIB),
        event("alloc", SMALL, 1000),
        *freed(LARGE, 4 * MIB),
        event("alloc", LARGE, 2 * MIB - 100),
        {"action": "snapshot", "addr": 0, "size": 0, "stream": 0, "time_us": 9},
    ]
    segments = [
        segment(
            LARGE, 20 * MIB, "large",
            block(LARGE, 2 * MIB, 2 * MIB - 100, "active_allocated"),
            block(LARGE + 2 * MIB, 2 * MIB, 0, "inactive"),
            block(LARGE + 4 * MIB, 8 * MIB, 8 * MIB, "active_allocated"),
            block(LARGE + 12 * MIB, 8 * MIB, 0, "inactive"),
        ),
        segment(
            SMALL, 2 * MIB, "small",
            block(SMALL, 1024, 1000, "active_allocated"), block(SMALL + 1024, 2 * MIB - 1024, 0, "inactive"),
        ),
        segment(LARGE, 20 * MIB, "large", block(LARGE, 20 * MIB, 0, "inactive"), device=1),
    ]  # fmt: skip
    settings = {"PYTORCH_CUDA_ALLOC_CONF": "", "max_split_size": -1, "expandable_segments": False, "newer": ()}
    return {"segments": segments, "device_traces": [events, [event("alloc", LARGE, 5)]], "allocator_settings": settings}


def test_a_snapshot_becomes_a_trace_that_the_model_replays_exactly(tmp_path: Path) -> None:
    path = tmp_path / "traces" / "p1.json.gz"
    write_trace(path, snapshot(), source="a test")
    trace = read_trace(path)
    assert [len(trace.events), len(trace.final_segments)] == [9, 2]
    result = replay(trace)
    assert (result.segments_actual, result.segments_matched) == (2, 2)
    assert (result.allocations, result.allocations_at_recorded_address) == (4, 4)
    assert result.final_layout_matches
    assert result.peak_allocated_bytes == 12 * MIB + 1024
    assert result.peak_reserved_bytes_predicted == 22 * MIB
    command = [sys.executable, "-m", "estimator.allocator", str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert json.loads(printed)["final_layout_matches"]


def test_a_layout_that_the_events_do_not_lead_to_is_noticed(tmp_path: Path) -> None:
    wrong = snapshot()
    wrong["device_traces"][0][2]["size"] = 7 * MIB
    write_trace(tmp_path / "t.json.gz", wrong, source="a test")
    assert not replay(read_trace(tmp_path / "t.json.gz")).final_layout_matches


def test_the_same_snapshot_makes_the_same_file_without_stacks(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_trace(tmp_path / name, snapshot(), source="a test")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    document = trace_document(snapshot(), source="a test")
    assert "frames" not in json.dumps(document)
    assert document["settings"] == {
        "PYTORCH_CUDA_ALLOC_CONF": "", "max_split_size": -1, "expandable_segments": False,
    }  # fmt: skip


class Inner(MemoryMeter):
    """Notes what it is told."""

    def __init__(self, told: list[str]) -> None:
        self.told = told

    def start(self, model: torch.nn.Module) -> None:
        self.told.append("start")

    def enter(self, phase: str) -> None:
        self.told.append(phase)

    def end_tracing(self) -> None:
        self.told.append("end tracing")

    def stop(self) -> MemoryPeaks:
        self.told.append("stop")
        peaks = (PhasePeak(phase="forward", allocated_bytes=1),)
        return MemoryPeaks(phases=peaks, loaded_bytes=0, reserved_bytes=0, device_bytes=0)

    def synchronize(self) -> None:
        self.told.append("synchronize")

    def facts(self) -> Mapping[str, str | float | None]:
        return {"seen_bytes": 3}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a made-up CUDA and the inner meter are told, in order."""
    found: list[str] = []

    def record(enabled: str | None, **options: Any) -> None:
        found.append(f"history {enabled}")
        assert enabled is None or options == {"context": None, "stacks": "python"}

    def take() -> dict[str, Any]:
        found.append("snapshot")
        return snapshot()

    monkeypatch.setattr(torch.cuda, "init", lambda: found.append("init"))
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", take)
    return found


def test_the_meter_records_from_before_the_model_to_the_end_of_the_traced_steps(
    told: list[str], tmp_path: Path
) -> None:
    meter = RecordingMeter(Inner(told), tmp_path / "t.json.gz", source="a test")
    meter.start(torch.nn.Linear(1, 1))
    meter.enter("forward")
    meter.end_tracing()
    meter.enter("forward")
    meter.synchronize()
    assert meter.stop().allocated_bytes == 1
    assert meter.facts() == {"seen_bytes": 3}
    first = ["init", "history all", "start", "forward", "end tracing", "snapshot", "history None"]
    assert told == [*first, "forward", "synchronize", "stop"]
    assert len(read_trace(tmp_path / "t.json.gz").events) == 9


def test_a_run_that_ends_while_traced_keeps_its_trace(told: list[str], tmp_path: Path) -> None:
    meter = RecordingMeter(Inner(told), tmp_path / "t.json.gz", source="a test")
    meter.start(torch.nn.Linear(1, 1))
    meter.stop()
    assert (tmp_path / "t.json.gz").exists()
    assert told[-3:] == ["snapshot", "history None", "stop"]
