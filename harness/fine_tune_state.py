"""What surrounds the steps of the plain loop: its log, the best evaluation, whole checkpoints, and going on from one.

The first rank writes; sharded optimizer states are written by all, through ``torch.distributed.checkpoint``. Loads torch on import.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from estimator.building.loading import inner, write_weights
from estimator.errors import InputError
from harness.checkpoints import check_room, complete, discard, prune, staging_directory
from harness.child_errors import explain_error
from harness.sharded_files import is_sharded, load_model, load_optimizer, save_optimizer
from harness.train_outcome import Run
from harness.training_log import LogEntry, TrainingLog
from harness.world import World, barrier
from profiler.disk import CheckpointSize, checkpoint_size

_STATE_FILE = "trainer_state.json"
_OPTIMIZER_FILE = "optimizer.pt"
_OWN_NAMES = {"save_original_format": False}
"""Of tensors, so that they are read back as they are."""


class FineTuneState:
    """Of one rank; ``log`` is the first one's alone."""

    def __init__(
        self,
        run: Run,
        world: World,
        log: TrainingLog | None,
        *,
        on_phase: Callable[[str], None],
        synchronize: Callable[[], None],
        is_traced: Callable[[], bool],
        on_step_done: Callable[[int], None],
        on_entry: Callable[[LogEntry], None],
    ) -> None:
        self._run, self._world, self._log = run, world, log
        self.enter = on_phase
        self._synchronize, self._is_traced, self._on_step_done, self._on_entry = (
            synchronize, is_traced, on_step_done, on_entry,
        )  # fmt: skip
        self._is_sharded = is_sharded(run.setup)
        self._best: tuple[float, int] | None = None
        self._best_on_disk: int | None = None
        self._best_is_new = False
        self._began = 0.0
        self._saving_seconds: list[float] = []
        self.checkpoint_size: CheckpointSize | None = None

    @property
    def median_saving_seconds(self) -> float | None:
        """Of one checkpoint, until it is on the disk; ``None`` where none was written."""
        return statistics.median(self._saving_seconds) if self._saving_seconds else None

    def begin_step(self) -> None:
        self._began = time.perf_counter()

    def end_step(self, step: int, loss: float, rate: float) -> None:
        self._synchronize()
        self._add("train", step, loss, time.perf_counter() - self._began, rate)

    def evaluated(self, step: int, loss: float, seconds: float) -> None:
        self._add("eval", step, loss, seconds, None)
        if self._best is None or loss < self._best[0]:
            self._best, self._best_is_new = (loss, step), True

    def _add(self, kind: str, step: int, loss: float, seconds: float, rate: float | None) -> None:
        entry = LogEntry(
            step=step,
            epoch=step / self._run.steps.steps_per_epoch,
            kind=kind,
            loss=loss,
            seconds=seconds,
            learning_rate=rate,
            traced=kind == "train" and self._is_traced(),
        )
        if self._log is not None:
            self._log.append(entry)
            self._on_entry(entry)

    def saves_after(self, step: int) -> bool:
        """The best so far is kept too."""
        return self._run.steps.saves_after(step) or self._best_is_new

    def done(self, step: int) -> None:
        self._on_step_done(step)

    def save(self, step: int, model: Any, optimizer: torch.optim.Optimizer) -> None:
        """A checkpoint, written aside and renamed when it is whole and on the disk. Raises DoesNotFitError."""
        began = time.perf_counter()
        out, keep = self._run.plan.out, self._run.plan.keep
        best = self._best[1] if self._best else None
        if self._world.is_main:
            assert self._log is not None
            self._log.sync()
            # Makes room first, so that --keep and the best are the most there is (one more with --keep 1).
            prune(out, keep=max(keep - 1, 1), spared=self._best_on_disk)
            check_room(out)
        directory = staging_directory(out) / f"checkpoint-{step}"
        try:
            self._write(directory, step, model, optimizer)
        except Exception as error:
            if explain_error(error)[0] == "failed" and self._world.is_main:
                discard(staging_directory(out))
                check_room(out)
            raise
        barrier(self._world)
        if self._world.is_main:
            written = complete(out, step)
            discard(staging_directory(out))
            prune(out, keep=keep, spared=best)
            self.checkpoint_size = checkpoint_size(written.path)
        self._best_on_disk, self._best_is_new = best, False
        self._saving_seconds.append(time.perf_counter() - began)

    def _write(self, directory: Path, step: int, model: Any, optimizer: torch.optim.Optimizer) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.write_model(directory, model, published=False)
        if self._is_sharded:
            save_optimizer(model, optimizer, directory)
        elif self._world.is_main:
            torch.save(optimizer.state_dict(), directory / _OPTIMIZER_FILE)
        torch.save(_random_state(), directory / f"rng_state_{self._world.rank}.pth")
        if self._world.is_main:
            state = {"step": step, "best": self._best}
            (directory / _STATE_FILE).write_text(json.dumps(state) + "\n")

    def write_model(self, directory: Path, model: Any, *, published: bool) -> None:
        """Weights and configuration, or adapters, as ``from_pretrained`` reads them; as ``write_weights`` has it."""
        if self._is_sharded:
            write_weights(model, directory, is_main=self._world.is_main, published=published)
        elif self._world.is_main:
            model.save_pretrained(directory, **({} if published or model is not inner(model) else _OWN_NAMES))

    def resume(self, checkpoint: Path, model: Any, optimizer: torch.optim.Optimizer) -> int:
        """Reads everything back; the number of steps that were done. Raises InputError for a damaged checkpoint."""
        try:
            state = json.loads((checkpoint / _STATE_FILE).read_text())
            self._best = None if state["best"] is None else (float(state["best"][0]), int(state["best"][1]))
            self._best_on_disk = self._best[1] if self._best else None
            self._read_model(checkpoint, model)
            self._read_optimizer(checkpoint, model, optimizer)
            name = f"rng_state_{self._world.rank}.pth"
            _set_random_state(torch.load(checkpoint / name, weights_only=True))
            return int(state["step"])
        except Exception as error:
            kind, reason = explain_error(error)
            if kind == "oom":
                raise
            raise InputError(
                f"out: {checkpoint} is damaged ({reason}); delete it to go on from the one before, or write --restart"
            ) from error

    def _read_model(self, checkpoint: Path, model: Any) -> None:
        if self._is_sharded:
            load_model(model, checkpoint)
        elif model is not inner(model):
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(model, load_peft_weights(str(checkpoint), device="cpu"))
        else:
            from safetensors.torch import load_file

            weights: dict[str, torch.Tensor] = {}
            for file in checkpoint.glob("*.safetensors"):
                weights |= load_file(file)
            missing, unexpected = model.load_state_dict(weights, strict=False)
            tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(
                dict(model.named_parameters())
            )
            assert not unexpected and set(missing) <= tied, (missing, unexpected)

    def _read_optimizer(self, checkpoint: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
        if self._is_sharded:
            load_optimizer(model, optimizer, checkpoint)
            return
        held = torch.load(checkpoint / _OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(held)


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
