"""What optimizers keep of the trained parameters, on the device and in host memory; bytes of one device."""

from __future__ import annotations

from estimator.arrays import Number, maximum, where
from estimator.memory.blocks import matrix_slack
from estimator.memory.galore import state_bytes
from estimator.memory.placement import Placement, model_divisors
from estimator.memory.widths import Widths, accumulates_in_fp32, keeps_master_weights
from estimator.model.lora_targets import adapted_matrices
from estimator.model.shape import ModelShape, ParameterCount
from estimator.setup import Setup

# Moments that an optimizer keeps for each trained parameter. AdamW's have the parameter's own width; bitsandbytes' are fp32, or
# 8-bit with an fp32 absmax a block of 256. Adafactor's rows and columns are left out (under 1%).
_MOMENTS = {
    "adamw": 2, "adamw-fused": 2, "adamw-8bit": 2, "adamw-8bit-paged": 2, "adamw-paged": 2, "adafactor": 0, "sgd": 0, "galore": 2,
}  # fmt: skip
_ABSMAX_WIDTH = 4 / 256
EIGHT_BIT_WIDTH = 1 + _ABSMAX_WIDTH
_MASTER_WIDTH = 4.0
_PAGED_FROM = 100_000
"""Elements of a tensor from which on bitsandbytes pages its states (``Optimizer8bit.get_state_buffer``)."""


def optimizer_bytes_per_parameter(setup: Setup, size: Widths) -> float:
    """Bytes of optimizer state for one trained parameter."""
    optimizer = setup.optimizer or "adamw"
    return _MOMENTS[optimizer] * _moment_width(optimizer, size)


def master_and_moments(setup: Setup) -> float:
    """Bytes of a trained parameter where the optimizer steps fp32 copies of half weights: DeepSpeed's engine and Megatron's."""
    optimizer = setup.optimizer or "adamw"
    return _MASTER_WIDTH + _MOMENTS[optimizer] * (EIGHT_BIT_WIDTH if "8bit" in optimizer else 4.0)


def _moment_width(optimizer: str, size: Widths) -> float:
    if "8bit" in optimizer:
        return EIGHT_BIT_WIDTH
    return 4.0 if "paged" in optimizer else size.trained


def optimizer_states(
    shape: ModelShape, setup: Setup, size: Widths, place: Placement, count: ParameterCount, *, trainable: Number, sharded: Number
) -> tuple[Number, Number]:  # fmt: skip
    """(on the device, in host memory). trainable: trained parameters of this device's share of the model; sharded: the same as
    data-parallel ranks share them."""
    optimizer = str(setup.optimizer)
    if optimizer == "galore":
        kept: Number = state_bytes(shape, size.trained)
    elif keeps_master_weights(setup):
        kept = trainable * master_and_moments(setup) / place.optimizer
    elif accumulates_in_fp32(setup):
        kept = master_and_moments(setup) * _distributed(setup, count, trainable)
    else:
        kept = sharded * optimizer_bytes_per_parameter(setup, size)
        if "8bit" in optimizer and setup.method == "full" and setup.framework.startswith("hf-trainer"):
            # Trainer has bitsandbytes keep fp32 states of embeddings.
            table = (count.embedding + (count.head if shape.tied_embeddings else 0)) / setup.tensor_parallel
            kept = kept + table * 2 * (4 - EIGHT_BIT_WIDTH)
        kept = kept / place.optimizer
    if setup.offload in ("optimizer", "optimizer+parameters"):  # ZeRO-Offload keeps fp32 master weights as well
        masters = size.trained == 2 and not (keeps_master_weights(setup) or accumulates_in_fp32(setup))
        return 0.0, kept + (trainable * 12.0 / place.optimizer if masters else 0.0)
    if "paged" in optimizer:  # unified memory outside torch's allocator
        left = _unpaged(shape, setup, sharded) / place.optimizer
        if keeps_master_weights(setup):
            left = left + _MASTER_WIDTH * trainable / place.optimizer
        elif accumulates_in_fp32(setup):
            left = left + _MASTER_WIDTH * _distributed(setup, count, trainable)
        return left, maximum(kept - left, 0.0)
    if keeps_master_weights(setup) or accumulates_in_fp32(setup):  # in flat buffers
        return kept, 0.0
    return kept + where(place.optimizer == 1, _slack(shape, setup, size), 0.0), 0.0


def _unpaged(shape: ModelShape, setup: Setup, sharded: Number) -> Number:
    """What a paged optimizer keeps on the device: the states of small tensors (of full training's, under a thousandth, none) and
    the statistics of 8-bit ones."""
    eight_bit = "8bit" in str(setup.optimizer)
    width = 2 * (1.0 if eight_bit else 4.0)
    left: Number = sharded * 2 * _ABSMAX_WIDTH if eight_bit else 0.0
    if setup.method not in ("lora", "dora", "qlora"):
        return left
    rank = setup.lora_rank or 1
    for moe, layers in ((False, shape.plain_layers), (True, shape.moe_layers)):
        if layers:
            for _, inputs, outputs in adapted_matrices(shape, setup, moe=moe):
                tensors = [rank * inputs, rank * outputs] + ([outputs] if setup.method == "dora" else [])
                left = left + layers * width * sum(elements for elements in tensors if elements < _PAGED_FROM)
    return left / setup.tensor_parallel / setup.pipeline_parallel


def _slack(shape: ModelShape, setup: Setup, size: Widths) -> Number:
    """Of the blocks of all moments."""
    moments = _MOMENTS[str(setup.optimizer)]
    if setup.method not in ("full", "freeze") or not moments or setup.optimizer == "galore":
        return 0.0
    width = 1.0 if "8bit" in str(setup.optimizer) else _moment_width(str(setup.optimizer), size)
    slack = matrix_slack(shape, setup, width, width, copies=moments)
    return slack * (setup.trainable_layers or 0) / shape.layers if setup.method == "freeze" else slack


def _distributed(setup: Setup, count: ParameterCount, trainable: Number) -> Number:
    """Trained parameters that one rank steps of Megatron's optimizer, which is split over those that hold the same weights."""
    ranks = setup.shard_size or setup.data_ranks * setup.context_parallel
    _, expert = model_divisors(setup)
    experts = count.experts / expert if setup.method == "full" else 0.0
    return (trainable - experts) / ranks + experts / maximum(ranks / setup.expert_parallel, 1)
