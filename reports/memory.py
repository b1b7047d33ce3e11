"""What holds the peak of a dry run, and what would make a setup fit, on a screen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reports import scale
from reports.page import Page

if TYPE_CHECKING:
    from estimator.dryrun.result import DryHolder
    from estimator.remedies import Remedy

_HOLDERS_SHOWN, _REMEDIES_SHOWN, _OTHERS_SHOWN = 8, 6, 4
_NAMELESS = {"logits": "the loss", "communication": "between the devices"}


@dataclass(frozen=True, slots=True, kw_only=True)
class HolderGroup:
    """What one part of the model, or the same part of all layers, holds at the peak."""

    name: str
    """``model.layers.*.mlp``: a layer's own modules are told apart, what is inside them is not."""
    layers: int
    """0 outside the layers."""
    by_category: tuple[tuple[str, int], ...]
    """Bytes, by the names of the memory's parts."""

    @property
    def bytes(self) -> int:
        return sum(amount for _, amount in self.by_category)


def group_holders(holders: Iterable[DryHolder]) -> tuple[HolderGroup, ...]:
    """Holders by the part of the model that they are in, largest first; the same bytes in all."""
    amounts: dict[str, dict[str, int]] = {}
    layers: dict[str, int] = {}
    for holder in holders:
        name = _part_name(holder)
        own = amounts.setdefault(name, {})
        own[holder.category] = own.get(holder.category, 0) + holder.bytes
        layers[name] = max(layers.get(name, 0), holder.layers if "*" in name else 0)
    groups = (
        HolderGroup(name=name, layers=layers[name], by_category=tuple(own.items())) for name, own in amounts.items()
    )
    return tuple(sorted(groups, key=lambda group: -group.bytes))


def _part_name(holder: DryHolder) -> str:
    if not holder.module:
        return _NAMELESS.get(holder.category, "outside modules")
    words = holder.module.split(".")
    return ".".join(words[: words.index("*") + 2]) if "*" in words else holder.module


def print_holders(page: Page, holders: Sequence[DryHolder]) -> None:
    """The largest holders of the peak, by part of the model and purpose."""
    total = sum(holder.bytes for holder in holders)
    rows = [
        (amount, category, group)
        for group in group_holders(holders)
        for category, amount in group.by_category
        if amount
    ]
    rows.sort(key=lambda row: -row[0])
    page.heading("What holds the peak")
    for amount, category, group in rows[:_HOLDERS_SHOWN]:
        layers = f", {group.layers} layers" if group.layers > 1 else ""
        page.row(category, scale.memory_text(amount), f"{group.name}{layers}")
    rest = sum(amount for amount, _, _ in rows[_HOLDERS_SHOWN:])
    if rest:
        page.row("the rest", scale.memory_text(rest), f"{rest / total:.0%} of the tensors")


def print_remedies(page: Page, remedies: Sequence[Remedy]) -> None:
    """What would make it fit; and what saves most of what would not do so alone."""
    fitting = [remedy for remedy in remedies if remedy.fits]
    page.heading("What would make it fit", "by the formula")
    for remedy in fitting[:_REMEDIES_SHOWN]:
        page.paragraph(describe_remedy(remedy), bullet="- ")
    if len(fitting) > _REMEDIES_SHOWN:
        page.paragraph(f"and {len(fitting) - _REMEDIES_SHOWN} more: --json lists them.")
    if not fitting:
        page.paragraph("No change that vramcalc knows is enough.")
    if not any(not remedy.note for remedy in fitting):
        others = sorted((remedy for remedy in remedies if not remedy.fits), key=lambda remedy: -remedy.saved_bytes)
        if others:
            page.paragraph("Not enough alone:")
        for remedy in others[:_OTHERS_SHOWN]:
            page.paragraph(describe_remedy(remedy), bullet="- ")


def describe_remedy(remedy: Remedy) -> str:
    """One line: "--checkpointing full: 13.7 GiB (-9.10 GiB), about 30% slower"."""
    saved = scale.memory_text(remedy.peak_device_bytes)
    if remedy.saved_bytes > 0:  # a larger device is no saving
        saved += f" (-{scale.memory_text(remedy.saved_bytes)})"
    return ", ".join(text for text in (f"{remedy.flags}: {saved}", speed_text(remedy.slower), remedy.note) if text)


def speed_text(slower: float | None) -> str:
    """How a change of a step's time reads: "about 30% slower", "2.4 times as fast"; empty where it is not known."""
    if slower is None:
        return "time not predicted"
    if slower >= 1.995:
        return f"{slower:.1f} times as slow"
    if slower > 1.005:
        return f"about {slower - 1:.0%} slower"
    if slower > 0.95:
        return "no slower"
    return f"{1 / slower:.1f} times as fast"
