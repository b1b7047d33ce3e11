"""Quantized bases under FSDP: packed weights as parameters that can be sharded. Loads torch on import.

FSDP gathers floating-point parameters of one type, so that the recipes store what is packed in the type of the rest:
bitsandbytes' ``bnb_4bit_quant_storage``, and fms-acceleration's views of GPTQ's integers. Statistics and scales are no
parameters: every rank has them whole. Nothing is cast as it is gathered, which would read codes as numbers
(accelerate's ``set_mixed_precision(quant_storage, override=True)``). LLM.int8()'s weights have no such storage.
"""

from __future__ import annotations

from typing import Any

import torch

from estimator.dryrun.quantized import GptqLinear, Nf4Linear

_GPTQ_PARTS = ("qweight", "qzeros")


def store_packed(model: torch.nn.Module, storage: torch.dtype) -> None:
    """Packed tensors of ``model`` become frozen parameters of the type ``storage``, of the same bytes."""
    for module in model.modules():
        if isinstance(module, Nf4Linear):
            module.weight = _stored(module.weight, storage)
        elif isinstance(module, GptqLinear):
            for name in _GPTQ_PARTS:
                packed = getattr(module, name)
                delattr(module, name)
                module.register_parameter(name, _stored(packed, storage))


def _stored(packed: torch.Tensor, storage: torch.dtype) -> Any:
    count = -(-packed.nbytes // storage.itemsize)
    return torch.nn.Parameter(torch.empty(count, 1, dtype=storage, device=packed.device), requires_grad=False)
