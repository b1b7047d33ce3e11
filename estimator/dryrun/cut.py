"""Which of a model's layers are run, and which of them stands for each of the others. Loads no torch.

A layer's place is its own kind with that of two neighbours to either side. Where a place comes again, the layers between are
a loop: they are left out as long as every place of theirs is still there. Layers that are all alike leave two at each end
and one between; a pattern of four leaves one period between the ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

_REACH = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Layers are counted in the whole model, those that are run from 0 up."""

    kept: tuple[int, ...]
    """Which layers are run."""
    samples: tuple[int, ...]
    """For each layer which of those that are run stands for it."""
    neighbours: tuple[Hashable, ...]
    """For each layer that is run its kind and its neighbours': layers of the same do the same, however far the ends are."""

    @property
    def repeats(self) -> list[int]:
        """For how many layers each that is run stands, itself included."""
        counts = Counter(self.samples)
        return [counts[sample] for sample in range(len(self.kept))]


def shortest(kinds: Sequence[Hashable]) -> Cut:
    """As few layers as found, in one pass, that have every place of the whole model. kinds: for each layer what it is."""
    places = [_around(kinds, layer, _REACH) for layer in range(len(kinds))]
    left = Counter(places)
    kept: list[int] = []
    for layer, place in enumerate(places):
        kept.append(layer)
        for start in range(len(kept) - 2, -1, -1):
            if places[kept[start]] != place:
                continue
            loop = Counter(places[inside] for inside in kept[start + 1 :])
            if all(left[inside] > count for inside, count in loop.items()):
                left -= loop
                del kept[start + 1 :]
            break
    by_place = {places[layer]: sample for sample, layer in reversed(list(enumerate(kept)))}
    own = {layer: sample for sample, layer in enumerate(kept)}
    return Cut(
        kept=tuple(kept),
        samples=tuple(own.get(layer, by_place[place]) for layer, place in enumerate(places)),
        neighbours=tuple(_around(kinds, layer, 1) for layer in kept),
    )


def whole(layers: int) -> Cut:
    """Every layer is run."""
    every = tuple(range(layers))
    return Cut(kept=every, samples=every, neighbours=every)


def _around(kinds: Sequence[Hashable], layer: int, reach: int) -> tuple[Hashable, ...]:
    """``None`` beyond the ends, so that those places are like no other."""
    return tuple(kinds[at] if 0 <= at < len(kinds) else None for at in range(layer - reach, layer + reach + 1))
