"""What a method does to a model: which parameters train, and peft's adapters. Needs torch and peft where they are used."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, cast

from estimator.errors import InputError, MissingError
from estimator.model.catalog import resolve_model
from estimator.model.shape import lora_modules
from estimator.setup import Setup

if TYPE_CHECKING:
    import torch


def apply_method(model: torch.nn.Module, setup: Setup) -> torch.nn.Module:
    """``model``, or peft's around it, with what does not train frozen. Raises InputError and MissingError."""
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
    try:
        with warnings.catch_warnings():  # peft asks by a name that transformers 5.2x has replaced
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            return cast("torch.nn.Module", get_peft_model(model, adapters))
    except ValueError as error:  # of experts, whose matrices are one tensor, it has no DoRA
        if "use_dora" not in str(error):
            raise
        raise InputError(
            "method: peft has no DoRA of experts; write --method lora, or --lora-targets 'q_proj k_proj v_proj o_proj'"
        ) from None


def decoder_layers(model: torch.nn.Module) -> Any:
    """The model's repeated layers: its largest list of modules."""
    import torch

    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))
