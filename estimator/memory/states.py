"""Bytes that stay through a step: parameters, gradients and optimizer states, by method, precision, quantization and sharding."""

from __future__ import annotations

from dataclasses import dataclass

from estimator.arrays import Number, minimum, where
from estimator.conventions import conventions, shards_flat
from estimator.memory.blocks import matrix_slack
from estimator.memory.optimizer_states import EIGHT_BIT_WIDTH, optimizer_bytes_per_parameter, optimizer_states
from estimator.memory.padding import padding
from estimator.memory.placement import Placement, model_divisors, placement
from estimator.memory.remembered import remembered
from estimator.memory.trained import ADAPTER_START, as_built, layer_parameters, trainable_parameters
from estimator.memory.widths import (
    Widths,
    accumulated_width,
    accumulates_in_fp32,
    copies_inputs,
    keeps_master_weights,
    widths,
)
from estimator.model.catalog import rotary_positions
from estimator.model.shape import ModelShape, ParameterCount, count_parameters
from estimator.setup import Setup

__all__ = [
    "ADAPTER_START", "EIGHT_BIT_WIDTH", "QUANTIZED_BYTES", "STATISTICS_BYTES", "Placement", "States", "Widths", "accumulates_in_fp32", "as_built",
    "copies_inputs", "keeps_master_weights", "layer_parameters", "leaves_table_whole", "model_divisors",
    "optimizer_bytes_per_parameter", "placement", "quantizes_experts", "states", "trainable_parameters", "widths",
]  # fmt: skip

# Bytes of one weight in a quantized matrix: the codes, and one absmax (or scale and zero) a group.
# nf4: bitsandbytes, blocks of 64 with an fp32 absmax; -dq: 8-bit absmax, fp32 again for 256 blocks. int8: one fp32
# statistic a row (left out: under 0.1%). GPTQ: groups of 128 with an fp16 scale and a packed zero.
QUANTIZED_BYTES = {
    "nf4": 0.5 + 4 / 64,
    "nf4-dq": 0.5 + 1 / 64 + 4 / (64 * 256),
    "int8": 1.0,
    "gptq-int4": 0.5 + (2 + 0.5) / 128,
    "gptq-int8": 1.0 + (2 + 1) / 128,
}
# Of these, what is no parameter: where packed weights are sharded, every rank has it whole.
STATISTICS_BYTES = {"nf4": 4 / 64, "nf4-dq": 1 / 64 + 4 / (64 * 256), "int8": 0.0, "gptq-int4": 2 / 128, "gptq-int8": 2 / 128}  # fmt: skip


def quantizes_experts(setup: Setup) -> bool:
    """transformers 5, as torchtitan, has a layer's experts in one tensor, which bitsandbytes leaves as it was loaded; before (as a loss tells:
    before 4.50), in GPTQ's checkpoints and in other code each is a matrix of its own."""
    of_today = setup.framework in ("hf-trainer", "hf-trainer+deepspeed", "torch-loop", "torchtitan")
    fused = of_today and setup.logit_copies == "none"
    return not (fused and str(setup.base_quantization) in ("nf4", "nf4-dq", "int8"))


def quantizes_head(setup: Setup) -> bool:
    """Whether the output projection is among the 4-bit matrices."""
    return conventions(setup).quantizes_head and str(setup.base_quantization).startswith("nf4")


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Bytes per device of what persists, and sizes that the phases need. All counts are of one device's share of the
    model (tensor, pipeline and expert parallelism applied), data-parallel sharding applied only to the bytes."""

    parameters: Number
    gradients: Number
    optimizer: Number
    host_optimizer: Number
    """Optimizer states (and, offloaded, parameters) that live in host memory."""
    trainable: Number
    """Trained parameters of this device's model share."""
    total: Number
    linear: Number
    """Parameters in the layers' matrices on this device."""
    experts: Number
    """Those of them in routed experts."""
    largest_layer: Number
    embedding: Number
    """Of the embedding on this device (and as many in an untied head)."""
    quantized: Number
    """Parameters held in quantized matrices."""
    gradient_width: Number
    padding: Number
    """Elements that FSDP2 adds to the model's own tensors (``estimator.memory.padding``)."""
    trained_padding: Number
    """And to trained ones."""


