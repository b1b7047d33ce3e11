"""FSDP2 around a model: what is gathered together, in which type, and what stays gathered. Loads torch on import.

One place for the dry run, which runs it over a process group that moves nothing, and for real training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from estimator.building.model import decoder_layers, weight_dtype
from estimator.conventions import shards_flat, splits_by_own_plan
from estimator.setup import Setup


def shard(model: torch.nn.Module, setup: Setup, mesh: Any) -> None:
    """``fully_shard`` of every unit and of the rest, over a mesh of (shards) or (replicas, shards).

    Embedding, every decoder layer, and final norm with head are each gathered by themselves, as torchtitan and accelerate have
    it; the last stays gathered between forward and backward. With tied embeddings both tables are in the last.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    if setup.base_quantization:
        from estimator.dryrun.packed import store_packed

        store_packed(model, weight_dtype(setup))
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": _policy(setup)}
    if setup.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    for modules, reshards in _units(model, flat=shards_flat(setup)):
        fully_shard(modules, reshard_after_forward=setup.reshard_after_forward and reshards, **options)
    fully_shard(model, **options)


def _policy(setup: Setup) -> Any:
    """torchtitan reduces in fp32, accelerate in the compute type. Packed weights are gathered as they are, and by default
    all are that transformers shards as it loads them (``DistributedConfig.fsdp_mixed_precision``)."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if setup.base_quantization or splits_by_own_plan(setup):
        return MixedPrecisionPolicy()
    half = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}.get(setup.precision)
    if half is None:
        return MixedPrecisionPolicy()
    if setup.framework == "hf-trainer":
        return MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half, output_dtype=half)
    return MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)


def _units(model: Any, *, flat: bool) -> list[tuple[Any, bool]]:
    """What is gathered together, and whether it is freed after the forward pass; all else is the root's, which is gathered
    first and stays. flat: FSDP1's units, whose root has both tables."""
    layers = decoder_layers(model)
    if flat:
        return [(layer, True) for layer in layers]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    norms = _after(model, layers)
    tied = head is not None and embedding.weight is head.weight
    tail = [*norms, *([embedding] if tied else []), *([head] if head is not None else [])]
    units: list[tuple[Any, bool]] = [(layer, True) for layer in layers]
    if not tied:
        units.append((embedding, True))
    units.append((tail, False))
    return units


def _after(model: torch.nn.Module, layers: torch.nn.Module) -> list[torch.nn.Module]:
    """The final norm: what stands behind the layers in the module that owns them, and has parameters."""
    for module in model.modules():
        children: Sequence[torch.nn.Module] = list(module.children())
        if any(child is layers for child in children):
            behind = children[[child is layers for child in children].index(True) + 1 :]
            return [child for child in behind if next(child.parameters(recurse=False), None) is not None]
    raise AssertionError("the layers are a module of the model")
