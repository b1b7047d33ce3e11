"""A training as ``vramcalc train`` leaves it: losses by step and epoch, overfitting, predicted against measured.

The files may come from anywhere: every value is checked before it is drawn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from estimator.errors import InputError
from harness.training_log import LOG_FILE, LogEntry
from harness.training_log import overfit_epoch as overfit_epoch_of
from reports.comparison import Comparison

RESULT_FILE = "result.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPoint:
    step: int
    epoch: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The losses of one training."""

    name: str
    """Where it was read from."""
    train: tuple[LossPoint, ...]
    evaluation: tuple[LossPoint, ...]
    overfit_epoch: float | None
    """From here on the evaluation loss rises while the training loss falls."""
    comparisons: tuple[Comparison, ...]
    """What was predicted before the training against what it measured; empty until it has ended."""

    @property
    def best(self) -> LossPoint | None:
        """The evaluation with the lowest loss, the first of equals."""
        return min(self.evaluation, key=lambda point: point.loss, default=None)


def read_training(directory: Path) -> Training:
    """The training that ``vramcalc train`` keeps in ``directory``. Raises InputError in one line."""
    texts: dict[str, str] = {}
    for file in (LOG_FILE, RESULT_FILE):
        path = directory / file
        if file == RESULT_FILE and not path.exists():
            continue
        try:
            texts[file] = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"training: cannot read {path}: {error.strerror or error}; write a directory of `vramcalc train`"
            ) from None
        except UnicodeDecodeError:
            raise InputError(f"training: {path} is not UTF-8 text; write a directory of `vramcalc train`") from None
    return parse_training(texts[LOG_FILE], texts.get(RESULT_FILE), name=str(directory))


def parse_training(log: str, result: str | None, *, name: str) -> Training:
    """From the text of ``training_log.jsonl`` and, where the training has ended, of ``result.json``.

    Raises InputError naming the file and the line. A last line that a running training has not finished is left out.
    """
    entries: list[LogEntry] = []
    for number, line in enumerate(log.split("\n")[:-1], start=1):
        where = f"training: {name}/{LOG_FILE}, line {number}"
        entry = _object(line, where)
        kind = entry.get("kind")
        if kind not in ("train", "eval"):
            raise InputError(f"{where}: kind is {kind!r:.60}; it must be train or eval")
        step, epoch, loss = (_number(entry.get(field), field, where) for field in ("step", "epoch", "loss"))
        entries.append(LogEntry(step=int(step), epoch=epoch, kind=str(kind), loss=loss, seconds=0.0))
    if not entries:
        raise InputError(f"training: {name}/{LOG_FILE} holds no losses; run `vramcalc train --out {name}` first")
    return Training(
        name=name,
        train=_points(entries, "train"),
        evaluation=_points(entries, "eval"),
        overfit_epoch=overfit_epoch_of(entries),
        comparisons=_comparisons(result, f"training: {name}/result.json") if result is not None else (),
    )


def _points(entries: list[LogEntry], kind: str) -> tuple[LossPoint, ...]:
    found = [entry for entry in entries if entry.kind == kind]
    return tuple(LossPoint(step=entry.step, epoch=entry.epoch, loss=entry.loss) for entry in found)


def _comparisons(result: str, where: str) -> tuple[Comparison, ...]:
    rows = _object(result, where).get("comparisons")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{where}: comparisons is not a list of objects; run `vramcalc train` again")
    found = []
    for row in rows:
        predicted = row.get("predicted")
        if predicted is not None and not isinstance(predicted, dict):
            raise InputError(f"{where}: predicted is {predicted!r:.60}, not an object")
        bounds = predicted or {"value": None, "low": None, "high": None}
        found.append(
            Comparison(
                quantity=str(row.get("quantity")),
                unit=str(row.get("unit")),
                predicted=_optional(bounds.get("value"), "predicted.value", where),
                low=_optional(bounds.get("low"), "predicted.low", where),
                high=_optional(bounds.get("high"), "predicted.high", where),
                measured=_optional(row.get("measured"), "measured", where),
            )
        )
    return tuple(found)


def _object(text: str, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: not a JSON object")
    return value


def _optional(value: Any, name: str, where: str) -> float | None:
    return None if value is None else _number(value, name, where)


def _number(value: Any, name: str, where: str) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError):
        raise InputError(f"{where}: {name} is {value!r:.60}, not a number") from None
