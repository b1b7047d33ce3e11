"""Bytes that stay through a step: parameters, gradients and optimizer states, by method, precision, quantization and sharding."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from estimator.arrays import Number, maximum, minimum, where
from estimator.conventions import conventions, shards_flat
from estimator.errors import InputError
from estimator.hardware import is_cpu
from estimator.memory.galore import state_bytes
from estimator.memory.remembered import remembered
from estimator.model.catalog import rotary_positions
from estimator.model.lora_targets import adapter_parameters
from estimator.model.shape import (
    ModelShape,
    ParameterCount,
    attention_parameters,
    count_parameters,
    mlp_parameters,
)
from estimator.setup import Setup
from estimator.units import MIB


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
    return str(setup.sharding).startswith("zero") and setup.precision.endswith("-mixed")


def accumulates_in_fp32(setup: Setup) -> bool:
    """Megatron's mixed precision: half weights and fp32 master weights as DeepSpeed's, but fp32 gradients."""
    mixed = setup.precision.endswith("-mixed") and not keeps_master_weights(setup)
    return mixed and conventions(setup).half_with_master_weights


def widths(setup: Setup) -> Widths:
    """Element sizes that the precision implies. Quantized bases compute in the half precision that autocast names."""
    half = setup.precision in ("bf16", "fp16") or keeps_master_weights(setup) or accumulates_in_fp32(setup)
    # FSDP's mixed precision gathers half copies of fp32 shards: the layers see half tensors only, and no autocast. A
    # quantized base is gathered as it is stored.
    gathers_half = setup.sharding == "fsdp" and setup.precision.endswith("-mixed") and not setup.base_quantization
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


def copies_inputs(setup: Setup, size: Widths) -> bool:
    """Whether adapters keep an input of their own, cast to their type or by autocast."""
    return setup.method in ("lora", "dora", "qlora") and (size.autocast or size.weight != size.trained)


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
# Moments that an optimizer keeps for each trained parameter. AdamW's have the parameter's own width; 8-bit ones carry
# an fp32 absmax a block of 256 (bitsandbytes). Adafactor's rows and columns are left out (under 1%).
_MOMENTS = {
    "adamw": 2, "adamw-fused": 2, "adamw-8bit": 2, "adamw-8bit-paged": 2, "adamw-paged": 2, "adafactor": 0, "sgd": 0, "galore": 2,
}  # fmt: skip
EIGHT_BIT_WIDTH = 1 + 4 / 256


def quantizes_experts(setup: Setup) -> bool:
    """transformers 5 has a layer's experts in one tensor, which bitsandbytes leaves as it was loaded; before (as a loss tells:
    before 4.50), in GPTQ's checkpoints and in other code each is a matrix of its own."""
    fused = setup.framework in ("hf-trainer", "hf-trainer+deepspeed", "torch-loop") and setup.logit_copies == "none"
    return not (fused and str(setup.base_quantization) in ("nf4", "nf4-dq", "int8"))


def as_built(shape: ModelShape, setup: Setup) -> ModelShape:
    """The shape as the setup's framework builds it."""
    if shape.tied_embeddings and conventions(setup).unties_head:
        return dataclasses.replace(shape, tied_embeddings=False)
    return shape


def trainable_parameters(shape: ModelShape, setup: Setup) -> int:
    """Parameters that get gradients, by method."""
    shape = as_built(shape, setup)
    total = count_parameters(shape).total
    if setup.method == "full":
        return total
    if setup.method == "freeze":
        assert setup.trainable_layers is not None
        if setup.trainable_layers > shape.layers:
            raise InputError(
                f"trainable_layers: {setup.trainable_layers} is more than the {shape.layers} layers of {shape.name}"
            )
        return setup.trainable_layers * layer_parameters(shape)
    if setup.method.startswith("adapter"):
        return _prompt_adapter_parameters(shape, setup)
    return adapter_parameters(shape, setup)


