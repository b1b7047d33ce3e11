"""A training from its model to its result, as one process runs it: the only one, or one rank of several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from estimator.building.model import build_model
from estimator.errors import InputError
from harness.checkpoints import checkpoints, discard, staging_directory
from harness.meters import memory_meter
from harness.run_directory import MODEL_DIRECTORY, RESULT_FILE
from harness.several import lone
from harness.tokenizer import text_tokenizer
from harness.train_outcome import Measured, Run, outcome
from harness.train_result import write_result
from harness.training_log import LogEntry, TrainingLog
from harness.world import ALONE, World, agreed, barrier, gathered
from profiler.cpu_memory import resident_peak_bytes
from profiler.disk import CheckpointSize
from profiler.memory import MemoryMeter

if TYPE_CHECKING:
    from harness.fine_tune_trainer import FineTuneTrainer

TRACED_STEPS = 2
"""Steps at the start of a run, or of its resumption, whose memory is traced: the second has the optimizer's state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainProgress:
    """How far a training is; sent when it starts and after each step and evaluation."""

    step: int
    steps: int
    epoch: float
    loss: float | None
    """Of the last step."""
    evaluation_loss: float | None
    """Of the last evaluation."""
    seconds_left: float | None


class _Training(Protocol):
    """A framework's fine-tune, ready to start."""

    def train(self, checkpoint: Path | None) -> None: ...

    def write_model(self, directory: Path) -> None: ...

    def saved(self) -> tuple[CheckpointSize | None, float | None]: ...


def train_rank(
    run: Run,
    world: World = ALONE,
    *,
    on_progress: Callable[[TrainProgress], None] = lambda _: None,
    meter: MemoryMeter | None = None,
) -> None:
    """Trains to the end, from the last complete checkpoint if there is one; the first rank writes the result.

    Several ranks are a process group already. ``meter`` is one that was made before a GPU was touched.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # of its own, for every checkpoint's files
    out, total = run.plan.out, run.steps.steps
    done = checkpoints(out) if world.is_main else []
    resumed_step, path = agreed(world, (done[-1].step, done[-1].path) if done else (0, None))
    log = TrainingLog(out, resumed_step=resumed_step) if world.is_main else None
    meter = meter or memory_meter(run.device, world.local_rank)  # on a CPU: right before the model
    progress = _Progress(run, log, on_progress)
    tracer = _Tracer(meter, resumed_step + TRACED_STEPS)
    make = _loop if run.setup.framework == "torch-loop" else _trainer
    training = make(run, world, meter, log, tracer, progress)
    try:
        progress.send()
        training.train(path)
    finally:
        peaks = meter.stop()  # in any case: a trace that an error cut short would go on
        if log is not None:
            log.close()
    ran = total - resumed_step
    _save_model(run, world, training)
    by_rank = gathered(world, peaks.allocated_bytes if ran else None)
    if log is not None:
        size, seconds = training.saved()
        measured = Measured(
            peaks=peaks if ran else None,
            allocated_by_rank=tuple(by_rank) if ran else (),
            settled=ran > TRACED_STEPS or (ran > 0 and run.device.kind == "cuda"),
            host_peak_bytes=resident_peak_bytes(),
            checkpoint=size,
            checkpoint_seconds=seconds,
        )
        write_result(out / RESULT_FILE, outcome(run, log.entries, measured))
    barrier(world)


def _save_model(run: Run, world: World, training: _Training) -> None:
    """Weights, configuration and tokenizer, as ``from_pretrained`` reads them; written aside and renamed."""
    out = run.plan.out
    written = staging_directory(out) / MODEL_DIRECTORY
    training.write_model(written)
    if world.is_main:
        text_tokenizer(run.setup.model, cache=run.plan.cache).encoder.save(written)
        discard(out / MODEL_DIRECTORY)
        written.rename(out / MODEL_DIRECTORY)
        discard(staging_directory(out))


class _Loop:
    """The plain loop."""

    def __init__(self, loop: Any, state: Any) -> None:
        self._loop, self._state = loop, state

    def train(self, checkpoint: Path | None) -> None:
        self._loop.train(checkpoint)

    def write_model(self, directory: Path) -> None:
        self._state.write_model(directory, self._loop.module, published=True)

    def saved(self) -> tuple[CheckpointSize | None, float | None]:
        return self._state.checkpoint_size, self._state.median_saving_seconds


def _loop(
    run: Run, world: World, meter: MemoryMeter, log: TrainingLog | None, tracer: _Tracer, progress: _Progress
) -> _Training:
    from harness.fine_tune_loop import FineTuneLoop
    from harness.fine_tune_state import FineTuneState
    from harness.ranks_model import build_for_rank

    model = build_for_rank(run.setup, world, seed=run.plan.seed, kind=run.device.kind)
    state = FineTuneState(
        run,
        world,
        log,
        on_phase=meter.enter,
        synchronize=meter.synchronize,
        is_traced=lambda: tracer.tracing,
        on_step_done=tracer.step_done,
        on_entry=progress.entry,
    )
    loop = FineTuneLoop(run, world, model, state)
    meter.start(loop.held())
    return _Loop(loop, state)


class _Trainer:
    """transformers' Trainer."""

    def __init__(self, trainer: FineTuneTrainer, steps: int, *, sharded: bool) -> None:
        self._trainer, self._steps, self._sharded = trainer, steps, sharded

    def train(self, checkpoint: Path | None) -> None:
        self._trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        assert self._trainer.state.global_step == self._steps, (self._trainer.state.global_step, self._steps)

    def write_model(self, directory: Path) -> None:
        model: Any = self._trainer.accelerator.unwrap_model(self._trainer.model, keep_torch_compile=False)
        if self._sharded:
            from estimator.building.loading import write_weights

            write_weights(model, directory, is_main=bool(self._trainer.args.should_save), published=True)
        elif self._trainer.args.should_save:
            model.save_pretrained(directory)

    def saved(self) -> tuple[CheckpointSize | None, float | None]:
        return self._trainer.checkpoint_size, self._trainer.median_saving_seconds


