"""Which setups of several devices, and of engines that shard even on one, a dry run executes."""

from __future__ import annotations

from estimator.conventions import splits_by_own_plan
from estimator.errors import InputError
from estimator.hardware import is_cpu
from estimator.memory.states import trainable_parameters
from estimator.model.catalog import resolve_model
from estimator.setup import Setup

_FRAMEWORKS = ("hf-trainer", "torch-loop", "hf-trainer+deepspeed", "torchtitan")
"""torchtitan: its step, sharding and compilation of each layer, around transformers' model of the same shape."""
_BUCKET = 500_000_000
_TENSOR_FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
_MASKED_FAMILIES = ("gemma2", "gemma3", "gpt_oss", "bloom", "mpt", "falcon")
_TENSOR_FRAMEWORKS = ("torchtitan", "torch-loop", "hf-trainer")


def check_parallel(setup: Setup) -> None:
    """Raises InputError for what the dry run does not execute over several devices (``setup`` resolved)."""
    if setup.framework not in _FRAMEWORKS:
        raise InputError(
            f"framework: a dry run does not execute {setup.framework}; write {', '.join(_FRAMEWORKS)}, or leave out --dry-run"
        )
    for name in ("pipeline_parallel", "expert_parallel"):
        if getattr(setup, name) > 1:
            raise InputError(
                f"{name}: a dry run executes data, tensor and context parallelism alone; write 1, or leave out --dry-run"
            )
    sharding = str(setup.sharding)
    if setup.tensor_parallel > 1:
        _check_tensor_parallel(setup)
    if setup.context_parallel > 1:
        _check_context_parallel(setup)
    _check_offload(setup)
    if sharding == "none" and setup.data_ranks > 1:
        raise InputError(f"sharding: none is of one device, not {setup.data_ranks}; write --sharding ddp or fsdp")
    if sharding == "none":
        return
    if sharding.startswith("zero") != (setup.framework == "hf-trainer+deepspeed"):
        raise InputError(
            f"sharding: a dry run does not execute {sharding} with {setup.framework}; ZeRO is --framework hf-trainer+deepspeed"
        )
    _refuse(setup, {"ddp": _unreplicated, "fsdp": _unsharded}.get(sharding, _unengined)(setup))
    ranks = setup.data_ranks * setup.context_parallel
    shards = setup.shard_size or ranks
    if ranks % shards or shards % setup.context_parallel:
        raise InputError(
            f"shard_size: {shards} does not divide the {ranks} ranks that hold parameters evenly; write --shard-size {ranks}"
        )


def _check_offload(setup: Setup) -> None:
    if setup.offload == "optimizer" and setup.sharding == "fsdp":
        raise InputError("offload: FSDP offloads the parameters too; write --offload optimizer+parameters")
    if setup.offload == "optimizer" and not str(setup.sharding).startswith("zero"):
        raise InputError(
            "offload: a dry run offloads the optimizer with DeepSpeed; write --framework hf-trainer+deepspeed"
        )
    if setup.offload == "optimizer+parameters" and (setup.sharding != "fsdp" or is_cpu(setup.accelerator)):
        raise InputError(
            "offload: a dry run offloads parameters from GPUs with FSDP; write --sharding fsdp, or leave out --dry-run"
        )


def _check_tensor_parallel(setup: Setup) -> None:
    ranks, shape = setup.tensor_parallel, resolve_model(setup.model)
    own_plan = splits_by_own_plan(setup)
    if setup.framework not in _TENSOR_FRAMEWORKS:
        raise InputError(
            f"tensor_parallel: a dry run does not execute it with {setup.framework}; write --framework torchtitan, or leave out --dry-run"
        )
    if not own_plan and (shape.family not in _TENSOR_FAMILIES or shape.experts):
        raise InputError(
            f"tensor_parallel: a dry run splits models like llama, not {shape.name}; write --framework hf-trainer, or leave out --dry-run"
        )
    if not own_plan and setup.method not in ("full", "freeze"):
        raise InputError(
            "method: peft splits adapters by transformers' plan alone; write --framework hf-trainer, or leave out --dry-run"
        )
    wholes = {"query heads": shape.heads, "key heads": shape.kv_heads}
    if not own_plan:
        wholes["tokens of a sequence"] = setup.seq
    for name, whole in wholes.items():
        if whole % ranks:
            raise InputError(
                f"tensor_parallel: {ranks} ranks do not divide {whole} {name}; write a divisor, or leave out --dry-run"
            )
    if own_plan and setup.sharding == "fsdp" and shape.tied_embeddings:
        raise InputError(
            f"sharding: transformers ties {shape.name}'s tables after FSDP has them twice, which no dry run knows; write --framework torchtitan, or leave out --dry-run"
        )
    _refuse(setup, _unplanned(setup) if own_plan else _unsplit(setup), "tensor parallelism")