ADAPTER_START, _ADAPTER_PROMPT = 2, 10
"""The first layer with an adaption prompt, and the prompt's tokens (litgpt/adapter.py)."""


def _prompt_adapter_parameters(shape: ModelShape, setup: Setup) -> int:
    """LLaMA-Adapter: a prompt and a gate a head in each layer from the third on; its second version trains the norms, and a
    scale and a bias of every product as well (litgpt/adapter_v2.py)."""
    prompts = (shape.layers - ADAPTER_START) * (_ADAPTER_PROMPT * shape.hidden + shape.heads)
    if setup.method == "adapter":
        return prompts
    norms = count_parameters(shape).norm
    outputs = shape.query_width + 2 * shape.kv_width + 2 * shape.hidden + (shape.matrices - 1) * shape.plain_ffn
    return prompts + norms + 2 * (shape.layers * outputs + shape.vocab)


def layer_parameters(shape: ModelShape) -> int:
    """Parameters of the largest layer."""
    norm = shape.norms_per_layer * shape.hidden * (2 if shape.norm_bias else 1)
    mlp = mlp_parameters(shape, shape.plain_ffn) if shape.plain_layers else 0
    if shape.moe_layers:
        experts = (shape.experts + shape.shared_experts) * mlp_parameters(shape, shape.ffn)
        mlp = max(mlp, experts + shape.hidden * shape.experts)
    return attention_parameters(shape) + norm + mlp


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How many ways each kind of state is divided over the devices."""

    parameters: Number
    gradients: Number
    optimizer: Number
    gathers: Number
    """Sharded parameters are gathered layer by layer (ZeRO-3, FSDP)."""


def placement(setup: Setup) -> Placement:
    """Divisors of data-parallel sharding (tensor, pipeline and expert parallelism divide the counts before)."""
    shards = setup.shard_size if setup.shard_size is not None else setup.data_ranks * setup.context_parallel
    kind = setup.sharding or "none"
    return Placement(
        parameters=shards if kind in ("zero3", "fsdp") else 1,
        gradients=shards if kind in ("zero2", "zero3", "fsdp") else 1,
        optimizer=shards if kind in ("zero1", "zero2", "zero3", "fsdp") else 1,
        gathers=shards > 1 if kind in ("zero3", "fsdp") else False,
    )


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


def model_divisors(setup: Setup) -> tuple[Number, Number]:
    """(dense, experts): how many ways model parallelism divides the parameters of a layer."""
    dense = setup.tensor_parallel * setup.pipeline_parallel
    return dense, dense * setup.expert_parallel


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
    quantized = (count.attention + count.mlp + experts + count.other) / dense if setup.base_quantization else 0.0
    # Expert-parallel ranks are data-parallel ranks as well: sharding divides experts by what is left of these.
    again = count.experts / expert * (minimum(setup.expert_parallel, place.parameters) - 1)
    parameters = _parameter_bytes(setup, size, count, total + again, trainable, quantized) / place.parameters
    parameters = parameters + where(place.parameters == 1, _block_slack(shape, setup, size), 0.0)
    trains_experts = setup.method == "full" and not accumulates_in_fp32(setup)
    sharded = trainable + (again if trains_experts else 0.0)
    gradients = sharded * size.trained / place.gradients
    if setup.method in ("lora", "dora", "qlora") and shards_flat(setup) and conventions(setup).mixed_units:
        gradients = layered * size.trained / place.gradients
    optimizer = sharded * optimizer_bytes_per_parameter(setup, size) / place.optimizer
    if setup.optimizer == "galore":
        optimizer = state_bytes(shape, size.trained)
    if "8bit" in str(setup.optimizer) and setup.method == "full" and setup.framework.startswith("hf-trainer"):
        # Trainer has bitsandbytes keep fp32 states of embeddings.
        table = (count.embedding + (count.head if shape.tied_embeddings else 0)) / setup.tensor_parallel
        optimizer = optimizer + table * 2 * (4 - EIGHT_BIT_WIDTH) / place.optimizer
    if keeps_master_weights(setup):
        optimizer = trainable * 12.0 / place.optimizer
        gradients = trainable * 2.0 / place.gradients
        parameters = parameters + _rotary_tables(shape, setup)
    elif accumulates_in_fp32(setup):
        gradients = trainable * 4.0 / place.gradients
        optimizer = _distributed_optimizer_bytes(setup, count, trainable)
    if conventions(setup).stable_embedding and str(setup.base_quantization).startswith("nf4"):
        table = shape.vocab * shape.hidden * size.weight
        parameters, gradients = parameters + table, gradients + table
    host: Number = 0.0
    if setup.offload in ("optimizer", "optimizer+parameters") or "paged" in str(setup.optimizer):
        # Paged states are unified memory outside torch's allocator; ZeRO-Offload keeps fp32 master weights as well.
        host, optimizer = optimizer, 0.0
        if keeps_master_weights(setup) and setup.sharding != "zero1":
            gradients = 0.0  # sent to the host bucket by bucket
        if setup.sharding == "fsdp" and setup.offload:
            gradients = 0.0  # each as soon as it is reduced
        if setup.offload and size.trained == 2 and not keeps_master_weights(setup):
            host += trainable * 12.0 / place.optimizer
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
    )


def _block_slack(shape: ModelShape, setup: Setup, size: Widths) -> Number:
    """What the allocator's blocks of loaded matrices hold beyond them: from 10 MiB on a matrix has a segment of its own,
    a multiple of 2 MiB, and keeps a rest of up to 1 MiB."""
    if shape.inferred or is_cpu(setup.accelerator):
        return 0.0
    width: float = size.weight
    if setup.base_quantization:
        width = 1.0 if "8" in setup.base_quantization else 0.5
    h, f, tensor = shape.hidden, shape.plain_ffn, setup.tensor_parallel
    matrices = [(h * shape.query_width, 2), (h * shape.kv_width, 2)] if not shape.latent_attention else []
    matrices.append((h * f, shape.matrices * (0 if shape.experts else 1)))
    slack: Number = 0.0
    for elements, count in matrices:
        slack = slack + count * _slack(elements * width / tensor)
    tables = 1 if shape.tied_embeddings else 2
    return slack * shape.layers / setup.pipeline_parallel + tables * _slack(shape.vocab * h * size.weight / tensor)


def _rotary_tables(shape: ModelShape, setup: Setup) -> float:
    """Before transformers 4.43 every layer kept the cosines and sines of all positions (as a loss tells: before 4.46)."""
    positions = rotary_positions(shape.name) if setup.logit_copies == "shifted" else None
    return 2.0 * 2 * (positions or 0) * shape.head_dim * shape.layers


def _slack(matrix_bytes: Number) -> Number:
    rest = -matrix_bytes % (2 * MIB)
    return where(matrix_bytes >= 10 * MIB, where(rest <= MIB, rest, 0.0), 0.0)


def _distributed_optimizer_bytes(setup: Setup, count: ParameterCount, trainable: Number) -> Number:
    """Megatron's: fp32 master weights and moments, split over the ranks that hold the same weights."""
    ranks = setup.shard_size or setup.data_ranks * setup.context_parallel
    _, expert = model_divisors(setup)
    experts = count.experts / expert if setup.method == "full" else 0.0
    return 12.0 * ((trainable - experts) / ranks + experts / maximum(ranks / setup.expert_parallel, 1))


def optimizer_bytes_per_parameter(setup: Setup, size: Widths) -> float:
    """Bytes of optimizer state for one trained parameter."""
    optimizer = setup.optimizer or "adamw"
    width = EIGHT_BIT_WIDTH if "8bit" in optimizer else size.trained
    return _MOMENTS[optimizer] * width


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
