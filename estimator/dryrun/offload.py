"""Activations in host memory between the passes: ``save_on_cpu`` around each decoder layer. Loads torch on import.

With checkpointing that is transformers' ``offload=True``: the layers' inputs leave the device. Without, all that a layer's
backward needs leaves it, but for its parameters, as in torchtune's ``OffloadActivations``; the head's and the loss's stay.
Copies are taken to be waited for: torchtune's second stream holds a few tensors longer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks


def offload_activations(layers: Iterable[Any], *, checkpointing: bool) -> None:
    """layers: of transformers. A host copy is no tensor here, only what is needed to make the device's anew."""
    for layer in layers:
        name = "_gradient_checkpointing_func" if checkpointing else "forward"
        setattr(layer, name, _within_hooks(getattr(layer, name)))


def _within_hooks(function: Any) -> Any:
    @functools.wraps(function)
    def offloading(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(_pack, _unpack):
            return function(*args, **kwargs)

    return offloading


def _pack(tensor: torch.Tensor) -> Any:
    owner = tensor if tensor._base is None else tensor._base  # of a linear layer the transposed weight is saved
    if isinstance(owner, torch.nn.Parameter):
        return tensor
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def _unpack(packed: Any) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    shape, stride, dtype = packed
    reach = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    dense = all(stride) and reach == torch.Size(shape).numel()  # else a copy is contiguous
    return torch.empty_strided(shape, stride, dtype=dtype) if dense else torch.empty(shape, dtype=dtype)
