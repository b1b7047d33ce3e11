"""A stream of a few layers written out for many.

In a step the decoder layers are visited in sweeps: up in the forward pass, down in backward, parameter by parameter in
the optimizer. Each sweep is cut into one unit per layer. Where the units of the inner layers are the same but for the layer
they are about, the unit of the middle one is repeated; everything else stays. Otherwise the model has to be run in full.
"""

from __future__ import annotations

import re
from dataclasses import replace

from estimator.dryrun.events import BIRTH, PHASE, Event, Stream

# Births are named by where in the stream they stand: (sweep or piece, layer or None, how manieth birth of the unit). A
# workspace, which only the first layer to need one allocates, is counted apart, from -1 down.
_Name = tuple[int, int | None, int]


def write_out(stream: Stream, *, run: int, layers: int) -> Stream | None:
    """The stream of ``layers`` decoder layers from that of ``run`` (5 or more, an odd number's middle is repeated).

    ``None`` where the inner layers are not alike.
    """
    if run >= layers:
        return stream
    pieces = _cut(stream.events, run)
    names = _names(pieces, stream)
    middle = run // 2
    for piece in pieces:
        if isinstance(piece, list):
            if any(event.layer == middle for event in piece):
                return None  # the middle layer's events outside a sweep: nobody knows where its copies' would be
            continue
        inner = [_relative(piece.units[layer], layer, names, stream, run) for layer in range(middle - 1, middle + 2)]
        if inner[0] != inner[1] or inner[1] != inner[2]:
            return None
    return _Writer(stream, pieces, names, run=run, layers=layers).write()


class _Sweep:
    """One visit of the layers in order: units by layer."""

    def __init__(self, order: range, units: dict[int, list[Event]]) -> None:
        self.order, self.units = order, units


def _cut(events: list[Event], run: int) -> list[list[Event] | _Sweep]:
    """Alternating stretches outside sweeps, and sweeps."""
    pieces: list[list[Event] | _Sweep] = []
    loose: list[Event] = []
    position = 0
    while position < len(events):
        event = events[position]
        sweep = None
        if event.layer is not None and event.layer < run // 2:
            sweep = _sweep_at(events, position, range(event.layer, run))
        elif event.layer == run - 1:
            sweep = _sweep_at(events, position, range(run - 1, -1, -1))
        if sweep is None:
            loose.append(event)
            position += 1
            continue
        pieces.append(loose)
        loose = []
        pieces.append(_Sweep(sweep[0], sweep[1]))
        position = sweep[2]
    pieces.append(loose)
    return pieces


def _sweep_at(events: list[Event], start: int, order: range) -> tuple[range, dict[int, list[Event]], int] | None:
    """The sweep that begins at ``start``, its units and where it ends; ``None`` if the layers don't follow in order.

    A sweep may leave out the first layers, which are dense in some mixtures of experts, but none from before the middle on.
    Events of no layer belong to the unit that they follow, but for those after the last layer's, which are outside.
    """
    units: dict[int, list[Event]] = {order[0]: []}
    current, position, end = 0, start, start
    while position < len(events):
        event = events[position]
        if event.kind == PHASE:
            break
        if event.layer is not None and event.layer != order[current]:
            if current + 1 == len(order) or event.layer != order[current + 1]:
                break
            current += 1
            units[order[current]] = []
        units[order[current]].append(event)
        position += 1
        if event.layer is not None:
            end = position
    if current + 1 < len(order) and (order.step > 0 or order[current] >= len(order) // 2):
        return None
    order = order[: current + 1]
    last = units[order[current]]
    del last[len(last) - (position - end) :]
    if position < len(events) and events[position].layer == order[-2]:
        # It turns at once, as lists do that are filled from the front and freed from the back: the last layer's events
        # are of both sweeps.
        turn = end - len(last) + len(units[order[-2]])
        back = next((i for i in range(turn, end) if events[i].layer is not None), end)
        if back < end and _sweep_at(events, back, order[::-1]) is not None:
            del last[len(units[order[-2]]) :]
            end = turn
    return order, units, end


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


def _relative(unit: list[Event], layer: int, names: dict[int, _Name], stream: Stream, run: int) -> list[object]:
    """A unit with layers counted from its own."""
    found: list[object] = []
    for event in unit:
        piece, born, position = names[event.index]
        storage = stream.storages[event.index]
        own = None if storage.layer is None else storage.layer - layer
        if event.kind == BIRTH:
            found.append((BIRTH, storage.bytes, storage.category, own, storage.stream))
        else:
            found.append((event.kind, piece, None if born is None else born - layer, position))
    return found


class _Writer:
    def __init__(
        self, stream: Stream, pieces: list[list[Event] | _Sweep], names: dict[int, _Name], *, run: int, layers: int
    ) -> None:
        self._stream, self._pieces, self._names = stream, pieces, names
        self._run, self._added, self._middle = run, layers - run, run // 2
        self._layers = layers
        self._out = Stream(phases=list(stream.phases))
        self._written: dict[_Name, int] = {}

    def write(self) -> Stream:
        for piece in self._pieces:
            if isinstance(piece, list):
                for event in piece:
                    self._event(event, None, None)
                continue
            first, last = self._deep(piece.order[0]), self._deep(piece.order[-1])
            deep = range(first, last + piece.order.step, piece.order.step)
            for layer in deep:
                sample = self._sample(layer)
                for event in piece.units[sample]:
                    self._event(event, layer, sample)
        return self._out

    def _sample(self, layer: int) -> int:
        """The layer that was run for this one: the first ones and the last ones themselves, between them the middle one."""
        if layer < self._middle:
            return layer
        return max(self._middle, layer - self._added)

    def _deep(self, sample: int) -> int:
        """A layer that was run, as an event outside a sweep means it: counted from the nearer end."""
        return sample if sample <= self._middle else sample + self._added

    def _meant(self, layer: int, visited: int | None, sample: int | None) -> int:
        """The layer that an event means by one that was run: relative to its own, but where it is of one end and the other
        of the other."""
        if visited is None or sample is None:
            return self._deep(layer)
        ends = sorted((layer, sample))
        if abs(sample - self._middle) > 1 and ends[0] < self._middle < ends[1]:
            return self._deep(layer)
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
        if event.kind != BIRTH:
            out.death(self._written.pop((piece, born, position)), visited)
            return
        storage = self._stream.storages[event.index]
        layer = storage.layer
        if layer is not None:
            layer = self._meant(layer, visited, sample)
        holder = storage.holder if layer == storage.layer else _renumbered(storage.holder, storage.layer, layer)
        grown = storage.bytes + storage.per_layer_bytes * self._added
        self._written[piece, born, position] = out.birth(
            replace(storage, layer=layer, holder=holder, bytes=grown), visited
        )


def _renumbered(holder: str, sample: int | None, layer: int | None) -> str:
    return re.sub(rf"\.{sample}(?=\.|$)", f".{layer}", holder, count=1)
