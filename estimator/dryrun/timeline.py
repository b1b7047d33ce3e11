"""Where a dry run's memory goes: what holds the peak, and the step around it moment by moment. Bytes are the allocator's blocks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from estimator.dryrun.events import BIRTH, PHASE, Stream
from estimator.dryrun.result import DryHolder, TimelinePoint
from estimator.memory.formula import PART_NAMES

LOSS_PHASES = {"forward": "loss", "evaluation": "loss of evaluation"}
"""What a pass is called from its first logits on."""
_STRETCHES = 400
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def live_at(stream: Stream, position: int) -> tuple[int, ...]:
    """The storages that exist once the event at ``position`` has happened, by number, in the order of their births."""
    live: dict[int, None] = {}
    for event in stream.events[: position + 1]:
        if event.kind == BIRTH:
            live[event.index] = None
        elif event.kind != PHASE:
            del live[event.index]
    return tuple(live)


def by_category(stream: Stream, live: Sequence[int], blocks: Sequence[int]) -> tuple[tuple[str, int], ...]:
    """The blocks of the storages ``live`` by category, in the order of ``PART_NAMES``; none that is empty."""
    amounts = dict.fromkeys(PART_NAMES, 0)
    for index in live:
        amounts[stream.storages[index].category] += blocks[index]
    return tuple((name, amount) for name, amount in amounts.items() if amount)


def holders(stream: Stream, live: Sequence[int], blocks: Sequence[int]) -> tuple[DryHolder, ...]:
    """Everything ``live`` by module and category, largest first; the modules of all layers are one, ``model.layers.*.mlp``."""
    amounts: dict[tuple[str, str], int] = {}
    layers: dict[tuple[str, str], set[int]] = {}
    for index in live:
        storage = stream.storages[index]
        key = (_NUMBER.sub(".*", storage.holder), storage.category)
        amounts[key] = amounts.get(key, 0) + blocks[index]
        layers.setdefault(key, set())
        if storage.layer is not None:
            layers[key].add(storage.layer)
    return tuple(
        DryHolder(module=module, category=category, bytes=amount, layers=len(layers[module, category]))
        for (module, category), amount in sorted(amounts.items(), key=lambda item: -item[1])
    )


def step_around(stream: Stream, peak_at: int, until: int) -> tuple[int, int]:
    """The events [start, end) of the step that holds the peak, and of the evaluation after it where the run ends in one.

    until: where the replay ended, which is before the stream's end where memory ran out. What is freed as the run itself
    ends, weights and all, is no part of a step.
    """
    starts = [
        position
        for position, event in enumerate(stream.events[:until])
        # A forward phase that follows the load or another step, not one more micro-batch.
        if event.kind == PHASE
        and stream.phases[event.index] == "forward"
        and stream.phases[event.index - 1] in ("load", "between")
    ]
    begun = [position for position, event in enumerate(stream.events[:until]) if event.kind == PHASE]
    if begun and stream.phases[stream.events[begun[-1]].index] == "between":
        until = max(begun[-1], peak_at) + 1
    bounds = [0, *starts, until]
    return next((a, b) for a, b in pairwise(bounds) if a <= peak_at < b or b == until)


def timeline(
    stream: Stream, blocks: Sequence[int], reserved: Sequence[tuple[int, int]], *, peak_at: int, until: int
) -> tuple[tuple[TimelinePoint, ...], tuple[str, ...]]:
    """The step of the peak, thinned, and the categories that its points count.

    Of each of some hundred stretches the first, the lowest and the highest moment are kept: no peak is lost, nor any
    phase's beginning. reserved: the allocator's segments from each event on that changed them.
    """
    start, end = step_around(stream, peak_at, until)
    stretch = max(1, (end - start) // _STRETCHES)
    categories = tuple(name for name in PART_NAMES if any(storage.category == name for storage in stream.storages))
    place = {name: i for i, name in enumerate(categories)}
    level, total, phase = [0] * len(categories), 0, "load"
    kept: dict[int, TimelinePoint] = {}
    low, high, extremes = 0, 0, dict[str, TimelinePoint]()
    changes, held, change = list(reserved), 0, 0
    for position, event in enumerate(stream.events[:end]):
        begins = event.kind == PHASE
        if begins:
            phase = stream.phases[event.index]
        else:
            storage = stream.storages[event.index]
            if phase in LOSS_PHASES and storage.category == "logits":
                phase, begins = LOSS_PHASES[phase], True
            amount = event.kind * blocks[event.index]
            level[place[storage.category]] += amount
            total += amount
        while change < len(changes) and changes[change][0] <= position:
            held, change = changes[change][1], change + 1
        if position < start:
            continue
        opens = begins or (position - start) % stretch == 0
        if opens:
            kept |= {point.event: point for point in extremes.values()}
            low = high = total
            extremes = {}
        if opens or position == peak_at or total < low or total > high:
            point = TimelinePoint(event=position, phase=phase, bytes_by_category=tuple(level), reserved_bytes=held)
            if opens or position == peak_at:
                kept[position] = point
            if total < low:
                low, extremes["low"] = total, point
            elif total > high:
                high, extremes["high"] = total, point
    kept |= {point.event: point for point in extremes.values()}
    return tuple(kept[position] for position in sorted(kept)), categories
