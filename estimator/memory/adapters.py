"""What adapters, quantized bases and operator-wise checkpointing keep of a layer, in bytes per token: read off peft,
bitsandbytes and torchtitan. Notation as in activations.py.
"""

from __future__ import annotations

from estimator.arrays import Number
from estimator.conventions import conventions, stream_ranks
from estimator.memory.states import Widths, keeps_master_weights
from estimator.model.layer_facts import layer_facts
from estimator.model.lora_targets import adapted_matrices
from estimator.model.shape import ModelShape
from estimator.setup import Setup

BITSANDBYTES = ("nf4", "nf4-dq", "int8")
"""Quantizations whose products are bitsandbytes' own."""


_ROWS = ("o_proj", "out_proj", "down_proj", "fc2")
"""Matrices that are split by rows: what they read is split."""


FEED_FORWARD = ("gate_proj", "up_proj", "down_proj", "router")
OUTPUT = ("o_proj",)


def adapter_bytes(
    shape: ModelShape, setup: Setup, size: Widths, *, moe: bool, among: tuple[str, ...] | None = None
) -> Number:
    """What LoRA keeps: the input of each adapted matrix (``among`` the named ones), and the low-rank product.

    Adapters are fp32 in peft, which casts the input of each to fp32; autocast casts that back, and then keeps only the
    half copy. Without any cast, matrices that read the same tensor share it, and the o projection's is kept anyway.
    """
    if setup.method.startswith("adapter"):
        return 0.0 if among else _prompt_adapter_bytes(shape, setup, size)
    assert setup.lora_rank is not None
    modules = [matrix for matrix in adapted_matrices(shape, setup, moe=moe) if among is None or matrix[0] in among]
    convention = conventions(setup)
    quantized = 0.0
    if among is None and convention.keeps_quantized_inputs and str(setup.base_quantization).startswith("nf4"):
        # Attention's output is kept anyway; both projections into the feed-forward read one tensor.
        quantized = size.compute * shape.hidden * min(shape.norms_per_layer, 2)
    if convention.dropped_inputs:
        fused = ("q_proj", "k_proj", "v_proj")
        read = {("qkv" if name in fused else name): width for name, width, _ in modules}
        rank = size.compute * setup.lora_rank * len(modules)
        return ((size.compute + 1) * sum(read.values()) + rank + quantized) / setup.tensor_parallel
    # FSDP's mixed precision gathers the adapters in half as well.
    element = size.compute if size.autocast or size.stream != size.weight else size.trained
    copied = size.autocast or size.weight != size.trained
    if setup.base_quantization in BITSANDBYTES and size.autocast and not size.casts_weights:
        copied = False  # peft's adapters beside bitsandbytes' matrices leave casting to autocast
    # Where the stream is whole, so is what columns read, and a product of low rank.
    whole = setup.tensor_parallel / stream_ranks(setup)
    reads = [(name, width * (1 if name in _ROWS else whole)) for name, width, _ in modules]
    inputs = {"gate_proj": "mlp", "up_proj": "mlp"} | dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "qkv_proj"), "attention"
    )
    kept = {inputs.get(name, name): width for name, width in reads if name != "o_proj"}
    copies = [width for name, width in reads if not (name == "o_proj" and leaves_casting(setup, size))]
    if setup.compile and copied:  # one cast for all that read the same tensor
        copied = False
        kept |= {} if size.autocast else {name: width for name, width in reads if name == "o_proj"}
    total = element * (sum(copies) if copied else sum(kept.values()))
    total += element * setup.lora_rank * len(modules) * whole
    if setup.method == "dora":
        # What the magnitude scales: the adapter's product and the base's, which loses its bias first (in the bias's type).
        for name, _, outputs in modules:
            biased = size.casts_weights and _has_bias(shape, name)
            total += (element + (size.weight if biased else size.compute)) * outputs
    return total / setup.tensor_parallel


def _has_bias(shape: ModelShape, name: str) -> bool:
    if name == "router":
        return shape.mlp_bias
    return shape.mlp_bias if name.startswith(("gate", "up", "down")) else name[0] in shape.attention_bias


def leaves_casting(setup: Setup, size: Widths) -> bool:
    """peft's adapters beside bitsandbytes' matrices leave casting to autocast: what is half already is not copied."""
    return setup.base_quantization in BITSANDBYTES and size.autocast


