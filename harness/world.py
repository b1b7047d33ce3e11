"""The processes that train one model together, one for each device: who this one is, and how they talk."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from estimator.errors import InputError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_TIMEOUT = datetime.timedelta(minutes=30)
"""Of a collective: the first rank tokenizes the data, and writes checkpoints, while the others wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among ``size``; ``local_rank`` counts on its own machine, and names its GPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this one writes, and speaks to people."""
        return self.rank == 0


ALONE = World()


def joined_world() -> World | None:
    """What ``torchrun`` told this process, or ``None`` where it was started by itself. Raises InputError."""
    told = [os.environ.get(name) for name in _VARIABLES]
    if None in told or "MASTER_ADDR" not in os.environ:
        return None
    try:
        rank, size, local_rank = (int(str(value)) for value in told)
    except ValueError:
        raise InputError(
            f"{', '.join(_VARIABLES)}: {told} are not numbers; start with torchrun, or unset them"
        ) from None
    return World(rank=rank, size=size, local_rank=local_rank)


@contextlib.contextmanager
def process_group(world: World, kind: str) -> Iterator[None]:
    """The ranks' group, over NCCL on GPUs (``kind`` cuda) and gloo on CPUs; objects go by gloo. Nothing for one process, or
    within one that is there already."""
    if world.size == 1 and joined_world() is None:
        yield
        return
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    device = None
    if kind == "cuda":
        torch.cuda.set_device(world.local_rank)
        device = torch.device("cuda", world.local_rank)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_TIMEOUT, device_id=device)
    yield
    # Not where this one fails: the others are in a collective then, for which an orderly end would wait.
    dist.destroy_process_group()


def agreed(world: World, value: Any) -> Any:
    """The first rank's ``value``, on every rank."""
    if world.size == 1:
        return value
    import torch.distributed as dist

    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def gathered(world: World, value: Any) -> list[Any]:
    """Every rank's ``value``, in their order, on every rank."""
    if world.size == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, value)
    return found


def summed(world: World, *values: float, device: Any = None) -> list[float]:
    """The sums over all ranks, by the device that is named, or the CPU."""
    if world.size == 1:
        return list(values)
    import torch
    import torch.distributed as dist

    held = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(held)
    sums: list[float] = held.tolist()
    return sums


def barrier(world: World) -> None:
    """Returns once every rank is here."""
    summed(world, 0.0)
