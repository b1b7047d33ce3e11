"""Where things made once are kept, and how a directory gets there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from estimator.errors import InputError


def cache_directory(cache: Path | None = None) -> Path:
    """``cache``, or ``$XDG_CACHE_HOME/vramcalc`` (``~/.cache/vramcalc``); made if it is not there. Raises InputError."""
    base = os.environ.get("XDG_CACHE_HOME")
    path = cache or (Path(base) if base else Path.home() / ".cache") / "vramcalc"
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            f"cache: cannot write to {path} ({error.strerror}); set XDG_CACHE_HOME to a directory that can be written"
        ) from None
    return path


def make_directory_once(path: Path, fill: Callable[[Path], None]) -> None:
    """Fills a temporary directory and renames it to ``path``; where another process was first, its result stays."""
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        temporary.chmod(0o755)  # mkdtemp makes directories that nobody else can read
        fill(temporary)
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
