"""The work of one optimizer step, by kind, from a shape and a setup.

A multiply-add is two FLOPs. Backward costs twice forward (inputs and weights); a frozen weight saves the second half of
that; full checkpointing adds one forward. Every count takes arrays where ``estimator.grid`` has them. What the work takes
in seconds: ``estimator.speed.step_law``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from estimator.arrays import Number, maximum
from estimator.conventions import conventions
from estimator.memory.logits import logit_bytes
from estimator.memory.remembered import remembered
from estimator.memory.states import Widths, placement, states, trainable_parameters, widths
from estimator.model.mixer import scan_bytes, scan_flops
from estimator.model.shape import ModelShape, active_parameters, count_parameters, with_predictions
from estimator.setup import Setup
from estimator.speed.traffic import (
    OPTIMIZER_OFFLOADS,
    OWN_KERNELS,
    adapter_bytes,
    cast_bytes,
    collective_bytes,
    elementwise_bytes,
    offload_bytes,
    operand_bytes,
    scores_bytes,
    sent_bytes,
    writes_scores,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """Per device and optimizer step, recomputation included."""

    matmul_flops: Number
    """Matrix products of the layers: forward, backward, recomputation."""
    head_flops: Number
    """The output projection over the vocabulary."""
    attention_flops: Number
    """Scores and weighted sums, the masked half counted."""
    elementwise_bytes: Number
    """Traffic of norms, activations, rotations, residuals."""
    logits_bytes: Number
    """Traffic of the softmax and loss over the vocabulary."""
    optimizer_bytes: Number
    """Traffic of clipping, the optimizer's step and zeroing."""
    communication_bytes: Number
    """What this device sends over its links."""
    launches: Number
    """Kernels started."""
    model_flops: Number
    """Of all devices, without recomputation and with every weight trained as counted: what MFU is a share of."""
    kernel_attention_flops: Number = 0.0
    """Of ``attention_flops``, what the kernel computes: all but eager ones skip masked blocks, and count as
    if heads were 128 wide."""
    scan_flops: Number = 0.0
    """Of layers that carry a state: the scan in chunks, masked half counted; states are computed again in backward."""
    scan_bytes: Number = 0.0
    """Traffic of these, their convolution and norm included."""
    operand_bytes: Number = 0.0
    """What the matrix products read and write at least: inputs, weights, outputs, accumulated gradients."""
    cast_bytes: Number = 0.0
    """Traffic of casts to 8 or 4 bits for the matrix products."""
    expert_flops: Number = 0.0
    """Of ``matmul_flops``, the routed experts' products: small, and as many as there are experts."""
    adapter_bytes: Number = 0.0
    """Of ``elementwise_bytes``, what adapters add to frozen matrices."""
    scores_bytes: Number = 0.0
    """Traffic of attention matrices that are written out (eager attention)."""
    dequantize_bytes: Number = 0.0
    """Traffic of turning quantized matrices into ones that can be multiplied."""
    offload_bytes: Number = 0.0
    """Between the device and its host."""
    host_optimizer_bytes: Number = 0.0
    """Traffic of an optimizer step in host memory."""
    tensor_bytes: Number = 0.0
    """Sent between tensor-parallel ranks."""
    context_bytes: Number = 0.0
    """Keys and values sent around context-parallel ranks."""
    expert_bytes: Number = 0.0
    """Tokens sent to their experts and back, where these are on other ranks."""
    gathered_bytes: Number = 0.0
    """Parameters and gradients that data-parallel ranks gather and scatter (ZeRO-3, FSDP), whole."""
    reduced_bytes: Number = 0.0
    """Gradients that data-parallel ranks reduce and gather once a step, whole."""
    pipeline_bytes: Number = 0.0
    """Activations and their gradients sent to the next stage."""
    bubble: Number = 0.0
    """Time that a stage waits for others, as a share of its work, before what interleaving hides of it."""
    whole_bubble: Number = 0.0
    """The same of a schedule that does not interleave."""
    micro_batches: Number = 1.0
    """Forward and backward passes of the step."""


WORK_NAMES = tuple(spec.name for spec in fields(StepWork) if spec.name != "model_flops")

