"""The model of one rank: whole, replicated (DDP), or its shard (FSDP2, tensor parallelism), on its device. Loads torch on import."""

from __future__ import annotations

from typing import Any

import torch

from estimator.building.loading import fill
from estimator.building.model import build_empty_model, build_model
from estimator.setup import Setup
from harness.several import lone
from harness.world import World


def build_for_rank(setup: Setup, world: World, *, seed: int, kind: str) -> Any:
    """This rank's model on its device, weights and all; under DDP torch's wrapper around it. ``setup`` resolved.

    Sharded, no rank holds the whole model but the first, and that only where ``estimator.building.loading`` says so.
    """
    device = torch.device("cuda", world.local_rank) if kind == "cuda" else torch.device("cpu")
    if setup.sharding == "fsdp" or setup.tensor_parallel > 1:
        from estimator.dryrun.sharded import distribute

        model: Any = build_empty_model(lone(setup))
        distribute(model, setup, rank_mesh(setup, device.type))
        fill(model, lone(setup), seed=seed, device=device, is_main=world.is_main)
        return model
    model = build_model(lone(setup), seed=seed).to(device)
    if setup.sharding != "ddp":
        return model
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model, device_ids=[device.index] if kind == "cuda" else None)


def rank_mesh(setup: Setup, device: str) -> Any:
    """All ranks as (replicas, shards, tensor): those of one tensor split are neighbours, and so on one machine."""
    from torch.distributed.device_mesh import init_device_mesh

    shards = setup.shard_size or setup.data_ranks
    sizes = {"replicate": setup.data_ranks // shards, "shard": shards, "tensor": setup.tensor_parallel}
    sizes = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    return init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def unwrapped(model: Any) -> Any:
    """Without DDP's wrapper and torch.compile's."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model


def local_tensors(model: Any) -> torch.nn.Module:
    """A module of what this rank holds: the local part of each parameter, and buffers."""
    held = torch.nn.Module()
    for number, tensor in enumerate([*model.parameters(), *model.buffers()]):
        held.register_buffer(str(number), getattr(tensor, "_local_tensor", tensor).detach())
    return held
