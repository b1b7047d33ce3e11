"""Builds model, adapters and optimizer from a setup: the harness runs them on real tensors, the dry run on fake ones.

It needs torch and transformers, and imports them where they are used.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from estimator.catalog import model_names, resolve_model, transformers_class
from estimator.errors import InputError, MissingError
from estimator.setup import Setup
from estimator.shape import ModelShape, lora_modules

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

_ATTENTION = {"eager": "eager", "sdpa": "sdpa", "flash": "flash_attention_2", "flex": "flex_attention"}
_LLAMA_LIKE = {
    "llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma", "gemma2", "granite", "nemotron", "deepseek_v3", "gpt_oss",
}  # fmt: skip


def weight_dtype(setup: Setup) -> torch.dtype:
    """The dtype that weights are stored in: fp32 for fp32 and every -mixed precision."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(setup.precision, torch.float32)


def quantized_compute_dtype(setup: Setup) -> torch.dtype:
    """What the products of a quantized base compute in: fp16 where autocast or the weights are, else bf16."""
    import torch

    half = setup.autocast or setup.precision.removesuffix("-mixed")
    return torch.float16 if half == "fp16" else torch.bfloat16


def model_config(setup: Setup) -> PreTrainedConfig:
    """The transformers config of ``setup.model``. Remote code is never executed.

    Raises InputError for a shape that transformers has no class for, or a config it cannot build.
    """
    attention = _ATTENTION[setup.attention]
    if is_pretrained(setup.model):
        from transformers import AutoConfig

        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                setup.model, trust_remote_code=False, attn_implementation=attention
            )
        except Exception as error:
            raise _refusal(setup, error) from None
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
        if shape.family == "deepseek_v3":
            arguments["head_dim"] = shape.qk_rope_head_dim
            arguments |= {
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
        elif shape.experts:
            experts = "num_experts" if shape.family == "qwen3_moe" else "num_local_experts"
            arguments |= {experts: shape.experts, "num_experts_per_tok": shape.active_experts}
            if shape.family == "qwen3_moe":
                arguments |= {"moe_intermediate_size": shape.ffn, "decoder_sparse_step": shape.moe_every}
        if shape.family in ("qwen2", "mistral", "mixtral"):
            arguments["sliding_window"] = None
        return arguments
    if shape.family in ("gpt2", "gpt_bigcode"):
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
    if shape.family in ("gpt_neox", "phi", "opt", "falcon", "bloom"):
        arguments = {
            "vocab_size": shape.vocab,
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "tie_word_embeddings": shape.tied_embeddings,
        }
        if shape.family in ("gpt_neox", "phi"):
            arguments["intermediate_size"] = shape.ffn
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
    raise InputError(f"model: no rule builds the family {shape.family!r} with transformers; choose another model")


def is_pretrained(model: str) -> bool:
    """Whether ``model`` is a directory, a config file or a hub id rather than a catalog name."""
    return model.lower() not in model_names() and (Path(model).expanduser().exists() or "/" in model)


def build_model(setup: Setup, *, seed: int = 0, drawn: bool = True) -> torch.nn.Module:
    """The model with its method applied, in its weight dtype, on the default device.

    Catalog shapes and bare configs get random weights from ``seed`` (with ``drawn=False`` whatever the memory holds, for
    who draws them elsewhere); directories with weights and hub ids are loaded. Raises InputError and MissingError.
    """
    import torch
    from transformers import AutoModelForCausalLM, set_seed
    from transformers.initialization import no_init_weights

    check_buildable(setup)
    set_seed(seed)
    config = model_config(setup)
    dtype = weight_dtype(setup)
    try:
        if is_pretrained(setup.model) and not Path(setup.model).is_file():
            model = AutoModelForCausalLM.from_pretrained(
                setup.model,
                config=config,
                dtype=quantized_compute_dtype(setup) if setup.base_quantization else dtype,
                trust_remote_code=False,
                quantization_config=_quantization(setup),
            )
            if setup.base_quantization:
                _widen(model, dtype)
        else:
            if setup.base_quantization:
                raise InputError(
                    f"base_quantization: {setup.base_quantization} quantizes pretrained weights; give --model DIRECTORY or a hub id"
                )
            with contextlib.nullcontext() if drawn else no_init_weights():
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
            if not drawn:
                model.tie_weights()  # which is a part of initialising
    except (OSError, ImportError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise _refusal(setup, error) from None
    model.config.use_cache = False
    if setup.checkpointing != "none":
        enable_checkpointing(model, setup)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        trained = _apply_method(model, setup)
    _use_loss(trained, setup, dry=False)
    return trained


def _use_loss(model: torch.nn.Module, setup: Setup, *, dry: bool) -> None:
    if setup.loss != "standard" or setup.compile or (dry and setup.logit_copies != "none"):
        from estimator.losses import use_loss

        use_loss(model, setup, dry=dry)


def build_empty_model(setup: Setup, *, layers: int | None = None) -> torch.nn.Module:
    """The same model on the meta device, without memory or values: never with pretrained weights, and cut to its first
    ``layers`` where given. Raises InputError and MissingError."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = model_config(setup)
    if layers is not None:
        cut_depth(config, layers)
    try:
        with no_init_weights(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=weight_dtype(setup), trust_remote_code=False)
    except Exception as error:
        raise _refusal(setup, error) from None
    model.tie_weights()  # which is a part of initialising
    model.config.use_cache = False
    if setup.checkpointing != "none":
        enable_checkpointing(model, setup)
    with torch.device("meta"):
        if setup.base_quantization:
            from estimator.dryrun.quantized import quantize

            quantize(model, setup.base_quantization, half=quantized_compute_dtype(setup))
        model = _apply_method(model, setup)
    _use_loss(model, setup, dry=True)
    return model


def enable_checkpointing(model: Any, setup: Setup) -> None:
    """Recomputes every decoder layer in backward, or what of it is cheap; transformers 5.2x renamed the switch."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    arguments: dict[str, Any] = {"use_reentrant": setup.checkpoint_reentrant}
    if setup.checkpointing == "selective":
        from estimator.selective import selective_contexts

        arguments["context_fn"] = selective_contexts
    enable(arguments)


def cut_depth(config: Any, layers: int) -> None:
    """Makes ``config`` (transformers') that of the same model with its first ``layers`` decoder layers."""
    config = config.get_text_config()  # of a model that sees as well
    config.num_hidden_layers = layers
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(config, name, None)
        if kinds is not None and not isinstance(getattr(type(config), name, None), property):
            setattr(config, name, list(kinds)[:layers])


def check_step(setup: Setup) -> None:
    """Raises InputError for combinations that exclude each other in every framework."""
    if setup.optimizer_in_backward and setup.accumulation > 1:
        raise InputError(
            f"accumulation: {setup.accumulation} micro-batches need gradients that an optimizer in backward has dropped; "
            "write --accumulation 1, or leave out --optimizer-in-backward"
        )
    if setup.checkpointing == "selective" and setup.checkpoint_reentrant:
        raise InputError(
            "checkpoint_reentrant: selective checkpointing is not reentrant; write --checkpointing full, or leave it out"
        )


def check_buildable(setup: Setup) -> None:
    """Raises InputError for what the estimator can predict but no step here executes."""
    check_step(setup)
    unbuilt = {
        "sharding": setup.sharding not in (None, "none"),
        "method": setup.method.startswith("adapter"),
        "varying_lengths": setup.varying_lengths,
        "offload": setup.offload is not None,
        "optimizer_in_backward": setup.optimizer_in_backward,
        "loss": setup.loss == "cut-cross-entropy",
        "precision": setup.precision.startswith(("fp8", "mxfp8", "nvfp4")),
        "base_quantization": setup.base_quantization in ("gptq-int4", "gptq-int8"),
        "accelerators": setup.accelerators > 1,
    }
    for name, wrong in unbuilt.items():
        if wrong:
            raise InputError(
                f"{name}: {getattr(setup, name)} can be estimated but not run on this machine; leave it out"
            )


def _widen(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """What is not quantized, in the weight dtype: fp32 beside autocast, as ``peft.prepare_model_for_kbit_training`` has it."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _quantization(setup: Setup) -> Any:
    if setup.base_quantization is None:
        return None
    from transformers import BitsAndBytesConfig

    if setup.base_quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=setup.base_quantization == "nf4-dq",
        bnb_4bit_compute_dtype=quantized_compute_dtype(setup),
    )


def _apply_method(model: torch.nn.Module, setup: Setup) -> torch.nn.Module:
    if setup.method == "full":
        return model
    if setup.method == "freeze":
        layers = decoder_layers(model)
        assert setup.trainable_layers is not None
        if setup.trainable_layers > len(layers):
            raise InputError(
                f"trainable_layers: {setup.trainable_layers} is more than the model's {len(layers)} layers"
            )
        model.requires_grad_(False)
        for layer in layers[-setup.trainable_layers :]:
            layer.requires_grad_(True)
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MissingError(f"method: {setup.method} needs peft; pip install 'vramcalc-toolkit[all]'") from None
    targets: str | list[str] = "all-linear"
    if setup.lora_targets not in ("all", "all-linear"):
        present = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        wanted = (setup.lora_targets or "").replace(",", " ").split()
        targets = wanted or [name for name, _, _ in lora_modules(resolve_model(setup.model), None)]
        absent = [name for name in targets if name.rsplit(".", 1)[-1] not in present]
        if len(absent) == len(targets):
            raise InputError(f"lora_targets: the model has no module {absent[0]!r}; write --lora-targets all-linear")
        if absent:  # peft passes over names that only other models have; a misspelt one is an error
            lora_modules(resolve_model(setup.model), " ".join(absent))
            targets = [name for name in targets if name not in absent]
    adapters = LoraConfig(
        r=setup.lora_rank or 16,
        lora_alpha=2 * (setup.lora_rank or 16),
        target_modules=targets,
        use_dora=setup.method == "dora",
        task_type="CAUSAL_LM",
    )
    if setup.base_quantization and any(parameter.is_meta for parameter in model.parameters()):
        from estimator.dryrun.quantized import register_adapters  # the libraries' own layers bring their own

        register_adapters(adapters)
    if setup.checkpointing != "none":
        cast("Any", model).enable_input_require_grads()
    return cast("torch.nn.Module", get_peft_model(model, adapters))


def decoder_layers(model: torch.nn.Module) -> Any:
    """The model's repeated layers: its largest list of modules."""
    import torch

    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))


def _refusal(setup: Setup, error: Exception) -> InputError | MissingError:
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
