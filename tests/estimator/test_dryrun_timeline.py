"""Where a dry run's memory goes: holders and timeline hold every byte of the peak."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.dryrun.events import Storage, Stream
from estimator.dryrun.result import DryRun
from estimator.dryrun.timeline import step_around, timeline
from estimator.model.catalog import resolve_model
from estimator.setup import Setup

pytest.importorskip("torch")

from estimator.dryrun.run import dry_run

SETUPS: list[dict[str, Any]] = [
    {"model": "small", "accelerator": "RTX-3090", "seq": 256},
    {"model": "small", "accelerator": "RTX-3090", "seq": 256, "checkpointing": "full", "accumulation": 2, "eval_batch": 4},
    {"model": "mini", "accelerator": "cpu", "precision": "fp32", "seq": 128, "optimizer": "sgd", "eval_batch": 1},
]  # fmt: skip


@pytest.fixture(scope="module", params=SETUPS, ids=str)
def found(request: pytest.FixtureRequest) -> DryRun:
    return dry_run(Setup(**request.param))


def test_holders_and_the_timelines_highest_moment_are_the_peak_to_the_byte(found: DryRun) -> None:
    assert sum(holder.bytes for holder in found.holders) == found.peak_allocated_bytes
    peak = next(point for point in found.timeline if point.event == found.peak_event)
    assert sum(peak.bytes_by_category) == found.peak_allocated_bytes
    assert max(sum(point.bytes_by_category) for point in found.timeline) == found.peak_allocated_bytes
    held = {name: amount for name, amount in zip(found.categories, peak.bytes_by_category, strict=True) if amount}
    assert held == dict(found.categories_bytes)


def test_the_timeline_is_a_step_with_all_its_phases_in_order(found: DryRun) -> None:
    phases = list(dict.fromkeys(point.phase for point in found.timeline))
    assert [phase for phase in phases if phase != "between"][:4] == ["forward", "loss", "backward", "optimizer"]
    assert ("evaluation" in phases) == ("evaluation" in {phase.phase for phase in found.phases})
    assert [point.event for point in found.timeline] == sorted({point.event for point in found.timeline})


def test_what_is_kept_of_a_step_is_small_and_its_segments_hold_its_tensors(found: DryRun) -> None:
    assert len(found.timeline) < 2000
    assert all(point.reserved_bytes >= sum(point.bytes_by_category) for point in found.timeline)
    # The weights are still there at the end: what is freed as the run ends is no part of a step.
    weights = found.categories.index("parameters")
    assert len({point.bytes_by_category[weights] for point in found.timeline}) == 1


def test_every_state_is_named_by_its_module_and_layers_are_one_line() -> None:
    found = dry_run(Setup(**SETUPS[0]))
    states = [holder for holder in found.holders if holder.category in ("parameters", "gradients", "optimizer")]
    assert all(holder.module for holder in states)
    mlp = next(h for h in states if h.category == "optimizer" and h.module == "model.layers.*.mlp.up_proj")
    shape = resolve_model("small")
    assert mlp.layers == shape.layers
    # Two fp32 moments of every weight of up_proj in all layers, in whole blocks.
    assert mlp.bytes == pytest.approx(2 * 4 * shape.layers * shape.hidden * shape.plain_ffn, rel=0.001)


def _sawtooth(steps: int, teeth: int) -> Stream:
    """Steps of ``teeth`` allocations, each freed at once; tooth ``i`` has ``i % 97 + 1`` bytes."""
    stream = Stream()
    stream.begin("load")
    for _ in range(steps):
        stream.begin("forward")
        for tooth in range(teeth):
            index = stream.birth(Storage(bytes=tooth % 97 + 1, category="activations", layer=None, holder=""), None)
            stream.death(index, None)
        stream.begin("between")
    return stream


def test_a_thinned_step_keeps_the_highest_moment_of_every_stretch() -> None:
    stream = _sawtooth(2, 20_000)
    blocks = [storage.bytes for storage in stream.storages]
    start, end = step_around(stream, len(stream.events) - 10, len(stream.events))
    points, categories = timeline(stream, blocks, [(0, 0)], peak_at=start + 1, until=len(stream.events))
    assert categories == ("activations",) and len(points) < 2000
    stretch = (end - start) // 20
    for left in range(start, end - stretch, stretch):
        assert max(p.bytes_by_category[0] for p in points if left <= p.event < left + stretch) == 97


def test_a_stream_that_broke_off_ends_where_it_broke() -> None:
    stream = _sawtooth(1, 100)
    assert step_around(stream, 5, 50) == (1, 50)
    points, _ = timeline(stream, [s.bytes for s in stream.storages], [(0, 0)], peak_at=5, until=50)
    assert points[-1].event < 50
