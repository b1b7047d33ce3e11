"""Tensor parallelism as transformers has it: the model's own plan, applied by its own code. Loads torch on import.

Matrices alone are split, those of experts within each expert: the stream between them is whole on every rank, and so are
the norms and the logits, which are gathered. peft splits an adapter's matrix where its layer's is split, the other is whole.
Sources: transformers 5.23 ``distributed/tensor_parallel.py``, peft 0.21 ``tuners/lora/model.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from estimator.errors import InputError

_SPLIT_ADAPTERS = {"colwise": "lora_B", "rowwise": "lora_A"}


def parallelize(model: Any, mesh: Any) -> None:
    """Splits ``model`` (transformers', or peft's around it) over the ranks of ``mesh``, which has one dimension.

    Raises InputError where transformers has no plan for it.
    """
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    plan: dict[str, str] = inner.tp_plan or {}
    if not any(".layers." in f".{name}" for name in plan):
        raise InputError(
            f"tensor_parallel: transformers has no plan for {inner.config.model_type}; write 1, or leave out --dry-run"
        )
    tied = inner.get_output_embeddings().weight is inner.get_input_embeddings().weight
    apply_tensor_parallelism(inner, mesh, dict(_steps(inner, plan)))
    if tied:
        inner.get_output_embeddings().weight = inner.get_input_embeddings().weight
    _split_adapters(inner, plan, mesh)


def _steps(model: torch.nn.Module, plan: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(name, style) of what is split: a module's parameters, of tied ones the first, before itself. What peft has wrapped is
    one name further in."""
    first = {name for name, _ in model.named_parameters()}
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            continue
        style = _style(plan, name)
        for parameter, _ in module.named_parameters(recurse=False):
            own = f"{name}.{parameter}"
            found = _style(plan, own) or style
            if found is not None and own in first:
                yield own, found
        if style is not None:
            yield name, style


def _style(plan: dict[str, str], name: str) -> str | None:
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

    return plan.get(replace_layer_number_by_wildcard(name.replace(".base_layer", "")))


def _split_adapters(model: torch.nn.Module, plan: dict[str, str], mesh: Any) -> None:
    for name, module in list(model.named_modules()):
        style = _style(plan, name) if hasattr(module, "base_layer") else None
        if style not in _SPLIT_ADAPTERS:
            continue
        from peft.tuners.lora.model import add_lora_tp_hooks_dtensor

        for adapter in getattr(module, _SPLIT_ADAPTERS[style]).values():
            add_lora_tp_hooks_dtensor(adapter, style, mesh, base_layer=module.base_layer, module_name=name)