def _trainer(
    run: Run, world: World, meter: MemoryMeter, log: TrainingLog | None, tracer: _Tracer, progress: _Progress
) -> _Training:
    from torch.utils.data import Subset

    from harness.fine_tune_trainer import FineTuneTrainer
    from harness.ranks_model import local_tensors
    from harness.sharded_files import is_sharded
    from harness.trainer import ranks_arguments, training_arguments

    plan, sharded = run.plan, is_sharded(run.setup)
    # Trainer moves to the device, and puts DDP around, by itself.
    model: Any = build_model(lone(run.setup), seed=plan.seed) if not sharded else _sharded_model(run, world)
    trainer = FineTuneTrainer(
        model=model,
        args=training_arguments(
            run.setup,
            output_dir=plan.out,
            max_steps=run.steps.steps,
            learning_rate=plan.learning_rate,
            seed=plan.seed,
            data_seed=plan.seed,
            logging_nan_inf_filter=False,  # Trainer would log the mean of earlier losses in place of a nan
            **ranks_arguments(run.setup),
        ),
        train_dataset=Subset(run.data.train, range(run.steps.samples)),
        eval_dataset=Subset(run.data.evaluation, range(run.evaluated)),
        on_phase=meter.enter,
        out=plan.out,
        steps=run.steps,
        keep=plan.keep,
        log=log,
        sharded=sharded,
        synchronize=meter.synchronize,
        is_traced=lambda: tracer.tracing,
        on_step_done=tracer.step_done,
        on_entry=progress.entry,
    )
    meter.start(local_tensors(model) if sharded else model)
    return _Trainer(trainer, run.steps.steps, sharded=sharded)


def _sharded_model(run: Run, world: World) -> Any:
    """accelerate takes a model that is sharded already as it is."""
    from harness.ranks_model import build_for_rank

    model = build_for_rank(run.setup, world, seed=run.plan.seed, kind=run.device.kind)
    ranks = run.setup.shard_size or run.setup.data_ranks
    if any(parameter.shape[0] < ranks for parameter in model.parameters()):
        # It finds parameters by their addresses, and empty shards have none.
        raise InputError(
            f"accelerators: Trainer cannot shard every parameter of {run.setup.model} over {ranks}; write --framework torch-loop"
        )
    return model


class _Tracer:
    """Ends the meter's tracing between two steps, once the last step to be traced is done, its evaluation included."""

    def __init__(self, meter: MemoryMeter, last_step: int) -> None:
        self._meter = meter
        self._last_step = last_step
        self.tracing = True

    def step_done(self, step: int) -> None:
        if self.tracing and step >= self._last_step:
            self._meter.end_tracing()
            self.tracing = False


class _Progress:
    """Of the rank that has the log."""

    def __init__(self, run: Run, log: TrainingLog | None, on_progress: Callable[[TrainProgress], None]) -> None:
        self._run = run
        self._log = log
        self._on_progress = on_progress

    def entry(self, _: LogEntry) -> None:
        self.send()

    def send(self) -> None:
        if self._log is None:
            return
        entries, steps = self._log.entries, self._run.steps
        last: dict[str, LogEntry] = {entry.kind: entry for entry in entries[-50:]}
        step = entries[-1].step if entries else 0
        recent = [entry.seconds for entry in entries[-50:] if entry.kind == "train" and not entry.traced]
        time = self._run.predicted.time
        each = sum(recent) / len(recent) if recent else time.step_seconds.value if time else None
        self._on_progress(
            TrainProgress(
                step=step,
                steps=steps.steps,
                epoch=step / steps.steps_per_epoch,
                loss=last["train"].loss if "train" in last else None,
                evaluation_loss=last["eval"].loss if "eval" in last else None,
                seconds_left=None if each is None else each * (steps.steps - step),
            )
        )
