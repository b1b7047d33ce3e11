"""DeepSpeed's engine in closed form, held against what it executes and against its own arithmetic."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from estimator.dryrun.run import dry_run
from estimator.memory.checkpoint import checkpoint_bytes
from estimator.memory.formula import memory_phases, peak_phase
from estimator.memory.states import states
from estimator.model.catalog import resolve_model
from estimator.model.shape import count_parameters
from estimator.setup import Setup

GPU = {"framework": "hf-trainer+deepspeed", "accelerator": "RTX-3090", "precision": "fp16-mixed"}


def peak(setup: Setup) -> int:
    setup = setup.resolved()
    return peak_phase(memory_phases(resolve_model(setup.model), setup)).bytes


def test_a_short_step_on_one_card_has_the_published_constant() -> None:
    # gpjt/fine-tune-2024-04: every run of up to 900 tokens peaks at the same byte, in the step.
    setup = Setup(model="qwen1.5-0.5b", sharding="zero3", seq=256, logit_copies="shifted", **GPU)
    assert peak(setup) == pytest.approx(11_425_284_096, rel=1e-4)


@pytest.mark.parametrize(
    ("sharding", "values"),
    [
        ("zero1", {"accelerators": 4, "accumulation": 2}),
        ("zero2", {"accelerators": 4, "accumulation": 2}),
        ("zero3", {"accelerators": 1}),
        ("zero3", {"accelerators": 4, "checkpointing": "full"}),
        ("zero1", {"accelerators": 2, "offload": "optimizer"}),
    ],
)
def test_the_formula_has_the_dry_runs_peak(sharding: str, values: dict[str, Any]) -> None:
    setup = Setup(model="qwen2.5-0.5b", sharding=sharding, seq=512, **GPU, **values)
    assert peak(setup) == pytest.approx(dry_run(setup).peak_allocated_bytes, rel=0.02)


def test_the_rotary_tables_of_old_releases_stay_in_every_layer() -> None:
    new = Setup(model="qwen1.5-0.5b", sharding="zero3", seq=256, **GPU)
    old = dataclasses.replace(new, logit_copies="shifted")
    shape = resolve_model(new.model)
    assert peak(old) - peak(new) == shape.layers * 2 * 32768 * shape.head_dim * 2


def test_what_is_gathered_has_a_limit() -> None:
    # Beyond stage3_max_live_parameters, more layers are not more gathered parameters.
    small, large = (
        Setup(model=m, sharding="zero3", accelerators=64, seq=64, checkpointing="full", **GPU)
        for m in ("llama-3.1-8b", "llama-3.1-70b")
    )
    share = [16 * count_parameters(resolve_model(s.model)).total / 64 for s in (small, large)]
    assert peak(large) - peak(small) < 2 * (share[1] - share[0])


@pytest.mark.parametrize(("optimizer", "width"), [("adamw", 12), ("sgd", 4), ("adafactor", 4), ("adamw-8bit", 6.03)])
def test_the_engine_keeps_master_weights_and_the_moments_that_the_optimizer_has(optimizer: str, width: float) -> None:
    for framework, sharding in (("hf-trainer+deepspeed", "zero3"), ("megatron", "zero1")):
        setup = Setup(model="llama-3.1-8b", framework=framework, sharding=sharding, accelerators=8, optimizer=optimizer)
        shape, setup = resolve_model(setup.model), setup.resolved()
        parameters = count_parameters(shape).total
        assert states(shape, setup).optimizer * 8 / parameters == pytest.approx(width, rel=0.005)
        # 2.3 TB for the 176B of BLOOM, by its authors: 14 B a parameter with AdamW.
        assert sum(checkpoint_bytes(shape, setup)) / parameters == pytest.approx(2 + width, rel=0.005)
