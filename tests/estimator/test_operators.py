"""The work of a step counted by its operators: against the formula where the shape is known, and where it is not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from estimator.dryrun.work import operator_step_work
from estimator.estimate import estimate
from estimator.hardware import find_accelerator
from estimator.model.catalog import resolve_model
from estimator.setup import Setup
from estimator.speed.compute import StepWork, step_work
from estimator.speed.step_law import formula_seconds

FLOPS = ("matmul_flops", "expert_flops", "attention_flops", "kernel_attention_flops", "model_flops")


def both(**values: Any) -> tuple[StepWork, StepWork, Setup]:
    """By operators and by the formula."""
    given = {"precision": "bf16", "seq": 256, "batch": 2, "accelerator": "a100"} | values
    setup = Setup(**given).resolved()
    shape = resolve_model(setup.model)
    return operator_step_work(shape, setup), step_work(shape, setup), setup


@pytest.mark.parametrize(
    "values",
    [
        {"model": "qwen2.5-0.5b"},
        {"model": "gpt2-medium"},
        {"model": "qwen3-30b-a3b"},
        {"model": "qwen3-30b-a3b", "precision": "bf16-mixed"},
        {"model": "deepseek-v3-16b-titan-flavor"},
        {"model": "nano-llama", "checkpointing": "full"},
        {"model": "nano-llama", "attention": "eager"},
        {"model": "micro-llama", "method": "freeze", "trainable_layers": 2},
        {"model": "micro-llama", "method": "freeze", "trainable_layers": 2, "checkpointing": "full"},
        {"model": "qwen2.5-0.5b", "method": "qlora", "checkpointing": "full"},
        {"model": "nano-llama", "attention": "flex", "compile": True, "loss": "fused-linear"},
    ],
    ids=lambda values: " ".join(str(value) for value in values.values()),
)
def test_flops_of_known_shapes_are_those_of_the_formula(values: dict[str, Any]) -> None:
    """Grouped queries, learned positions, experts, latent attention; the few percent are adapters' and trained layers' first,
    whose inputs need no gradient."""
    counted, said, _ = both(**values)
    tolerance = 0.01 if values.get("method") is None else 0.02
    # With checkpointing transformers has backward pass through frozen layers too, which MFU does not count.
    wasted = values.get("method") == "freeze" and "checkpointing" in values
    for kind in FLOPS[:-1] if wasted else FLOPS:
        assert getattr(counted, kind) == pytest.approx(getattr(said, kind), rel=tolerance), kind


@pytest.mark.parametrize("model", ["qwen2.5-1.5b", "llama-3.1-8b", "gemma-2b", "powerlm-3b"])
def test_a_llamalike_takes_as_long_by_either_count(model: str) -> None:
    counted, said, setup = both(model=model, seq=1024)
    device = find_accelerator("a100")
    seconds = []
    for work in (counted, said):
        parts = formula_seconds(work, setup, device)
        assert parts is not None
        seconds.append(sum(part.amount for part in parts))
    assert seconds[0] == pytest.approx(seconds[1], rel=0.06)


def test_model_parallelism_and_micro_batches_divide_it_as_they_divide_the_formula() -> None:
    alone, *_ = both(model="qwen2.5-0.5b")
    split, said, _ = both(
        model="qwen2.5-0.5b", accelerators=8, tensor_parallel=2, pipeline_parallel=2, accumulation=3, framework="torchtitan"
    )  # fmt: skip
    for kind in FLOPS[:-1]:
        assert getattr(split, kind) == pytest.approx(getattr(alone, kind) * 3 / 4)
    assert split.model_flops == pytest.approx(said.model_flops, rel=0.01)


SIZES = {
    "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 704,
    "vocab_size": 4096, "tie_word_embeddings": False,
}  # fmt: skip


def _config(path: Path, kind: str, **further: Any) -> str:
    file = path / f"{kind}.json"
    file.write_text(json.dumps({"model_type": kind, **SIZES, **further}))
    return str(file)


@pytest.mark.parametrize(
    ("kind", "further", "products"),
    [
        ("exaone4", {}, 1.0),  # Llama's matrices, other norms
        (
            "ernie4_5_moe",
            {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 64},
            None,
        ),  # experts under other keys
    ],
)
def test_a_type_that_no_family_describes_has_its_time_from_its_own_code(
    kind: str, further: dict[str, Any], products: float | None, tmp_path: Path
) -> None:
    setup = Setup(model=_config(tmp_path, kind, **further), precision="bf16", seq=256, accelerator="h100")
    found = estimate(setup, dry_run=True)
    assert found.time is not None and found.memory.method == "dry-run"
    assert found.model.parameters == _parameters(setup.model)
    assert any("no known family" in note for note in found.notes)
    llama = estimate(dataclasses.replace(setup, model=_config(tmp_path, "llama")))
    assert llama.time is not None
    if products is not None:
        assert found.time.model_flops_per_step == pytest.approx(products * llama.time.model_flops_per_step, rel=0.01)
    else:
        assert found.time.model_flops_per_step != pytest.approx(llama.time.model_flops_per_step, rel=0.05)
    assert any("no published run told the law of this model" in note for note in found.notes)


def _parameters(config: str) -> int:
    """By transformers itself, on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config))
    return sum(parameter.numel() for parameter in model.parameters())


def test_without_a_dry_run_the_guess_says_that_it_is_one(tmp_path: Path) -> None:
    found = estimate(Setup(model=_config(tmp_path, "exaone4"), accelerator="h100"))
    assert any("--dry-run runs its own code" in note for note in found.notes)
