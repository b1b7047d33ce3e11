"""What would make a setup fit: single changes, some together, more devices or larger ones; each with its peak and its price."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from estimator.changes import Change, ladders
from estimator.errors import InputError
from estimator.hardware import context_bytes, find_accelerator, is_cpu
from estimator.memory.device import allocator_room_bytes, device_bytes
from estimator.memory.formula import peak_bytes
from estimator.model.shape import ModelShape
from estimator.possible import check_possible
from estimator.result import FitEstimate
from estimator.setup import Setup

StepSeconds = Callable[[Setup], float | None]

_LEAST_SHARE = 0.005
"""Of the peak: what saves less is no remedy."""
_UNTIMED = {("optimizer", "adamw-paged"), ("offload", "optimizer")}
"""The time formula does not know what the link to the host costs."""
_PAIRS_SHOWN, _LARGER_SHOWN, _MOST_RANKS = 3, 3, 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """One change of a setup that lowers a device's peak."""

    change: tuple[tuple[str, Any], ...]
    """Settings by name and their new values."""
    flags: str
    """The same as one writes it: ``--checkpointing full``."""
    peak_device_bytes: int
    saved_bytes: int
    """Of the device's peak; below 0 on a larger accelerator, where nothing makes the allocator give its cache back."""
    slower: float | None
    """Seconds for a token over those of the setup as it is; ``None`` where no time is predicted."""
    fits: bool
    note: str
    """What else it changes; empty where the training does the same arithmetic on the same tokens."""


def find_remedies(
    shape: ModelShape,
    setup: Setup,
    fit: FitEstimate,
    *,
    device_peak_bytes: float,
    by_formula: bool,
    reserve_bytes: int,
    larger: Sequence[FitEstimate],
    step_seconds: StepSeconds,
) -> tuple[Remedy, ...]:
    """What would make ``setup`` (resolved) fit, by the formula; nothing where it fits or the capacity is unknown.

    Single changes; where none that leaves the result as it is suffices also pairs, then several together, then more
    devices and larger ones. First what fits, of that first what leaves the result as it is, then the least slowdown,
    then the most bytes. device_peak_bytes: what was predicted for the setup as it is. by_formula: whether by the formula;
    where by a dry run or a fitted law, the formula's tensors and fragments are scaled to it, and none are given back on a
    device that is full. larger: accelerators and whether the setup fits them. step_seconds: the time of a setup's step.
    """
    if fit.margin_bytes is None or fit.margin_bytes >= 0 or fit.capacity_bytes is None:
        return ()
    judge = _Judge(
        shape=shape,
        setup=setup,
        capacity_bytes=fit.capacity_bytes + reserve_bytes,
        reserve_bytes=reserve_bytes,
        device_peak_bytes=device_peak_bytes,
        scale=1.0 if by_formula else _scale(shape, setup, device_peak_bytes),
        gives_back=by_formula,
        step_seconds=step_seconds,
        seconds_now=step_seconds(setup),
    )
    singles = [(ladder, r) for ladder in ladders(setup) if (r := judge.first_that_fits(ladder)) is not None]
    found = [r for _, r in singles if r.fits or r.saved_bytes >= _LEAST_SHARE * device_peak_bytes]
    if not any(remedy.fits and not remedy.note for remedy in found):
        found += _pairs(judge, singles)
    if not any(remedy.fits and not remedy.note for remedy in found):
        found += _together(judge, singles)
    if not any(remedy.fits and not remedy.note for remedy in found):
        found += _more_devices(judge, setup)
        found += _larger_devices(judge, larger)
    return tuple(sorted(map(judge.timed, found), key=_order))


def _scale(shape: ModelShape, setup: Setup, device_peak_bytes: float) -> float:
    """What the formula's bytes are multiplied by, so that it says ``device_peak_bytes``."""
    context = context_bytes(setup.accelerator).value
    said = float(device_bytes(shape, setup, None))
    return max(0.0, device_peak_bytes - context) / max(1.0, said - context)


