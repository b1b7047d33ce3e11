"""Calibrations on the disk: JSON with a schema, written whole or not at all, and checked when read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import tempfile
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from estimator.calibration.fitting import (
    FLOP_TERMS,
    MEMORY_GROUPS,
    OTHER_TERMS,
    Calibration,
    Law,
    canonical_name,
    time_types,
)
from estimator.errors import InputError

SCHEMA = "vramcalc/calibration/1"


def default_path(accelerator: str) -> Path:
    """Where this machine keeps the laws of one accelerator: ``$XDG_DATA_HOME`` (or ~/.local/share)/vramcalc."""
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    slug = re.sub(r"[^a-z0-9.]+", "-", canonical_name(accelerator)).strip("-.")
    return Path(home) / "vramcalc" / f"calibration-{slug}.json"


def saved_for(accelerator: str) -> Calibration | None:
    """The calibration that was saved on this machine for an accelerator, if there is one. Raises InputError if it is bad."""
    path = default_path(accelerator)
    return read_calibration(path) if path.is_file() else None


def to_document(calibration: Calibration) -> dict[str, Any]:
    """The JSON document of a calibration, with its schema; non-finite numbers never occur."""
    return {"schema": SCHEMA, **dataclasses.asdict(calibration)}


def check_writable(path: Path, flag: str = "out") -> None:
    """Raises InputError where a file cannot be written at ``path``, before the work whose result it is to hold."""
    try:
        if path.is_dir():
            raise InputError(f"{flag}: {path} is a directory; write a file in it")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{flag}: cannot write {path}: {error.strerror or error}") from None


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Writes JSON to a temporary file beside ``path``, then renames it. Raises InputError where that cannot be done."""
    text = json.dumps(to_document(calibration), indent=1, allow_nan=False) + "\n"
    # Draws are most of the file: one line each.
    text = re.sub(r"\[\s+([-+0-9.e,\s]+?)\s+\]", lambda match: "[" + " ".join(match[1].split()) + "]", text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)  # mkstemp lets nobody else read
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"out: cannot write {path}: {error.strerror or error}") from None


def read_calibration(path: Path) -> Calibration:
    """Raises InputError, in one line that names the file and the field, for anything that is not a calibration."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise InputError(f"calibration: cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"calibration: {path} is not JSON ({error}); make it with `vramcalc fit`") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else None
        raise InputError(f"calibration: {path} has schema {found!r}, not {SCHEMA}; make it with `vramcalc fit`")
    try:
        calibration: Calibration = _decode(Calibration, {k: v for k, v in document.items() if k != "schema"}, "")
        for law in calibration.laws:
            _check_law(law)
    except InputError as error:
        raise InputError(f"calibration: {path}: {error}; make it again with `vramcalc fit`") from None
    return calibration


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _check_law(law: Law) -> None:
    """The invariants that the functions above rely on."""
    names = [coefficient.name for coefficient in law.coefficients]
    if law.quantity == "peak_allocated_bytes":
        known = {*MEMORY_GROUPS.values(), "constant"}
        complete = set(names) == known
    elif law.quantity == "step_seconds":
        known = {f"{term}[{kind}]" for term in FLOP_TERMS for kind in time_types(law)} | {*OTHER_TERMS, "step"}
        complete = set(names) == known and bool(time_types(law))
    else:
        complete = set(names) == {"constant", "ratio"}
    if not complete or len(set(names)) != len(names):
        raise InputError(f"{law.quantity}: coefficients {', '.join(names)} are not those of its law")
    if any(len(draw) != len(names) for draw in law.draws):
        raise InputError(f"{law.quantity}: a draw does not have {len(names)} coefficients")
    numbers = [law.residual, law.drift, *(c.value for c in law.coefficients), *(x for d in law.draws for x in d)]
    if any(number < 0 for number in numbers) or law.largest <= 0:
        raise InputError(f"{law.quantity}: a coefficient or a scale is negative")


def _decode(kind: Any, value: Any, where: str) -> Any:
    """``value`` from JSON as the annotated type ``kind``: a dataclass, a tuple, an optional or a plain type."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        return _decode(next(option for option in typing.get_args(kind) if option is not type(None)), value, where)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise InputError(f"{where} is not a list")
        item = typing.get_args(kind)[0]
        return tuple(_decode(item, entry, where) for entry in value)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    accepted: dict[Any, Callable[[Any], bool]] = {
        float: lambda v: isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v),
        int: lambda v: isinstance(v, int) and not isinstance(v, bool),
        str: lambda v: isinstance(v, str),
    }
    if not accepted[kind](value):
        raise InputError(f"{where} is {value!r:.60}, not {'text' if kind is str else 'a number'}")
    return kind(value)


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise InputError(f"{where or 'the document'} is not an object")
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    if missing := [name for name in hints if name not in value]:
        raise InputError(f"{prefix}{missing[0]} is missing")
    return kind(**{name: _decode(hint, value[name], prefix + name) for name, hint in hints.items()})
