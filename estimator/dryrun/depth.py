"""A stream of a few layers written out for many.

In a step the decoder layers are visited in sweeps: up in the forward pass, down in backward, parameter by parameter in
the optimizer. Each sweep is cut into one unit per layer, and a layer that was not run is written as the unit of the one that
stands for it (``cut.Cut``). Where layers with the same neighbours did not do the same, or a unit means what only its own
layer has, the model has to be run in full.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, replace

from estimator.dryrun.cut import Cut
from estimator.dryrun.events import BIRTH, PHASE, Event, Stream

# Births are named by where in the stream they stand: (sweep or piece, layer or None, how manieth birth of the unit). A
# workspace, which only the first layer to need one allocates, is counted apart, from -1 down.
_Name = tuple[int, int | None, int]

_REACH = 2
"""How many layers away a unit means a neighbour's storages; beyond that it means a certain layer's."""


def write_out(stream: Stream, cut: Cut) -> Stream | None:
    """The stream of all layers from that of those that were run.

    ``None`` where they do not say what the others do.
    """
    if len(cut.kept) == len(cut.samples):
        return stream
    pieces = _cut(stream.events)
    names = _names(pieces, stream)
    for piece in pieces:
        if isinstance(piece, _Sweep) and not _alike(piece, cut, names, stream):
            return None
    return _Writer(stream, pieces, names, cut).write()


@dataclass(slots=True)
class _Sweep:
    """One visit of the layers in order: units by layer, up or down; some layers may be left out."""

    units: dict[int, list[Event]]
    up: bool = True


def _cut(events: list[Event]) -> list[list[Event] | _Sweep]:
    """Stretches outside sweeps, and sweeps. Events of no layer belong to the unit that they follow, but for those after the
    last layer's, which are outside."""
    pieces: list[list[Event] | _Sweep] = []
    position = 0
    while position < len(events):
        start = position
        while position < len(events) and events[position].layer is None:
            position += 1
        if position > start:
            pieces.append(events[start:position])
        if position < len(events):
            sweep, position = _sweep_at(events, position)
            pieces.append(sweep)
    return pieces


def _sweep_at(events: list[Event], start: int) -> tuple[_Sweep, int]:
    """The sweep that begins at ``start``, and where it ends: before the layers turn, or a phase begins."""
    current = events[start].layer
    assert current is not None
    sweep, step, end = _Sweep({current: []}), 0, start
    unit = sweep.units[current]
    for position in range(start, len(events)):
        event = events[position]
        if event.kind == PHASE:
            break
        if event.layer is None:
            continue
        if event.layer != current:
            turn = 1 if event.layer > current else -1
            if step and turn != step:
                break
            step, current = turn, event.layer
            unit += events[end:position]
            unit = sweep.units[current] = []
            end = position
        unit += events[end : position + 1]
        end = position + 1
    sweep.up = step >= 0
    return sweep, end


def _names(pieces: list[list[Event] | _Sweep], stream: Stream) -> dict[int, _Name]:
    names: dict[int, _Name] = {}
    for number, piece in enumerate(pieces):
        units: dict[int | None, list[Event]] = {None: piece} if isinstance(piece, list) else dict(piece.units.items())
        for layer, unit in units.items():
            count = apart = 0
            for event in unit:
                if event.kind != BIRTH:
                    continue
                if stream.storages[event.index].category == "workspace":
                    apart -= 1
                    names[event.index] = (number, layer, apart)
                else:
                    names[event.index] = (number, layer, count)
                    count += 1
    return names


def _alike(sweep: _Sweep, cut: Cut, names: dict[int, _Name], stream: Stream) -> bool:
    """Whether layers with the same neighbours have the same units.

    A visit of none that are repeated is of the ends alone.
    """
    if all(cut.repeats[layer] == 1 for layer in sweep.units):
        return True
    found: dict[Hashable, list[object] | None] = {}
    for layer, neighbours in enumerate(cut.neighbours):
        unit = sweep.units.get(layer)
        relative = None if unit is None else _relative(unit, layer, names, stream)
        if found.setdefault(neighbours, relative) != relative:
            return False
    return True


