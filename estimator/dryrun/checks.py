"""What of activations and compilation a dry run does not execute. Loads no torch."""

from __future__ import annotations

from estimator.building.model import check_step
from estimator.errors import InputError
from estimator.hardware import is_cpu
from estimator.model.catalog import resolve_model
from estimator.setup import Setup

_COMPILED = {
    "method": ("full", "freeze", "lora"),
    "loss": ("standard", "compiled"),
    "attention": ("eager", "sdpa", "flash"),
    "attention_kernel": (None, "flash", "efficient", "cudnn"),
    "optimizer_in_backward": (False,),
    "checkpoint_reentrant": (False,),
    "offload": (None,),
    "sharding": ("none", "fsdp"),
    "base_quantization": (None,),
}
"""What is known of a compiled model; of the rest either the kernels are not, or the graph would not contain it."""


def check_activations(setup: Setup) -> None:
    """Raises InputError for what excludes itself, or what no dry run knows (``setup`` resolved)."""
    check_step(setup)
    shape = resolve_model(setup.model)
    positions = shape.positions - (2 if shape.family == "opt" else 0)  # whose table begins with two that no token has
    if shape.positions and setup.seq > positions:
        raise InputError(
            f"seq: {shape.name} has {positions} learned positions; write --seq {positions} or less, or leave out --dry-run"
        )
    cpu = is_cpu(setup.accelerator)
    if cpu and setup.attention == "flex":
        raise InputError("attention: flex has no backward pass on a CPU; write --attention sdpa")
    if cpu and setup.offload == "activations":
        raise InputError("offload: activations of a CPU are in host memory; leave it out")
    for name, values in _COMPILED.items() if setup.compile else ():
        value = getattr(setup, name)
        if value not in values:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{name}: a dry run does not compile a model with {value}; leave out {flag} or --compile")
