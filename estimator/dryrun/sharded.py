"""FSDP2 over a process group that moves nothing: torch's own ``fully_shard`` on one rank of any world. Loads torch on import.

The CPU's streams, which torch keeps only as names, stand for the device's: the allocator keeps a pool for each. A block is
free again when the last reference to it goes, as on a GPU: FSDP2 orders its streams by events and never records a tensor on
a second one. Source: ``torch/distributed/fsdp/_fully_shard``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from estimator.building.model import decoder_layers
from estimator.building.sharding import shard
from estimator.conventions import shards_flat, splits_by_own_plan
from estimator.dryrun import private_fsdp, tensor_parallel, transformers_plan
from estimator.dryrun.host_shards import shards_on_host
from estimator.dryrun.private_api import replaced
from estimator.dryrun.returned_inputs import keep_inputs
from estimator.dryrun.tracker import Tracker
from estimator.memory.flat_parameters import keeps_layer_inputs
from estimator.setup import Setup


@contextlib.contextmanager
def sharded(model: torch.nn.Module, setup: Setup) -> Iterator[None]:
    """``model``, on the meta device, is one rank's (the fullest: the first) as long as this lasts.

    Embedding, every decoder layer, and final norm with head are each gathered by themselves, as torchtitan and accelerate have
    it; the last stays gathered between forward and backward. With tied embeddings both tables are in the last.
    """
    ranks = setup.data_ranks * setup.context_parallel  # parameters are sharded over both
    shards = setup.shard_size or ranks
    # Whether there are more ranks than share the shards decides if gradients are reduced twice; how many changes nothing.
    replicas = 2 if ranks > shards else 1
    sizes = {"replicate": replicas, "shard": shards, "tensor": setup.tensor_parallel}
    sizes = {name: size for name, size in sizes.items() if size > 1 or (name, setup.sharding) == ("shard", "fsdp")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(private_fsdp.fake_process_group(math.prod(sizes.values())))
        stack.enter_context(private_fsdp.lazy_chunks())
        if setup.tensor_parallel > 1 and not splits_by_own_plan(setup):
            stack.enter_context(tensor_parallel.split_loss())
        if setup.context_parallel > 1:
            from estimator.dryrun.context_parallel import ring_attention

            stack.enter_context(ring_attention(private_fsdp.first_ranks(setup.context_parallel, "context")))
        distribute(model, setup, private_fsdp.cpu_mesh(**sizes))
        yield


def distribute(model: torch.nn.Module, setup: Setup, mesh: Any) -> None:
    """Splits tensors over the dimension ``tensor`` of a mesh, if it has one, and shards over the others."""
    names = list(mesh.mesh_dim_names)
    if "tensor" in names:
        names.remove("tensor")
        if splits_by_own_plan(setup):
            transformers_plan.parallelize(model, mesh["tensor"])
        else:
            tensor_parallel.parallelize(model, mesh["tensor"], tokens=setup.seq)
    if setup.sharding == "fsdp":
        shard(model, setup, mesh[tuple(names)])


@contextlib.contextmanager
def watched(tracker: Tracker, model: Any, setup: Setup) -> Iterator[None]:
    """FSDP's own allocations, of what for and in which stream, are seen by ``tracker``."""
    if keeps_layer_inputs(setup):
        keep_inputs(decoder_layers(model), tracker)
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._sharding_prop import ShardingPropagator
    from torch.distributed.tensor.parallel import loss

    def allocate(tensor: torch.Tensor) -> None:
        before = tensor.untyped_storage().nbytes()
        plain_allocate(tensor)
        if not before:
            tracker.allocated(tensor)

    def free(tensor: torch.Tensor) -> None:
        tracker.freed(tensor)
        plain_free(tensor)

    plain_allocate, plain_free = _fsdp_param.alloc_storage, _fsdp_param.free_storage
    groups: Any = _fsdp_param_group.FSDPParamGroup
    numbers = {id(torch.cpu.current_stream()): 0}
    tracker.wrappers = (DTensor, AsyncCollectiveTensor)
    tracker.stream_number = lambda: private_fsdp.stream_number(numbers)
    tracker.collectives = _gloo()
    tracker.waits = torch.ops._c10d_functional.wait_tensor.default
    with contextlib.ExitStack() as stack:
        if setup.offload:
            stack.enter_context(shards_on_host(tracker))
        for owner, name, function in (
            (_fsdp_param, "alloc_storage", allocate),
            (_fsdp_param, "free_storage", free),
            (_fsdp_param_group, "alloc_storage", allocate),
        ):
            stack.enter_context(replaced(owner, name, function))
        for name in ("unshard", "wait_for_unshard", "post_backward"):
            stack.enter_context(replaced(groups, name, _communicating(tracker, getattr(groups, name))))
        if shards_flat(setup):
            stack.enter_context(replaced(groups, "wait_for_unshard", _gathered_in_place(groups.wait_for_unshard)))
            together = setup.method in ("full", "freeze")  # an adapter's matrix is a unit of its own
            reduce = _reduced_at_once(groups.post_backward, together=together)
            stack.enter_context(replaced(groups, "post_backward", reduce))
            if setup.checkpointing == "full" and setup.checkpoint_reentrant:
                # A layer whose output needed no gradient in the forward pass is not fetched ahead.
                stack.enter_context(replaced(groups, "_backward_prefetch", lambda group: None))
        name = "_nll_loss_and_log_softmax_backward"
        stack.enter_context(replaced(loss, name, _formula(getattr(loss, name))))
        # What DTensor runs at the global shape to learn the result's: no memory of this rank's.
        propagate = "_propagate_tensor_meta_non_cached"
        stack.enter_context(
            replaced(ShardingPropagator, propagate, _unseen(tracker, getattr(ShardingPropagator, propagate)))
        )
        yield


