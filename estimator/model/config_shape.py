"""The shape that a transformers config describes."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from estimator.data import read_data
from estimator.errors import InputError
from estimator.model.families import families, shape_of_family
from estimator.model.hybrid_shape import HYBRIDS, hybrid_dimensions, layer_kinds
from estimator.model.shape import ModelShape, count_parameters

# What transformers' configs call each dimension.
_KEYS = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "vocab": ("vocab_size", "padded_vocab_size"),
}
_ALIASES = {
    "num_attention_heads": _KEYS["heads"],
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "multi_query"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim"),
}
_RECURRENT = (
    "mamba_d_state", "mamba_num_heads", "mamba_n_heads", "ssm_state_size", "state_size", "linear_num_value_heads", "attn_layer_period", "lru_width",
)  # fmt: skip
"""Keys of configs whose layers carry a state along the sequence."""
_OWN = "own"
"""What model_types.csv calls the family of types whose layers are like no other's."""
_MOST_LAYERS, _MOST_PARAMETERS = 10_000, 10**14
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE = ("num_experts_per_tok", "moe_topk", "moe_k")
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_SWITCHED_BIASES = dict.fromkeys(("llama", "qwen3", "granite", "granitemoe", "mistral", "olmo2", "olmoe", "cohere", "phimoe"), "qkvo") | {
    "glm4_moe": "qkv"
}  # fmt: skip
"""Which projections ``attention_bias`` gives a bias, in the families where it does."""
_SWITCHED_NORMS = {"cohere": True, "stablelm": True, "glm4_moe": False}
"""Whether the norms of queries and keys have a weight for each element of all heads, where the config switches them on."""


@functools.cache
def _defaults() -> dict[str, dict[str, int]]:
    """What transformers takes for the keys that a config leaves out, by model type."""
    rows = read_data("config_defaults.csv")
    return {
        row["model_type"]: {key: int(value) for key, value in (item.split("=") for item in row["defaults"].split())}
        for row in rows
    }


@functools.cache
def _types() -> dict[str, dict[str, str]]:
    """Model types whose name is no family's: the family, or what else they are."""
    return {row["model_type"]: row for row in read_data("model_types.csv")}


def _completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's keys, with the defaults of its type for those that stand there under no name."""
    text = config.get("text_config")
    given = {**config, **text} if isinstance(text, dict) else dict(config)
    for key, value in _defaults().get(str(given.get("model_type", "")), {}).items():
        if not any(alias in given for alias in _ALIASES.get(key, (key,))):
            given[key] = bool(value) if key == "tie_word_embeddings" else value
    if given.get("model_type") in HYBRIDS and given.get("num_hidden_layers") is None:
        given["num_hidden_layers"] = len(layer_kinds(given))
    return given


def _has_own_layers(config: Mapping[str, Any]) -> bool:
    """Whether no formula knows its layers: a recurrent state, or what the table says."""
    kind = str(config.get("model_type", ""))
    own = _types().get(kind, {}).get("family") == _OWN or any(config.get(key) for key in _RECURRENT)
    return kind not in HYBRIDS and (own or kind.startswith(("mamba", "rwkv")))


def _check_decoder(config: Mapping[str, Any], name: str) -> None:
    kind = str(config.get("model_type", "it"))
    found = _types()[kind]["what"] if kind in _types() and not config.get("is_decoder") else ""
    if config.get("is_encoder_decoder") is True or (config.get("encoder_layers") and config.get("decoder_layers")):
        found = "has an encoder beside its decoder"
    if found:
        raise InputError(
            f"model {name}: {kind} {found}; only decoder-only transformers are predicted, see `vramcalc models`"
        )


