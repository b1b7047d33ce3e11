"""What bitsandbytes and GPTQ have no code for, or none that a dry run knows."""

from __future__ import annotations

from estimator.errors import InputError
from estimator.hardware import is_cpu
from estimator.model.catalog import resolve_model
from estimator.setup import Setup


def check_libraries(setup: Setup) -> None:
    """Raises InputError for a quantized base or an optimizer (``setup`` resolved) that the library cannot run so."""
    if setup.base_quantization:
        _check_base(setup, setup.base_quantization)
    if str(setup.optimizer).endswith(("8bit", "paged")):
        if is_cpu(setup.accelerator):
            raise InputError(f"optimizer: {setup.optimizer} runs on a GPU; name one with --gpu")
        if setup.sharding != "none":
            raise InputError(f"optimizer: no dry run shards the states of {setup.optimizer}; write --optimizer adamw")


def _check_base(setup: Setup, kind: str) -> None:
    gptq = kind.startswith("gptq")
    if setup.method == "dora":
        raise InputError("method: no dry run has DoRA over a quantized base; write --method qlora")
    if gptq and resolve_model(setup.model).experts:
        raise InputError(
            f"base_quantization: no dry run has experts in {kind}; write --quantization nf4, or leave out --dry-run"
        )
    if gptq and setup.precision == "fp32":
        raise InputError(f"precision: {kind} computes in fp16; write --precision bf16")
    if is_cpu(setup.accelerator) and (gptq or kind == "int8"):
        raise InputError(f"base_quantization: {kind} runs on a GPU; name one with --gpu")
    if setup.sharding not in ("none", "ddp", "fsdp"):
        raise InputError(
            f"sharding: no dry run has {setup.sharding} over a base in {kind}; write --sharding fsdp or ddp"
        )