def _is_far(born: int | None, layer: int) -> bool:
    return born is None or abs(born - layer) > _REACH


def _relative(unit: list[Event], layer: int, names: dict[int, _Name], stream: Stream) -> list[object]:
    """A unit with layers counted from its own, and without the ends of what is not from nearby: the last visitor's matter."""
    found: list[object] = []
    for event in unit:
        piece, born, position = names[event.index]
        storage = stream.storages[event.index]
        own = None if storage.layer is None else storage.layer - layer
        if event.kind == BIRTH:
            found.append((BIRTH, storage.bytes, storage.category, own, storage.stream))
        elif born is not None and not _is_far(born, layer):
            found.append((event.kind, piece, born - layer, position))
    return found


class _Unlike(Exception):
    """A unit means what the layer that it is repeated for has not."""


class _Writer:
    def __init__(self, stream: Stream, pieces: list[list[Event] | _Sweep], names: dict[int, _Name], cut: Cut) -> None:
        self._stream, self._pieces, self._names, self._deep = stream, pieces, names, cut.kept
        self._samples, self._repeats = cut.samples, cut.repeats
        self._out = Stream(phases=list(stream.phases), packages=stream.packages)
        self._written: dict[_Name, tuple[int, int]] = {}
        """Of each birth that is not yet dead its number, and that of the storage that it repeats."""

    def write(self) -> Stream | None:
        try:
            for piece in self._pieces:
                self._write(piece)
        except _Unlike:
            return None
        died = {event.index for event in self._stream.events if event.kind not in (BIRTH, PHASE)}
        left = any(sample in died for _, sample in self._written.values())
        return None if left else self._out

    def _write(self, piece: list[Event] | _Sweep) -> None:
        if isinstance(piece, list):
            for event in piece:
                self._event(event, None, None)
            return
        deep = [layer for layer, sample in enumerate(self._samples) if sample in piece.units]
        deep = deep if piece.up else deep[::-1]
        last = {self._samples[layer]: layer for layer in deep}
        for layer in deep:
            sample = self._samples[layer]
            for event in piece.units[sample]:
                # What all layers of a kind share is freed by the last of them.
                if event.kind == BIRTH or layer == last[sample] or not _is_far(self._names[event.index][1], sample):
                    self._event(event, layer, sample)

    def _meant(self, layer: int, visited: int | None, sample: int | None) -> int:
        """The layer that an event means by one that was run: nearby relative to its own, else that very one."""
        if visited is None or sample is None or _is_far(layer, sample):
            return self._deep[layer]
        return layer + visited - sample

    def _event(self, event: Event, visited: int | None, sample: int | None) -> None:
        """``visited``: the layer whose unit this is, ``sample``: the one that was run for it; ``None`` outside sweeps."""
        out = self._out
        if event.kind == PHASE:
            out.events.append(Event(PHASE, event.index, None))
            return
        piece, born, position = self._names[event.index]
        if born is not None:
            born = self._meant(born, visited, sample)
        storage = self._stream.storages[event.index]
        if event.kind != BIRTH:
            written, repeated = self._written.pop((piece, born, position), (-1, -1))
            known = self._stream.storages[repeated]
            if written < 0 or (known.bytes, known.category) != (storage.bytes, storage.category):
                raise _Unlike
            out.death(written, visited)
            return
        layer = storage.layer
        if layer is not None:
            layer = self._meant(layer, visited, sample)
        holder = storage.holder if layer == storage.layer else _renumbered(storage.holder, storage.layer, layer)
        grown = storage.bytes + sum(size * (self._repeats[part] - 1) for part, size in storage.bytes_of_layers.items())
        copy = replace(storage, layer=layer, holder=holder, bytes=grown)
        self._written[piece, born, position] = out.birth(copy, visited), event.index


def _renumbered(holder: str, sample: int | None, layer: int | None) -> str:
    return re.sub(rf"\.{sample}(?=\.|$)", f".{layer}", holder, count=1)
