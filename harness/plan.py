"""What a fine-tune is to do: one frozen record, and the part of it that a resumed run must share with the first."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from estimator.errors import InputError
from estimator.setup import Setup
from harness.data import TokenData
from harness.prompts import PROMPT_FORMATS
from profiler.files import write_whole

SCHEMA = "vramcalc/run/1"
RUN_FILE = "run.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """A fine-tune as asked for. Raises InputError for values that mean nothing."""

    setup: Setup
    out: Path
    """Where log, checkpoints, result and model go."""
    data: str | None = None
    """A file, a directory, a hub id, or ``None`` for the offline instruction set."""
    prompt_format: str = "chat"
    samples: int | None = None
    """Sequences of an epoch; ``None`` for all that the data has."""
    dataset_tokens: int | None = None
    """The same as an amount of tokens, rounded up to whole sequences."""
    epochs: int = 3
    steps: int | None = None
    """Optimizer steps, in place of ``epochs``."""
    learning_rate: float = 5e-5
    """The first one; it falls linearly to zero over the run, as Trainer's default schedule has it."""
    keep: int = 2
    """The newest checkpoints that are kept, besides the best one."""
    save_steps: int | None = None
    """Steps between checkpoints; ``None`` for one at the end of each epoch."""
    eval_steps: int | None = None
    """Steps between further evaluations; one is made at the end of each epoch in any case."""
    seed: int = 0
    """Of the data's order, of random weights and of dropout."""
    force: bool = False
    """Train even though the estimate says that it does not fit."""
    restart: bool = False
    """Discard what ``out`` holds of an earlier run."""
    cache: Path | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "dataset_tokens", "epochs", "steps", "keep", "save_steps", "eval_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: {value} is too small; write --{name.replace('_', '-')} 1 or more")
        if self.setup.seq < 2:
            raise InputError("seq: in a sequence of 1 token there is no next one to learn; write --seq 2 or more")
        if self.samples is not None and self.dataset_tokens is not None:
            raise InputError("dataset_tokens: means the same as samples; write --dataset-tokens or --samples, not both")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(
                f"learning_rate: {self.learning_rate} is not a rate; write for example --learning-rate 5e-5"
            )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed: {self.seed} is not in 0 to 4294967295; write for example --seed 0")
        if self.prompt_format not in PROMPT_FORMATS:
            raise InputError(
                f"prompt_format: {self.prompt_format!r} is not known; write --prompt-format with one of "
                f"{', '.join(PROMPT_FORMATS)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A plan's steps, once the data is known. Every step is whole: what fills no step is left out of each epoch."""

    samples: int
    """Sequences of an epoch over all devices."""
    steps: int
    steps_per_epoch: int
    eval_steps: int | None
    save_steps: int | None

    @property
    def epochs(self) -> float:
        return self.steps / self.steps_per_epoch

    def evaluates_after(self, step: int) -> bool:
        return self._ends_epoch(step) or (self.eval_steps is not None and step % self.eval_steps == 0)

    def saves_after(self, step: int) -> bool:
        if step == self.steps:
            return True
        return self._ends_epoch(step) if self.save_steps is None else step % self.save_steps == 0

    def _ends_epoch(self, step: int) -> bool:
        return step == self.steps or step % self.steps_per_epoch == 0


def schedule(plan: TrainPlan, data: TokenData) -> Schedule:
    """The steps of ``plan`` over ``data``. Raises InputError where the data has fewer sequences than asked for."""
    setup = plan.setup
    samples = plan.samples or data.samples
    if plan.dataset_tokens is not None:
        samples = math.ceil(plan.dataset_tokens / setup.seq)
    if samples > data.samples:
        field = "samples" if plan.samples else "dataset_tokens"
        most = data.samples if plan.samples else data.samples * setup.seq
        raise InputError(
            f"{field}: {data.name} has {data.samples} sequences of {setup.seq} tokens, not {samples}; "
            f"write --{field.replace('_', '-')} {most} or less, and --epochs to repeat them"
        )
    sequences_per_step = setup.batch * setup.accumulation * setup.data_ranks
    steps_per_epoch = samples // sequences_per_step
    if not steps_per_epoch:
        raise InputError(
            f"batch: one step takes {sequences_per_step} sequences and an epoch of {data.name} has {samples}; "
            "write a smaller --batch or --accumulation, a shorter --seq, or more data"
        )
    return Schedule(
        samples=steps_per_epoch * sequences_per_step,
        steps=plan.steps or plan.epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        eval_steps=plan.eval_steps,
        save_steps=plan.save_steps,
    )


def run_identity(plan: TrainPlan, steps: Schedule, data: TokenData) -> dict[str, Any]:
    """Everything that changes a loss or a weight, by name. A run is resumed only where all of it is the same."""
    return {
        **plan.setup.resolved().as_dict(),
        "data": data.name,
        "data_fingerprint": data.fingerprint,
        "prompt_format": plan.prompt_format,
        "samples": steps.samples,
        "steps": steps.steps,
        "learning_rate": plan.learning_rate,
        "save_steps": plan.save_steps,
        "eval_steps": plan.eval_steps,
        "seed": plan.seed,
    }


def claim_identity(out: Path, identity: dict[str, Any]) -> bool:
    """Writes the identity into ``out`` if there is none; whether one was there. Raises InputError where it differs."""
    path = out / RUN_FILE
    if not path.exists():
        write_whole(path, (json.dumps({"schema": SCHEMA, **identity}, indent=1) + "\n").encode())
        return False
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(earlier, dict)
    except (OSError, ValueError, AssertionError):
        raise InputError(f"out: {path} is damaged; write --restart to begin anew, or another --out") from None
    for name, value in identity.items():
        if earlier.get(name) != value:
            raise InputError(
                f"out: {out} holds a run with {name} {earlier.get(name)}, not {value}; "
                "write --restart to begin anew, or another --out"
            )
    return True
