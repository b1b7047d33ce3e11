"""Memory by method and model size: one estimate for every cell of a table, from lists of settings."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from estimator.errors import InputError
from estimator.estimate import estimate
from estimator.model.catalog import resolve_model
from estimator.model.shape import count_parameters
from estimator.result import Estimate, FitEstimate
from estimator.setup import Setup, setting_types
from estimator.units import Interval

DEFAULT_MODELS = (
    "qwen1.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "llama-3.1-8b", "qwen2.5-14b", "qwen2.5-32b", "llama-3.1-70b",
    "llama-3.1-405b",
)  # fmt: skip
DEFAULT_SEQ = 512
_DEFAULT_METHODS: tuple[dict[str, Any], ...] = (
    {"method": "full", "precision": "bf16-mixed"},
    {"method": "full", "precision": "bf16"},
    {"method": "freeze", "precision": "bf16"},
    {"method": "lora", "precision": "bf16"},
    {"method": "qlora", "precision": "bf16", "base_quantization": "int8"},
    {"method": "qlora", "precision": "bf16", "base_quantization": "nf4-dq"},
)
_METHODS = tuple(dict.fromkeys(line["method"] for line in _DEFAULT_METHODS))
# What only some methods have: left out of the others' lines, so that one list of methods can be crossed with them.
_ONLY_FOR = {
    "lora_rank": ("lora", "dora", "qlora"),
    "lora_targets": ("lora", "dora", "qlora"),
    "base_quantization": ("qlora",),
    "trainable_layers": ("freeze",),
}
_DEFAULT_TRAINABLE_LAYERS = 2
MOST_CELLS = 2000
"""More than anybody reads; each is an estimate of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChartColumn:
    """One model."""

    model: str
    """As it was written."""
    name: str
    parameters: int
    inferred: bool
    """Only the count was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChartCell:
    setup: Setup
    """Resolved."""
    peak_device_bytes: Interval
    """What one device must have."""
    parts_bytes: tuple[tuple[str, int], ...]
    """By name, at the allocated peak."""
    fits: FitEstimate


@dataclass(frozen=True, slots=True, kw_only=True)
class ChartRow:
    label: str
    cells: tuple[ChartCell, ...]
    """One for each column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    columns: tuple[ChartColumn, ...]
    rows: tuple[ChartRow, ...]
    assumptions: str
    """The settings that all cells share."""


def make_chart(axes: Mapping[str, Sequence[Any]]) -> Chart:
    """A column for each value of ``model``, a line for each combination of the others; what is not given is the story's:
    512 tokens, batch 1, and the usual methods. Raises InputError for what cannot be."""
    models = [str(model) for model in axes.get("model", DEFAULT_MODELS)]
    lines = _lines(axes)
    if len(models) * len(lines) > MOST_CELLS:
        raise InputError(
            f"chart: {len(models)} models x {len(lines)} lines are more than {MOST_CELLS} cells; write shorter lists"
        )
    columns = tuple(_column(model) for model in models)
    varied = [name for name in setting_types() if len({str(line.get(name)) for line in lines}) > 1]
    rows = tuple(
        ChartRow(
            label=_label(line, varied),
            cells=tuple(chart_cell(Setup.from_mapping({**line, "model": model})) for model in models),
        )
        for line in lines
    )
    return Chart(columns=columns, rows=rows, assumptions=_assumptions(rows[0].cells[0].setup, varied))


def chart_cell(setup: Setup) -> ChartCell:
    """The memory of one setup."""
    found: Estimate = estimate(setup)
    return ChartCell(
        setup=found.setup,
        peak_device_bytes=found.memory.peak_device_bytes,
        parts_bytes=tuple((part.name, int(part.amount)) for part in found.memory.parts),
        fits=found.fits,
    )


def _column(model: str) -> ChartColumn:
    shape = resolve_model(model)
    return ChartColumn(model=model, name=shape.name, parameters=count_parameters(shape).total, inferred=shape.inferred)


def _lines(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The settings of each line, every one once; a setting that is given replaces the usual one of every method."""
    given = {name: list(values) for name, values in axes.items() if name != "model"}
    given.setdefault("seq", [DEFAULT_SEQ])
    usual = [line for method in given.pop("method", _METHODS) for line in _usual(str(method))]
    points = [dict(zip(given, point, strict=True)) for point in itertools.product(*given.values())]
    lines: list[dict[str, Any]] = []
    for line in ({**method, **point} for method in usual for point in points):
        kept = {name: value for name, value in line.items() if line["method"] in _ONLY_FOR.get(name, (line["method"],))}
        if kept["method"] == "freeze":
            kept.setdefault("trainable_layers", _DEFAULT_TRAINABLE_LAYERS)
        if kept not in lines:
            lines.append(kept)
    return lines


def _usual(method: str) -> list[dict[str, Any]]:
    """The lines that a method has where nothing more is said."""
    like = "lora" if method == "dora" else method
    return [{**line, "method": method} for line in _DEFAULT_METHODS if line["method"] == like] or [{"method": method}]


def _label(line: Mapping[str, Any], varied: Sequence[str]) -> str:
    """ "full bf16-mixed", "qlora nf4-dq", and what else varies: "lora bf16, 2,048 tokens"."""
    setup = Setup.from_mapping({**line, "model": "nano"})
    parts = [setup.method]
    if setup.method == "freeze":
        parts.append(f"({setup.trainable_layers} layers)")
    parts.append(setup.base_quantization or setup.precision)
    told = {"method", "precision", "base_quantization", "trainable_layers"}
    more = [_setting(name, getattr(setup, name)) for name in varied if name not in told and name in line]
    return ", ".join([" ".join(parts), *more])


def _setting(name: str, value: Any) -> str:
    if name == "seq":
        return f"{value:,} tokens"
    return f"{name.replace('_', ' ')} {value}"


def _assumptions(setup: Setup, varied: Sequence[str]) -> str:
    """Of the settings that matter to memory, those that are the same in every cell."""
    shared = {
        "seq": f"{setup.seq:,} tokens",
        "batch": f"batch {setup.batch}",
        "framework": setup.framework,
        "optimizer": str(setup.optimizer),
        "attention": f"{setup.attention} attention",
        "checkpointing": f"checkpointing {setup.checkpointing}",
        "loss": f"{setup.loss} loss",
        "accelerators": f"{setup.accelerators} device{'s' * (setup.accelerators > 1)}"
        + (f" ({setup.sharding})" if setup.accelerators > 1 else ""),
    }
    return ", ".join(text for name, text in shared.items() if name not in varied)
