"""Records what CUDA's caching allocator does in a run, as a trace that ``python -m estimator.allocator`` replays."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profiler.files import write_whole
from profiler.memory import MemoryMeter, MemoryPeaks

if TYPE_CHECKING:
    import torch

_SETTINGS = (
    "PYTORCH_CUDA_ALLOC_CONF", "max_split_size", "garbage_collection_threshold", "expandable_segments",
)  # fmt: skip
"""What a replay needs of ``allocator_settings``."""


def trace_document(snapshot: Mapping[str, Any], *, source: str, device: int = 0) -> dict[str, Any]:
    """A snapshot (``torch.cuda.memory._snapshot()``) as the document that ``estimator.allocator.trace`` reads.

    Of one device: events as ``[action, size, address, stream]``, blocks as ``[address, size, requested_size, state]``;
    stack frames, times and the other devices are left out.
    """
    traces = snapshot.get("device_traces") or []
    events = traces[device] if device < len(traces) else []
    segments = [segment for segment in snapshot["segments"] if segment.get("device", device) == device]
    settings = snapshot.get("allocator_settings") or {}
    return {
        "source": source,
        "settings": {name: settings[name] for name in _SETTINGS if name in settings},
        "events": [_event(event) for event in events],
        "final_segments": [_segment(segment) for segment in segments],
    }


def _event(event: Mapping[str, Any]) -> list[Any]:
    # Of an event of no block ("oom") the address is elsewhere or absent.
    return [event["action"], event.get("size", 0), event.get("addr", 0), event.get("stream", 0)]


def _segment(segment: Mapping[str, Any]) -> dict[str, Any]:
    blocks, address = [], segment["address"]
    for block in segment["blocks"]:
        address = block.get("address", address)  # torch 1 left it out
        blocks.append([address, block["size"], block.get("requested_size", 0), block["state"]])
        address += block["size"]
    return {
        "address": segment["address"],
        "total_size": segment["total_size"],
        "stream": segment["stream"],
        "segment_type": segment["segment_type"],
        "is_expandable": bool(segment.get("is_expandable", False)),
        "blocks": blocks,
    }


def write_trace(path: Path, snapshot: Mapping[str, Any], *, source: str) -> None:
    """Writes ``trace_document`` as gzipped JSON, whole or not at all. Raises OSError."""
    text = json.dumps(trace_document(snapshot, source=source), separators=(",", ":"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, gzip.compress(text.encode(), mtime=0))  # the same trace makes the same file


class RecordingMeter(MemoryMeter):
    """A meter of a GPU that also keeps the allocator's trace, from here to the end of the traced steps.

    Make it before the model. Recording initialises CUDA, so ``inner`` must have taken its baseline before. Stacks are not
    recorded; events take some microseconds each, in traced steps only.
    """

    def __init__(self, inner: MemoryMeter, path: Path, *, source: str) -> None:
        import torch

        self._inner = inner
        self._path = path
        self._source = source
        self._recording = True
        torch.cuda.init()  # before, there is no allocator whose history could be recorded
        torch.cuda.memory._record_memory_history("all", context=None, stacks="python")

    def start(self, model: torch.nn.Module) -> None:
        self._inner.start(model)

    def enter(self, phase: str) -> None:
        self._inner.enter(phase)

    def end_tracing(self) -> None:
        import torch

        self._inner.end_tracing()
        if self._recording:
            # The end of recording clears it.
            write_trace(self._path, torch.cuda.memory._snapshot(), source=self._source)
            torch.cuda.memory._record_memory_history(None)
            self._recording = False

    def stop(self) -> MemoryPeaks:
        if self._recording:
            self.end_tracing()
        return self._inner.stop()

    def synchronize(self) -> None:
        self._inner.synchronize()

    def facts(self) -> Mapping[str, str | float | None]:
        return self._inner.facts()
