"""ZeRO-3's parameters over several ranks: gathered before a module runs, some ahead, freed when they are not soon used again.

From DeepSpeed 0.14 (``partitioned_param_coordinator.py``, ``partition_parameters.py``) with its defaults. The first step
records the order of modules and frees everything at once; later ones look ahead in it.
"""

from __future__ import annotations

from typing import Any

import torch

from estimator.dryrun.events import Storage
from estimator.dryrun.tracker import Tracker

_PREFETCH, _MAX_LIVE, _REUSE_DISTANCE, _PERSISTENT = 50_000_000, 1_000_000_000, 1_000_000_000, 100_000
_HALF = 2


class _Gathered:
    """The flat buffer of parameters that were gathered together, held until each of them has been waited for."""

    def __init__(self, flat: int | None, waiting: int) -> None:
        self.flat, self.waiting = flat, waiting


class Gatherer:
    """Follows the modules of ``model`` that own parameters."""

    def __init__(self, model: torch.nn.Module, tracker: Tracker, ranks: int) -> None:
        self._tracker, self._ranks = tracker, ranks
        self._live: dict[int, int] = {}
        self._pending: dict[int, _Gathered] = {}
        self._numel: dict[int, int] = {}
        self._trace: list[list[int]] = []
        self._recorded: list[list[int]] = []
        self._queue: list[tuple[int, int]] = []
        self._fetched_for: dict[int, int] = {}
        self._visits = 0
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            if own:
                self._numel |= {id(p): p.numel() for p in own}
                self._follow(module, [id(p) for p in own])

    def release_all(self) -> None:
        """A step ends: everything is freed, and what was visited is what to expect."""
        for parameter in list(self._live):
            self._give(self._live.pop(parameter))
        self._trace, self._recorded, self._visits = self._recorded or self._trace, [], 0
        self._queue = [(visit, parameter) for visit, own in enumerate(self._trace) for parameter in own]
        self._fetched_for.clear()

    def _follow(self, module: torch.nn.Module, own: list[int]) -> None:
        def before(*_: Any) -> None:
            self._fetch(own)

        def after(_: Any, inputs: Any, output: Any) -> None:
            self._release(own)
            if isinstance(output, torch.Tensor) and output.requires_grad:
                output.register_hook(lambda grad: self._fetch(own))
            for tensor in inputs:
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad and tensor.grad_fn is not None:
                    tensor.register_hook(lambda grad: self._release(own))

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def _fetch(self, own: list[int]) -> None:
        self._recorded.append(own)
        self._gather([p for p in own if p not in self._live and p not in self._pending])
        for parameter in own:
            self._wait(parameter)
        while self._queue and self._queue[0][0] <= self._visits:
            self._queue.pop(0)
        ahead: list[int] = []
        available = self._live.keys() | self._pending.keys()  # counted from when they are asked for
        room = min(_PREFETCH, _MAX_LIVE - sum(self._numel[p] for p in available))
        while self._queue and sum(self._numel[p] for p in ahead) < room:
            visit, parameter = self._queue.pop(0)
            self._fetched_for[parameter] = visit
            if parameter not in self._live and parameter not in self._pending and parameter not in ahead:
                ahead.append(parameter)
        self._gather(ahead)
        self._visits += 1

    def _gather(self, parameters: list[int]) -> None:
        """One parameter is gathered in place, several through a flat buffer."""
        if len(parameters) == 1:
            self._live[parameters[0]] = self._take(parameters[0], padded=True)
        elif parameters:
            padded = sum(-(-self._numel[p] // self._ranks) for p in parameters) * self._ranks
            handle = _Gathered(self._birth(padded * _HALF), len(parameters))
            self._pending |= dict.fromkeys(parameters, handle)

    def _wait(self, parameter: int) -> None:
        handle = self._pending.pop(parameter, None)
        if handle is None:
            return
        # Waiting for one copies all that were gathered with it.
        for other in [parameter, *(p for p, h in self._pending.items() if h is handle)]:
            if other not in self._live:
                self._live[other] = self._take(other, padded=False)
        handle.waiting -= 1
        if not handle.waiting and handle.flat is not None:
            self._give(handle.flat)

    def _release(self, own: list[int]) -> None:
        for parameter in own:
            if parameter in self._live and not self._needed(parameter):
                self._give(self._live.pop(parameter))

    def _needed(self, parameter: int) -> bool:
        if not self._trace:
            return False
        if self._numel[parameter] <= _PERSISTENT or self._fetched_for.get(parameter, -1) >= self._visits:
            return True
        passed = 0
        for own in self._trace[self._visits :]:
            if passed >= _REUSE_DISTANCE:
                return False
            if parameter in own:
                return True
            passed += sum(self._numel[p] for p in own)
        return False

    def _take(self, parameter: int, *, padded: bool) -> int:
        elements = self._numel[parameter]
        return self._birth((-(-elements // self._ranks) * self._ranks if padded else elements) * _HALF)

    def _birth(self, amount: int) -> int:
        storage = Storage(bytes=amount, category="communication", layer=None, holder="DeepSpeed, gathered", stream=0)
        return self._tracker.stream.birth(storage, None)

    def _give(self, index: int) -> None:
        self._tracker.stream.death(index, None)
