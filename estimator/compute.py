"""The work of one optimizer step, by kind, from a shape and a setup; and the seconds it takes on a known accelerator.

A multiply-add is two FLOPs. Backward costs twice forward (inputs and weights); a frozen weight saves the second half of
that; full checkpointing adds one forward. Attention's S x S products are counted in full, not halved for causality.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from estimator.activations import layer_activations, logit_bytes
from estimator.hardware import Accelerator
from estimator.result import Part
from estimator.setup import Setup
from estimator.shape import ModelShape, active_parameters, count_parameters
from estimator.states import states, trainable_parameters, widths


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """Per device and optimizer step, recomputation included."""

    matmul_flops: float
    """Matrix products of the layers: forward, backward, recomputation."""
    head_flops: float
    """The output projection over the vocabulary."""
    attention_flops: float
    """Scores and weighted sums."""
    elementwise_bytes: float
    """Traffic of norms, activations, rotations, residuals."""
    logits_bytes: float
    """Traffic of the softmax and loss over the vocabulary."""
    optimizer_bytes: float
    """Traffic of clipping, the optimizer's step and zeroing."""
    communication_bytes: float
    """What this device sends over its links."""
    launches: float
    """Kernels started."""
    model_flops: float
    """Of all devices, without recomputation and with every weight trained as counted: what MFU is a share of."""


def step_work(shape: ModelShape, setup: Setup) -> StepWork:
    """The work of one step (``setup`` resolved)."""
    count = count_parameters(shape)
    size = widths(setup)
    devices_of_model = setup.tensor_parallel * setup.pipeline_parallel * setup.context_parallel
    sequences = setup.batch * setup.accumulation
    tokens = float(sequences * setup.seq)
    """Of one data-parallel rank; the layers of all its model-parallel devices share them."""
    head = shape.vocab * shape.hidden
    tables = count.embedding + count.head
    layers = active_parameters(shape) - tables - count.norm - count.other
    share = layers + count.other  # an inferred shape's remainder works like the rest
    forward = 2.0 * tokens * share
    head_forward = 2.0 * tokens * head
    attention = (
        2.0
        * 2.0
        * tokens
        * _context(shape, setup)
        * shape.heads
        * (shape.head_dim + _value_dim(shape))
        / 2
        * shape.layers
    )

    frozen = setup.method in ("lora", "dora", "qlora")
    trained_share = 1.0 if setup.method == "full" else 0.0
    if setup.method == "freeze":
        trained_share = min(1.0, trainable_parameters(shape, setup) / max(share, 1))
    recompute = {"none": 0.0, "full": 1.0, "selective": 0.3}[setup.checkpointing]
    # Recomputation stops at the last tensor that backward needs: the down projection is not run again.
    stopped = 0.0 if setup.checkpoint_reentrant else shape.plain_layers * shape.hidden * shape.plain_ffn
    repeated = recompute * 2.0 * tokens * (share - stopped)
    adapters = 6.0 * tokens * trainable_parameters(shape, setup) if frozen else 0.0
    matmul = forward * (2.0 + trained_share) + repeated + adapters
    head_total = head_forward * (2.0 + (1.0 if setup.method == "full" else 0.0))
    # Backward of attention: five products against forward's two.
    attention_total = attention * (1.0 + 2.5 + recompute)

    passes = 3.0 + recompute
    traffic = tokens * sum(
        layer_activations(shape, setup, moe=moe).kept * layers_of
        for moe, layers_of in ((False, shape.plain_layers), (True, shape.moe_layers))
    )
    scores = tokens * setup.seq * shape.layers * layer_activations(shape, setup, moe=False).scores
    if setup.base_quantization:
        # Dequantizing reads the codes and writes the matrices, in forward, backward and recomputation.
        traffic += setup.accumulation * (2.0 + recompute) / passes * count.linear * (size.compute + 0.6)
    persistent = states(shape, setup)
    optimizer = persistent.trainable * (3 * size.trained + 2 * persistent.optimizer / max(persistent.trainable, 1.0))
    logits = logit_bytes(shape, setup)
    return StepWork(
        matmul_flops=matmul / devices_of_model,
        head_flops=head_total / devices_of_model,
        attention_flops=attention_total / devices_of_model,
        elementwise_bytes=passes * (traffic + scores) / devices_of_model,
        logits_bytes=2.0 * tokens * max(logits.backward, 2 * size.compute * shape.vocab) / devices_of_model,
        optimizer_bytes=optimizer,
        communication_bytes=_communication(shape, setup, persistent.total, persistent.trainable, tokens),
        launches=_launches(shape, setup),
        model_flops=model_flops_per_token(shape, setup) * setup.tokens_per_step,
    )


def model_flops_per_token(shape: ModelShape, setup: Setup) -> float:
    """6 N + 12 L·a·d·S for full fine-tunes (N: the active parameters that multiply, the head once, lookups not), the
    PaLM paper's count; 4 N where the base is frozen, plus the adapters' own 6."""
    count = count_parameters(shape)
    tables = 0 if shape.tied_embeddings else shape.vocab * shape.hidden  # the lookup multiplies nothing
    multiplying = active_parameters(shape) - tables - shape.positions * shape.hidden - count.norm
    attention = 2.0 * _context(shape, setup) * shape.heads * (shape.head_dim + _value_dim(shape)) * shape.layers
    if setup.method in ("lora", "dora", "qlora"):
        return 4.0 * multiplying + 6.0 * trainable_parameters(shape, setup) + 3.0 * attention
    if setup.method == "freeze":
        return 2.0 * multiplying + 4.0 * trainable_parameters(shape, setup) + attention
    return 6.0 * multiplying + 3.0 * attention