def _gloo() -> dict[Any, Any]:
    """What gloo takes for itself (ProcessGroupGloo.cpp): a copy of what it reduces, and of what it gathers."""
    operators, functional = torch.ops.c10d, torch.ops._c10d_functional
    return {
        operators._reduce_scatter_base_.default: lambda args: (args[1].untyped_storage().nbytes(),),
        operators._allgather_base_.default: lambda args: (args[0].untyped_storage().nbytes(),),
        functional.reduce_scatter_tensor.default: lambda args: (args[0].untyped_storage().nbytes(),),
        functional.all_gather_into_tensor.default: lambda args: (args[0].untyped_storage().nbytes() * args[1],),
    }


def _communicating(tracker: Tracker, method: Any) -> Any:
    def called(*args: Any, **kwargs: Any) -> Any:
        with tracker.purpose("communication"):
            return method(*args, **kwargs)

    return called


def _gathered_in_place(method: Any) -> Any:
    """FSDP1 gathers into the flat parameter itself, where FSDP2 keeps what was gathered until the next unit comes."""

    def called(group: Any) -> None:
        method(group)
        group.comm_ctx.all_gather_state = None

    return called


def _reduced_at_once(method: Any, *, together: bool) -> Any:
    """FSDP1's parameters are views of the flat one: autograd puts their gradients together into its own while it is still gathered,
    where FSDP2 copies them once it is freed; and what is reduced is left to the allocator (``record_stream``), where FSDP2 keeps
    it until the next unit's. Two real processes (gloo) have 3.04 times an untied root at the end of backward."""

    def called(group: Any, *unused: Any) -> None:
        whole = [each.unsharded_param for each in group.fsdp_params if hasattr(each, "_unsharded_param")]
        whole = [parameter for parameter in whole if parameter.grad is not None]
        if together and len(whole) > 1:
            with torch.no_grad():
                flat = torch.cat([parameter.grad.flatten() for parameter in whole])
                for parameter, part in zip(whole, flat.split([each.numel() for each in whole]), strict=True):
                    parameter.grad = part.view_as(parameter)
                del flat, part
        method(group, *unused)
        group.comm_ctx.reduce_scatter_states.clear()

    return called


def _formula(function: Any) -> Any:
    """A backward formula in Python: its sums are not autograd's, which are in place and never record."""

    def called(*args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad():
            return function(*args, **kwargs)

    return called


def _unseen(tracker: Tracker, method: Any) -> Any:
    def called(*args: Any, **kwargs: Any) -> Any:
        with tracker.blind():
            return method(*args, **kwargs)

    return called