@remembered
def states(shape: ModelShape, setup: Setup) -> States:
    """What persists through a step, per device (``setup`` resolved)."""
    shape = as_built(shape, setup)
    count = count_parameters(shape)
    dense, expert = model_divisors(setup)
    size = widths(setup)
    place = placement(setup)
    total = (count.total - count.experts) / dense + count.experts / expert
    # The stage that holds an embedding is the fullest: its table is divided by the tensor-parallel ranks only.
    tables = (count.embedding + count.head) / setup.tensor_parallel / 2
    layered = (count.layered - count.experts) / dense + count.experts / expert
    total = where(setup.pipeline_parallel > 1, layered + tables, total)
    trainable = total if setup.method == "full" else trainable_parameters(shape, setup) / dense
    experts = count.experts if quantizes_experts(setup) else 0
    quantized: Number = 0.0
    if setup.base_quantization:
        quantized = (count.attention + count.mixer + count.mlp + count.other) / dense + experts / expert
    if quantizes_head(setup):
        quantized = quantized + count.head / setup.tensor_parallel
    # Expert-parallel ranks are data-parallel ranks as well: sharding divides experts by what is left of these.
    again = count.experts / expert * (minimum(setup.expert_parallel, place.parameters) - 1)
    packed = quantized + (again if setup.base_quantization and experts else 0.0)
    padded, trained_padded = padding(shape, setup, place)
    held, trained = total + again + padded, trainable + trained_padded
    parameters = _parameter_bytes(setup, size, count, held, trained, packed) / place.parameters
    slack = _slack_of_loaded(shape, setup, size)
    parameters = parameters + where(place.parameters == 1, slack, 0.0)
    if setup.base_quantization:
        whole = quantized * STATISTICS_BYTES[setup.base_quantization]
        parameters = parameters + whole * (1 - 1 / place.parameters)
    trains_experts = setup.method == "full" and not accumulates_in_fp32(setup)
    sharded = trainable + (again if trains_experts else 0.0) + trained_padded
    gradients = sharded * size.trained / place.gradients
    if setup.method in ("lora", "dora", "qlora") and shards_flat(setup) and conventions(setup).mixed_units:
        gradients = layered * size.trained / place.gradients
    if keeps_master_weights(setup):
        gradients = trainable * 2.0 / place.gradients
        parameters = parameters + _rotary_tables(shape, setup)
    elif accumulates_in_fp32(setup):
        gradients = trainable * accumulated_width(setup) / place.gradients
    if leaves_table_whole(shape, setup):
        gradients = gradients + (setup.tensor_parallel - 1) * size.trained * count.embedding / setup.tensor_parallel
    optimizer, host = optimizer_states(shape, setup, size, place, count, trainable=trainable, sharded=sharded)
    if setup.offload in ("optimizer", "optimizer+parameters") or "paged" in str(setup.optimizer):
        if keeps_master_weights(setup) and setup.sharding != "zero1":
            gradients = 0.0  # sent to the host bucket by bucket
        if setup.sharding == "fsdp" and setup.offload:
            gradients = 0.0  # each as soon as it is reduced
    if setup.offload == "optimizer+parameters":
        host += parameters
        parameters = 0.0
    return States(
        parameters=parameters,
        gradients=0.0 if setup.optimizer_in_backward else gradients,
        optimizer=optimizer,
        host_optimizer=host,
        trainable=trainable,
        total=total,
        linear=count.linear / dense
        if not count.experts
        else (count.linear - count.experts) / dense + count.experts / expert,
        experts=count.experts / expert,
        largest_layer=layer_parameters(shape)
        / (setup.tensor_parallel * (setup.expert_parallel if shape.experts else 1)),
        embedding=shape.vocab * shape.hidden / setup.tensor_parallel,
        quantized=quantized,
        gradient_width=size.trained,
        padding=padded,
        trained_padding=trained_padded,
    )


def leaves_table_whole(shape: ModelShape, setup: Setup) -> bool:
    """Whether a table's gradient is on every rank as large as the whole table, until the step splits it: DTensor's lookup makes it
    from its own tokens, and nothing but sharding or a tied head's gradient asks for the table's own split before."""
    untied = setup.method == "full" and not shape.tied_embeddings
    return untied and setup.sharding == "none" and conventions(setup).parallel_loss


def _slack_of_loaded(shape: ModelShape, setup: Setup, size: Widths) -> Number:
    if keeps_master_weights(setup):  # the engine's parameters are parts of flat buffers
        return 0.0
    width = size.weight
    if setup.base_quantization:
        width = 1.0 if "8" in setup.base_quantization else 0.5
    return matrix_slack(shape, setup, width, size.weight)


def _rotary_tables(shape: ModelShape, setup: Setup) -> float:
    """Before transformers 4.43 every layer kept the cosines and sines of all positions (as a loss tells: before 4.46)."""
    positions = rotary_positions(shape.name) if setup.logit_copies == "shifted" else None
    return 2.0 * 2 * (positions or 0) * shape.head_dim * shape.layers


def _parameter_bytes(
    setup: Setup, size: Widths, count: ParameterCount, total: Number, trainable: Number, quantized: Number
) -> Number:
    if setup.method in ("full", "freeze"):
        return total * size.weight
    if not setup.base_quantization:
        return total * size.weight + trainable * size.trained
    # Embeddings, norms and head stay as they were loaded.
    rest = total - quantized
    return quantized * QUANTIZED_BYTES[setup.base_quantization] + rest * size.weight + trainable * size.trained
