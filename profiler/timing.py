"""Step times: from the end of one optimizer step to the end of the next, whatever happens in between included."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Each timed step, in order, in seconds."""

    seconds: tuple[float, ...]

    @property
    def median_seconds(self) -> float:
        return percentile(self.seconds, 0.5)

    @property
    def spread(self) -> float:
        """Half the distance between the 5th and 95th percentile, over the median."""
        return (percentile(self.seconds, 0.95) - percentile(self.seconds, 0.05)) / 2 / self.median_seconds


class StepClock:
    """Takes the time as each step ends, once the device has ended it too."""

    def __init__(self, synchronize: Callable[[], None], now: Callable[[], float] = time.perf_counter) -> None:
        self._synchronize = synchronize
        self._now = now
        self._moments: list[float] = []

    def tick(self) -> None:
        """A step has ended; the first call only starts the clock."""
        self._synchronize()
        self._moments.append(self._now())

    def times(self) -> StepTimes:
        """Of all steps since the first tick; at least one must have ended."""
        assert len(self._moments) > 1, "no step was timed"
        pairs = zip(self._moments, self._moments[1:], strict=False)
        return StepTimes(seconds=tuple(end - start for start, end in pairs))


def percentile(values: Sequence[float], fraction: float) -> float:
    """With linear interpolation between neighbours (numpy's default). At least one value."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
