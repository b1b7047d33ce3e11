"""A training's losses on the disk, one JSON object a line, and what can be read off them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from estimator.errors import InputError
from profiler.files import write_whole

LOG_FILE = "training_log.jsonl"
KINDS = ("train", "eval")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """One optimizer step, or one evaluation after it."""

    step: int
    epoch: float
    """Epochs done after this step."""
    kind: str
    """``train`` or ``eval``."""
    loss: float
    """Mean over the tokens of the step, or of the evaluation set."""
    seconds: float
    """Of the step with the loading of its data, or of the evaluation."""
    learning_rate: float | None = None
    """That the step used; ``None`` for an evaluation."""
    traced: bool = False
    """Its memory was traced, which slows it: its seconds are not the training's."""


class TrainingLog:
    """Appends to a log. Each line is handed to the system as it is written: killing the process loses none of them."""

    def __init__(self, out: Path, *, resumed_step: int) -> None:
        """Drops the entries after ``resumed_step`` (they will come again) and a line that a kill cut short."""
        self.path = out / LOG_FILE
        kept = [entry for entry in read_log(self.path) if entry.step <= resumed_step]
        write_whole(self.path, ("".join(_line(entry) for entry in kept)).encode())
        self.entries = kept
        self._file: TextIO = self.path.open("a", encoding="utf-8")

    def append(self, entry: LogEntry) -> None:
        self.entries.append(entry)
        self._file.write(_line(entry))
        self._file.flush()

    def sync(self) -> None:
        """Returns once all lines are on the disk: a checkpoint must not be newer than its log."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _line(entry: LogEntry) -> str:
    return json.dumps(asdict(entry), allow_nan=False) + "\n"


def read_log(path: Path) -> list[LogEntry]:
    """All whole entries; none where there is no file. Raises InputError for a line that is not one."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"out: cannot read {path}: {error.strerror}") from None
    entries = []
    lines = text.split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is a line cut short
        try:
            entry = LogEntry(**json.loads(line))
            if entry.kind not in KINDS:
                raise ValueError(entry.kind)
        except (ValueError, TypeError):
            raise InputError(f"out: line {number} of {path} is damaged; write --restart to begin anew") from None
        entries.append(entry)
    return entries


def overfit_epoch(entries: Iterable[LogEntry]) -> float | None:
    """The epoch after which the evaluation loss rises for good while the training loss still falls, or ``None``.

    That is the epoch of the lowest evaluation loss (the first of equals), if evaluations follow it, all above it, and
    if the mean training loss since then is below that of the stretch that led to it.
    """
    ordered = sorted(entries, key=lambda entry: entry.step)
    evaluations = [entry for entry in ordered if entry.kind == "eval"]
    if len(evaluations) < 2:
        return None
    lowest = min(evaluations, key=lambda entry: (entry.loss, entry.step))
    place = evaluations.index(lowest)
    later = evaluations[place + 1 :]
    if not later or min(entry.loss for entry in later) == lowest.loss:
        return None
    before = evaluations[place - 1].step if place else 0
    learnt = _mean_loss(ordered, before, lowest.step)
    since = _mean_loss(ordered, lowest.step, later[-1].step)
    if learnt is None or since is None or since >= learnt:
        return None
    return lowest.epoch


def _mean_loss(entries: Sequence[LogEntry], after: int, until: int) -> float | None:
    losses = [entry.loss for entry in entries if entry.kind == "train" and after < entry.step <= until]
    return sum(losses) / len(losses) if losses else None


def median_step_seconds(entries: Iterable[LogEntry]) -> float | None:
    """Of the steps whose memory was not traced; ``None`` where there are none."""
    from statistics import median

    seconds = [entry.seconds for entry in entries if entry.kind == "train" and not entry.traced]
    return median(seconds) if seconds else None
