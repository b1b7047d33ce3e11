"""What comes on top of the steps: against published interruptions, and by what must hold of any run."""

from __future__ import annotations

import dataclasses
import math

import pytest

from estimator.memory.checkpoint import checkpoint_estimate
from estimator.model.catalog import resolve_model
from estimator.run.wall_time import Cadence, RunClock, forward_share, optimal_steps, run_clock
from estimator.setup import Setup
from estimator.units import Interval

ONCE = Cadence(epochs=1.0, save_every_steps=None, eval_every_steps=None, eval_samples=0)


def clock(setup: Setup, *, step: float = 10.0, cadence: Cadence = ONCE, disk: float | None = None) -> RunClock:
    setup, shape = setup.resolved(), resolve_model(setup.model)
    return run_clock(
        setup,
        step_seconds=Interval.exactly(step),
        parameters=8 * 10**9,
        checkpoint=checkpoint_estimate(shape, setup),
        cadence=cadence,
        disk_bytes_per_second=disk,
    )


LLAMA_405B = Setup(model="llama-3.1-405b", accelerators=16384, tensor_parallel=8, pipeline_parallel=16, accumulation=16, accelerator="H100-SXM-80GB")  # fmt: skip


def test_the_llama_3_papers_interruptions_and_effective_time_come_out() -> None:
    # 54 days on 16,384 H100: 466 interruptions, more than 90% of the time effective (The Llama 3 Herd of Models, 3.3.4).
    steps = round(54 * 86_400 * 0.92 / 10)
    run = clock(LLAMA_405B).run(steps)
    assert run.seconds.value / 86_400 == pytest.approx(54, rel=0.03)
    assert run.restarts.value == pytest.approx(466, rel=0.05)
    assert run.goodput.value > 0.90


def test_failures_lose_half_a_segment_and_a_restart_each_where_they_are_rare() -> None:
    cadence = dataclasses.replace(ONCE, save_every_steps=360)
    run = clock(Setup(model="llama-3.1-8b", accelerators=64), cadence=cadence, disk=1e15).run(36_000)
    parts = {part.name: part.amount for part in run.parts}
    failures = (parts["steps"] + parts["start-up"]) * 2.2e-5 * 64 / 3600
    assert parts["failures"] == pytest.approx(failures * (3600 / 2 + 600), rel=0.01)


def test_the_interval_between_checkpoints_is_youngs_and_no_other_loses_less() -> None:
    assert optimal_steps(write_seconds=50, between_failures_seconds=10_000, step_seconds=1) == 1000
    best = clock(LLAMA_405B).run(100_000)
    for factor in (0.25, 0.5, 2, 4):
        other = dataclasses.replace(ONCE, save_every_steps=max(1, round(best.save_every_steps * factor)))
        assert clock(LLAMA_405B, cadence=other).run(100_000).seconds.value >= best.seconds.value


def test_a_small_run_saves_once_an_epoch_and_loses_nothing_to_failures() -> None:
    run = clock(Setup(model="llama-3.2-1b"), cadence=dataclasses.replace(ONCE, epochs=3)).run(300)
    assert (run.checkpoints, run.save_every_steps, run.evaluations) == (3, 100, 0)
    assert run.restarts.value < 1e-4


def test_an_evaluation_takes_forwards_share_of_a_step() -> None:
    setup = Setup(model="llama-3.2-1b", batch=4)
    assert forward_share(setup) == pytest.approx(1 / 3)
    assert forward_share(dataclasses.replace(setup, checkpointing="full", method="lora")) == pytest.approx(1 / 3)
    evaluated = dataclasses.replace(ONCE, eval_samples=40, eval_every_steps=25)
    run = clock(setup, cadence=evaluated).run(100)
    parts = {part.name: part.amount for part in run.parts}
    assert run.evaluations == 4
    assert parts["evaluation"] == pytest.approx(4 * 10 * 10.0 / 3)  # 40 samples are ten micro-batches of four


def test_a_checkpoint_takes_its_bytes_over_the_disk_shared_by_the_machines_that_write() -> None:
    saved = checkpoint_estimate(resolve_model("llama-3.1-8b"), Setup(model="llama-3.1-8b").resolved()).bytes
    one = clock(Setup(model="llama-3.1-8b"), disk=1e9).run(10)
    eight = clock(Setup(model="llama-3.1-8b", accelerators=64), disk=1e9).run(10)
    assert {p.name: p.amount for p in one.parts}["checkpoints"] == pytest.approx(saved / 1e9, rel=1e-3)
    assert {p.name: p.amount for p in eight.parts}["checkpoints"] == pytest.approx(saved / 8e9, rel=1e-3)


def test_a_cluster_that_fails_before_it_can_save_gives_a_finite_number() -> None:
    setup = Setup(model="llama-3.1-405b", accelerators=10**11)
    run = clock(setup, step=1e6).run(1000)
    assert math.isfinite(run.seconds.high) and run.goodput.value < 1e-6


def test_only_a_run_over_several_machines_may_take_much_longer_than_its_steps() -> None:
    one, many = clock(Setup(model="llama-3.1-8b", accelerators=8)), clock(Setup(model="llama-3.1-8b", accelerators=64))
    long, longer = one.run(100_000).seconds, many.run(100_000).seconds
    assert long.high < 1.05 * long.value and longer.high > 1.75 * longer.value


def test_more_epochs_than_steps_never_take_less() -> None:
    setup = Setup(model="llama-3.2-1b", accelerators=512)
    seconds = [
        clock(setup, cadence=dataclasses.replace(ONCE, epochs=epochs)).seconds(1).value for epochs in (1.0, 3.0, 6.0)
    ]
    assert seconds == sorted(seconds)
