"""The bytes of one optimizer step, by kind: through a device's memory, between devices, and to the host.

Per device and step; the arguments are those that ``estimator.speed.compute.step_work`` has at hand. ``tokens`` are those of one
data-parallel rank.
"""

from __future__ import annotations

from estimator.arrays import Number, where
from estimator.memory.activations import layer_activations
from estimator.memory.states import States, Widths, placement
from estimator.model.shape import ModelShape, lora_modules
from estimator.setup import Setup

NARROW = ("fp8", "mxfp8", "nvfp4")
"""Precisions whose products are in 8 or 4 bits."""
OPTIMIZER_OFFLOADS = ("optimizer", "optimizer+parameters")
OWN_KERNELS = ("llm.c",)
"""Kernels written for one family of models and one vendor, as Megatron's are, without its checkpointing and parallelism."""


def writes_scores(setup: Setup) -> bool:
    """Attention without a fused kernel: its matrices exist, the masked half as well."""
    return setup.attention == "eager" or setup.attention_kernel == "math"


def operand_bytes(
    shape: ModelShape, setup: Setup, size: Widths, persistent: States, tokens: Number, *, passes: Number, trained: float
) -> Number:
    """Bytes of inputs, weights and outputs of the matrix products: c (T (k + n) + k n) each, and gradients added to.

    Weights pass once a micro-batch, however few tokens it has: what makes small matrix products slow. ``passes`` counts
    forward, the inputs' gradients and recomputation, ``trained`` the share of the weights that get gradients.
    """
    layers = _product_widths(shape, setup)
    head = shape.hidden + shape.vocab / setup.tensor_parallel
    ends = tokens / setup.context_parallel / setup.pipeline_parallel
    activations = size.compute * ends * (layers * (passes + trained) + head * 3)
    weights = size.compute * passes + 2 * size.trained * trained
    return activations + setup.accumulation * persistent.linear * weights


def _product_widths(shape: ModelShape, setup: Setup) -> Number:
    """Inputs and outputs of all matrix products of the layers, in elements of a token on one device."""
    h = shape.hidden
    ways = setup.tensor_parallel
    attention = 2 * h + (2 * shape.query_width + 2 * shape.kv_width) / ways
    matrices = shape.matrices
    dense = (matrices if not shape.gated else 2) * h + matrices * shape.plain_ffn / ways
    routed = shape.active_experts * (2 * shape.routed_hidden + matrices * shape.ffn / ways)
    routed += shape.shared_experts * (2 * h + matrices * shape.ffn / ways)
    routed += 2 * (h + shape.expert_hidden) if shape.expert_hidden else 0
    widths_of_layers = shape.attention_layers * attention + shape.plain_layers * dense + shape.moe_layers * routed
    if shape.mixer:
        widths_of_layers = widths_of_layers + shape.mixer.layers * (
            2 * h + (shape.mixer.projected + shape.mixer.values) / ways
        )
    return widths_of_layers


def cast_bytes(shape: ModelShape, setup: Setup, persistent: States, tokens: Number, *, recomputed: Number) -> Number:
    """Bytes of what products in 8 or 4 bits need: inputs in forward and outputs' gradients in backward are read in half
    precision and written twice, by rows and by columns; weights the same once a step. NVFP4 is half as wide, and reads twice:
    for the largest number first."""
    if not setup.precision.startswith(NARROW):
        return 0.0
    written = 3.0 if setup.precision.startswith("nvfp4") else 2.0
    found = tokens / setup.context_parallel / setup.pipeline_parallel * _product_widths(shape, setup)
    return (2.0 + written) * (found * (1.0 + recomputed / 2) + persistent.linear)


def elementwise_bytes(shape: ModelShape, setup: Setup, size: Widths, persistent: States, tokens: Number) -> Number:
    """Bytes of one forward pass of what is not a matrix product: norms and residuals read and write the stream twice
    each, rotations and activations their tensors; routing permutes tokens; autocast casts the weights anew for each micro-batch."""
    h, c = shape.hidden, size.compute
    if setup.framework in OWN_KERNELS:
        return tokens * c * shape.layers * _own_kernels_width(shape)
    stream = size.stream * h * (3.0 * shape.norms_per_layer + 3.0 * shape.branches / shape.layers)
    rotation = c * 3.0 * (shape.query_width + shape.kv_width)
    per_width = 4.0 if shape.gated else 2.0
    dense = c * per_width * shape.plain_ffn
    routed = c * (
        per_width * shape.ffn * (shape.active_experts + shape.shared_experts)
        + 4.0 * shape.routed_hidden * shape.active_experts
    )
    if shape.mlp_bias:  # grouped products have no epilogue: biases are added to what they wrote
        outputs = (shape.matrices - 1) * shape.ffn + shape.routed_hidden
        routed += c * 2.0 * outputs * shape.active_experts
    width = shape.layers * stream + shape.attention_layers * rotation
    width += shape.plain_layers * dense + shape.moe_layers * routed
    devices_of_model = setup.tensor_parallel * setup.pipeline_parallel * setup.context_parallel
    casts = 6.0 / 3.0 * setup.accumulation * persistent.linear if size.casts_weights else 0.0
    return tokens * width / devices_of_model + casts


