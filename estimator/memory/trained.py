"""The shape as a framework builds it, and how many of its parameters get gradients."""

from __future__ import annotations

import dataclasses

from estimator.conventions import conventions
from estimator.errors import InputError
from estimator.model.lora_targets import adapter_parameters
from estimator.model.shape import (
    ModelShape,
    attention_parameters,
    count_parameters,
    expert_parameters,
    mlp_parameters,
)
from estimator.setup import Setup


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
        experts = shape.experts * expert_parameters(shape) + shape.shared_experts * mlp_parameters(shape, shape.ffn)
        mlp = max(mlp, experts + shape.hidden * shape.experts)
    return attention_parameters(shape) + norm + mlp
