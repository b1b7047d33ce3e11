"""The bytes that a checkpoint takes on the disk, as transformers' Trainer writes it: safetensors and ``torch.save``.

Shared tensors (a tied head) are written once. Overheads were read off written files: a safetensors header takes about
107 bytes a tensor, an entry of optimizer.pt about 822 bytes a parameter tensor (two moments and a step), and the rest
(random states, arguments, scheduler, configs) 23 kB.
"""

from __future__ import annotations

from dataclasses import dataclass

from estimator.memory.galore import state_bytes
from estimator.memory.optimizer_states import master_and_moments
from estimator.memory.states import (
    EIGHT_BIT_WIDTH,
    accumulates_in_fp32,
    keeps_master_weights,
    optimizer_bytes_per_parameter,
    trainable_parameters,
    widths,
)
from estimator.model.mixer import mixer_tensors
from estimator.model.shape import ModelShape, count_parameters, lora_modules
from estimator.result import CheckpointEstimate
from estimator.setup import Setup

_HEADER_BYTES = 107
_ADAPTER_HEADER_BYTES = 129
_MOMENTS_BYTES = 822
_FACTORED_BYTES = 712
_REST_BYTES = 23_000
_LOOP_REST_BYTES = 7_600
"""Of the plain loop, which writes one random state and no arguments."""
_CARD_BYTES = 5_200
"""The README.md that peft writes beside adapters, whatever the model; of it 5,158 B at peft 0.21."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorGroup:
    """``count`` tensors of one size; vectors have one column."""

    rows: int
    columns: int
    count: int


def weight_tensors(shape: ModelShape) -> tuple[TensorGroup, ...]:
    """The model's parameter tensors as transformers lays them out, experts stacked. Latent attention and shared experts
    are grouped by size only."""
    h, layers = shape.hidden, shape.attention_layers
    fused = shape.family in ("gpt2", "gpt_bigcode", "gpt_neox", "falcon", "bloom", "gpt", "mpt")
    q, kv = shape.query_width, shape.kv_width
    found = [(shape.vocab, h, 1), (shape.positions, h, 1)]
    if not shape.tied_embeddings:
        found.append((shape.vocab, h, 1))
    if shape.latent_attention:
        rank, rope, nope = shape.kv_lora_rank, shape.qk_rope_head_dim, shape.qk_nope_head_dim
        queries = shape.heads * (nope + rope)
        if shape.q_lora_rank:
            found += [
                (shape.q_lora_rank, h, layers),
                (queries, shape.q_lora_rank, layers),
                (shape.q_lora_rank, 1, layers),
            ]
        else:
            found.append((queries, h, layers))
        found += [(rank + rope, h, layers), (rank, 1, layers), (shape.heads * (nope + shape.v_head_dim), rank, layers)]
        found.append((h, shape.heads * shape.v_head_dim, layers))
    else:
        made = 2 * q if shape.attention_gate else q
        found += [(q + 2 * kv, h, layers)] if fused else [(made, h, layers), (kv, h, 2 * layers)]
        found.append((h, q, layers))
        if shape.attention_bias.startswith("qkv"):
            found += [(q + 2 * kv, 1, layers)] if fused else [(q, 1, layers), (kv, 1, 2 * layers)]
        if shape.attention_bias.endswith("o"):
            found.append((h, 1, layers))
        if shape.qk_norm:
            found += [(q, 1, layers), (kv, 1, layers)] if shape.wide_qk_norm else [(shape.head_dim, 1, 2 * layers)]
        if shape.family == "gpt_oss":
            found.append((shape.heads, 1, layers))
    for width, count in ((shape.plain_ffn, shape.plain_layers), (shape.ffn, shape.moe_layers * shape.shared_experts)):
        found += [(width, h, (shape.matrices - 1) * count), (h, width, count)]
        if shape.mlp_bias:
            found += [(width, 1, (shape.matrices - 1) * count), (h, 1, count)]
    if shape.experts:
        up = (shape.matrices - 1) * shape.ffn
        read = shape.routed_hidden * shape.experts
        found += [(up, read, shape.moe_layers), (shape.ffn, read, shape.moe_layers)]
        found.append((shape.expert_hidden, h, 2 * shape.moe_layers))
        found.append((h, 1, shape.moe_layers if shape.shared_gate else 0))
        found.append((shape.experts, h, shape.moe_layers))
        if shape.mlp_bias:
            found += [((up + h) * shape.experts, 1, shape.moe_layers), (shape.experts, 1, shape.moe_layers)]
    if shape.mixer:
        found += [(rows, columns, shape.mixer.layers) for rows, columns in mixer_tensors(shape.mixer, h)]
    norms = shape.layers * shape.norms_per_layer + shape.extra_norms
    found.append((h, 1, norms * (2 if shape.norm_bias else 1)))
    if shape.head_bias:
        found.append((shape.vocab, 1, 1))
    if shape.extra_parameters:
        found.append((shape.extra_parameters, 1, 1))
    return tuple(TensorGroup(rows=r, columns=c, count=n) for r, c, n in found if r and c and n)


def checkpoint_bytes(shape: ModelShape, setup: Setup) -> tuple[int, int]:
    """(model, optimizer) bytes of one checkpoint. With adapters the model file holds the adapters alone."""
    size = widths(setup)
    trained = trainable_parameters(shape, setup)
    tensors = weight_tensors(shape)
    if setup.method not in ("full", "freeze"):
        modules = 1 if setup.method.startswith("adapter") else len(lora_modules(shape, setup.lora_targets))
        adapted = (3 if setup.method == "dora" else 2) * modules * shape.layers  # DoRA's magnitudes
        model = trained * size.trained + adapted * _ADAPTER_HEADER_BYTES
        trained_tensors = adapted
    else:
        count = sum(group.count for group in tensors)
        model = count_parameters(shape).total * size.weight + count * _HEADER_BYTES
        trained_tensors = count if setup.method == "full" else round(count * trained / count_parameters(shape).total)
    return round(model), _optimizer_bytes(shape, setup, tensors, trained, trained_tensors)


def _optimizer_bytes(
    shape: ModelShape, setup: Setup, tensors: tuple[TensorGroup, ...], trained: int, trained_tensors: int
) -> int:
    if keeps_master_weights(setup) or accumulates_in_fp32(setup):
        # What steps fp32 copies saves them too; DeepSpeed's first stages, the model once more beside Trainer's.
        again = 2.0 if setup.framework.startswith("hf-") and setup.sharding != "zero3" else 0.0
        return round(trained * (master_and_moments(setup) + again)) + _MOMENTS_BYTES * trained_tensors
    if setup.optimizer == "sgd":
        return 1_657  # parameter groups alone
    if setup.optimizer == "adafactor":
        # A row and a column of second moments for a matrix, all of them for a vector; fp32.
        factors = sum((g.rows + g.columns if g.columns > 1 else g.rows) * g.count for g in tensors)
        total = sum(g.rows * g.columns * g.count for g in tensors)
        return round(4 * factors * trained / total) + _FACTORED_BYTES * trained_tensors
    if setup.optimizer == "galore":
        return round(state_bytes(shape, widths(setup).trained)) + _MOMENTS_BYTES * trained_tensors
    wide = 0.0
    if "8bit" in str(setup.optimizer) and setup.method == "full" and setup.framework.startswith("hf-trainer"):
        count = count_parameters(shape)  # Trainer has bitsandbytes keep fp32 moments of embeddings
        wide = (count.embedding + (count.head if shape.tied_embeddings else 0)) * 2 * (4 - EIGHT_BIT_WIDTH)
    each = optimizer_bytes_per_parameter(setup, widths(setup))
    return round(trained * each + wide) + _MOMENTS_BYTES * trained_tensors


def checkpoint_estimate(shape: ModelShape, setup: Setup, *, kept: int = 2) -> CheckpointEstimate:
    """Bytes of one checkpoint and, for a run that keeps ``kept`` of them and the best, of the disk at its fullest: with the
    newest one just written and the oldest not yet removed, and the final model beside them."""
    model, optimizer = checkpoint_bytes(shape, setup)
    rest = _LOOP_REST_BYTES if setup.framework == "torch-loop" else _REST_BYTES
    total = model + optimizer + rest + (0 if setup.method in ("full", "freeze") else _CARD_BYTES)
    return CheckpointEstimate(
        bytes=total,
        model_bytes=model,
        optimizer_bytes=optimizer,
        run_disk_bytes=(max(kept, 2) + 1) * total + model,
    )