def _prompt_adapter_bytes(shape: ModelShape, setup: Setup, size: Widths) -> Number:
    """LLaMA-Adapter adds nothing that grows with the tokens; its second version keeps what it scales: every product with its
    bias, and the norms' tensors before their weights."""
    h = shape.hidden
    kept = 0.0
    if setup.method == "adapter_v2":
        outputs = shape.query_width + 2 * shape.kv_width + 2 * h + (shape.matrices - 1) * shape.plain_ffn
        kept = size.compute * (outputs + shape.norms_per_layer * h)
    if str(setup.base_quantization).startswith("nf4"):
        kept += size.compute * h * shape.norms_per_layer
    return kept / setup.tensor_parallel


def last_quantized_inputs(shape: ModelShape, setup: Setup) -> Number:
    """What the last micro-batch's products with 4-bit matrices hold of a layer, a token, while the next forward pass runs: their
    inputs, which are the norms', attention's and the feed-forward's last outputs."""
    if not (conventions(setup).keeps_quantized_inputs and str(setup.base_quantization).startswith("nf4")):
        return 0.0
    return 2.0 * (min(shape.norms_per_layer, 2) * shape.hidden + shape.value_width + shape.plain_ffn)


def eight_bit_input_bytes(shape: ModelShape, setup: Setup, size: Widths) -> Number:
    """bitsandbytes' int8 product keeps its input on its context: the norms' outputs and the down projection's (attention's output
    is counted with attention)."""
    if setup.base_quantization != "int8":
        return 0.0
    return size.stream * (shape.norms_per_layer * shape.hidden + shape.plain_ffn) / setup.tensor_parallel


def dora_temporaries(shape: ModelShape, setup: Setup) -> float:
    """DoRA multiplies an identity matrix through an adapter to know the norm of the adapted matrix: bytes at its worst."""
    if setup.method != "dora":
        return 0.0
    # Half where the engine or FSDP's mixed precision has the adapters so.
    mixed = setup.sharding == "fsdp" and setup.precision.endswith("-mixed") and not setup.base_quantization
    width = 2.0 if keeps_master_weights(setup) or mixed else 4.0
    return max(width * inputs * (inputs + 4 * outputs) for _, inputs, outputs in adapted_matrices(shape, setup))


def selective_bytes(shape: ModelShape, setup: Setup, size: Widths, *, moe: bool) -> tuple[float, float]:
    """(bytes per token, bytes) of what operator-wise checkpointing saves (torchtitan's, which ``estimator.memory.selective`` runs): attention's output with
    its log-sum-exp, products with a bias, and of those without every second, from the first on.

    Compiled, a product that backward needs for nothing is not saved: the last one.
    """
    h, q, kv = shape.hidden, shape.query_width, shape.kv_width
    f = shape.shared_experts * shape.ffn if moe else shape.plain_ffn
    projections = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)]
    if layer_facts(shape.family).fused_qkv:
        projections = [("qkv_proj", q + 2 * kv)]
    projections.append(("o_proj", h))
    if moe:  # the routed experts' own products are none of them
        projections.append(("router", shape.experts))
    if f:
        projections += [("gate_proj", f)] * (shape.matrices - 2) + [("up_proj", f), ("down_proj", h)]
    adapted = {}
    if setup.method in ("lora", "dora", "qlora"):
        adapted = {name: inputs for name, inputs, _ in adapted_matrices(shape, setup, moe=moe)}
    # LLM.int8() has kernels of its own; the others' products are plain ones with the dequantized matrix, in half.
    opaque = setup.base_quantization == "int8"
    base_width = min(size.compute, 2.0) if setup.base_quantization else size.compute
    # FSDP's mixed precision gathers the adapters in half.
    element = size.compute if size.autocast or size.stream != size.weight else size.trained
    whole_sums = conventions(setup).parallel_loss  # DTensor's, on every rank before they are split
    saved, fixed, plain = 0.0, 0.0, 0
    for name, width in projections:
        biased = _has_bias(shape, name)
        products = [] if opaque else [(width, biased)]
        if name in adapted and setup.method == "dora":  # first the norm's products, of no tokens
            for outputs in (setup.lora_rank or 0, width):
                plain += 1
                fixed += element * adapted[name] * outputs * ((plain + sum(not b for _, b in products)) % 2)
        if name in adapted:
            products += [(setup.lora_rank or 0, False), (width, False)]
        for position, (outputs, has_bias) in enumerate(products):
            plain += 0 if has_bias else 1
            unused = setup.compile and name == "down_proj"
            if (has_bias or plain % 2 == 1) and not unused:
                base = position == 0 and not opaque
                if name in _ROWS and whole_sums:
                    outputs = outputs * setup.tensor_parallel
                saved += outputs * (base_width if base else element)
    return saved + size.compute * shape.value_width + 4 * shape.heads, fixed