MEGATRON = ("megatron", "megatron-deepspeed", "nemo", "mlperf")


def is_megatron(setup: Setup) -> Number:
    """Whether the step is Megatron's: by name, or because Trainer and a plain loop have neither tensor nor pipeline
    parallelism, so that whoever states it under their name (or none) ran something else."""
    if setup.framework in MEGATRON:
        # NeMo's other engine (AutoModel) is PyTorch's own FSDP and DTensor.
        return not (setup.framework == "nemo" and setup.sharding == "fsdp")
    plain = setup.framework in ("hf-trainer", "hf-loop", "torch-loop")
    return plain & (setup.tensor_parallel * setup.pipeline_parallel > 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Passes:
    """How often the parts of a layer run in a step: forward is 1."""

    matmul: Number
    attention: Number
    elementwise: Number
    repeated: Number
    """Of ``matmul``, what backward computes a second time."""
    trained: float
    """Share of the weights that get gradients."""


def _passes(shape: ModelShape, setup: Setup) -> _Passes:
    """Selective checkpointing reruns attention alone in Megatron; elsewhere (torchtitan, torchtune) everything but
    attention and every second matrix product."""
    reached = _reached(shape, setup)
    matmul: Number = 0.0
    attention: Number = 0.0
    elementwise: Number = 0.0
    if setup.checkpointing == "full":
        matmul = attention = elementwise = 1.0
    elif setup.checkpointing == "selective":
        megatron = 1.0 * is_megatron(setup)
        matmul, attention, elementwise = 0.5 * (1 - megatron), megatron, 1 - megatron
    return _Passes(
        matmul=1.0 + reached * (1.0 + matmul),
        # Fused kernels compute the scores again.
        attention=1.0 + reached * ((2.0 if writes_scores(setup) else 2.5) + attention),
        elementwise=1.0 + reached * (2.0 + elementwise),
        repeated=reached * matmul,
        trained=_trained(shape, setup),
    )


def _trained(shape: ModelShape, setup: Setup) -> float:
    """Share of the layers whose weights get gradients; with adapters none."""
    if setup.method == "freeze":
        return min(1.0, (setup.trainable_layers or 0) / shape.layers)
    return 1.0 if setup.method == "full" else 0.0


def _reached(shape: ModelShape, setup: Setup) -> float:
    """Share of the layers that backward passes through: it ends at the first that trains, unless they are checkpointed, for
    which transformers has the embeddings require gradients."""
    ends = setup.method == "freeze" and setup.checkpointing == "none"
    return _trained(shape, setup) if ends else 1.0


@remembered
def step_work(shape: ModelShape, setup: Setup) -> StepWork:
    """The work of one step (``setup`` resolved)."""
    whole, ahead = shape, 0
    if shape.predicted_ahead and setup.framework in MEGATRON and setup.method == "full" and is_megatron(setup):
        shape, ahead = with_predictions(shape), shape.predicted_ahead
    count = count_parameters(shape)
    size = widths(setup)
    passes = _passes(shape, setup)
    persistent = states(shape, setup)
    devices_of_model = setup.tensor_parallel * setup.pipeline_parallel * setup.context_parallel
    tokens = 1.0 * setup.batch * setup.accumulation * setup.seq
    """Of one data-parallel rank; the layers of all its model-parallel devices share them."""
    layers = active_parameters(shape) - count.embedding - count.head - count.norm - count.other
    share = layers + count.other  # an inferred shape's remainder works like the rest
    of_adapters = adapter_bytes(shape, setup, size, tokens) * passes.elementwise
    adapters = trainable_parameters(shape, setup) if setup.method in ("lora", "dora", "qlora") else 0
    # Recomputation stops at the last tensor that backward needs: the down projection is not run again. Reentrant
    # checkpointing, and Megatron's own (CheckpointFunction), runs the whole layer.
    early = 0.0 if setup.checkpoint_reentrant else 1.0 - 1.0 * is_megatron(setup)
    stopped = early * shape.plain_layers * shape.hidden * shape.plain_ffn
    products = passes.matmul + passes.trained
    matmul = 2.0 * tokens * (share * products - stopped * passes.repeated)
    matmul += (6.0 + 2.0 * passes.repeated) * tokens * adapters
    # Each further token's layer reads the stream and the token before it, put together.
    matmul += 2.0 * tokens * 2 * shape.hidden**2 * ahead * products
    experts = count.experts * shape.active_experts / shape.experts if shape.experts else 0.0
    head = 2.0 * tokens * shape.vocab * shape.hidden * (2.0 + (1.0 if setup.method == "full" else 0.0)) * (1 + ahead)
    attention = 2.0 * tokens * shape.heads * (shape.head_dim + _value_dim(shape)) * shape.attention_layers
    attention = attention * passes.attention
    context, causal = _context(shape, setup)
    logits = logit_bytes(shape, setup)
    # Logits are already those of a tensor-parallel rank.
    of_logits = (1 + ahead) * tokens / setup.pipeline_parallel / setup.context_parallel
    optimizer = persistent.trainable * 3 * size.trained / placement(setup).optimizer + 2 * persistent.optimizer
    quantized = persistent.quantized * setup.accumulation * (passes.matmul if setup.base_quantization else 0.0)
    bubble = 1.0 * (setup.pipeline_parallel - 1) / setup.accumulation
    interleaved = 1.0 * (setup.pipeline_schedule == "interleaved-1f1b")
    sent = collective_bytes(shape, setup, size, persistent, tokens)
    return StepWork(
        matmul_flops=matmul / devices_of_model,
        head_flops=head / devices_of_model,
        attention_flops=attention * context / devices_of_model,
        elementwise_bytes=elementwise_bytes(shape, setup, size, persistent, tokens) * passes.elementwise + of_adapters,
        logits_bytes=of_logits * _logit_traffic(logits.backward, shape.vocab / setup.tensor_parallel, size, setup),
        optimizer_bytes=optimizer,
        communication_bytes=sent_bytes(setup, sent),
        launches=_launches(shape, setup),
        model_flops=model_flops_per_token(whole, setup) * setup.tokens_per_step,
        kernel_attention_flops=attention
        * (context if writes_scores(setup) else causal * narrowness(shape.head_dim, _value_dim(shape)))
        / devices_of_model,
        scan_flops=tokens * _scans(shape) * passes.attention / devices_of_model,
        scan_bytes=tokens * _scanned(shape, size.compute) * passes.attention / devices_of_model,
        operand_bytes=operand_bytes(
            shape, setup, size, persistent, tokens, passes=passes.matmul, trained=passes.trained
        ),
        cast_bytes=cast_bytes(shape, setup, persistent, tokens, recomputed=passes.repeated),
        expert_flops=2.0 * tokens * experts * products / devices_of_model,
        adapter_bytes=of_adapters,
        scores_bytes=scores_bytes(shape, setup, size) * tokens * setup.seq * passes.attention / devices_of_model,
        dequantize_bytes=quantized * (0.6 + size.compute),
        offload_bytes=offload_bytes(shape, setup, size, persistent, tokens),
        host_optimizer_bytes=2 * persistent.host_optimizer if setup.offload in OPTIMIZER_OFFLOADS else 0.0,
        bubble=interleaved * bubble,
        whole_bubble=(1.0 - interleaved) * bubble,
        micro_batches=setup.accumulation,
        **sent,
    )


def model_flops_per_token(shape: ModelShape, setup: Setup) -> Number:
    """6 N + 12 L·a·d·S for full fine-tunes (N: the active parameters that multiply, the head once, lookups not), the
    PaLM paper's count; 4 N where the base is frozen, plus the adapters' own 6."""
    count = count_parameters(shape)
    tables = 0 if shape.tied_embeddings else shape.vocab * shape.hidden  # the lookup multiplies nothing
    multiplying = active_parameters(shape) - tables - shape.positions * shape.hidden - count.norm
    attention = 2.0 * _context(shape, setup)[0] * shape.heads * (shape.head_dim + _value_dim(shape))
    attention = attention * shape.attention_layers + _scans(shape)
    if setup.method in ("lora", "dora", "qlora"):
        return 4.0 * multiplying + 6.0 * trainable_parameters(shape, setup) + 3.0 * attention
    if setup.method == "freeze":
        head = 2.0 * shape.vocab * shape.hidden
        attention *= 1.0 + 2.0 * _trained(shape, setup)
        trained: Number = trainable_parameters(shape, setup)
        if shape.experts:  # a token is routed to a few of a layer's
            trained = _trained(shape, setup) * (active_parameters(shape) - count.embedding - count.head - count.norm)
        return 2.0 * multiplying + head + 4.0 * trained + attention
    return 6.0 * multiplying + 3.0 * attention


def _logit_traffic(peak: Number, vocab: Number, size: Widths, setup: Setup) -> Number:
    """Bytes of a token's loss: twice what it holds, or the two readings and the writing in place of a kernel of its own.
    What Megatron normalises in place moves as many bytes as elsewhere."""
    if setup.framework in OWN_KERNELS:
        return 3.0 * size.compute * vocab
    if setup.loss == "standard" and conventions(setup).softmax_in_place:
        peak = 12.0 * vocab
    return 2.0 * maximum(peak, 2 * size.compute * vocab)


def _scans(shape: ModelShape) -> float:
    """FLOPs of one token through all layers that carry a state, forward, beside their projections."""
    return shape.mixer.layers * scan_flops(shape.mixer) if shape.mixer else 0.0


def _scanned(shape: ModelShape, compute: float) -> float:
    """The same in bytes."""
    return shape.mixer.layers * scan_bytes(shape.mixer, compute) if shape.mixer else 0.0


def _value_dim(shape: ModelShape) -> int:
    return shape.v_head_dim if shape.latent_attention else shape.head_dim


def narrowness(head_dim: int, value_dim: int) -> float:
    """Seconds of attention per FLOP beside those of heads 128 wide: a score's exponential, a third of them there, takes as
    long for a narrow head (FlashAttention-3 at 64 reaches three quarters of its rate at 128)."""
    return (2.0 + 2.0 * 128 / (head_dim + value_dim)) / 3.0


def _context(shape: ModelShape, setup: Setup) -> tuple[Number, Number]:
    """Mean keys that a query meets over the layers, masked ones counted and not: the sequence, or the window where a
    layer slides."""
    seq = 1.0 * setup.seq
    if not shape.window:
        return seq, seq / 2
    window = seq - maximum(seq - shape.window, 0.0)
    windowed = 1.0 / shape.window_every
    return windowed * window + (1 - windowed) * seq, windowed * window * (1 - window / seq / 2) + (
        1 - windowed
    ) * seq / 2


def _launches(shape: ModelShape, setup: Setup) -> Number:
    """Kernels: about 15 a branch (30 a layer) forward and twice that backward; routing doubles them, and each expert that the device
    holds has matrix products of its own (one cuBLAS call each in TransformerEngine's grouped products, a loop in
    transformers); quantized matrices are made whole before each product; fused and foreach optimizers a few a hundred
    tensors."""
    recompute = 1.0 if setup.checkpointing == "full" else 0.0
    routed = shape.moe_layers * (30.0 + shape.matrices * shape.experts / setup.expert_parallel)
    scanned = _SCAN_KERNELS * shape.mixer.layers if shape.mixer else 0.0
    per_pass = (15.0 * shape.branches + scanned + routed) / setup.pipeline_parallel + 20
    quantized: Number = 0.0
    if setup.base_quantization:
        quantized = _DEQUANTIZE_KERNELS * (4.0 + shape.matrices) * shape.layers * (2.0 + recompute)
    passes = per_pass * (1.0 + _reached(shape, setup) * (2.0 + recompute)) + quantized / setup.pipeline_parallel
    return setup.accumulation * passes + 2.0 * shape.layers


_SCAN_KERNELS = 8.0
"""Of a layer that carries a state, forward: its convolution, and the cumulated decays, scores, states and sums of its chunks."""
_DEQUANTIZE_KERNELS = 3.0
"""To make a quantized matrix whole: its scales, its codes, a cast."""
