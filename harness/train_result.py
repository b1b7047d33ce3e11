"""What came of a fine-tune, and its file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from estimator.errors import InputError
from estimator.units import Interval
from profiler.files import write_whole

SCHEMA = "vramcalc/train/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedMeasured:
    """One quantity before and after, in base units; ``None`` is "not predicted" or "not measured"."""

    quantity: str
    """As people read it: "peak allocated", "step time"."""
    unit: str
    """``bytes`` (memory), ``disk_bytes``, ``seconds``, ``tokens/s`` or ``hours``."""
    predicted: Interval | None
    measured: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """A finished fine-tune. Paths are relative to the run's directory."""

    setup: dict[str, Any]
    data: str
    samples: int
    """Sequences of an epoch."""
    steps: int
    epochs: float
    tokens: int
    """Trained on, repeats counted."""
    device: str
    first_loss: float
    """Of the first step."""
    final_loss: float
    """Of the last step."""
    final_evaluation_loss: float
    best_evaluation_loss: float
    best_epoch: float
    best_checkpoint: str
    last_checkpoint: str
    model: str
    """Weights after the last step, configuration and tokenizer, as ``from_pretrained`` reads them."""
    overfit_epoch: float | None
    """From here on the evaluation loss rises while the training loss still falls."""
    training_seconds: float
    """All steps, without evaluation and saving; traced ones at the median."""
    evaluation_seconds: float
    checkpoint_seconds: float | None
    """Median time of writing one checkpoint; ``None`` where none was written since the run was last resumed."""
    peak_phase: str | None
    allocated_by_rank: tuple[int, ...] = ()
    """The allocated peak of each device; the comparison has the highest, and all else of memory is the first one's."""
    comparisons: tuple[PredictedMeasured, ...]


def to_document(result: TrainResult) -> dict[str, Any]:
    """The JSON document, with its schema."""
    return {"schema": SCHEMA, **dataclasses.asdict(result)}


def write_result(path: Path, result: TrainResult) -> None:
    write_whole(path, (json.dumps(to_document(result), indent=1, allow_nan=False) + "\n").encode())


def read_result(path: Path) -> TrainResult:
    """Raises InputError for a file that ``write_result`` did not write."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.pop("schema") != SCHEMA:
            raise ValueError("schema")
        comparisons = [
            PredictedMeasured(**(row | {"predicted": Interval(**row["predicted"]) if row["predicted"] else None}))
            for row in document.pop("comparisons")
        ]
        by_rank = tuple(document.pop("allocated_by_rank", ()))
        return TrainResult(**document, allocated_by_rank=by_rank, comparisons=tuple(comparisons))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"out: {path} is damaged; write --restart to begin anew, or another --out") from None
