"""The step law: what must hold of any law of time, published step times, and that arrays mean what numbers mean."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from importlib import resources
from typing import Any

import numpy as np
import pytest

from estimator.estimate import estimate
from estimator.grid import setup_grid
from estimator.hardware import accelerators, find_accelerator
from estimator.model.catalog import resolve_model
from estimator.run.cost import RunRequest
from estimator.setup import Setup
from estimator.speed.compute import step_work
from estimator.speed.rates import rates
from estimator.speed.step_law import COEFFICIENTS, fitted_law, formula_seconds, levels, multipliers, step_interval

MODELS = ("qwen2.5-0.5b", "llama-3.1-8b", "mixtral-8x7b", "gpt-oss-120b")


def seconds(setup: Setup) -> Any:
    assert setup.accelerator is not None
    resolved = setup.resolved()
    parts = formula_seconds(
        step_work(resolve_model(resolved.model), resolved), resolved, find_accelerator(setup.accelerator)
    )
    assert parts is not None
    return sum(part.amount for part in parts)


@pytest.mark.parametrize("seq", [512, 8192, 262_144])
def test_no_estimate_has_an_mfu_above_one(seq: int) -> None:
    for accelerator in accelerators().values():
        for model in MODELS:
            for precision in ("bf16-mixed", "fp8-mixed", "fp32"):
                setup = Setup(
                    model=model, precision=precision, seq=seq, batch=8, accelerator=accelerator.name
                ).resolved()
                if rates(setup, accelerator) is None:
                    continue
                time = estimate(setup).time
                assert time is not None and time.mfu is not None
                assert 0 < time.mfu.value <= 1


def test_doubling_the_accelerators_never_brings_gpu_hours_below_the_ideal() -> None:
    for model in MODELS:
        for count in (1, 2, 4, 8, 16, 64, 1024):
            setup = Setup(model=model, accelerator="H100-SXM-80GB", accelerators=count, seq=4096)
            found = estimate(setup, request=RunRequest(dataset_tokens=10**12))
            assert found.time is not None and found.run is not None
            peak = find_accelerator("h100").matrix_flops("bf16-mixed")
            assert peak is not None
            ideal = found.time.model_flops_per_step * 10**12 / setup.tokens_per_step / peak / 3600
            assert found.run.gpu_hours.value >= ideal


def test_more_tokens_never_take_less_time() -> None:
    for base in (
        Setup(model="llama-3.1-8b", accelerator="h100", seq=1024),
        Setup(model="gpt-oss-120b", accelerator="gb200", accelerators=64, expert_parallel=64, framework="megatron", seq=1024),
        Setup(model="qwen2.5-0.5b", accelerator="rtx-3090", method="qlora", checkpointing="full", seq=1024),
        Setup(model="llama-3.1-70b", accelerator="h100", accelerators=64, tensor_parallel=4, pipeline_parallel=4,
              framework="megatron", accumulation=16, seq=1024),
    ):  # fmt: skip
        for axis in ("batch", "seq", "accumulation"):
            start = getattr(base, axis)
            grid = setup_grid(base.resolved(), **{axis: start * np.arange(1, 65)})
            assert (np.diff(seconds_of_grid(grid)) > 0).all(), (base.model, axis)


def seconds_of_grid(grid: Any) -> Any:
    parts = formula_seconds(step_work(resolve_model(grid.model), grid), grid, find_accelerator(grid.accelerator))
    assert parts is not None
    return sum(part.amount for part in parts)


@pytest.mark.parametrize("framework", ["hf-trainer", "megatron"])
def test_a_grid_of_setups_takes_the_seconds_that_each_takes_alone(framework: str) -> None:
    base = Setup(
        model="mixtral-8x7b", framework=framework, accelerator="h100", accelerators=64, sharding="fsdp"
    ).resolved()
    axes = {
        "accelerators": np.array([64, 128, 64, 256, 64]), "tensor_parallel": np.array([1, 2, 8, 4, 1]),
        "pipeline_parallel": np.array([1, 1, 4, 2, 8]), "context_parallel": np.array([1, 2, 1, 2, 1]),
        "expert_parallel": np.array([1, 8, 2, 1, 8]), "batch": np.array([1, 2, 3, 4, 5]), "seq": np.array([512, 1024, 2048, 4096, 8192]),
        "accumulation": np.array([1, 4, 8, 16, 2]),
    }  # fmt: skip
    together = seconds_of_grid(setup_grid(base, **axes))
    for index, of_grid in enumerate(together):
        values = {name: int(column[index]) for name, column in axes.items()}
        alone = Setup(model="mixtral-8x7b", framework=framework, accelerator="h100", sharding="fsdp", **values)
        assert of_grid == pytest.approx(seconds(alone), rel=1e-12)


@pytest.mark.parametrize(
    ("model", "count", "batch", "accumulation", "pipeline", "checkpointing", "measured"),
    [
        ("gpt-22b", 8, 4, 1, 1, "selective", 1.10),
        ("gpt-22b", 8, 4, 1, 1, "full", 1.42),
        ("gpt-175b", 64, 1, 64, 8, "selective", 13.75),
        ("mt-nlg-530b", 280, 1, 280, 35, "selective", 37.83),
        ("mt-nlg-530b", 280, 1, 280, 35, "full", 49.05),
    ],
)
def test_the_iteration_times_of_megatrons_table_5(
    model: str, count: int, batch: int, accumulation: int, pipeline: int, checkpointing: str, measured: float
) -> None:
    # Korthikanti et al., arXiv:2205.05198, table 5 (A100 80 GB, tensor parallel 8); the law was fitted to these among others.
    found = seconds(
        Setup(model=model, framework="megatron", accelerator="a100", accelerators=count, tensor_parallel=8, batch=batch,
              pipeline_parallel=pipeline, accumulation=accumulation, seq=2048, precision="fp16-mixed", attention="eager",
              checkpointing=checkpointing)
    )  # fmt: skip
    assert found == pytest.approx(measured, rel=0.15)


def test_what_the_fit_has_not_seen_gets_a_wider_interval() -> None:
    def width(**values: Any) -> float:
        setup = Setup(model="llama-3.1-8b", seq=4096, **values).resolved()
        interval = step_interval(100.0, resolve_model(setup.model), setup, find_accelerator(str(setup.accelerator)))
        assert interval.low < 100.0 < interval.high
        return math.log(interval.high / 100.0)

    known = width(framework="llm-foundry", accelerator="h100")
    assert known < width(framework="axolotl", accelerator="h100")
    assert known < width(framework="llm-foundry", accelerator="rtx-5090")
    assert known < width(framework="llm-foundry", accelerator="h100", precision="fp32")
    assert width(framework="axolotl", accelerator="rtx-5090") >= width(framework="axolotl", accelerator="h100")


def test_unseen_levels_keep_the_general_coefficient() -> None:
    law = fitted_law()
    setup = Setup(model="nano", framework="axolotl", accelerator="mi300x").resolved()
    accelerator = find_accelerator("mi300x")
    of = levels(setup, accelerator, megatron=False)
    assert ("framework", "axolotl") in of["total"] and "axolotl" not in law.effects["total"]["framework"]
    assert multipliers(law, setup, accelerator)["gathered"] == pytest.approx(law.coefficients["gathered"])


def test_the_stored_law_has_every_coefficient_with_its_error_and_where_it_came_from() -> None:
    stored = json.loads((resources.files("estimator.data") / "step_law.json").read_text("utf-8"))
    assert list(stored["coefficients"]) == [coefficient.name for coefficient in COEFFICIENTS]
    for entry in stored["coefficients"].values():
        assert entry["value"] > 0 and 0 <= entry["relative_error"] < 1 and entry["meaning"]
    assert stored["rows"] > 500 and len(stored["sources"]) > 10 and stored["command"] and stored["made"]


def test_trainer_with_tensor_parallelism_is_taken_for_megatron() -> None:
    # transformers' Trainer has no pipeline stages: who states them under its name, or under none, ran Megatron's step.
    law, accelerator = fitted_law(), find_accelerator("a100")
    plain, unnamed, named = (
        multipliers(law, Setup(model="gpt-22b", accelerators=8, sharding="none", **values), accelerator)
        for values in ({}, {"tensor_parallel": 8}, {"tensor_parallel": 8, "framework": "megatron"})
    )
    assert unnamed == named != plain


def test_a_machines_ranks_fetch_what_they_gather_over_the_network_once() -> None:
    setup = Setup(model="llama-3.1-8b", accelerator="h100", accelerators=16, sharding="fsdp").resolved()
    found = rates(setup, find_accelerator("h100"))
    assert found is not None
    # Half of the bytes are on the other machine; eight network ports of 50 GB/s bring them.
    assert found.data == pytest.approx(max(0.5 / (8 * 50e9), 7 / 8 / 450e9))


def drawn_setups(count: int) -> list[Setup]:
    """Random setups (seeded) that leave checkpointing and method to the test, on accelerators with a known rate."""
    draw = random.Random(0)
    found: list[Setup] = []
    while len(found) < count:
        setup = Setup(
            model=draw.choice(["qwen1.5-0.5b", "gemma-2-9b", "llama-3.1-8b", "llama-3.1-405b", "mixtral-8x7b"]),
            framework=draw.choice(["hf-trainer", "hf-trainer+deepspeed", "torchtitan", "torchtune", "litgpt", "llm-foundry",
                                   "megatron", "nemo", "axolotl", "unsloth", "fms-fsdp"]),
            accelerator=draw.choice(list(accelerators())), accelerators=draw.choice([1, 8, 64]),
            precision=draw.choice(["bf16", "bf16-mixed", "fp16-mixed", "fp8-mixed"]),
            optimizer=draw.choice(["adamw", "adamw-8bit", "sgd"]), sharding=draw.choice(["none", "zero2", "fsdp"]),
            attention=draw.choice(["eager", "sdpa", "flash"]), loss=draw.choice(["standard", "chunked", "fused-linear"]),
            checkpointing=draw.choice(["none", "selective", "full"]), compile=draw.random() < 0.2,
            seq=draw.choice([128, 2048, 8192]), batch=draw.choice([1, 4, 16]), accumulation=draw.choice([1, 8]),
        )  # fmt: skip
        if rates(setup.resolved(), find_accelerator(str(setup.accelerator))) is not None:
            found.append(setup)
    return found


DRAWN = drawn_setups(150)


def test_recomputing_more_never_takes_less_time() -> None:
    for setup in DRAWN:
        none, selective, full = (
            seconds(dataclasses.replace(setup, checkpointing=kind)) for kind in ("none", "selective", "full")
        )
        assert none <= selective <= full, setup


def test_training_less_never_takes_longer_and_what_adapters_add_costs() -> None:
    for setup in DRAWN:
        lora = dataclasses.replace(setup, method="lora")
        # Of models of half a billion parameters and more: in narrower ones adapters' traffic outweighs what they save.
        assert seconds(lora) <= seconds(setup), setup
        assert seconds(dataclasses.replace(lora, method="dora")) >= seconds(lora), setup


def test_dequantization_only_costs() -> None:
    for setup in DRAWN:
        lora = dataclasses.replace(setup, method="lora", sharding="none")  # sharded, what is gathered shrinks
        assert seconds(dataclasses.replace(lora, method="qlora", base_quantization="nf4")) >= seconds(lora), setup


def test_no_end_of_an_interval_is_faster_than_the_peak() -> None:
    wide = [
        Setup(model="llama-3.1-405b", framework="megatron-deepspeed", accelerator="a10", accelerators=8, method=method, seq=512,
              batch=16, attention="eager", sharding="none")
        for method in ("full", "lora", "dora")
    ]  # fmt: skip
    for setup in [*DRAWN, *wide]:
        time = estimate(setup).time
        assert time is not None and time.mfu is not None
        assert time.step_seconds.low <= time.step_seconds.value <= time.step_seconds.high
        assert time.mfu.high <= 1 + 1e-9, setup


def test_a_pipeline_that_does_not_interleave_waits_longer() -> None:
    base = Setup(model="gpt-175b", framework="megatron", accelerator="a100", accelerators=64, tensor_parallel=8,
                 pipeline_parallel=8, accumulation=16, seq=2048)  # fmt: skip
    unsaid, interleaved, plain = (
        seconds(dataclasses.replace(base, pipeline_schedule=schedule))
        for schedule in (None, "interleaved-1f1b", "1f1b")
    )
    assert unsaid == interleaved < plain


def test_nine_in_ten_rows_that_a_fit_had_left_out_are_within_their_interval() -> None:
    stored = json.loads((resources.files("estimator.data") / "step_law.json").read_text("utf-8"))
    for split, held in stored["coverage"].items():
        for kind in ("all", "dense", "experts"):
            assert 0.86 <= held[kind][1] <= 0.97, (split, kind)