def _value_dim(shape: ModelShape) -> int:
    return shape.v_head_dim if shape.latent_attention else shape.head_dim


def _context(shape: ModelShape, setup: Setup) -> float:
    """Mean keys a query meets over the layers: the sequence, or the window where a layer slides."""
    if not shape.window or shape.window >= setup.seq:
        return float(setup.seq)
    windowed = 1.0 / shape.window_every if shape.window_every > 1 else 1.0
    return windowed * shape.window + (1 - windowed) * setup.seq


def _communication(shape: ModelShape, setup: Setup, total: float, trainable: float, tokens: float) -> float:
    """Ring collectives: an all-reduce sends 2 (d-1)/d of its bytes, a gather or scatter (d-1)/d."""
    size = widths(setup)
    sent = 0.0
    ranks = setup.data_ranks
    if ranks > 1:
        ring = (ranks - 1) / ranks
        if setup.sharding in ("fsdp", "zero3"):
            gathers = 2.0 if setup.reshard_after_forward else 1.0
            sent += setup.accumulation * ring * (gathers * size.compute * total + size.trained * trainable)
        else:
            sent += 2.0 * ring * size.trained * trainable
    if setup.tensor_parallel > 1:
        ring = (setup.tensor_parallel - 1) / setup.tensor_parallel
        # Two all-reduces (or gather and scatter) a layer in forward and in backward.
        sent += 4 * 2.0 * ring * size.compute * tokens * shape.hidden * shape.layers / setup.pipeline_parallel
    return sent


def _launches(shape: ModelShape, setup: Setup) -> float:
    """Kernels: about 30 a layer forward and twice that backward; fused and foreach optimizers a few a hundred tensors."""
    recompute = 1.0 if setup.checkpointing == "full" else 0.0
    per_pass = 30.0 * shape.layers / setup.pipeline_parallel + 20
    return setup.accumulation * per_pass * (3.0 + recompute) + 2.0 * shape.layers


WORK_NAMES = tuple(spec.name for spec in fields(StepWork) if spec.name != "model_flops")


# Shares of the datasheet's rates that a step reaches, and seconds a launch: medians over the dense, well-specified rows
# of the published runs (docs/accuracy.md says how good that is).
MATMUL_EFFICIENCY = 0.72
ATTENTION_EFFICIENCY = 0.42
BANDWIDTH_EFFICIENCY = 0.75
LINK_EFFICIENCY = 0.6
LAUNCH_SECONDS = 6e-6
FORMULA_RELATIVE_ERROR = 0.45
"""Half-width of the 90% interval of a step time that no measurement supports."""


def formula_seconds(work: StepWork, setup: Setup, accelerator: Accelerator) -> tuple[Part, ...] | None:
    """Seconds by kind of work from the datasheet's rates and global efficiencies; ``None`` where a rate is unknown."""
    rate = accelerator.matrix_flops(setup.precision if setup.precision != "fp16" else "fp16")
    bandwidth = accelerator.bandwidth_bytes_per_second
    if rate is None or bandwidth is None:
        return None
    matrix = rate * MATMUL_EFFICIENCY
    memory = bandwidth * BANDWIDTH_EFFICIENCY
    seconds = [
        ("matrix products", work.matmul_flops / matrix, "FLOPs / (peak x 0.72)"),
        ("head", work.head_flops / matrix, "FLOPs / (peak x 0.72)"),
        ("attention", work.attention_flops / (rate * ATTENTION_EFFICIENCY), "FLOPs / (peak x 0.42)"),
        ("elementwise", work.elementwise_bytes / memory, "bytes / (bandwidth x 0.75)"),
        ("logits", work.logits_bytes / memory, "bytes / (bandwidth x 0.75)"),
        ("optimizer", work.optimizer_bytes / memory, "bytes / (bandwidth x 0.75)"),
    ]
    busy = sum(amount for _, amount, _ in seconds)
    # Launches run ahead of the device: only what exceeds the work shows.
    seconds.append(("launches", max(0.0, work.launches * LAUNCH_SECONDS - busy), "kernels x 6 us beyond the work"))
    seconds.append(
        ("communication", _exposed_communication(work, setup, accelerator, busy), "bytes / link, overlapped")
    )
    if setup.pipeline_parallel > 1:
        bubble = (setup.pipeline_parallel - 1) / setup.accumulation
        seconds.append(("pipeline bubble", busy * bubble, "(stages - 1) / micro-batches"))
    return tuple(
        Part(name=name, amount=amount, formula=formula, source="datasheet rates, global efficiencies")
        for name, amount, formula in seconds
        if amount > 0
    )


def _exposed_communication(work: StepWork, setup: Setup, accelerator: Accelerator, busy: float) -> float:
    if not work.communication_bytes:
        return 0.0
    crosses = setup.accelerators > setup.gpus_per_node
    link = accelerator.link_bytes_per_second or accelerator.pcie_bytes_per_second or 16e9
    if crosses:
        # Bytes/s of one device to other machines; 25 GB/s on A100 machines and 50 on later ones unless stated.
        default = 50e9 if accelerator.architecture in ("Hopper", "Blackwell", "Blackwell Ultra") else 25e9
        link = min(link, setup.internode_gbps * 1e9 / 8 if setup.internode_gbps else default)
    seconds = work.communication_bytes / (link * LINK_EFFICIENCY)
    return max(0.15 * seconds, seconds - 0.7 * busy)
