"""Everything that the dry run takes from torch's private interface to distributed training. Checked with torch 2.13."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from estimator.dryrun.private_api import replaced


@contextlib.contextmanager
def fake_process_group(world: int) -> Iterator[None]:
    """The first rank of ``world``; collectives return at once."""
    import torch.distributed as dist
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized()
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        # What DTensor remembers of a mesh names this world's groups, and equal meshes of the next world would find it.
        _clear_sharding_prop_cache()
        dist.destroy_process_group()


def cpu_mesh(**sizes: int) -> Any:
    """The first rank's, of the named dimensions; of groups only its own are made, so that set-up does not grow with the world."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    names, shape = tuple(sizes), tuple(sizes.values())
    if len(names) == 1:
        return init_device_mesh("cpu", shape, mesh_dim_names=names)
    ranks = torch.arange(math.prod(shape)).view(shape)
    own = [ranks[tuple(slice(None) if d == dim else 0 for d in range(len(shape)))] for dim in range(len(shape))]
    groups = [dist.new_group(line.tolist()) for line in own]
    return DeviceMesh.from_group(groups, "cpu", mesh=ranks, mesh_dim_names=names)


def first_ranks(count: int, name: str) -> Any:
    """The mesh of the first ``count`` ranks of a larger world."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    group = dist.new_group(list(range(count)))
    return DeviceMesh.from_group([group], "cpu", mesh=torch.arange(count), mesh_dim_names=(name,))


class _FirstChunk:
    """``torch.chunk``'s result, of which only the first, this rank's, is made: set-up does not grow with the world."""

    def __init__(self, tensor: torch.Tensor, chunks: int, dim: int) -> None:
        self._chunk = tensor.narrow(dim, 0, -(-tensor.size(dim) // chunks))

    def __getitem__(self, rank: int) -> torch.Tensor:
        assert rank == 0
        return self._chunk


@contextlib.contextmanager
def lazy_chunks() -> Iterator[None]:
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    with replaced(_fsdp_param, "_chunk_with_empty", lambda tensor, count, dim: _FirstChunk(tensor, count, dim)):
        yield


def stream_number(numbers: dict[int, int]) -> int:
    """Of the stream that is current: 0 is the default one, others are numbered as they come."""
    current = id(torch.cpu.current_stream())
    return numbers.setdefault(current, len(numbers))
