"""Random setups over several devices, for ``benchmarks/formula_vs_dry_run.py``: everything that the dry run executes there."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from estimator.errors import InputError
from estimator.model.catalog import resolve_model
from estimator.possible import check_possible
from estimator.setup import Setup

_LLAMA_LIKE = ("llama-3.2-1b", "llama-3.2-3b", "qwen3-4b", "mistral-7b", "llama-3.1-8b", "qwen2.5-0.5b")
_OTHERS = ("gemma-2b", "gpt2-large", "opt-1.3b", "pythia-1b")
_MIXTURES = ("qwen3-30b-a3b", "mixtral-8x7b", "gpt-oss-20b")
_LOSSES = ("standard", "standard", "standard", "chunked", "fused-kernel", "fused-linear", "cut-cross-entropy")
_PRECISIONS = ("bf16-mixed", "bf16-mixed", "bf16", "fp32")


def draw_fsdp(seed: int) -> Iterator[Setup]:
    """Under FSDP, without end; the same for the same seed."""
    chance = random.Random(seed)
    while True:
        settings = _step(chance) | _method(chance) | _variant(chance)
        ranks = max(
            chance.choice((2, 4, 8, 8, 32, 64)), settings.get("shard_size", 1), settings.get("context_parallel", 1)
        )
        settings |= {
            "framework": chance.choice(("hf-trainer", "hf-trainer", "torch-loop", "torchtitan")),
            "accelerators": ranks,
            "sharding": "fsdp",
            "reshard_after_forward": chance.random() < 0.9,
        }
        if (setup := _possible(settings)) is not None:
            yield setup


def draw_parallel(seed: int) -> Iterator[Setup]:
    """Under DDP, ZeRO and tensor parallelism, without end; the same for the same seed."""
    chance = random.Random(seed)
    while True:
        settings = _step(chance) | _method(chance)
        kind = chance.choice(("ddp", "zero1", "zero2", "zero3", "tensor", "tensor with fsdp"))
        ranks = chance.choice((2, 4, 8, 8, 32))
        if kind == "ddp":
            settings |= {"sharding": kind, "framework": chance.choice(("hf-trainer", "torch-loop"))}
        elif kind.startswith("zero"):
            offload = "optimizer" if chance.random() < 0.2 else None
            settings |= {
                "sharding": kind,
                "framework": "hf-trainer+deepspeed",
                "precision": "bf16-mixed",
                "offload": offload,
            }
            settings |= {"loss": "standard", "optimizer": "adamw-fused"}
        else:
            tensor = chance.choice((2, 4))
            settings = _step(chance) | {
                "sharding": "none" if kind == "tensor" else "fsdp",
                "tensor_parallel": tensor,
                "framework": "torchtitan",
                "loss": "standard",
                "attention": "sdpa",
            }
            ranks = tensor if kind == "tensor" else max(ranks, 2 * tensor)
        if (setup := _possible(settings | {"accelerators": ranks})) is not None:
            yield setup


def _step(chance: random.Random) -> dict[str, Any]:
    pool = chance.choice((_LLAMA_LIKE,) * 4 + (_OTHERS, _MIXTURES))
    return {
        "model": chance.choice(pool),
        "accelerator": "H100-SXM-80GB",
        "precision": chance.choice(_PRECISIONS),
        "optimizer": chance.choice(("adamw-fused", "adamw-fused", "adamw", "sgd")),
        "checkpointing": chance.choice(("none", "none", "full", "full", "full", "selective")),
        "attention": chance.choice(("sdpa", "sdpa", "flash", "eager")),
        "loss": chance.choice(_LOSSES),
        "seq": chance.choice((512, 1024, 2048, 4096)),
        "batch": chance.choice((1, 1, 2)),
        "accumulation": chance.choice((1, 1, 2)),
    }


def _method(chance: random.Random) -> dict[str, Any]:
    method = chance.choice(("full", "full", "full", "lora", "dora", "qlora", "freeze"))
    if method == "freeze":
        return {"method": method, "trainable_layers": chance.randint(1, 16)}
    if method == "full":
        return {"method": method}
    adapters = {"method": method, "lora_rank": chance.choice((8, 16, 64))}
    adapters["lora_targets"] = chance.choice((None, "all-linear", "q_proj v_proj"))
    if method == "qlora":
        adapters["base_quantization"] = chance.choice(("nf4", "nf4-dq"))
    return adapters


def _variant(chance: random.Random) -> dict[str, Any]:
    """One of FSDP's own, or none."""
    kind = chance.choice(("plain", "plain", "plain", "hybrid", "context", "flat", "offload", "compiled"))
    if kind == "hybrid":
        return {"shard_size": chance.choice((2, 4))}
    if kind == "context":
        return {"context_parallel": chance.choice((2, 4)), "attention": "sdpa"}
    if kind == "flat":
        return {"flat_parameters": True, "checkpoint_reentrant": chance.random() < 0.5}
    if kind == "offload":
        return {"offload": chance.choice(("optimizer+parameters", "optimizer+parameters", "activations"))}
    if kind == "compiled":
        return {"compile": True, "loss": "standard"}
    return {}


def _possible(settings: dict[str, Any]) -> Setup | None:
    """The setup, if a dry run executes it."""
    from estimator.dryrun.run import check_dry_runnable

    if settings["model"] in _OTHERS and settings.get("lora_targets") not in (None, "all-linear"):
        return None
    try:
        setup = Setup(**settings)
        check_possible(resolve_model(setup.model), setup.resolved())
        check_dry_runnable(setup.resolved())
    except InputError:
        return None
    return setup
