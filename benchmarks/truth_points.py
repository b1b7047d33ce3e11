"""The points of the truth matrix (``truth_matrix.csv``), as this device can run them."""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from estimator.errors import InputError
from estimator.estimate import estimate
from estimator.model.catalog import resolve_model
from estimator.model.shape import count_parameters
from estimator.setup import Setup
from harness.point import local_setup
from profiler.device import LocalDevice

MATRIX = Path(__file__).with_name("truth_matrix.csv")
EDGE = "edge"
"""In the column ``batch``: the batches on both sides of the edge of the memory."""
_EDGE_SHARES = (0.97, 1.0)
"""Of the memory: the largest batches that are predicted to fit into these."""
_OVER_SHARE = 1.04
"""The smallest batch that is predicted to need this much runs out of memory, or the prediction is wrong."""
_LARGEST_EDGE = 4096
_EDGE_STEP = 0.06
"""Of the batch: how much further out the edge is looked for where the prediction missed it."""
_HOPELESS_SHARE = 1.1
"""Points that are predicted to need more are not tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TruthPoint:
    """One point of the matrix."""

    setup: Setup
    why: str
    traced: bool
    """Whether its allocator's trace is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A row of the matrix that this machine does not run, and why."""

    setup: Setup
    reason: str


def truth_points(
    device: LocalDevice, *, tiny: bool, matrix: Path = MATRIX
) -> tuple[tuple[TruthPoint, ...], tuple[LeftOut, ...]]:
    """The points in the order of their value, each once, and what was left out. ``tiny`` shrinks every model to a built-in
    one of its family, for a CPU. Raises InputError for a matrix that does not say what it means."""
    points: dict[Setup, TruthPoint] = {}
    left_out: list[LeftOut] = []
    for row in _rows(matrix):
        traced, why = row.pop("trace") == "yes", row.pop("why")
        for setup in _setups(row, device, tiny=tiny):
            reason = _obstacle(setup, device, edge=row["batch"] == EDGE)
            if reason is not None:
                left_out.append(LeftOut(setup=setup, reason=reason))
                continue
            resolved = local_setup(setup, device)
            points.setdefault(resolved, TruthPoint(setup=resolved, why=why, traced=traced))
    return tuple(points.values()), tuple(left_out)


def _rows(matrix: Path) -> Iterator[dict[str, str]]:
    try:
        with matrix.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            missing = sorted({"why", "model", "batch", "trace"} - set(reader.fieldnames or ()))
            if missing:
                raise InputError(f"matrix: {matrix} has no column {missing[0]}; write a table like {MATRIX.name}")
            yield from reader
    except OSError as error:
        raise InputError(f"matrix: cannot read {matrix}: {error.strerror or error}; write another --matrix") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"matrix: {matrix} is not a table: {error}; write another --matrix") from None


def _setups(row: dict[str, str], device: LocalDevice, *, tiny: bool) -> Iterator[Setup]:
    if row["batch"] != EDGE:
        setup = Setup.from_mapping(row)
        yield shrunk(setup) if tiny else _halved_to_fit(dataclasses.replace(setup, accelerator=device.name), device)
    elif not tiny:  # the edge of a CPU's memory is where the machine stops answering
        one = dataclasses.replace(Setup.from_mapping(row | {"batch": "1"}), accelerator=device.name)
        for batch in edge_batches(one, device.capacity_bytes):
            yield dataclasses.replace(one, batch=batch)


def _halved_to_fit(setup: Setup, device: LocalDevice) -> Setup:
    """With the batch halved until it is not hopeless; unchanged where a batch of 1 still is."""
    smaller = setup
    while predicted_bytes(smaller) > _HOPELESS_SHARE * device.capacity_bytes:
        if smaller.batch == 1:
            return setup
        smaller = dataclasses.replace(smaller, batch=smaller.batch // 2)
    return smaller


def edge_batches(setup: Setup, capacity_bytes: int) -> list[int]:
    """Batches around the largest that is predicted to fit: well below, just below, and above. Empty where 1 does not fit."""
    below = [_largest_batch(setup, share * capacity_bytes) for share in _EDGE_SHARES]
    if not below[-1]:
        return []
    return sorted({batch for batch in below if batch} | {_largest_batch(setup, _OVER_SHARE * capacity_bytes) + 1})


def _largest_batch(setup: Setup, bytes: float) -> int:
    """0 where a batch of 1 is predicted to need more."""
    low, high = 0, 1
    while high <= _LARGEST_EDGE and predicted_bytes(dataclasses.replace(setup, batch=high)) <= bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = predicted_bytes(dataclasses.replace(setup, batch=middle)) <= bytes
        low, high = (middle, high) if fits else (low, middle)
    return low


def missing_edges(tried: Sequence[Setup], outcomes: Mapping[Setup, str | None]) -> list[Setup]:
    """What to run next, so that each edge has a batch that fits and a larger one that does not: larger ones where all of
    ``tried`` fitted, smaller ones where none did. Empty once there are both, or where a run ended for another reason."""
    groups: dict[Setup, dict[int, str | None]] = {}
    for setup in tried:
        groups.setdefault(dataclasses.replace(setup, batch=1), {})[setup.batch] = outcomes.get(setup)
    further = []
    for one, found in groups.items():
        if set(found.values()) == {"ok"}:
            batch = max(found) + max(round(_EDGE_STEP * max(found)), 1)
        elif set(found.values()) == {"oom"}:
            batch = min(found) - max(round(_EDGE_STEP * min(found)), 1)
        else:
            continue
        if 1 <= batch <= 2 * _LARGEST_EDGE:
            further.append(dataclasses.replace(one, batch=batch))
    return further


@functools.cache
def predicted_bytes(setup: Setup) -> float:
    """Of the device, by the formula."""
    return estimate(setup).memory.peak_device_bytes.value


def shrunk(setup: Setup) -> Setup:
    """The same settings on a model that a CPU trains in milliseconds a step."""
    shape = resolve_model(setup.model)
    parameters = count_parameters(shape).total
    size = "nano" if parameters < 0.6e9 else "micro" if parameters < 2e9 else "mini"
    return dataclasses.replace(
        setup,
        model=f"{size}-llama" if shape.family == "llama" else size,
        seq=min(max(setup.seq // 16, 32), 256),
        batch=min(setup.batch, 2),
        trainable_layers=None if setup.trainable_layers is None else 2,
        attention_kernel=None,
        expandable_segments=False,
    )


def _obstacle(setup: Setup, device: LocalDevice, *, edge: bool) -> str | None:
    """Why this machine cannot run a point, or ``None``."""
    needs = []
    if "8bit" in (setup.optimizer or "") or "paged" in (setup.optimizer or "") or setup.base_quantization:
        needs.append("bitsandbytes")
    if setup.attention == "flash":
        needs.append("flash_attn")
    for package in needs:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if device.kind != "cuda" and "fp16" in (setup.precision, setup.precision.removesuffix("-mixed")):
        return "fp16 needs a GPU"
    try:
        local = local_setup(setup, device)
        if not edge and predicted_bytes(local) > _HOPELESS_SHARE * device.capacity_bytes:
            return "more than the device's memory"
    except InputError as error:
        return str(error)
    return None