def _order(remedy: Remedy) -> tuple[bool, bool, float, int, int]:
    slower = float("inf") if remedy.slower is None else max(1.0, round(remedy.slower, 2))
    devices = next((value for name, value in remedy.change if name == "accelerators"), 0)
    return not remedy.fits, bool(remedy.note), slower, devices, -remedy.saved_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judge:
    shape: ModelShape
    setup: Setup
    capacity_bytes: int
    """Of the device, what something else holds included."""
    reserve_bytes: int
    device_peak_bytes: float
    scale: float
    gives_back: bool
    step_seconds: StepSeconds
    seconds_now: float | None

    def judge(self, change: Change, *, must_fit: bool = False) -> Remedy | None:
        """What a change brings, its time left out; ``None`` where the setup would be none, or would have to fit and does not."""
        try:
            changed = self._changed(change.settings)
            if changed.optimizer_in_backward and changed.accumulation > self.setup.accumulation:
                return None  # a gradient that is dropped at once can't be accumulated
            check_possible(self.shape, changed)
            allocated = peak_bytes(self.shape, changed) * self.scale
        except InputError:
            return None
        capacity: int | None = self.capacity_bytes
        if changed.accelerator and changed.accelerator != self.setup.accelerator:
            capacity = find_accelerator(changed.accelerator).usable_bytes
        if must_fit and (capacity is None or allocated + self.reserve_bytes > capacity):
            return None  # the tensors alone: most of what is tried ends here
        room = allocator_room_bytes(changed, self.reserve_bytes, capacity) if self.gives_back else None
        peak = round(float(device_bytes(self.shape, changed, room, allocated_bytes=allocated)))
        fits = capacity is not None and peak <= capacity - self.reserve_bytes
        if must_fit and not fits:
            return None
        return Remedy(
            change=tuple(change.settings.items()),
            flags=change.flags,
            peak_device_bytes=peak,
            saved_bytes=round(self.device_peak_bytes) - peak,
            slower=None,
            fits=fits,
            note=change.note,
        )

    def _changed(self, settings: dict[str, Any]) -> Setup:
        if "accelerators" not in settings:
            return dataclasses.replace(self.setup, **settings)
        freed = settings | {"data_parallel": None, "shard_size": None}
        return dataclasses.replace(self.setup, **freed).resolved()

    def first_that_fits(self, ladder: Iterable[Change]) -> Remedy | None:
        """Of ever stronger changes the first that suffices, else the last."""
        last = None
        for change in ladder:
            last = self.judge(change) or last
            if last is not None and last.fits:
                break
        return last

    def timed(self, remedy: Remedy) -> Remedy:
        """With its price in time, where that can be told."""
        if self.seconds_now is None or any(setting in _UNTIMED for setting in remedy.change):
            return remedy
        changed = self._changed(dict(remedy.change))
        seconds = self.step_seconds(changed)
        if seconds is None:
            return remedy
        slower = seconds / changed.tokens_per_step / (self.seconds_now / self.setup.tokens_per_step)
        return dataclasses.replace(remedy, slower=slower)


def _pairs(judge: _Judge, singles: Sequence[tuple[list[Change], Remedy]]) -> list[Remedy]:
    """Pairs that suffice, of changes that do not alone: such as leave the result as it is, else others.

    A change that saves nothing alone is tried as well: the other may have moved the peak to where it does.
    """
    same = [ladder for ladder, remedy in singles if not remedy.fits and not remedy.note]
    other = [ladder for ladder, remedy in singles if not remedy.fits and remedy.note]
    for pairs in (itertools.combinations(same, 2), itertools.product(same, other), itertools.combinations(other, 2)):
        fitting = [remedy for pair in pairs if (remedy := _pair(judge, *pair)) is not None]
        if fitting:
            return sorted(fitting, key=lambda remedy: -remedy.saved_bytes)[:_PAIRS_SHOWN]
    return []


def _pair(judge: _Judge, first: list[Change], second: list[Change]) -> Remedy | None:
    if first[0].settings.keys() & second[0].settings.keys():  # two ways to change one setting
        return None
    strongest = judge.judge(first[-1].then(second[-1]), must_fit=True)
    if strongest is None:
        return None
    weaker = (judge.judge(one.then(other), must_fit=True) for one in first for other in second)
    return next((remedy for remedy in weaker if remedy is not None), strongest)


def _together(judge: _Judge, singles: Sequence[tuple[list[Change], Remedy]]) -> list[Remedy]:
    """As few changes as suffice of those that leave the result as it is, each time the one that then saves most."""
    left = [ladder[-1] for ladder, remedy in singles if not remedy.note]
    made, best = Change(settings={}), None
    while left:
        tried = [(made.then(change), change) for change in left if not made.settings.keys() & change.settings.keys()]
        judged = [(r, one, change) for one, change in tried if (r := judge.judge(one)) is not None]
        if not judged:
            break
        remedy, one, change = min(judged, key=lambda item: item[0].peak_device_bytes)
        if best is not None and remedy.peak_device_bytes >= best.peak_device_bytes:
            break
        if remedy.fits:
            return [remedy]
        made, best = one, remedy
        left.remove(change)
    return []


def _more_devices(judge: _Judge, setup: Setup) -> list[Remedy]:
    """The fewest accelerators over which sharding everything suffices, and how many fewer with checkpointing."""
    if is_cpu(setup.accelerator):
        return []
    sharding = "zero3" if str(setup.sharding).startswith("zero") or "deepspeed" in setup.framework else "fsdp"
    start = 2 * setup.model_parallel
    while start <= setup.accelerators:
        start *= 2
    found: list[Remedy] = []
    most = _MOST_RANKS
    for checkpointing in dict.fromkeys((setup.checkpointing, "full")):
        more = {} if checkpointing == setup.checkpointing else {"checkpointing": checkpointing}
        count = start
        while count <= most:
            remedy = judge.judge(Change(settings={"accelerators": count, "sharding": sharding} | more), must_fit=True)
            if remedy is not None:
                found.append(remedy)
                most = count // 2
            count *= 2
    return found


def _larger_devices(judge: _Judge, larger: Sequence[FitEstimate]) -> list[Remedy]:
    """The smallest accelerators of the catalog that hold it as it is."""
    names = [fit.gpu for fit in larger if fit.fits and fit.gpu != judge.setup.accelerator]
    found = (judge.judge(Change(settings={"accelerator": name}), must_fit=True) for name in names)
    return list(itertools.islice((remedy for remedy in found if remedy is not None), _LARGER_SHOWN))
