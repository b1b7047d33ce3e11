"""The directory of one training: claimed by one process at a time, cleaned of what a kill left."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from estimator.errors import InputError
from harness.checkpoints import checkpoints, discard, remove_leftovers
from harness.plan import RUN_FILE
from harness.training_log import LOG_FILE
from profiler.files import temporary_prefix

RESULT_FILE = "result.json"
MODEL_DIRECTORY = "model"
_LOCK = ".lock"
_FILES = (RUN_FILE, LOG_FILE, RESULT_FILE)


@contextlib.contextmanager
def run_directory(out: Path) -> Iterator[None]:
    """Makes ``out`` if need be and holds it: nobody else trains there meanwhile.

    Leftovers of a killed run are removed and nothing else is touched; a directory in which nothing was kept disappears
    again. Raises InputError where ``out`` cannot be written, is held, or has checkpoints of another program.
    """
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / _LOCK).open("w")
    except OSError as error:
        raise InputError(
            f"out: cannot write to {out}: {error.strerror}; name a directory that can be written"
        ) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"out: another process is training in {out}; wait for it, or name another --out") from None
        if checkpoints(out) and not (out / RUN_FILE).exists():
            raise InputError(f"out: {out} holds checkpoints of another program; name another --out")
        remove_leftovers(out)
        for name in _FILES:
            for path in out.glob(f"{temporary_prefix(out / name)}*"):
                path.unlink()
        yield
    finally:
        lock.close()
        if made and [path.name for path in out.iterdir()] == [_LOCK]:
            (out / _LOCK).unlink()
            out.rmdir()


def forget_run(out: Path) -> None:
    """Removes the run in ``out``, and nothing else."""
    # The identity last: killed before that, the directory is still known to hold a run of ours.
    for checkpoint in checkpoints(out):
        discard(checkpoint.path)
    shutil.rmtree(out / MODEL_DIRECTORY, ignore_errors=True)
    for name in (RESULT_FILE, LOG_FILE, RUN_FILE):
        (out / name).unlink(missing_ok=True)
