"""A whole point along the path of a GPU, with a made-up ``torch.cuda`` over the CPU: what is called, and what it becomes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from estimator.allocator.trace import read_trace
from estimator.setup import Setup
from harness.point import Procedure, local_setup, run_point
from profiler.device import LocalDevice

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")
GIB, MIB = 2**30, 2**20
DEVICE = LocalDevice(
    name="RTX-3090", kind="cuda", description="NVIDIA GeForce RTX 3090", capacity_bytes=24 * GIB, free_bytes=24 * GIB
)


class FakeCuda:
    """An allocator whose peak is 100 MiB more with every reset and read, within segments of 1 GiB; a context of 0.5 GiB."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.peak = 0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("init", "synchronize"):
            patch.setattr(torch.cuda, name, lambda name=name: self.calls.append(name))
        patch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)
        patch.setattr(torch.cuda, "max_memory_reserved", lambda: GIB)
        patch.setattr(torch.cuda, "memory_reserved", lambda: GIB)
        patch.setattr(torch.cuda, "memory_stats", lambda: {"num_alloc_retries": 2})
        patch.setattr(torch.cuda, "mem_get_info", lambda: (24 * GIB - 3 * GIB // 2, 24 * GIB))
        patch.setattr(torch.cuda.memory, "_snapshot", self.snapshot)
        patch.setattr(torch.cuda.memory, "_record_memory_history", self.record)
        patch.setattr("profiler.cuda_memory.first_gpu", lambda: None)

    def reset(self) -> None:
        self.calls.append("reset")
        self.peak += 100 * MIB

    def record(self, enabled: str | None, **options: Any) -> None:
        self.calls.append(f"history {enabled}")

    def snapshot(self) -> dict[str, Any]:
        events = [{"action": "segment_alloc", "addr": 2**40, "size": 2 * MIB, "stream": 0}]
        blocks = [{"address": 2**40, "size": 2 * MIB, "requested_size": 0, "state": "inactive"}]
        segment = {"address": 2**40, "total_size": 2 * MIB, "stream": 0, "segment_type": "small", "blocks": blocks}
        settings = {"expandable_segments": True}
        return {"segments": [segment], "device_traces": [events], "allocator_settings": settings}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", lambda settings: None, raising=False)
    fake = FakeCuda()
    fake.install(monkeypatch)
    state = torch.random.get_rng_state()
    yield fake
    torch.random.set_rng_state(state)


@pytest.mark.parametrize("framework", ["torch-loop", "hf-trainer"])
def test_a_point_on_a_gpu(framework: str, cuda: FakeCuda, cache: Path, tmp_path: Path) -> None:
    setup = local_setup(
        Setup(
            model="nano",
            seq=32,
            precision="fp32",
            framework=framework,
            attention_kernel="flash",
            expandable_segments=True,
        ),
        DEVICE,
    )
    procedure = Procedure(warmup_steps=1, timed_steps=2, checkpoint_limit_bytes=10_000, cache=cache)
    scratch, trace = tmp_path / "scratch", tmp_path / "traces" / "t.json.gz"
    scratch.mkdir()
    run = run_point(setup, procedure, DEVICE, scratch, trace)
    assert (run.outcome, run.setup.accelerator, run.source) == ("ok", "RTX-3090", run.source)
    # Start and the three phases of two steps and what is between them: the last of each kind has the highest peak.
    assert cuda.calls.count("reset") == 1 + 2 * 4
    assert (run.peak_forward_bytes, run.peak_backward_bytes, run.peak_optimizer_bytes) == (
        600 * MIB + 0, 700 * MIB, 800 * MIB,
    )  # fmt: skip
    assert (run.peak_allocated_bytes, run.peak_phase) == (900 * MIB, "optimizer")
    assert (run.peak_reserved_bytes, run.peak_device_bytes) == (GIB, 3 * GIB // 2)
    assert run.peak_host_bytes and run.loaded_bytes and run.step_seconds
    assert run.checkpoint_bytes is None, "larger than the limit: none is written"
    assert list(scratch.iterdir()) == []
    facts = json.loads(run.environment or "")
    assert (facts["overhead_bytes"], facts["allocator_retries"], facts["allocator_expandable"]) == (GIB // 2, 2, True)
    assert (facts["device_bytes_by"], facts["sdpa_kernel"]) == ("cuda", "flash")
    assert facts["allocator_settings"] == "expandable_segments:True"
    assert cuda.calls[:2] == ["init", "history all"] and cuda.calls.count("history None") == 1
    assert len(read_trace(trace).events) == 1


def test_the_timed_steps_touch_no_counter(cuda: FakeCuda, cache: Path, tmp_path: Path) -> None:
    setup = local_setup(Setup(model="nano", seq=32, precision="fp32", framework="torch-loop"), DEVICE)
    run_point(setup, Procedure(warmup_steps=1, timed_steps=3, cache=cache), DEVICE, tmp_path)
    after_tracing = cuda.calls[len(cuda.calls) - 1 - cuda.calls[::-1].index("reset") + 1 :]
    assert after_tracing == ["synchronize"] * 4, "one as the clock starts and one as each timed step ends"