def shape_from_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape that a transformers ``config.json`` describes. Raises InputError naming the missing key, for what is no
    decoder-only transformer, and for more than 10,000 layers or 10^14 parameters."""
    config = _completed(config)
    _check_decoder(config, name)

    def first(dimension: str) -> int:
        for key in _KEYS[dimension]:
            if config.get(key) is not None:
                return _whole(key, config[key])
        raise InputError(f"model {name}: its config has none of {', '.join(_KEYS[dimension])}")

    def whole(key: str, default: int) -> int:
        return _whole(key, config[key]) if config.get(key) is not None else default

    def any_of(keys: tuple[str, ...], default: int = 0) -> int:
        return next((_whole(key, config[key]) for key in keys if config.get(key) is not None), default)

    extra: dict[str, Any] = {}
    kind = str(config.get("model_type", ""))
    if _has_own_layers(config):
        return _checked(_known_by_code(name, first("layers"), first("hidden"), first("vocab")))
    family = kind if kind in families() else _types().get(kind, {}).get("family") or None
    if family is None:
        # A decoder of an unknown type: the Llama layout unless its keys say otherwise.
        family = "llama" if "rms_norm_eps" in config or "num_key_value_heads" in config else "gpt"
        extra["guessed"] = True
    hidden, heads = first("hidden"), first("heads")
    if not heads:
        raise InputError(f"model {name}: num_attention_heads is 0")
    kv_heads = whole("num_key_value_heads", whole("num_kv_heads", 0)) or whole("multi_query_group_num", 0)
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        kv_heads = 1  # Falcon's configs name as many kv heads as heads beside it
    kv_heads = kv_heads or heads
    positions = int(families()[family]["positions"])
    if positions:
        learned = whole("n_positions", whole("max_position_embeddings", positions))
        positions = learned + 2 if family == "opt" and "max_position_embeddings" in config else learned
    experts = any_of(_EXPERTS) if config.get("is_moe") is not False else 0
    for key in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        extra[key] = whole(key, 0)
    if config.get("attention_bias") is True and family in _SWITCHED_BIASES:
        extra["attention_bias"] = _SWITCHED_BIASES[family]
    if config.get("use_qkv_bias") is True:
        extra["attention_bias"] = "qkv"
    if family in _SWITCHED_NORMS and (config.get("use_qk_norm") or config.get("qk_layernorm")):
        extra |= {"qk_norm": True, "wide_qk_norm": _SWITCHED_NORMS[family]}
    if config.get("lm_head_bias") is True:
        extra["head_bias"] = True
    if config.get("use_parallel_residual") is True and family == "stablelm":
        extra["norms_per_layer"] = 1
    if config.get("mlp_bias") is True:
        extra["mlp_bias"] = True
    ffn = whole("intermediate_size", whole("n_inner", whole("ffn_hidden_size", whole("ffn_dim", 4 * hidden))))
    expert_ffn = any_of(("moe_intermediate_size", "expert_ffn_hidden_size"))
    if experts and expert_ffn:
        extra["dense_ffn"] = ffn
        extra["dense_layers"] = any_of(("first_k_dense_replace", "moe_layer_start_index"))
        extra["moe_every"] = whole("decoder_sparse_step", 1)
        if without := config.get("mlp_only_layers"):
            extra |= {"dense_layers": _without_experts(without, first("layers"), extra["moe_every"]), "moe_every": 1}
        ffn = expert_ffn
        shared = whole("shared_expert_intermediate_size", 0)  # one, as wide as several
        extra["shared_experts"] = any_of(_SHARED, round(shared / max(ffn, 1)))
        extra["shared_gate"] = family == "qwen2_moe" and extra["shared_experts"] > 0
    elif experts and config.get("intermediate_size_mlp") is not None:  # llama4: a shared expert beside the routed ones
        extra |= {"dense_ffn": whole("intermediate_size_mlp", 0), "shared_experts": 1}
        extra["moe_every"] = whole("interleave_moe_layer_step", 1)
    elif experts:
        extra["shared_experts"] = any_of(_SHARED)
    head_dim = whole("head_dim", hidden // heads)
    if extra["kv_lora_rank"]:
        head_dim = extra["qk_nope_head_dim"] + extra["qk_rope_head_dim"]
    dimensions: dict[str, Any] = {
        "layers": first("layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "ffn": ffn,
        "gated": families()[family]["mlp"] == "gated",
        "vocab": first("vocab"),
        "tied_embeddings": bool(config.get("tie_word_embeddings", families()[family]["tied"] == "1")),
        "experts": experts,
        "active_experts": any_of(_ACTIVE) if experts else 0,
        "positions": positions,
    }
    if kind in HYBRIDS:
        extra |= hybrid_dimensions(config)
    return _checked(shape_of_family(family, name=name, **(dimensions | extra)))


def _without_experts(named: Any, layers: int, every: int) -> int:
    """Layers that have no experts: those in ``mlp_only_layers``, and those between every ``decoder_sparse_step``-th one."""
    if not isinstance(named, list) or not all(isinstance(layer, int) for layer in named):
        raise InputError(f"model config: mlp_only_layers is {repr(named)[:60]}; it must be a list of layers")
    lost = [layer for layer in set(named) if 0 <= layer < layers and (layer + 1) % max(every, 1) == 0]
    return layers - layers // max(every, 1) + len(lost)


def _known_by_code(name: str, layers: int, hidden: int, vocab: int) -> ModelShape:
    """What a config says of layers that no formula knows; the widths within them are placeholders."""
    ones = dict.fromkeys(("heads", "kv_heads", "head_dim", "ffn"), 1)
    return shape_of_family(
        "llama", name=name, layers=layers, hidden=hidden, vocab=vocab, gated=True, tied_embeddings=True, guessed=True,
        code_only=True, **ones,
    )  # fmt: skip


def _checked(shape: ModelShape) -> ModelShape:
    if shape.layers > _MOST_LAYERS or count_parameters(shape).total > _MOST_PARAMETERS:
        raise InputError(
            f"model {shape.name}: {shape.layers:.4g} layers of width {shape.hidden:.4g} are beyond {_MOST_LAYERS:,} layers or 1e14 "
            "parameters; correct its config"
        )
    return shape


def _whole(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 10**300:
        raise InputError(f"model config: {key} is {repr(value)[:60]}; it must be a whole number")
    return value


def shape_from_config_file(path: Path) -> ModelShape:
    """The shape of a ``config.json`` or of a directory that holds one. Raises InputError."""
    file = path
    try:
        path = file = path.expanduser()
        file = path / "config.json" if path.is_dir() else path
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of too many digits, or brackets
        raise InputError(f"model: {file} is not JSON: {error}") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of nobody
        raise InputError(f"model: cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(config, dict):
        raise InputError(f"model: {file} does not hold a JSON object")
    return shape_from_config(config, name=str(path))
