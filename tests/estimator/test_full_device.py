"""What fits where the segments alone would not: published runs that ended, and such as ran out of memory."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.estimate import estimate
from estimator.measured import from_row

FMS = {
    "framework": "hf-trainer", "accelerator": "A100-SXM-80GB", "precision": "bf16", "autocast": "bf16", "optimizer": "adamw",
    "checkpointing": "full", "attention": "flash", "seq": 4096, "transformers": "4.45.2",
}  # fmt: skip
LORA = {"method": "lora", "lora_rank": 16, "lora_targets": "q_proj k_proj v_proj o_proj"}
TITAN = {
    "framework": "torchtitan", "precision": "bf16-mixed", "sharding": "fsdp", "loss": "standard", "attention": "sdpa",
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "ended"),
    [
        # foundation-model-stack/fms-acceleration, scripts/benchmarks/refs
        (FMS | {"model": "mistral-7b", "method": "full", "loss": "fused-kernel", "batch": 16}, False),
        (FMS | {"model": "mistral-7b", "method": "full", "loss": "standard", "batch": 8}, True),
        (FMS | LORA | {"model": "llama-2-70b", "sharding": "fsdp", "accelerators": 2, "batch": 2}, False),
        # Lightning-AI/litgpt, tutorials/resource-tables.md
        (
            {"model": "llama-2-13b", "framework": "litgpt", "accelerator": "A100-SXM-40GB", "accelerators": 2, "seq": 1304}
            | {"method": "lora", "lora_rank": 8, "lora_targets": "q_proj v_proj", "sharding": "fsdp", "accumulation": 64}
            | {"precision": "bf16", "checkpointing": "full", "loss": "chunked"},
            False,
        ),
        # pytorch/torchtitan, docs/performance.md and benchmarks/
        (
            TITAN | {"model": "llama-2-13b", "accelerator": "A100-SXM-80GB", "accelerators": 64, "batch": 2, "seq": 4096}
            | {"checkpointing": "none"},
            True,
        ),
        (
            TITAN | {"model": "qwen3-32b", "accelerator": "H100-96GB", "accelerators": 64, "tensor_parallel": 8}
            | {"batch": 64, "seq": 4096, "checkpointing": "full"},
            False,
        ),
    ],
)  # fmt: skip
def test_published_runs_at_the_edge(settings: dict[str, Any], ended: bool) -> None:
    assert estimate(from_row({"run": "r"} | settings).setup).fits.fits is ended


def test_segments_that_grow_leave_less_unused() -> None:
    plain = {
        "run": "r",
        "model": "mistral-7b",
        "accelerator": "A100-SXM-80GB",
        "precision": "bf16",
        "batch": 16,
        "seq": 4096,
    }
    both = [
        estimate(from_row(plain | {"checkpointing": "full", "expandable_segments": grows}).setup)
        for grows in (False, True)
    ]
    rest = [found.memory.peak_reserved_bytes.value - found.memory.peak_allocated_bytes.value for found in both]
    assert rest[1] < rest[0]


@pytest.mark.parametrize(
    ("row", "name", "value"),
    [
        ({"framework": "torchtitan", "compile": "True"}, "loss", "compiled"),
        ({"framework": "torchtitan", "compile": "True", "notes": "graph_trainer aot"}, "loss", "standard"),
        ({"framework": "torchtitan", "compile": "True", "loss": "chunked"}, "loss", "chunked"),
        ({"accelerators": 8, "notes": "framework_config=moe-scattermoe-granite-ep8-foak;"}, "expert_parallel", 8),
        ({"notes": "ep8 of another kind"}, "expert_parallel", 1),
    ],
)
def test_what_tables_leave_out(row: dict[str, Any], name: str, value: Any) -> None:
    assert getattr(from_row({"run": "r", "model": "mixtral-8x7b"} | row).setup, name) == value


MEGATRON = {"framework": "megatron", "precision": "mxfp8-mixed", "expert_parallel": 1, "accumulation": 16}


@pytest.mark.parametrize(
    "settings",
    [
        # NVIDIA-NeMo/Megatron-Bridge, docs/performance-summary-archive.md: all ended
        {"model": "llama-3-70b", "accelerator": "GB300", "accelerators": 64, "pipeline_parallel": 4, "seq": 8192},
        {"model": "llama-3.1-405b", "accelerator": "GB300", "accelerators": 256, "tensor_parallel": 2}
        | {"pipeline_parallel": 8, "context_parallel": 2, "seq": 8192},
        {"model": "qwen3-30b-a3b", "accelerator": "GB300", "accelerators": 8, "expert_parallel": 8, "batch": 8, "seq": 4096},
    ],
)  # fmt: skip
def test_megatrons_published_layouts_fit(settings: dict[str, Any]) -> None:
    by_default, ddp = (
        estimate(from_row({"run": "r"} | MEGATRON | settings | sharding).setup)
        for sharding in ({}, {"sharding": "ddp"})
    )
    assert by_default.fits.fits and ddp.fits.fits
    # Its distributed optimizer, whatever the table calls it.
    allocated = ddp.memory.peak_allocated_bytes.value
    assert by_default.memory.peak_allocated_bytes.value == pytest.approx(allocated, rel=1e-4)


@pytest.mark.parametrize("stages", [2, 16])
@pytest.mark.parametrize("loss", ["standard", "fused-linear"])
def test_logits_and_a_pipelines_micro_batches_are_on_different_stages(stages: int, loss: str) -> None:
    """1F1B's first stage holds as many micro-batches as there are stages, so of all layers as much as one device would; the
    last one holds a single one beside the logits."""
    row = {"run": "r", "model": "llama-3-8b", "accelerator": "B200", "seq": 8192, "batch": 4, "loss": loss}

    def held(count: int) -> tuple[float, float]:
        setup = from_row(MEGATRON | row | {"accelerators": 16 * count, "pipeline_parallel": count}).setup
        parts = {part.name: part.amount for part in estimate(setup).memory.parts}
        return parts["activations"], parts.get("logits", 0)

    activations, logits = held(1)
    assert sum(held(stages)) == pytest.approx(max(activations, activations / stages + logits), rel=0.03)