def _check_context_parallel(setup: Setup) -> None:
    """torch's ring attention: without masks, by the kernels of GPUs that return sums of exponentials."""
    shape, pieces = resolve_model(setup.model), 2 * setup.context_parallel
    if setup.sharding != "fsdp":
        raise InputError(
            f"context_parallel: its ranks share parameters by FSDP2, not {setup.sharding}; write --sharding fsdp"
        )
    if setup.seq % pieces:
        raise InputError(
            f"context_parallel: {setup.seq} tokens are not {pieces} even pieces; write --seq with a multiple"
        )
    if is_cpu(setup.accelerator):
        raise InputError(
            "context_parallel: torch has no ring attention for a CPU; write --gpu with another accelerator"
        )
    if shape.window or shape.family in _MASKED_FAMILIES:
        raise InputError(
            f"context_parallel: {shape.name}'s attention needs a mask, which ring attention has not; write 1, or leave out --dry-run"
        )
    grouped = shape.kv_heads != shape.heads and not shape.latent_attention
    plain = grouped and (setup.precision == "fp32" or setup.attention_kernel == "efficient")
    if plain:
        raise InputError(
            "context_parallel: grouped queries need the flash kernel, which takes half precision; write --precision bf16-mixed"
        )
    unringed = {
        "attention": setup.attention not in ("sdpa", "flash"),
        "attention_kernel": setup.attention_kernel == "math",
        "compile": setup.compile,
        "flat_parameters": setup.flat_parameters,
    }
    _refuse(setup, unringed, "context parallelism")


def _unsplit(setup: Setup) -> dict[str, bool]:
    alone = setup.sharding == "none"
    return _unsharded(setup) | {
        "sharding": setup.sharding not in ("none", "fsdp"),
        "offload": setup.offload is not None,
        "base_quantization": setup.base_quantization is not None,
        # The mask would be made for this rank's part of the sequence.
        "attention": setup.attention not in ("sdpa", "flash"),
        "loss": setup.loss != "standard",
        "compile": setup.compile,
        # torchtitan has mixed precision from FSDP alone.
        "precision": alone and setup.precision.endswith("-mixed"),
        "autocast": setup.autocast is not None,
        "flat_parameters": setup.flat_parameters,
    }


def _unplanned(setup: Setup) -> dict[str, bool]:
    """Of transformers' own plan: it splits no bitsandbytes layers, and peft no DoRA; what FSDP shards besides gets adapters of
    its shards' widths, which fail."""
    return _unsharded(setup) | {
        "sharding": setup.sharding not in ("none", "fsdp"),
        "context_parallel": setup.context_parallel > 1,
        "offload": setup.offload is not None,
        "method": setup.method == "dora" or (setup.sharding == "fsdp" and setup.method == "lora"),
        "base_quantization": setup.base_quantization is not None,
        "loss": setup.loss != "standard",
        "compile": setup.compile,
        "flat_parameters": setup.flat_parameters,
    }


def same_in_depth(setup: Setup) -> bool:
    """Whether what stands between the layers does not depend on how many there are: buckets that hold all gradients."""
    if not str(setup.sharding).startswith("zero"):
        return True
    gathers = setup.sharding == "zero3" and setup.data_ranks > 1
    return not gathers and trainable_parameters(resolve_model(setup.model), setup) <= _BUCKET


def _unreplicated(setup: Setup) -> dict[str, bool]:
    return {
        "optimizer_in_backward": setup.optimizer_in_backward,
        "compile": setup.compile,
        "shard_size": setup.shard_size is not None,
    }


def _unsharded(setup: Setup) -> dict[str, bool]:
    plain = not setup.flat_parameters and not setup.base_quantization
    return {
        # Packed weights are parameters only where they can be stored in the type of the rest.
        "base_quantization": setup.base_quantization == "int8",
        "offload": setup.offload is not None and (setup.offload == "activations" or not plain),
        "optimizer_in_backward": setup.optimizer_in_backward,
        # torch's and transformers' Adafactor fail on sharded parameters, those of bitsandbytes on fake ones.
        "optimizer": str(setup.optimizer).endswith(("8bit", "paged", "adafactor")),
        "loss": setup.loss == "compiled",
        "autocast": setup.autocast is not None and setup.precision.endswith("-mixed"),
    }


def _unengined(setup: Setup) -> dict[str, bool]:
    return {
        "precision": not setup.precision.endswith("-mixed"),
        "base_quantization": setup.base_quantization is not None,
        "offload": setup.offload not in (None, "optimizer"),
        "optimizer_in_backward": setup.optimizer_in_backward,
        "optimizer": setup.optimizer not in ("adamw", "adamw-fused"),
        "loss": setup.loss != "standard",
        "compile": setup.compile,
        "autocast": setup.autocast is not None,
        "shard_size": setup.shard_size is not None,
    }


def _refuse(setup: Setup, wrong: dict[str, bool], where: str | None = None) -> None:
    for name, applies in wrong.items():
        if applies:
            raise InputError(
                f"{name}: a dry run does not execute {getattr(setup, name)} under {where or setup.sharding}; change it, or leave out --dry-run"
            )