def _own_kernels_width(shape: ModelShape) -> float:
    """Values that llm.c's kernels read and write for a token and layer, a third of forward and backward (train_gpt2.cu, -r 0):
    a norm and its residual 4 h in each, an activation 2 f and 3 f, products' outputs once more for the biases' gradients."""
    norms = 8.0 * shape.hidden * shape.norms_per_layer
    biases = shape.query_width + 2.0 * shape.kv_width + 2.0 * shape.hidden + shape.ffn
    return (norms + 5.0 * shape.ffn + biases) / 3.0


def adapter_bytes(shape: ModelShape, setup: Setup, size: Widths, tokens: Number) -> Number:
    """Bytes of one forward pass of adapters: the inputs they drop out and the outputs they add to; DoRA scales the outputs
    and, once a micro-batch, writes out the adapters' product, adds it to the matrix and takes the norms of the sum."""
    if setup.method not in ("lora", "dora", "qlora"):
        return 0.0
    modules = lora_modules(shape, setup.lora_targets)
    found = tokens / setup.context_parallel * sum(3.0 * inputs + 3.0 * outputs for _, inputs, outputs in modules)
    if setup.method == "dora":
        found = found + tokens / setup.context_parallel * sum(4.0 * outputs for _, _, outputs in modules)
        # Forward alone, a third of the passes that the caller counts.
        found = found + 6.0 / 3.0 * setup.accumulation * sum(inputs * outputs for _, inputs, outputs in modules)
    return size.compute * shape.layers * found / setup.tensor_parallel / setup.pipeline_parallel


def scores_bytes(shape: ModelShape, setup: Setup, size: Widths) -> float:
    """Bytes per token and token of context of attention matrices that exist: mask, softmax in fp32 and its cast."""
    if not writes_scores(setup):
        return 0.0
    return shape.attention_layers * shape.heads * (4.0 * size.compute + 8.0) / 3.0


def offload_bytes(shape: ModelShape, setup: Setup, size: Widths, persistent: States, tokens: Number) -> Number:
    """Over PCIe in a step: gradients out and weights back, and where these live on the host, each pass's; activations out
    in forward and back in backward."""
    if setup.offload == "activations":
        kept: Number = 0.0
        for moe, layers in ((False, shape.plain_layers), (True, shape.moe_layers)):
            if not layers:
                continue
            of = layer_activations(shape, setup, moe=moe)
            kept += layers * (of.kept if setup.checkpointing == "none" else of.layer_input)
        return 2.0 * tokens * kept / setup.pipeline_parallel / setup.context_parallel
    if setup.offload not in OPTIMIZER_OFFLOADS:
        return 0.0
    moved = 2.0 * size.trained * persistent.trainable / placement(setup).optimizer
    if setup.offload == "optimizer+parameters":
        moved += 2.0 * setup.accumulation * size.compute * persistent.total / placement(setup).parameters
    return moved


def collective_bytes(
    shape: ModelShape, setup: Setup, size: Widths, persistent: States, tokens: Number
) -> dict[str, Number]:
    """Bytes by collective. Of the data-parallel ones the whole payload, which the ranks of a machine share the link for;
    of the others what one device sends: an all-reduce 2 (d-1)/d of its bytes, a gather or scatter (d-1)/d."""
    stage = tokens / setup.context_parallel / setup.pipeline_parallel
    stream, routed = size.compute * stage * shape.hidden, size.compute * stage * shape.routed_hidden
    tensor, context, expert = setup.tensor_parallel, setup.context_parallel, setup.expert_parallel
    found: dict[str, Number] = {
        # Two all-reduces (or gather and scatter) a layer in forward and in backward: one a branch.
        "tensor_bytes": 4.0 * (tensor - 1) / tensor * stream * shape.branches,
        # Keys and values of every other rank in forward; in backward these and their gradients.
        "context_bytes": 3
        * 2.0
        * size.compute
        * stage
        * shape.kv_width
        / tensor
        * (context - 1)
        * shape.attention_layers,
        # Dispatch and combine, forward and backward.
        "expert_bytes": 4.0 * (expert - 1) / expert * routed / tensor * shape.active_experts * shape.moe_layers,
        "pipeline_bytes": 2.0 * stream * setup.pipeline_parallel / tensor * (1.0 * (setup.pipeline_parallel > 1)),
    }
    many = 1.0 * (setup.data_ranks * context > 1)
    if setup.sharding in ("fsdp", "zero3"):
        whole = size.compute * persistent.total
        if setup.base_quantization:
            whole = persistent.parameters * placement(setup).parameters
        gathers = 2.0 if setup.reshard_after_forward else 1.0
        # Pipeline stages keep what they gathered and reduce behind the last micro-batch (torch.distributed.pipelining).
        once = where(setup.pipeline_parallel > 1, 1.0, 1.0 * setup.accumulation)
        found["gathered_bytes"] = many * once * (gathers * whole + size.trained * persistent.trainable)
    else:
        found["reduced_bytes"] = many * 2.0 * size.trained * persistent.trainable
    return found


def sent_bytes(setup: Setup, parts: dict[str, Number]) -> Number:
    ranks = setup.data_ranks * setup.context_parallel
    ring = 1.0 * (ranks - 1) / ranks
    whole = parts.get("gathered_bytes", 0.0) + parts.get("reduced_bytes", 0.0)
    return (
        sum(amount for name, amount in parts.items() if name not in ("gathered_bytes", "reduced_bytes")) + ring * whole
    )
