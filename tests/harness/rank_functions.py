"""What ranks of tests run; importable by a fresh process."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from estimator.errors import InputError
from estimator.result import Estimate
from harness.plan import TrainPlan
from harness.world import World
from profiler.device import LocalDevice

Send = Callable[[Any], None]


def tell(world: World, send: Send, word: str) -> None:
    named = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    send({"rank": world.rank, "word": word, **named})


def end(world: World, send: Send, how: str) -> None:
    """Rank 1 ends as ``how`` says."""
    send(os.getpid())
    if world.rank == 0 or how == "wait":
        time.sleep(0.5 if how == "bug" else 600)
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:1")
    time.sleep(0.7)
    if how == "input":
        raise InputError("seq: too long; write a shorter one")
    if how == "memory":
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    print(1 / 0)


def train_all(world: World, send: Send, runs: Sequence[tuple[TrainPlan, LocalDevice, Estimate]]) -> None:
    """One rank of trainings that follow each other. Where a run's directory ends in ``-resumed`` its first half is that of
    the run before, checkpoint and log."""
    from harness.train import _launched
    from harness.world import process_group

    with process_group(world, "cpu"):
        for plan, device, predicted in runs:
            if world.is_main:
                plan.out.mkdir(parents=True)
                if plan.out.name.endswith("-resumed"):
                    before = plan.out.with_name(plan.out.name.removesuffix("-resumed"))
                    shutil.copytree(before / "checkpoint-4", plan.out / "checkpoint-4")
                    shutil.copy(before / "training_log.jsonl", plan.out)
            _launched(world, send, plan, device, predicted)
