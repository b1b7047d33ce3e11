"""The work of a step by the operators that a dry run sees, and that as the work which the step law knows.

FLOPs are taken as counted. Bytes and kernels need an exchange rate: the law's coefficients are fitted to the formula's, which
are those of fused kernels, and operators move two to three times as much. The rate is that of a Llama of the catalog
that is counted in the same setup.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, fields

from estimator.model.catalog import resolve_model
from estimator.model.shape import ModelShape
from estimator.setup import Setup
from estimator.speed.compute import StepWork, step_work

_REFERENCE = "llama-3.2-1b"


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorWork:
    """Of one device and step, the optimizer left out. FLOPs as ``StepWork`` has them; bytes as unfused kernels move them."""

    matmul_flops: float
    """Products of the layers with their weights: forward, backward, recomputation."""
    expert_flops: float
    """Of ``matmul_flops``, those in groups or batches."""
    head_flops: float
    attention_flops: float
    kernel_attention_flops: float
    """Half of it where the kernel is told that it is causal."""
    repeated_flops: float
    """Of the above, what backward computes a second time."""
    operand_bytes: float
    elementwise_bytes: float
    logits_bytes: float
    scores_bytes: float
    launches: float


KINDS = tuple(spec.name for spec in fields(OperatorWork))
_FLOPS = ("matmul_flops", "expert_flops", "attention_flops", "kernel_attention_flops")
_TRAFFIC = ("operand_bytes", "elementwise_bytes", "scores_bytes")


def operator_step_work(shape: ModelShape, setup: Setup) -> StepWork:
    """The work of one step of ``setup`` (resolved), whatever its model computes, from its operators on one device.

    Model parallelism divides it as the formula does. The head, the loss, the optimizer and what goes between devices depend
    on counts of parameters alone: these stay the formula's. Raises InputError as the dry run does, MissingError without torch.
    """
    alone = _on_one_device(setup)
    found, formula = counted_work(alone), step_work(shape, setup)
    # Of no adapters that only this model has, and as many layers trained as it may have.
    layers = alone.trainable_layers and min(alone.trainable_layers, resolve_model(_REFERENCE).layers)
    reference = dataclasses.replace(alone, model=_REFERENCE, lora_targets=None, trainable_layers=layers)
    known, said = counted_work(reference), step_work(resolve_model(_REFERENCE), reference)
    share = setup.accumulation / (setup.tensor_parallel * setup.pipeline_parallel * setup.context_parallel)

    def at_rate(kind: str) -> float:
        counted = getattr(known, kind)
        return float(getattr(found, kind) * getattr(said, kind) / counted) if counted else 0.0

    products = found.matmul_flops + found.head_flops + found.attention_flops - found.repeated_flops
    return dataclasses.replace(
        formula,
        **{kind: getattr(found, kind) * share for kind in _FLOPS},
        **{kind: at_rate(kind) * share for kind in _TRAFFIC},
        launches=at_rate("launches") * setup.accumulation / setup.pipeline_parallel,
        model_flops=products * setup.accumulation * setup.data_ranks,
    )


def _on_one_device(setup: Setup) -> Setup:
    """What decides the operators of a micro-batch, and nothing that does not: quantized weights are made whole by kernels that
    the formula counts, compiled layers are those that the law knows."""
    narrow = setup.precision.startswith(("fp8", "mxfp8", "nvfp4"))
    return Setup(
        model=setup.model,
        method="lora" if setup.method == "qlora" else setup.method,
        lora_rank=setup.lora_rank,
        lora_targets=setup.lora_targets,
        trainable_layers=setup.trainable_layers,
        precision="bf16-mixed" if narrow else setup.precision,
        autocast=setup.autocast,
        attention="sdpa" if setup.attention == "flex" else setup.attention,
        attention_kernel=setup.attention_kernel,
        checkpointing=setup.checkpointing,
        checkpoint_reentrant=setup.checkpoint_reentrant,
        batch=setup.batch,
        seq=setup.seq,
        framework="torch-loop",
        accelerator=setup.accelerator,
    ).resolved()


@functools.lru_cache(maxsize=32)
def counted_work(setup: Setup) -> OperatorWork:
    """The operators of one step of ``setup`` (resolved, of one device). Raises as ``dry_run``."""
    from estimator.dryrun.run import count_operators

    return count_operators(setup)
