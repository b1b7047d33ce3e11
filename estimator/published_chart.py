"""The well-known chart of memory by method and size (LLaMA-Factory's README), each value beside ours and why they differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from estimator.chart import DEFAULT_SEQ, ChartCell, chart_cell
from estimator.errors import InputError
from estimator.model.catalog import read_data, resolve_model
from estimator.model.shape import count_parameters
from estimator.setup import Setup
from estimator.units import GB

_STATES = {"parameters": "weights", "gradients": "gradients", "optimizer": "optimizer"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedCell:
    edition: str
    """The month of the README."""
    method: str
    """As printed: "Full 16"."""
    size: str
    model: str
    parameters: int
    published_bytes: int
    ours: ChartCell | None
    """``None`` where no setup means the same."""
    why: str
    """What each counts, in bytes a parameter."""
    source: str

    @property
    def ratio(self) -> float | None:
        """Published / ours."""
        return None if self.ours is None else self.published_bytes / self.ours.peak_device_bytes.value


def editions() -> tuple[str, ...]:
    """Newest first."""
    return tuple(dict.fromkeys(row["edition"] for row in read_data("published_chart.csv")))


def published_chart(edition: str | None = None, settings: Mapping[str, Any] | None = None) -> tuple[PublishedCell, ...]:
    """Every value of one edition, by line. The chart states neither tokens nor batch: ``settings`` says which (512 x 1), and
    overrides the chart's tool's own habits (it checkpoints activations)."""
    edition = edition or editions()[0]
    if edition not in editions():
        raise InputError(f"published: {edition!r} is no edition of the chart; write one of {', '.join(editions())}")
    rows = [row for row in read_data("published_chart.csv") if row["edition"] == edition]
    return tuple(_cell(row, {"seq": DEFAULT_SEQ, **(settings or {})}) for row in rows)


def _cell(row: Mapping[str, str], settings: Mapping[str, Any]) -> PublishedCell:
    own = dict(item.split("=") for item in row["settings"].split())
    ours = chart_cell(Setup.from_mapping({"model": row["model"], **own, **settings})) if own else None
    parameters = count_parameters(resolve_model(row["model"])).total
    published = round(float(row["gigabytes"]) * GB)
    return PublishedCell(
        edition=row["edition"],
        method=f"{row['method']} {row['bits']}",
        size=row["size"],
        model=row["model"],
        parameters=parameters,
        published_bytes=published,
        ours=ours,
        why=_why(published, parameters, ours),
        source=row["source"],
    )


def _why(published: int, parameters: int, ours: ChartCell | None) -> str:
    """Both as bytes a parameter: what the states take, the rest of the tensors, and what is not tensors."""
    stated = f"{published / parameters:.1f} B a parameter"
    if ours is None:
        return f"{stated}; 2-bit weights are not modelled"
    parts = dict(ours.parts_bytes)
    amounts = [(_STATES[name], parts.pop(name)) for name in _STATES if name in parts]
    if parts:
        largest = max(parts, key=lambda name: parts[name])
        amounts.append((largest, sum(parts.values())))
    tensors = sum(amount for _, amount in amounts)
    amounts.append(("allocator and context", round(ours.peak_device_bytes.value) - tensors))
    return f"{stated}; ours " + " + ".join(f"{amount / parameters:.2g} {name}" for name, amount in amounts)
