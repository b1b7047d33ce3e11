"""Builds model, adapters and optimizer from a setup: the harness runs them on real tensors, the dry run on fake ones.

It needs torch and transformers, and imports them where they are used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from estimator.building.config import cut_depth, is_pretrained, model_config, refusal
from estimator.building.methods import apply_method, decoder_layers
from estimator.errors import InputError
from estimator.model.catalog import resolve_model
from estimator.setup import Setup

if TYPE_CHECKING:
    import torch

__all__ = [
    "build_empty_model", "build_model", "check_buildable", "check_step", "cut_depth", "decoder_layers", "is_pretrained", "model_config", "quantized_compute_dtype", "weight_dtype",
]  # fmt: skip


def weight_dtype(setup: Setup) -> torch.dtype:
    """The dtype that weights are stored in: fp32 for fp32 and every -mixed precision."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(setup.precision, torch.float32)


def quantized_compute_dtype(setup: Setup) -> torch.dtype:
    """What the products of a quantized base compute in: fp16 where autocast or the weights are, else bf16."""
    import torch

    half = setup.autocast or setup.precision.removesuffix("-mixed")
    return torch.float16 if half == "fp16" else torch.bfloat16


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
    dtype = quantized_compute_dtype(setup) if setup.base_quantization else weight_dtype(setup)
    if setup.base_quantization:
        from estimator.building.quantized_base import check_bitsandbytes, quantize_base

        check_bitsandbytes(setup.base_quantization)
    try:
        if is_pretrained(setup.model) and not Path(setup.model).is_file():
            model = AutoModelForCausalLM.from_pretrained(
                setup.model,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                quantization_config=_quantization(setup),
            )
        else:
            with contextlib.nullcontext() if drawn else no_init_weights():
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
            if not drawn:
                model.tie_weights()  # which is a part of initialising
            if setup.base_quantization:
                quantize_base(model, setup.base_quantization, half=dtype, drawn=drawn)
        if setup.base_quantization:
            _widen(model, weight_dtype(setup))
    except (OSError, ImportError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise refusal(setup, error) from None
    model.config.use_cache = False
    if setup.checkpointing != "none":
        enable_checkpointing(model, setup)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        trained = apply_method(model, setup)
    _use_loss(trained, setup, dry=False)
    return trained


def _use_loss(model: torch.nn.Module, setup: Setup, *, dry: bool) -> None:
    if setup.loss != "standard" or setup.compile or (dry and setup.logit_copies != "none"):
        from estimator.memory.losses import use_loss

        use_loss(model, setup, dry=dry)


def build_empty_model(setup: Setup, *, layers: Sequence[int] | None = None) -> torch.nn.Module:
    """The same model on the meta device, without memory or values: never with pretrained weights, and cut to those of its
    ``layers`` that are given. Raises InputError and MissingError."""
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
        raise refusal(setup, error) from None
    model.tie_weights()  # which is a part of initialising
    model.config.use_cache = False
    if setup.checkpointing != "none":
        enable_checkpointing(model, setup)
    with torch.device("meta"):
        if setup.base_quantization:
            from estimator.dryrun.quantized import quantize

            quantize(model, setup.base_quantization, half=quantized_compute_dtype(setup))
        model = apply_method(model, setup)
    _use_loss(model, setup, dry=True)
    return model


def enable_checkpointing(model: Any, setup: Setup) -> None:
    """Recomputes every decoder layer in backward, or what of it is cheap; transformers 5.2x renamed the switch."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    arguments: dict[str, Any] = {"use_reentrant": setup.checkpoint_reentrant}
    if setup.checkpointing == "selective":
        from estimator.memory.selective import selective_contexts

        arguments["context_fn"] = selective_contexts
    enable(arguments)


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
    if resolve_model(setup.model).inferred:
        # Its whole layers and heads never add up to the count.
        raise InputError(f"model: {setup.model} names no model that can be built; write --model NAME")
    unbuilt = {
        "sharding": setup.sharding not in (None, "none"),
        "method": setup.method.startswith("adapter"),
        "varying_lengths": setup.varying_lengths,
        "offload": setup.offload is not None,
        "optimizer_in_backward": setup.optimizer_in_backward,
        "optimizer": setup.optimizer == "galore",
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
