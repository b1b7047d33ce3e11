"""What the configs of hybrids say beyond a transformer's: which layers attend, which carry a state, and how wide that is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from estimator.model.mixer import Mixer

HYBRIDS = ("nemotron_h", "granitemoehybrid", "bamba", "falcon_h1", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
"""Model types of which the layers are Mamba-2's or gated delta nets, attention and feed-forwards."""

_MIXER, _ATTENTION = ("M", "mamba", "linear_attention"), ("*", "attention", "full_attention")
_EXPERTS = ("E", "moe")


def layer_kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The kind of each layer, as the config writes it; empty where it does not say."""
    for key in ("layer_types", "layers_block_type", "hybrid_override_pattern"):
        if config.get(key):
            return tuple(config[key])
    count = config.get("num_hidden_layers") or 0
    if isinstance(config.get("attn_layer_indices"), list):  # Bamba's
        return tuple("attention" if layer in config["attn_layer_indices"] else "mamba" for layer in range(count))
    every = config.get("full_attention_interval", 4)
    if "linear_num_value_heads" in config:  # Qwen3-Next's
        return tuple("attention" if (layer + 1) % every == 0 else "mamba" for layer in range(count))
    return ()


def hybrid_dimensions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``ModelShape`` that a hybrid's config sets; a model type of ``HYBRIDS``."""
    kinds = layer_kinds(config)
    mixers = sum(kind in _MIXER for kind in kinds)
    found: dict[str, Any] = {"attending": sum(kind in _ATTENTION for kind in kinds)}
    if config["model_type"] == "falcon_h1":  # both in every layer
        mixers = config["num_hidden_layers"]
        found["attending"] = mixers
    found["mixer"] = _mixer(config, mixers) if mixers else None
    if config["model_type"] == "nemotron_h":
        found |= _one_branch_a_layer(config, kinds)
    elif "linear_num_value_heads" in config:
        found |= {"attention_gate": True, "shared_gate": bool(config.get("num_experts"))}
    elif config["model_type"] == "granitemoehybrid":
        width = config.get("shared_intermediate_size", 1024)
        experts = config.get("num_local_experts", 8)
        found |= {"shared_experts": round(width / config["intermediate_size"])} if experts else {"ffn": width}
    return found


def _one_branch_a_layer(config: Mapping[str, Any], kinds: tuple[str, ...]) -> dict[str, Any]:
    """Nemotron-H: each layer is a mixer, attention, a feed-forward or a mixture of experts."""
    mixtures = sum(kind in _EXPERTS for kind in kinds)
    lone = sum(kind not in _MIXER and kind not in _ATTENTION for kind in kinds)
    found: dict[str, Any] = {"layers": len(kinds), "lone_feed_forwards": lone, "dense_layers": lone - mixtures}
    if not mixtures:
        return found | {"ffn": config["intermediate_size"], "experts": 0, "active_experts": 0, "shared_experts": 0}
    shared = config.get("moe_shared_expert_intermediate_size", 7688) / config["moe_intermediate_size"]
    return found | {"shared_experts": round(shared), "expert_hidden": config.get("moe_latent_size") or 0}


def _mixer(config: Mapping[str, Any], layers: int) -> Mixer:
    if "linear_num_value_heads" in config:
        return Mixer(
            layers=layers,
            heads=config["linear_num_value_heads"],
            head_dim=config.get("linear_value_head_dim", 128),
            state=config.get("linear_key_head_dim", 128),
            groups=config.get("linear_num_key_heads", 16),
            conv=config.get("linear_conv_kernel_dim", 4),
            chunk=64,  # of fla's kernels, and of transformers' own code
            delta_rule=True,
        )

    def of(*keys: str, default: Any) -> Any:
        return next((config[key] for key in keys if config.get(key) is not None), default)

    nemotron = config["model_type"] == "nemotron_h"
    heads = of("mamba_num_heads", "mamba_n_heads", default=128)
    width = of("mamba_d_ssm", default=of("mamba_expand", "expand", default=2) * config["hidden_size"])
    head_dim = of("mamba_head_dim", "mamba_d_head", default=64 if nemotron else "auto")
    return Mixer(
        layers=layers,
        heads=heads,
        head_dim=width // heads if head_dim == "auto" else head_dim,
        state=of("ssm_state_size", "mamba_d_state", default=128 if nemotron else 256),
        groups=of("n_groups", "mamba_n_groups", default=8 if nemotron else 1),
        conv=of("conv_kernel", "mamba_d_conv", default=4),
        chunk=of("chunk_size", "mamba_chunk_size", default=128 if nemotron else 256),
        norm=config["model_type"] != "falcon_h1" or bool(config.get("mamba_rms_norm")),
    )
