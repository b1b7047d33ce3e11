"""Checkpoints that are whole or not there: written beside, renamed into place, renamed away before they are deleted."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from estimator.errors import DoesNotFitError
from profiler.disk import checkpoint_size

_NAME = re.compile(r"checkpoint-([0-9]+)")
_STAGING = ".incomplete"
_DISCARDED = ".discarded-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    step: int
    path: Path


def checkpoints(out: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    found = [(path, _NAME.fullmatch(path.name)) for path in out.iterdir() if path.is_dir()]
    return sorted(
        (Checkpoint(step=int(match[1]), path=path) for path, match in found if match),
        key=lambda checkpoint: checkpoint.step,
    )


def staging_directory(out: Path) -> Path:
    """Where Trainer writes a checkpoint that is not complete yet."""
    return out / _STAGING


def complete(out: Path, step: int) -> Checkpoint:
    """Moves the checkpoint that was written under ``staging_directory`` into place, once it is on the disk."""
    written, path = staging_directory(out) / f"checkpoint-{step}", out / f"checkpoint-{step}"
    for file in sorted(written.rglob("*")):
        _sync(file)
    _sync(written)
    discard(path)
    written.rename(path)
    _sync(out)
    return Checkpoint(step=step, path=path)


def discard(path: Path) -> None:
    """Deletes a directory; killed half-way, what is left has a name that nobody takes for a checkpoint."""
    if path.exists():
        dying = path.with_name(_DISCARDED + path.name)
        shutil.rmtree(dying, ignore_errors=True)
        path.rename(dying)
        shutil.rmtree(dying)


def prune(out: Path, *, keep: int, spared: int | None) -> None:
    """Leaves the ``keep`` newest checkpoints, and that of step ``spared``."""
    for checkpoint in checkpoints(out)[:-keep]:
        if checkpoint.step != spared:
            discard(checkpoint.path)


def check_room(out: Path) -> None:
    """Before a checkpoint of the size of the last one. Raises DoesNotFitError."""
    last = checkpoints(out)
    needed = checkpoint_size(last[-1].path).total_bytes if last else 0
    free = shutil.disk_usage(out).free
    if free < needed:
        raise DoesNotFitError(
            f"disk: a checkpoint takes {needed:,} B and {out} has {free:,} B free; free some, or write a "
            "smaller --keep; the training goes on from its last checkpoint"
        )


def remove_leftovers(out: Path) -> None:
    """Of a run that was killed: a checkpoint half written or half deleted."""
    for path in out.iterdir():
        if path.is_dir() and (path.name == _STAGING or path.name.startswith(_DISCARDED)):
            shutil.rmtree(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
