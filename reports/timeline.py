"""One HTML file from a dry run: memory over a step, what holds the peak, what would make it fit. It asks for nothing from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from estimator.dryrun.result import DryHolder, DryRun
from estimator.hardware import context_bytes, is_cpu
from reports import scale
from reports.memory import describe_remedy, group_holders
from reports.summary import Tile
from reports.tables import Cell, Column, Table
from reports.templating import render_template
from reports.terminal import describe_method, describe_setup
from reports.timeline_figure import timeline_figure

if TYPE_CHECKING:
    from estimator.result import Estimate

_REMEDIES_SHOWN = 10


def render_timeline(estimate: Estimate) -> str:
    """The page as one HTML document, the same for the same estimate. The memory must be from a dry run. Raises MissingError."""
    found = estimate.memory.dry_run
    assert found is not None, "only a dry run has a timeline"
    cuda = not is_cpu(estimate.setup.accelerator)
    capacity = _capacity_bytes(estimate)
    return render_template(
        "timeline.html.j2",
        title=f"{describe_method(estimate.setup)} of {estimate.model.name}",
        setup=describe_setup(estimate.setup),
        lead=_lead(found),
        tiles=_tiles(estimate, found, cuda=cuda),
        figure=timeline_figure(found, capacity, cuda=cuda),
        gpu=estimate.setup.accelerator,
        beyond=None if capacity is None else scale.memory_text(capacity),
        cuda=cuda,
        remedies=[(remedy.flags, describe_remedy(remedy).removeprefix(remedy.flags + ": "), remedy.fits) for remedy in estimate.remedies][:_REMEDIES_SHOWN],
        tables=[_parts_table(found), _phases_table(found), _holders_table(found.holders)],
        layers_run=found.layers_run,
        layers=estimate.model.layers,
    )  # fmt: skip


def _capacity_bytes(estimate: Estimate) -> int | None:
    """What the device has for the allocator."""
    if estimate.fits.capacity_bytes is None:
        return None
    context = context_bytes(estimate.setup.accelerator).value
    return max(0, estimate.fits.capacity_bytes - round(context))


def _lead(found: DryRun) -> str:
    largest = sorted(found.categories_bytes, key=lambda part: -part[1])[:3]
    words = {"optimizer": "optimizer states"}
    parts = ", ".join(f"{scale.memory_text(amount)} of {words.get(name, name)}" for name, amount in largest)
    return f"The tensors reach {scale.memory_text(found.peak_allocated_bytes)} in {found.peak_phase}: {parts}."


def _tiles(estimate: Estimate, found: DryRun, *, cuda: bool) -> list[Tile]:
    fit, memory = estimate.fits, estimate.memory
    verdict = "what must fit"
    if fit.margin_bytes is not None and fit.capacity_bytes is not None:
        margin = scale.margin_text(fit.margin_bytes, fits=fit.fits is True)
        verdict = f"{margin} on {fit.gpu}"
        if fit.fits and memory.peak_device_bytes.value > fit.capacity_bytes:
            verdict = f"with room; on {fit.gpu} the allocator gives cache back, {margin}"
    tiles = [
        Tile(
            label="Allocated",
            value=scale.memory_text(found.peak_allocated_bytes),
            detail=f"tensors, at the peak in {found.peak_phase}",
        )
    ]
    if cuda:
        between = scale.memory_text(found.peak_reserved_bytes - found.peak_allocated_bytes)
        reserved = scale.memory_text(found.peak_reserved_bytes)
        tiles.append(Tile(label="Reserved", value=reserved, detail=f"the allocator's segments, {between} more"))
    tiles.append(Tile(label="Device", value=scale.memory_text(memory.peak_device_bytes.value), detail=verdict))
    return tiles


def _bytes(amount: int) -> Cell:
    return Cell(text=scale.memory_text(amount) if amount else "–", value=amount)


def _parts_table(found: DryRun) -> Table:
    """What each part of the model holds at the peak, by category."""
    groups = group_holders(found.holders)
    names = [name for name, _ in sorted(found.categories_bytes, key=lambda part: -part[1])]
    rows = []
    for group in groups:
        held = dict(group.by_category)
        rows.append(
            (
                Cell(text=group.name, value=group.name),
                Cell(text=f"{group.layers}" if group.layers else "–", value=group.layers),
                _bytes(group.bytes),
                Cell(
                    text=scale.percent_text(group.bytes / found.peak_allocated_bytes),
                    value=group.bytes / found.peak_allocated_bytes,
                ),
                *(_bytes(held.get(name, 0)) for name in names),
            )
        )
    columns = (
        Column(title="Part of the model", name="part"),
        Column(title="Layers", name="layers", number=True),
        Column(title="Together", name="bytes", number=True),
        Column(title="Share", name="share", number=True),
        *(Column(title=name.capitalize(), name=f"{name}_bytes", number=True) for name in names),
    )
    return Table(name="parts", caption="What holds the peak", columns=columns, rows=tuple(rows))


def _phases_table(found: DryRun) -> Table:
    rows = tuple(
        (
            Cell(text=phase.phase + (" steps" if phase.phase == "between" else ""), value=phase.phase),
            _bytes(phase.peak_allocated_bytes),
            Cell(
                text=scale.percent_text(phase.peak_allocated_bytes / found.peak_allocated_bytes),
                value=phase.peak_allocated_bytes / found.peak_allocated_bytes,
            ),
        )
        for phase in found.phases
    )
    columns = (
        Column(title="Phase", name="phase"),
        Column(title="Allocated", name="peak_allocated_bytes", number=True),
        Column(title="Of the peak", name="share", number=True),
    )
    return Table(name="phases", caption="The highest moment of each phase", columns=columns, rows=rows)


def _holders_table(holders: Sequence[DryHolder]) -> Table:
    rows = tuple(
        (
            Cell(text=holder.module or "outside modules", value=holder.module),
            Cell(text=holder.category, value=holder.category),
            Cell(text=f"{holder.layers}" if holder.layers else "–", value=holder.layers),
            _bytes(holder.bytes),
        )
        for holder in holders
    )
    columns = (
        Column(title="Module", name="module"),
        Column(title="Holds", name="category"),
        Column(title="Layers", name="layers", number=True),
        Column(title="Bytes", name="bytes", number=True),
    )
    return Table(name="modules", caption="Every module at the peak", columns=columns, rows=rows)
