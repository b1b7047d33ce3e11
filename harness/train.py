"""The full fine-tune: estimate, refuse or train, evaluate, save, resume, and compare what was predicted with what was."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from estimator.building.model import build_model, check_buildable, is_pretrained
from estimator.errors import DoesNotFitError, InputError
from estimator.model.catalog import resolve_model
from estimator.model.hub import settle_for_the_cache_without_a_network
from estimator.result import Estimate
from estimator.setup import Setup
from harness.checkpoints import checkpoints, discard, staging_directory
from harness.child_errors import explain_error
from harness.cuda_process import settle_allocator
from harness.data import load_tokens
from harness.forecast import forecast, refuse_what_does_not_fit
from harness.meters import memory_meter
from harness.plan import TrainPlan, claim_identity, run_identity, schedule
from harness.run_directory import MODEL_DIRECTORY, RESULT_FILE, forget_run, run_directory
from harness.samples import find_source
from harness.tokenizer import text_tokenizer
from harness.train_outcome import Measured, Run, outcome
from harness.train_result import TrainResult, read_result, write_result
from harness.training_log import LogEntry, TrainingLog
from profiler.cpu_memory import resident_peak_bytes
from profiler.device import LocalDevice, local_device
from profiler.memory import MemoryMeter, MemoryPeaks

if TYPE_CHECKING:
    from estimator.calibration.fitting import Calibration
    from harness.fine_tune_trainer import FineTuneTrainer

TRACED_STEPS = 2
"""Steps at the start of a run, or of its resumption, whose memory is traced: the second has the optimizer's state."""
_EVALUATION_TOKENS = 32_768
_EVALUATION_SHARE = 4
_EVALUATION_SEQUENCES = 8


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


def train(
    plan: TrainPlan,
    *,
    on_estimate: Callable[[Estimate], None] = lambda _: None,
    on_progress: Callable[[TrainProgress], None] = lambda _: None,
    calibration: Calibration | None = None,
    calibration_name: str | None = None,
) -> TrainResult:
    """Trains ``plan`` to its end, from its last complete checkpoint if there is one; a finished run is only read.

    On a CPU, and with the same number of threads, a run that was killed and resumed has the losses and weights of one
    that was not, to the last bit. Raises InputError before any work for what cannot be run or read, DoesNotFitError for
    what does not fit in memory or on the disk (beforehand unless ``plan.force``, or when it runs out), MissingError.
    """
    # As profiled points run, from which step times are predicted; it counts only before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    device = local_device()
    plan = dataclasses.replace(plan, setup=_local_setup(plan.setup, device))
    if is_pretrained(plan.setup.model):
        settle_for_the_cache_without_a_network()
    resolve_model(plan.setup.model)
    check_buildable(plan.setup)
    find_source(plan.data, cache=plan.cache)
    with run_directory(plan.out):
        data = load_tokens(
            plan.data,
            model=plan.setup.model,
            seq=plan.setup.seq,
            pack=plan.setup.pack,
            sequences=None,
            cache=plan.cache,
            prompt_format=plan.prompt_format,
            seed=plan.seed,
        )
        steps = schedule(plan, data)
        predicted = forecast(plan, steps, device, calibration=calibration, calibration_name=calibration_name)
        on_estimate(predicted)
        meter = None
        if device.kind == "cuda":
            settle_allocator(plan.setup)
            # What the GPU holds now is others': made before Trainer's arguments, which initialise CUDA.
            meter = memory_meter(device)
        # Not before: it loads torch and transformers, and what is wrong so far is said at once.
        _check_arguments(plan)
        if not plan.force:
            refuse_what_does_not_fit(predicted, plan.out)
        if plan.restart:
            forget_run(plan.out)
        known = claim_identity(plan.out, run_identity(plan, steps, data))
        if known and (plan.out / RESULT_FILE).exists():
            return read_result(plan.out / RESULT_FILE)
        run = Run(plan=plan, setup=plan.setup, device=device, data=data, steps=steps, predicted=predicted)
        try:
            return _train(run, on_progress, meter)
        except (MemoryError, RuntimeError, OSError) as error:
            kind, reason = explain_error(error)
            if kind == "oom":
                raise DoesNotFitError(
                    f"memory: the training ran out of it ({reason}); write a smaller --batch or --seq, "
                    "--checkpointing full or --method lora"
                ) from error
            raise


def _local_setup(setup: Setup, device: LocalDevice) -> Setup:
    if setup.accelerator is not None and setup.accelerator.lower() != device.name.lower():
        raise InputError(
            f"accelerator: {setup.accelerator} is not what this machine has ({device.name}); leave out --gpu"
        )
    return dataclasses.replace(setup, accelerator=device.name, eval_batch=setup.eval_batch or setup.batch).resolved()


