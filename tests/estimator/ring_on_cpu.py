"""Ring attention with the CPU's flash kernel: torch's own ring, whose handlers know the kernels of GPUs alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.experimental._context_parallel import _attention as ring

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _forward(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    local = [tensor.to_local() for tensor in args[:3]]
    dropout, causal = (*args[3:], 0.0, False)[:2]
    group = args[0].device_mesh.get_group()
    found = ring._templated_ring_attention(group, 2, _FORWARD, *local, is_causal=causal, dropout_p=dropout, **kwargs)
    return tuple(_shared(tensor, args[0]) for tensor in found)


def _backward(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    gradient, query, key, value, out, lse = (tensor.to_local() for tensor in args[:6])
    group = args[0].device_mesh.get_group()
    found = ring._templated_ring_attention_backward(
        group, 2, _BACKWARD, gradient, "grad_out", query, key, value, out, lse, args[7], dropout_p=args[6], **kwargs
    )
    return tuple(_shared(tensor, args[1]) for tensor in found)


def _shared(tensor: torch.Tensor, like: Any) -> Any:
    mesh = like.device_mesh
    shape = list(tensor.shape)
    shape[2] *= mesh.size()
    meta = TensorMeta(torch.Size(shape), tensor.stride(), tensor.dtype)
    return DTensor(tensor, DTensorSpec(mesh, (Shard(2),), tensor_meta=meta), requires_grad=False)


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """torch's context parallelism has these handlers too, as long as this lasts."""
    added = {_FORWARD: _forward, _BACKWARD: _backward}
    ring.custom_ops.update(added)
    try:
        yield
    finally:
        for operator in added:
            del ring.custom_ops[operator]
