"""The transformers config of what ``--model`` names, and the one line for what it cannot be built from.

It needs torch and transformers, and imports them where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from estimator.errors import InputError, MissingError
from estimator.model.catalog import listed_name, model_names, resolve_model
from estimator.model.families import transformers_class
from estimator.model.shape import ModelShape
from estimator.setup import Setup

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ATTENTION = {"eager": "eager", "sdpa": "sdpa", "flash": "flash_attention_2", "flex": "flex_attention"}
_LLAMA_LIKE = {
    "llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "granite", "granitemoe", "nemotron",
    "deepseek_v3", "gpt_oss", "olmo2", "olmoe", "minimax_m2", "glm4_moe", "cohere", "stablelm", "phimoe", "arcee", "starcoder2",
}  # fmt: skip


_BIASED: dict[str, Callable[[ModelShape], bool]] = {"attention_bias": lambda shape: bool(shape.attention_bias)}
_NORMED: dict[str, Callable[[ModelShape], bool]] = {"use_qk_norm": lambda shape: bool(shape.qk_norm)}
_SWITCHES: dict[str, dict[str, Callable[[ModelShape], bool]]] = {
    "glm4_moe": _BIASED | _NORMED,
    "cohere": _NORMED,
    "stablelm": {
        "use_qkv_bias": lambda shape: bool(shape.attention_bias),
        "qk_layernorm": lambda shape: bool(shape.qk_norm),
        "use_parallel_residual": lambda shape: shape.norms_per_layer == 1,
    },
    "phimoe": _BIASED | {"lm_head_bias": lambda shape: bool(shape.head_bias)},
}
"""Keys that switch parts of a layer on, in the families whose models differ in them."""


def model_config(setup: Setup) -> PreTrainedConfig:
    """The transformers config of ``setup.model``. Remote code is never executed.

    Raises InputError for a shape that transformers has no class for, or a config it cannot build.
    """
    attention = _ATTENTION[setup.attention]
    if is_pretrained(setup.model):
        from estimator.model.hub import settle_for_the_cache_without_a_network

        if not Path(setup.model).expanduser().exists():
            settle_for_the_cache_without_a_network()
        from transformers import AutoConfig

        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                setup.model, trust_remote_code=False, attn_implementation=attention
            )
        except Exception as error:
            if not isinstance(error, OSError) or listed_name(setup.model) == setup.model:
                raise refusal(setup, error) from None  # else neither cached nor to be had, but known
        else:
            return config
    shape = resolve_model(setup.model)
    name = transformers_class(shape.family)
    if name is None:
        raise InputError(
            f"model: transformers has no class that builds {setup.model!r} ({shape.family}); choose another model"
        )
    import transformers

    config = getattr(transformers, name)(**_config_arguments(shape))
    assert isinstance(config, transformers.PreTrainedConfig)
    config._attn_implementation = attention
    config.use_cache = False
    return config


def _config_arguments(shape: ModelShape) -> dict[str, Any]:
    if shape.family in _LLAMA_LIKE:
        return _llama_arguments(shape)
    if shape.family in ("gpt2", "gpt_bigcode", "gptj"):
        return _gpt2_arguments(shape)
    if shape.family in ("gpt_neox", "phi", "opt", "falcon", "bloom", "gpt_neo"):
        return _plain_arguments(shape)
    raise InputError(f"model: no rule builds the family {shape.family!r} with transformers; choose another model")


def _llama_arguments(shape: ModelShape) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.dense_ffn if shape.experts and shape.dense_ffn else shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": shape.tied_embeddings,
        "max_position_embeddings": 131_072,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if shape.family in ("qwen2", "mistral", "mixtral", "starcoder2"):
        arguments["sliding_window"] = None
    if shape.family in _SWITCHES:
        arguments |= {key: field(shape) for key, field in _SWITCHES[shape.family].items()}
    if shape.experts:
        arguments |= _expert_arguments(shape)
    return arguments


def _expert_arguments(shape: ModelShape) -> dict[str, Any]:
    if shape.family == "deepseek_v3":
        return {
            "head_dim": shape.qk_rope_head_dim,
            "q_lora_rank": shape.q_lora_rank or None,
            "kv_lora_rank": shape.kv_lora_rank,
            "qk_nope_head_dim": shape.qk_nope_head_dim,
            "qk_rope_head_dim": shape.qk_rope_head_dim,
            "v_head_dim": shape.v_head_dim,
            "first_k_dense_replace": shape.dense_layers,
            "n_routed_experts": shape.experts,
            "n_shared_experts": shape.shared_experts,
            "moe_intermediate_size": shape.ffn,
            "num_experts_per_tok": shape.active_experts,
        }
    if shape.family == "glm4_moe":
        return {
            "first_k_dense_replace": shape.dense_layers,
            "n_routed_experts": shape.experts,
            "n_shared_experts": shape.shared_experts,
            "moe_intermediate_size": shape.ffn,
            "num_experts_per_tok": shape.active_experts,
        }
    if shape.family == "olmoe":
        return {"num_experts": shape.experts, "num_experts_per_tok": shape.active_experts}
    if shape.family in ("qwen2_moe", "qwen3_moe"):
        shared = {"shared_expert_intermediate_size": shape.shared_experts * shape.ffn}
        return (shared if shape.family == "qwen2_moe" else {}) | {
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.active_experts,
            "moe_intermediate_size": shape.ffn,
            "decoder_sparse_step": shape.moe_every,
        }
    return {"num_local_experts": shape.experts, "num_experts_per_tok": shape.active_experts}


def _gpt2_arguments(shape: ModelShape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocab,
        "n_embd": shape.hidden,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "n_inner": shape.ffn,
        "n_positions": shape.positions,
        "tie_word_embeddings": shape.tied_embeddings,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _plain_arguments(shape: ModelShape) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "tie_word_embeddings": shape.tied_embeddings,
    }
    if shape.family in ("gpt_neox", "phi", "gpt_neo"):
        arguments["intermediate_size"] = shape.ffn
    if shape.family == "gpt_neo":  # every second layer slides
        arguments |= {
            "attention_types": [[["global", "local"], shape.layers // 2]],
            "window_size": shape.window,
            "max_position_embeddings": shape.positions,
        }
    if shape.family == "opt":
        arguments |= {
            "ffn_dim": shape.ffn,
            "word_embed_proj_dim": shape.hidden,
            "max_position_embeddings": shape.positions - 2,
            "dropout": 0.0,
        }
    if shape.family == "falcon":
        arguments |= {"multi_query": shape.kv_heads == 1, "ffn_hidden_size": shape.ffn, "bias": False}
    return arguments


def is_pretrained(model: str) -> bool:
    """Whether ``model`` is a directory, a config file or a hub id rather than a catalog name."""
    return model.lower() not in model_names() and (Path(model).expanduser().exists() or "/" in model)


def cut_depth(config: Any, kept: Sequence[int]) -> None:
    """Makes ``config`` (transformers') that of the same model with these of its decoder layers, in their order."""
    config = config.get_text_config()  # of a model that sees as well
    layers = config.num_hidden_layers
    place = {layer: index for index, layer in enumerate(kept)}
    config.num_hidden_layers = len(kept)
    for name, value in list(vars(config).items()):
        if not isinstance(value, (list, tuple)) or not value or name in config.attribute_map:
            continue
        if len(value) == layers:  # an entry for each
            setattr(config, name, type(value)(value[layer] for layer in kept))
        elif "layer" in name and all(type(item) is int for item in value):  # which layers are of a kind
            setattr(config, name, type(value)(place[layer] for layer in value if layer in place))


def refusal(setup: Setup, error: Exception) -> InputError | MissingError:
    """What transformers raised at a config, which holds what somebody wrote: of any type, in one line."""
    if isinstance(error, ImportError):
        return MissingError(f"model: cannot load {setup.model!r}: {_first_line(error)}")
    text = str(error)
    if "trust_remote_code" in text:
        return InputError(
            f"model: {setup.model!r} needs code of its own, which is never executed; choose a model that transformers has a class for"
        )
    if "attention implementation" in text or "Flex Attention" in text:
        return InputError(
            f"attention: transformers has no such attention for the class of {setup.model!r}; write --attention eager"
        )
    if "Unrecognized configuration class" in text:
        return InputError(
            f"model: {setup.model!r} is no causal language model that transformers can build; give its text model's config.json"
        )
    if "does not recognize this architecture" in text or "Should have a `model_type`" in text:
        return InputError(
            f"model: transformers knows no model_type of the config of {setup.model!r}; correct it, or choose another model"
        )
    reason = " ".join(text.split("\nException raised from", 1)[0].split()) or type(error).__name__
    return InputError(f"model: transformers cannot build {setup.model!r}: {reason[:200]}; correct its config.json")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
