"""What a dry run found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DryPhase:
    """The highest moment of one phase, over all steps."""

    phase: str
    """``load``, ``forward``, ``backward``, ``optimizer``, ``evaluation`` or ``between``."""
    peak_allocated_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DryHolder:
    """What one module, or the same module of all layers, holds at the peak for one purpose."""

    module: str
    """By its name in the model, ``*`` for the layer's number: ``model.layers.*.mlp.up_proj``; empty outside modules."""
    category: str
    bytes: int
    """In the allocator's blocks."""
    layers: int
    """How many layers' modules these are; 0 outside them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelinePoint:
    """A moment of the step that holds the peak."""

    event: int
    """How many events (allocations, frees, beginnings of phases) came before it since the run began."""
    phase: str
    """One of ``DryPhase``'s; from the first logits on ``loss``, and in an evaluation ``loss of evaluation``."""
    bytes_by_category: tuple[int, ...]
    """In the allocator's blocks, in the order of ``DryRun.categories``."""
    reserved_bytes: int
    """The allocator's segments; on a CPU what is allocated at most until then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """Peaks and what made them. Bytes of one device; on a CPU ``reserved`` is ``allocated``."""

    peak_allocated_bytes: int
    """In the allocator's blocks: ``torch.cuda.max_memory_allocated``; on a CPU the tensors' own bytes."""
    peak_reserved_bytes: int
    """The allocator's segments: ``torch.cuda.max_memory_reserved``."""
    peak_phase: str
    categories_bytes: tuple[tuple[str, int], ...]
    """At the peak of ``allocated``, by the names of ``estimator.memory.formula.PART_NAMES``; their sum is the peak."""
    phases: tuple[DryPhase, ...]
    """In the order in which they first ran."""
    holders: tuple[DryHolder, ...]
    """What holds the peak, largest first; their sum is the peak."""
    timeline: tuple[TimelinePoint, ...]
    """The step that holds the peak, with the evaluation after it where the run ends in one, thinned so that no
    stretch loses its highest moment."""
    categories: tuple[str, ...]
    peak_event: int
    """Where in the timeline's events the peak is."""
    retries: int
    """How often the cache was emptied because the device was full."""
    out_of_memory: str | None
    """What the allocator said where the device was too small; the peaks are then those up to that moment."""
    layers_run: int
    """Decoder layers that were executed; the others' events are copies of theirs."""
    reference_code: tuple[str, ...] = ()
    """Packages of GPU kernels that the model would call, in whose place transformers' own code was run."""
