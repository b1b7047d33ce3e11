"""Bytes of one element by role, as precision, method and sharding have them."""

from __future__ import annotations

from dataclasses import dataclass

from estimator.conventions import conventions
from estimator.setup import Setup


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Bytes of one element, by role."""

    weight: float
    """As stored, outside quantized matrices."""
    compute: float
    """What matrix products read and write."""
    stream: float
    """The residual stream between the layers."""
    trained: float
    """Trained parameters and their gradients (adapters are fp32 in peft)."""
    autocast: bool
    """Matrix products run under autocast."""
    casts_weights: bool
    """Autocast has wider weights to cast, and the casts live in the graph."""


def keeps_master_weights(setup: Setup) -> bool:
    """DeepSpeed's engine: the model itself is half, without autocast, and the optimizer holds fp32 master weights."""
    if setup.sharding == "zero1" and conventions(setup).distributed_optimizer:
        return False
    return str(setup.sharding).startswith("zero") and setup.precision.endswith("-mixed")


def accumulates_in_fp32(setup: Setup) -> bool:
    """Megatron's mixed precision: half weights and fp32 master weights as DeepSpeed's, but fp32 gradients."""
    mixed = setup.precision.endswith("-mixed") and not keeps_master_weights(setup)
    return mixed and conventions(setup).half_with_master_weights


def widths(setup: Setup) -> Widths:
    """Element sizes that the precision implies. Quantized bases compute in the half precision that autocast names."""
    half = setup.precision in ("bf16", "fp16") or keeps_master_weights(setup) or accumulates_in_fp32(setup)
    half = half or conventions(setup).half_weights
    # FSDP's mixed precision gathers half copies of fp32 shards: the layers see half tensors only, and no autocast. A
    # quantized base is gathered as it is stored.
    gathers_half = setup.sharding == "fsdp" and setup.precision.endswith("-mixed") and not setup.base_quantization
    gathers_half = gathers_half and not half
    mixed = setup.precision.endswith("-mixed") and not half and not gathers_half
    weight = 2.0 if half else 4.0
    compute = 2.0 if half or mixed or gathers_half else 4.0
    adapters = setup.method in ("lora", "dora", "qlora")
    # DeepSpeed makes the whole model half, adapters as well.
    fp32_adapters = conventions(setup).fp32_adapters and not keeps_master_weights(setup)
    trained = 4.0 if adapters and fp32_adapters else weight
    return Widths(
        weight=weight,
        compute=compute,
        stream=compute if gathers_half else weight,
        trained=trained,
        autocast=mixed or setup.autocast is not None,
        casts_weights=mixed,
    )


_LOW_PRECISION = {"fp8-mixed": 1.0, "mxfp8-mixed": 1 + 1 / 32, "nvfp4-mixed": 0.5 + 1 / 16}


def input_width(setup: Setup, size: Widths) -> float:
    """Bytes of an element of what a trained product keeps as its input: Transformer Engine keeps it as it multiplied it."""
    low = _LOW_PRECISION.get(setup.precision, size.compute)
    return low if conventions(setup).fused_layers else size.compute


def accumulated_width(setup: Setup) -> float:
    """Bytes of an element of Megatron's gradient buffers: fp32, but half in the recipes of Megatron-Bridge and NeMo that multiply
    in less than half (``grad_reduce_in_fp32``)."""
    return 2.0 if setup.precision in _LOW_PRECISION else 4.0


def copies_inputs(setup: Setup, size: Widths) -> bool:
    """Whether adapters keep an input of their own, cast to their type or by autocast."""
    return setup.method in ("lora", "dora", "qlora") and (size.autocast or size.weight != size.trained)