def _check_arguments(plan: TrainPlan) -> None:
    """What Trainer would refuse, before anything is built or kept."""
    from harness.trainer import training_arguments

    training_arguments(plan.setup, output_dir=plan.out)


def _train(run: Run, on_progress: Callable[[TrainProgress], None], meter: MemoryMeter | None) -> TrainResult:
    out, total = run.plan.out, run.steps.steps
    done = checkpoints(out)
    resumed_step = done[-1].step if done else 0
    log = TrainingLog(out, resumed_step=resumed_step)
    meter = meter or memory_meter(run.device)  # on a CPU: right before the model
    progress = _Progress(run, log, on_progress)
    trainer = _trainer(run, meter, log, progress, resumed_step)
    try:
        progress.send()
        trainer.train(resume_from_checkpoint=str(done[-1].path) if done else None)
    finally:
        peaks = meter.stop()  # in any case: a trace that an error cut short would go on
        log.close()
    assert trainer.state.global_step == total, (trainer.state.global_step, total)
    measured = _measured(trainer, peaks, run.device, ran=total - resumed_step)
    _save_model(run, trainer)
    result = outcome(run, log.entries, measured)
    write_result(out / RESULT_FILE, result)
    return result


def _trainer(run: Run, meter: MemoryMeter, log: TrainingLog, progress: _Progress, resumed_step: int) -> FineTuneTrainer:
    from torch.utils.data import Subset

    from harness.fine_tune_trainer import FineTuneTrainer
    from harness.trainer import training_arguments

    plan, setup = run.plan, run.setup
    model = build_model(setup, seed=plan.seed)
    arguments = training_arguments(
        setup,
        output_dir=plan.out,
        max_steps=run.steps.steps,
        learning_rate=plan.learning_rate,
        seed=plan.seed,
        data_seed=plan.seed,
        logging_nan_inf_filter=False,  # Trainer would log the mean of earlier losses in place of a nan
    )
    tracer = _Tracer(meter, resumed_step + TRACED_STEPS)
    trainer = FineTuneTrainer(
        model=model,
        args=arguments,
        train_dataset=Subset(run.data.train, range(run.steps.samples)),
        eval_dataset=Subset(run.data.evaluation, range(_evaluated(run))),
        on_phase=meter.enter,
        out=plan.out,
        steps=run.steps,
        keep=plan.keep,
        log=log,
        synchronize=meter.synchronize,
        is_traced=lambda: tracer.tracing,
        on_step_done=tracer.step_done,
        on_entry=progress.entry,
    )
    assert trainer.model is not None
    meter.start(trainer.model)
    return trainer


def _evaluated(run: Run) -> int:
    """Held-out sequences that an evaluation reads: enough to see a trend, few beside an epoch.

    At most 32,768 tokens and a quarter of an epoch's sequences, but eight sequences if there are so many.
    """
    wanted = min(_EVALUATION_TOKENS // run.setup.seq, run.steps.samples // _EVALUATION_SHARE)
    return min(len(run.data.evaluation), max(wanted, _EVALUATION_SEQUENCES))  # type: ignore[arg-type]


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
    def __init__(self, run: Run, log: TrainingLog, on_progress: Callable[[TrainProgress], None]) -> None:
        self._run = run
        self._log = log
        self._on_progress = on_progress

    def entry(self, _: LogEntry) -> None:
        self.send()

    def send(self) -> None:
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


def _save_model(run: Run, trainer: FineTuneTrainer) -> None:
    """Weights, configuration and tokenizer, as ``from_pretrained`` reads them; written aside and renamed."""
    out = run.plan.out
    written = staging_directory(out) / MODEL_DIRECTORY
    model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    model.save_pretrained(written)
    text_tokenizer(run.setup.model, cache=run.plan.cache).encoder.save(written)
    discard(out / MODEL_DIRECTORY)
    written.rename(out / MODEL_DIRECTORY)
    discard(staging_directory(out))


def _measured(trainer: FineTuneTrainer, peaks: MemoryPeaks, device: LocalDevice, *, ran: int) -> Measured:
    return Measured(
        peaks=peaks if ran else None,
        settled=ran > TRACED_STEPS or (ran > 0 and device.kind == "cuda"),
        host_peak_bytes=resident_peak_bytes(),
        checkpoint=trainer.checkpoint_size,
        checkpoint_seconds=trainer.median_saving_seconds,
    )
