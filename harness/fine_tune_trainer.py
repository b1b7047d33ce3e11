"""The Trainer of a full fine-tune: a log line for each loss, whole checkpoints, the best one kept.

Loads torch and transformers on import; import it where training happens.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from estimator.errors import InputError
from harness.checkpoints import check_room, complete, discard, prune, staging_directory
from harness.child_errors import explain_error
from harness.plan import Schedule
from harness.trainer import PhaseTrainer
from harness.training_log import LogEntry, TrainingLog
from profiler.disk import CheckpointSize, checkpoint_size


class FineTuneTrainer(PhaseTrainer):
    """Trainer that evaluates and saves as ``steps`` says.

    It decides both at the end of a step and evaluates before it saves, so that a checkpoint never lacks the evaluation
    of its own step: Trainer's own strategies evaluate at the end of an epoch and may save before that, and a run
    resumed from there would have skipped one evaluation.
    """

    def __init__(
        self,
        *,
        out: Path,
        steps: Schedule,
        keep: int,
        log: TrainingLog | None,
        sharded: bool,
        synchronize: Callable[[], None],
        is_traced: Callable[[], bool],
        on_step_done: Callable[[int], None],
        on_entry: Callable[[LogEntry], None],
        **kwargs: Any,
    ) -> None:
        self._out = out
        self._steps = steps
        self._keep = keep
        self._training_log = log
        self._sharded = sharded
        self._synchronize = synchronize
        self._is_traced = is_traced
        self._on_step_done = on_step_done
        self._on_entry = on_entry
        self._saving = False
        self._best_on_disk: int | None = None
        self._step_began = time.perf_counter()
        self._step_seconds = 0.0
        self._saving_seconds: list[float] = []
        self.checkpoint_size: CheckpointSize | None = None
        super().__init__(callbacks=[_Moments(self)], **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._step_began = time.perf_counter()
        return super().train(*args, **kwargs)

    @property
    def median_saving_seconds(self) -> float | None:
        """Of one checkpoint, until it is on the disk; ``None`` where none was written."""
        return statistics.median(self._saving_seconds) if self._saving_seconds else None

    def begin(self) -> None:
        """Training starts, or goes on from a checkpoint whose state has been read."""
        self._best_on_disk = self.state.best_global_step or None

    def end_step(self) -> None:
        """The step is over: its time, and whether an evaluation and a checkpoint follow."""
        self._synchronize()
        self._step_seconds = time.perf_counter() - self._step_began
        step = self.state.global_step
        self.control.should_log = True
        self.control.should_evaluate = self._steps.evaluates_after(step)
        self.control.should_save = self._steps.saves_after(step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        # Every checkpoint would carry all losses so far; the log file has them.
        self.state.log_history.clear()
        if "loss" in logs:
            self._add("train", logs["loss"], self._step_seconds, learning_rate=logs["learning_rate"])
        elif "eval_loss" in logs:
            self._add("eval", logs["eval_loss"], logs["eval_runtime"])

    def _add(self, kind: str, loss: float, seconds: float, learning_rate: float | None = None) -> None:
        step = self.state.global_step
        if not math.isfinite(loss):
            raise InputError(
                f"learning_rate: the {kind} loss is {loss} after step {step}; write a lower --learning-rate, "
                "or --precision bf16-mixed where it is fp16"
            )
        entry = LogEntry(
            step=step,
            epoch=step / self._steps.steps_per_epoch,
            kind=kind,
            loss=loss,
            seconds=seconds,
            learning_rate=learning_rate,
            traced=kind == "train" and self._is_traced(),
        )
        if self._training_log is not None:  # the first rank's
            self._training_log.append(entry)
            self._on_entry(entry)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._on_step_done(self.state.global_step)
        self._step_began = time.perf_counter()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best, loss = self.state.best_metric, metrics["eval_loss"]
        if best is not None and loss >= best:
            return False
        self.state.best_metric, self.state.best_global_step = loss, self.state.global_step
        self.control.should_save = True
        return True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _readable(resume_from_checkpoint):
            TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            if self._sharded:
                from harness.sharded_files import load_model

                load_model(self.model, Path(resume_from_checkpoint))
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            if self._sharded and checkpoint is not None:
                from harness.sharded_files import load_optimizer

                load_optimizer(self.model, self._bare_optimizer, Path(checkpoint))
                assert self.lr_scheduler is not None
                self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
            else:
                super()._load_optimizer_and_scheduler(checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from harness.sharded_files import save_optimizer

        save_optimizer(self.model, self._bare_optimizer, Path(output_dir))
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Weights, or adapters, as ``from_pretrained`` reads them; each rank must call it."""
        if not self._sharded:
            super().save_model(output_dir, _internal_call)
            return
        from estimator.building.loading import write_weights

        assert output_dir is not None
        write_weights(self.model, Path(output_dir), is_main=bool(self.args.should_save), published=False)
        if self.args.should_save:
            torch.save(self.args, Path(output_dir) / TRAINING_ARGS_NAME)

    @property
    def _bare_optimizer(self) -> torch.optim.Optimizer:
        """Without accelerate's wrapper."""
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)  # type: ignore[no-any-return]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_rng_state(checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        return str(staging_directory(self._out)) if self._saving else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's own checkpoint, written aside and renamed when it is whole and on the disk."""
        began = time.perf_counter()
        step = self.state.global_step
        if self._training_log is not None:
            self._training_log.sync()
            # Makes room first, so that --keep and the best are the most there is (one more with --keep 1).
            prune(self._out, keep=max(self._keep - 1, 1), spared=self._best_on_disk)
            check_room(self._out)
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(staging_directory(self._out), ignore_errors=True)
            check_room(self._out)
            raise
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        self._best_on_disk = self.state.best_global_step or None
        if self._training_log is not None:
            written = complete(self._out, step)
            discard(staging_directory(self._out))
            prune(self._out, keep=self._keep, spared=self._best_on_disk)
            self.checkpoint_size = checkpoint_size(written.path)
        self._saving_seconds.append(time.perf_counter() - began)


@contextlib.contextmanager
def _readable(checkpoint: str | None) -> Iterator[None]:
    """Trainer reads a checkpoint with safetensors, JSON and ``torch.load(weights_only=True)``; each raises its own."""
    try:
        yield
    except Exception as error:
        kind, reason = explain_error(error)
        if kind == "oom":
            raise
        raise InputError(
            f"out: {checkpoint} is damaged ({reason}); delete it to go on from the one before, or write --restart"
        ) from error


class _Moments(TrainerCallback):
    def __init__(self, trainer: FineTuneTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.end_step()
