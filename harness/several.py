"""Which setups are trained here, on one device or several."""

from __future__ import annotations

import dataclasses

from estimator.building.model import check_buildable
from estimator.errors import InputError
from estimator.setup import Setup

_FRAMEWORKS = ("hf-trainer", "torch-loop")
_MODEL_PARALLEL = ("pipeline_parallel", "context_parallel", "expert_parallel")


def check_trainable(setup: Setup) -> None:
    """Raises InputError for what no step here executes, whatever the machine has; ``setup`` resolved."""
    if setup.framework not in _FRAMEWORKS:
        raise InputError(
            f"framework: {setup.framework} can be estimated but not run here; write --framework hf-trainer or torch-loop"
        )
    if setup.accelerators > 1:
        _check_several(setup)
    check_buildable(lone(setup) if setup.accelerators > 1 else setup)


def _check_several(setup: Setup) -> None:
    for name in _MODEL_PARALLEL:
        if getattr(setup, name) > 1:
            raise InputError(f"{name}: {getattr(setup, name)} can be estimated but not run here; write 1")
    sharded = setup.sharding == "fsdp"
    if setup.sharding not in ("ddp", "fsdp") and (setup.sharding, setup.data_ranks) != ("none", 1):
        raise InputError(f"sharding: {setup.sharding} can be estimated but not run here; write --sharding ddp or fsdp")
    if setup.tensor_parallel > 1:
        _check_tensor_parallel(setup)
    unrun = {
        "base_quantization": sharded and setup.base_quantization is not None,
        "optimizer": sharded and setup.optimizer not in ("adamw", "adamw-fused", "sgd"),
        "compile": setup.compile,
        "loss": sharded and setup.loss == "compiled",
        "flat_parameters": setup.flat_parameters,
        "autocast": sharded and setup.autocast is not None,
    }
    for name, wrong in unrun.items():
        if wrong:
            raise InputError(
                f"{name}: {getattr(setup, name)} can be estimated but not run on several devices with --sharding "
                f"{setup.sharding}; change it, or write --sharding ddp"
            )
    shards = setup.shard_size or setup.data_ranks
    if setup.data_ranks % shards or (shards != setup.data_ranks and not sharded):
        raise InputError(
            f"shard_size: {shards} does not divide {setup.data_ranks} ranks of FSDP; write --shard-size {setup.data_ranks}"
        )


def _check_tensor_parallel(setup: Setup) -> None:
    if setup.framework != "torch-loop":
        raise InputError("tensor_parallel: can be estimated but not run with Trainer; write --framework torch-loop")
    if setup.sharding == "ddp":
        raise InputError("tensor_parallel: is not run with DDP around it; write --sharding fsdp")
    from estimator.dryrun.parallel import check_parallel

    try:
        check_parallel(setup)
    except InputError as error:  # the reason holds here too, the advice is for a dry run
        reason = str(error).partition(";")[0].replace("a dry run", "training here")
        raise InputError(f"{reason}; change it, or write --tensor-parallel 1") from None


def lone(setup: Setup) -> Setup:
    """The same on one device."""
    return dataclasses.replace(
        setup, accelerators=1, data_parallel=1, tensor_parallel=1, sharding="none", shard_size=None
    )
