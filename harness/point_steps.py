"""The steps of one profiled point: model, loop, phases told to the meters, checkpoint.

In order: two steps whose memory is traced (the first allocates the optimizer's state), warm-up steps, timed steps, a
checkpoint.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from estimator.memory.checkpoint import checkpoint_estimate
from estimator.model.catalog import resolve_model
from estimator.setup import Setup
from profiler.device import LocalDevice
from profiler.disk import checkpoint_size
from profiler.energy import energy_meter
from profiler.memory import MemoryMeter
from profiler.timing import StepClock, StepTimes

if TYPE_CHECKING:
    import torch

    from harness.data import TokenData
    from harness.point import Procedure

TRACED_STEPS = 2


class Watch:
    """Turns the phases that a loop reports into traced, warm-up and timed steps."""

    def __init__(self, meter: MemoryMeter, device: LocalDevice, procedure: Procedure) -> None:
        self.meter = meter
        self.device = device
        self._procedure = procedure
        self._clock = StepClock(meter.synchronize)
        self._energy = energy_meter(device.kind)
        self._joules: list[float] = []
        self._ended = 0

    def enter(self, phase: str) -> None:
        timed_from = TRACED_STEPS + self._procedure.warmup_steps
        if phase == "between":
            self._ended += 1
        if self._ended < timed_from:
            self.meter.enter(phase)
        if phase != "between":
            return
        if self._ended == TRACED_STEPS:
            self.meter.end_tracing()
        if self._ended >= timed_from:
            self._clock.tick()
        if self._energy is not None and self._ended in (timed_from, self._procedure.steps):
            self._joules.append(self._energy.joules())

    def times(self) -> StepTimes:
        return self._clock.times()

    def joules_per_step(self) -> float | None:
        """``None`` without a meter, and where the steps were over before its counter moved."""
        if len(self._joules) < 2 or self._joules[1] <= self._joules[0]:
            return None
        return (self._joules[1] - self._joules[0]) / self._procedure.timed_steps


def build_for(setup: Setup, device: LocalDevice) -> torch.nn.Module:
    """On a GPU random weights are drawn there, by ``_start``; DoRA's adapters are computed from them as they are made."""
    from estimator.building.model import build_model

    return build_model(setup, drawn=not _draws_there(setup, device.kind))


def _draws_there(setup: Setup, kind: str) -> bool:
    from estimator.building.model import is_pretrained

    return kind == "cuda" and not is_pretrained(setup.model) and setup.method != "dora"


def _start(setup: Setup, model: torch.nn.Module, watch: Watch) -> None:
    """The model is where it trains."""
    from harness.cuda_process import draw_weights

    if _draws_there(setup, watch.device.kind):
        draw_weights(getattr(model, "_orig_mod", model))
    watch.meter.start(model)


def train_point(
    setup: Setup, model: torch.nn.Module, tokens: TokenData, watch: Watch, procedure: Procedure, scratch: Path
) -> dict[str, Any]:
    """Runs the steps; the columns of the checkpoint, for which training waited (the system may write to the disk later)."""
    limit = procedure.checkpoint_limit_bytes
    saves = limit is None or checkpoint_estimate(resolve_model(setup.model), setup).bytes <= limit
    run = _run_loop if setup.framework == "torch-loop" else _run_trainer
    directory, seconds = run(setup, model, tokens, watch, procedure.steps, scratch / "checkpoint", saves=saves)
    size = checkpoint_size(directory) if saves else None
    shutil.rmtree(scratch / "checkpoint", ignore_errors=True)
    if size is None:
        return {}
    return {
        "checkpoint_bytes": size.total_bytes,
        "checkpoint_model_bytes": size.model_bytes,
        "checkpoint_optimizer_bytes": size.optimizer_bytes,
        "checkpoint_seconds": seconds,
    }


def _run_loop(
    setup: Setup, model: torch.nn.Module, tokens: TokenData, watch: Watch, steps: int, out: Path, *, saves: bool
) -> tuple[Path, float]:
    from harness.torch_loop import TorchLoop

    loop = TorchLoop(setup, model, tokens.train, on_phase=watch.enter)
    _start(setup, loop.model, watch)
    loop.train(steps)
    started = time.perf_counter()
    if saves:
        loop.save(out)
    return out, time.perf_counter() - started


def _run_trainer(
    setup: Setup, model: torch.nn.Module, tokens: TokenData, watch: Watch, steps: int, out: Path, *, saves: bool
) -> tuple[Path, float]:
    from transformers import TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint

    from harness.trainer import PhaseTrainer, training_arguments

    moments: list[float] = []

    class SaveTimer(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            moments[:] = [time.perf_counter()]

        def on_save(self, *args: Any, **kwargs: Any) -> None:
            moments.append(time.perf_counter())

    saving = {"save_strategy": "steps", "save_steps": steps} if saves else {}
    arguments = training_arguments(setup, output_dir=out, max_steps=steps, **saving)
    trainer = PhaseTrainer(
        model=model,
        args=arguments,
        train_dataset=tokens.train,
        on_phase=watch.enter,
        callbacks=[SaveTimer()],
    )
    _start(setup, model, watch)
    trainer.train()
    if not saves:
        return out, 0.0
    directory = get_last_checkpoint(str(out))
    assert directory is not None and len(moments) == 2, "Trainer wrote no checkpoint at its last step"
    return Path(directory), moments[1] - moments[0]


def point_meter(device: LocalDevice, trace: Path | None, *, source: str) -> MemoryMeter:
    if device.kind != "cuda":
        from profiler.cpu_memory import CpuMemoryMeter

        return CpuMemoryMeter()
    from profiler.allocator_recording import RecordingMeter
    from profiler.cuda_memory import CudaMemoryMeter

    meter = CudaMemoryMeter()
    return meter if trace is None else RecordingMeter(meter, trace, source=source)
