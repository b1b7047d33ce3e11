"""The memory formula against allocator events of real steps, published peaks, and its own promises."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from estimator.measured import MeasuredRun, from_row
from estimator.memory.formula import PART_NAMES, memory_phases, peak_phase
from estimator.model.catalog import model_names, resolve_model
from estimator.setup import LOSSES, OPTIMIZERS, PRECISIONS, Setup

DATA = Path(__file__).parent.parent / "data"
DECODERS = [name for name in model_names() if not name.startswith("bert")]


def peak(setup: Setup) -> int:
    resolved = setup.resolved()
    return peak_phase(memory_phases(resolve_model(resolved.model), resolved)).bytes


def measured_peak(setup: Setup, directory: Path) -> int:
    """The highest sum of live tensor bytes over two real steps on this CPU: the allocator events of torch.profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from estimator.building.model import build_model

    torch.manual_seed(0)
    model: Any = build_model(setup)
    model.train()
    ids = torch.randint(0, model.config.vocab_size, (setup.batch, setup.seq))
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in [*model.parameters(), *model.buffers(), ids]
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    half = {"bf16-mixed": torch.bfloat16}.get(setup.precision, {"bf16": torch.bfloat16}.get(str(setup.autocast)))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(2):
            for _ in range(setup.accumulation):
                with torch.autocast("cpu", dtype=half) if half else contextlib.nullcontext():
                    loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            del loss
    trace = directory / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    live = highest = sum(storages.values())
    for event in sorted(events, key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        highest = max(highest, live)
    return highest


CPU_SETUPS = [
    {"model": "micro", "precision": "fp32"},
    {"model": "micro-llama", "precision": "fp32", "seq": 256, "batch": 1},
    {"model": "micro", "precision": "bf16"},
    {"model": "micro", "precision": "bf16-mixed"},
    {"model": "micro", "precision": "bf16-mixed", "seq": 64, "checkpointing": "full"},
    {"model": "micro", "precision": "fp32", "checkpointing": "full"},
    {"model": "micro", "precision": "fp32", "attention": "eager"},
    {"model": "micro", "precision": "fp32", "method": "lora"},
    {"model": "micro", "precision": "bf16", "method": "lora", "autocast": "bf16"},
    {"model": "micro", "precision": "fp32", "accumulation": 2},
    {"model": "mini", "precision": "fp32", "seq": 32, "batch": 1},
    {"model": "micro", "precision": "fp32", "method": "freeze", "trainable_layers": 2},
]


@pytest.mark.parametrize("values", CPU_SETUPS, ids=lambda v: " ".join(str(x) for x in v.values()))
def test_the_formula_is_within_one_percent_of_a_real_step_on_a_cpu(values: dict[str, Any], tmp_path: Path) -> None:
    setup = Setup(**({"seq": 128, "batch": 2, "accelerator": "cpu"} | values)).resolved()
    assert peak(setup) == pytest.approx(measured_peak(setup, tmp_path), rel=0.01)


def published() -> list[MeasuredRun]:
    with (DATA / "a6000_llama_1b.csv").open(newline="") as file:
        return [from_row(row) for row in csv.DictReader(file)]


@pytest.mark.parametrize("run", published(), ids=lambda run: run.run)
def test_the_formula_is_within_two_percent_of_every_published_peak_with_all_settings_known(run: MeasuredRun) -> None:
    # PyPI vramcalc 0.1.2, benchmarks/results.jsonl: Llama-3.2-1B on an RTX A6000.
    assert peak(run.setup) == pytest.approx(run.peak_allocated_bytes, rel=0.02)


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    method = draw(st.sampled_from(["full", "freeze", "lora", "dora", "qlora"]))
    precision = draw(st.sampled_from(PRECISIONS))
    devices = draw(st.sampled_from([1, 1, 2, 8, 64]))
    adapters = method in ("lora", "dora", "qlora")
    return Setup(
        model=draw(st.sampled_from([*DECODERS, "5e7", "8e9", "400e9"])),
        framework=draw(st.sampled_from(["hf-trainer", "torch-loop", "torchtitan"])),
        accelerator=draw(st.sampled_from([None, "cpu", "RTX-3090", "H100-SXM-80GB"])),
        accelerators=devices,
        method=method,
        trainable_layers=1 if method == "freeze" else None,
        lora_rank=draw(st.sampled_from([8, 64])) if adapters else None,
        lora_targets=draw(st.sampled_from([None, "all-linear"])) if adapters else None,
        precision=precision,
        autocast=draw(st.sampled_from([None, "bf16"])) if precision in ("bf16", "fp16") else None,
        optimizer=draw(st.sampled_from([None, *(name for name in OPTIMIZERS if name != "galore")])),
        zero_grad=draw(st.sampled_from([None, "zero", "none"])),
        sharding=draw(st.sampled_from([None, "ddp", "zero1", "zero2", "zero3", "fsdp"])) if devices > 1 else None,
        offload=draw(st.sampled_from([None, None, "optimizer", "optimizer+parameters"])),
        checkpointing=draw(st.sampled_from(["none", "full", "selective"])),
        attention=draw(st.sampled_from(["sdpa", "eager", "flash"])),
        loss=draw(st.sampled_from(LOSSES)),
        seq=draw(st.integers(1, 16_384)),
        batch=draw(st.integers(1, 16)),
        accumulation=draw(st.sampled_from([1, 4])),
        eval_batch=draw(st.sampled_from([None, 1, 8])),
    ).resolved()


@settings(max_examples=300, deadline=None)
@given(setups(), st.integers(1, 4096), st.integers(1, 8))
def test_more_tokens_or_a_larger_batch_never_lower_a_peak(setup: Setup, tokens: int, sequences: int) -> None:
    assert peak(dataclasses.replace(setup, seq=setup.seq + tokens)) >= peak(setup)
    assert peak(dataclasses.replace(setup, batch=setup.batch + sequences)) >= peak(setup)


@settings(max_examples=300, deadline=None)
@given(setups(), st.integers(3 * 10**6, 10**12), st.floats(1.0001, 3))
def test_more_parameters_never_lower_a_peak(setup: Setup, parameters: int, factor: float) -> None:
    # With all of a shard on the host a device has one gathered unit: a matter of width, not of the count.
    assume(setup.sharding != "fsdp" or not setup.offload)
    smaller = dataclasses.replace(setup, model=str(parameters))
    larger = dataclasses.replace(setup, model=str(int(parameters * factor) + 1))
    assert peak(larger) >= peak(smaller)


@settings(max_examples=100, deadline=None)
@given(setups())
def test_parts_are_whole_positive_bytes_with_known_names(setup: Setup) -> None:
    for phase in memory_phases(resolve_model(setup.model), setup):
        assert [part.name for part in phase.parts] == [
            name for name in PART_NAMES if name in {p.name for p in phase.parts}
        ]
        assert all(part.amount == int(part.amount) > 0 for part in phase.parts)


def test_lora_trains_in_less_memory_than_full_and_checkpointing_saves_activations() -> None:
    full = peak(Setup(model="llama-3.1-8b", seq=4096))
    assert peak(Setup(model="llama-3.1-8b", seq=4096, method="lora")) < full
    assert peak(Setup(model="llama-3.1-8b", seq=4096, checkpointing="full")) < full


def test_sharding_over_more_devices_never_raises_a_peak() -> None:
    peaks = [
        peak(Setup(model="llama-3.1-70b", accelerators=n, sharding="fsdp", checkpointing="full"))
        for n in (2, 8, 64, 512)
    ]
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_quantized_experts_are_divided_over_expert_parallel_ranks(sharding: str) -> None:
    def parameters(ranks: int) -> float:
        setup = Setup(model="mixtral-8x7b", method="qlora", base_quantization="gptq-int4", accelerators=8, sharding=sharding,
                      expert_parallel=ranks, seq=128).resolved()  # fmt: skip
        peak = peak_phase(memory_phases(resolve_model(setup.model), setup))
        return next(part.amount for part in peak.parts if part.name == "parameters")

    one, eight = parameters(1), parameters(8)
    # Half a byte for each of 45.1B experts' parameters, 2 B for embeddings and head.
    assert 0.1 * one < eight < (0.3 if sharding == "none" else 1.0) * one


def test_offloaded_activations_of_a_dense_model_before_transformers_4_46_have_a_time() -> None:
    from estimator.speed.compute import step_work

    setup = Setup(model="nano", offload="activations", logit_copies="shifted").resolved()
    assert step_work(resolve_model("nano"), setup).offload_bytes > 0


def test_an_evaluation_has_the_logits_that_the_dry_run_sees_in_chunks() -> None:
    from estimator.dryrun.run import dry_run

    setup = Setup(model="nano", precision="bf16", loss="chunked", seq=128, eval_batch=16, accelerator="RTX-3090").resolved()  # fmt: skip
    peak = peak_phase(memory_phases(resolve_model("nano"), setup))
    assert peak.phase == "evaluation"
    assert peak.bytes == pytest.approx(dry_run(setup).peak_allocated_bytes, rel=0.02)
