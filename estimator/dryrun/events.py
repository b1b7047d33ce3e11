"""The stream of a dry run: storages that are born and die, and the moments at which phases begin.

Every event knows the decoder layer that it belongs to, so that a stream of few layers can be written out for many.
"""

from __future__ import annotations

from dataclasses import dataclass, field

BIRTH, DEATH, PHASE = 1, -1, 0


@dataclass(slots=True, kw_only=True)
class Storage:
    """One allocation. Not frozen: what it was for is known only later, as when a temporary becomes a gradient."""

    bytes: int
    category: str
    """One of ``estimator.memory.formula.PART_NAMES``."""
    layer: int | None
    """The decoder layer that it was allocated for; ``None`` outside them."""
    holder: str
    """The module that was running, by name, or the one that owns the parameter."""
    bytes_of_layers: dict[int, int] = field(default_factory=dict)
    """What of ``bytes`` each layer brings: of tensors with an element for each parameter."""
    stream: int = 0


@dataclass(slots=True)
class Event:
    """``kind`` is BIRTH or DEATH of the storage number ``index``, or the PHASE number ``index``."""

    kind: int
    index: int
    layer: int | None
    """The layer that was at work, by whose visits the stream repeats."""


@dataclass(slots=True, kw_only=True)
class Stream:
    """Storages by number, events in order, and the names of the phases as they began."""

    storages: list[Storage] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    packages: set[str] = field(default_factory=set)
    """Whose kernels the model asked for, in whose place its own code was run."""

    def begin(self, phase: str) -> None:
        self.events.append(Event(PHASE, len(self.phases), None))
        self.phases.append(phase)

    def birth(self, storage: Storage, layer: int | None) -> int:
        index = len(self.storages)
        self.storages.append(storage)
        self.events.append(Event(BIRTH, index, layer))
        return index

    def death(self, index: int, layer: int | None) -> None:
        self.events.append(Event(DEATH, index, layer))
