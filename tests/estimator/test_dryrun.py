"""The dry run: published peaks to the byte, real steps on this CPU, the same result at any depth that is run."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from estimator.dryrun.run import dry_run
from estimator.errors import InputError
from estimator.estimate import estimate
from estimator.measured import MeasuredRun, from_row
from estimator.memory.formula import PART_NAMES
from estimator.run.cost import RunRequest
from estimator.setup import Setup

sys.path.insert(0, str(Path(__file__).parent))
from cpu_truth import measured_peaks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def published() -> list[MeasuredRun]:
    with (Path(__file__).parent.parent / "data" / "a6000_llama_1b.csv").open(newline="") as file:
        return [from_row(row) for row in csv.DictReader(file)]


@pytest.mark.parametrize("run", published(), ids=lambda run: run.run)
def test_a_published_peak_with_every_setting_known_is_hit_within_one_block(run: MeasuredRun) -> None:
    # PyPI vramcalc 0.1.2, benchmarks/results.jsonl: Llama-3.2-1B on an RTX A6000, torch.cuda.max_memory_allocated.
    assert run.peak_allocated_bytes is not None
    assert abs(dry_run(run.setup).peak_allocated_bytes - run.peak_allocated_bytes) <= 512


CPU_SETUPS: list[dict[str, Any]] = [
    {},
    {"model": "nano-llama", "seq": 128},
    {"model": "micro", "batch": 1},
    {"model": "micro", "batch": 1, "precision": "bf16-mixed"},
    {"precision": "bf16"},
    {"precision": "bf16-mixed"},
    {"precision": "bf16-mixed", "checkpointing": "full"},
    {"checkpointing": "full"},
    {"attention": "eager"},
    {"precision": "bf16", "attention": "eager"},
    {"method": "lora"},
    {"method": "lora", "precision": "bf16"},
    {"method": "lora", "precision": "bf16", "autocast": "bf16"},
    {"model": "nano-llama", "method": "lora", "lora_targets": "all-linear", "checkpointing": "full"},
    {"accumulation": 2},
    {"framework": "torch-loop"},
    {"framework": "torch-loop", "precision": "bf16-mixed", "zero_grad": "zero"},
    {"optimizer": "adamw"},
    {"optimizer": "sgd"},
    {"optimizer": "adafactor"},
    {"optimizer": "adafactor", "framework": "torch-loop"},
    {"method": "freeze", "trainable_layers": 2},
    {"model": "micro-llama", "precision": "bf16", "checkpointing": "full"},
    {"method": "dora"},
]


@pytest.mark.parametrize("values", CPU_SETUPS, ids=str)
def test_a_real_step_on_this_cpu_peaks_where_the_dry_run_says(values: dict[str, Any]) -> None:
    # What is left, at most 0.2%, are buffers inside kernels (attention's backward, reductions).
    setup = Setup(
        **({"model": "nano", "precision": "fp32", "seq": 64, "batch": 2, "accelerator": "cpu"} | values)
    ).resolved()
    highest = max(measured_peaks(setup).phases, key=lambda phase: phase.allocated_bytes)
    found = dry_run(setup)
    assert found.peak_allocated_bytes == pytest.approx(highest.allocated_bytes, rel=0.002)
    assert found.peak_phase == highest.phase


@pytest.mark.parametrize(
    "values",
    [
        {"model": "base", "precision": "bf16"},
        {"model": "base-llama", "precision": "bf16-mixed", "checkpointing": "full", "accelerator": "RTX-3090"},
        {"model": "small", "precision": "fp32", "method": "lora", "accelerator": "H100-SXM-80GB"},
        {"model": "gpt2-124m", "precision": "fp32", "accelerator": "RTX-3090", "seq": 512},
        {"model": "smollm2-135m", "precision": "bf16", "framework": "torch-loop", "accelerator": "RTX-A6000"},
        {"model": "mixtral-8x7b", "accelerator": "H100-SXM-80GB", "checkpointing": "full"},
        {"model": "deepseek-v3-16b-titan-flavor", "accelerator": "H100-SXM-80GB"},  # its first layer is dense
        {"model": "llama-3.2-1b", "method": "freeze", "trainable_layers": 4},
        {"model": "llama-3.2-1b", "method": "freeze", "trainable_layers": 13, "checkpointing": "full"},
    ],
    ids=str,
)
def test_a_few_layers_written_out_are_the_full_model_to_the_byte(values: dict[str, Any]) -> None:
    setup = Setup(**({"seq": 256, "batch": 2} | values))
    few, all_layers = dry_run(setup), dry_run(setup, every_layer=True)
    assert few.layers_run < all_layers.layers_run
    assert few.peak_allocated_bytes == all_layers.peak_allocated_bytes
    assert few.peak_reserved_bytes == all_layers.peak_reserved_bytes
    assert few.categories_bytes == all_layers.categories_bytes
    assert few.phases == all_layers.phases


def test_categories_are_the_formulas_parts_and_sum_to_the_peak() -> None:
    found = dry_run(Setup(model="small", accelerator="RTX-3090", seq=256))
    assert {name for name, _ in found.categories_bytes} <= set(PART_NAMES)
    assert sum(amount for _, amount in found.categories_bytes) == found.peak_allocated_bytes
    assert found.peak_reserved_bytes >= found.peak_allocated_bytes
    assert found.holders and all(holder.bytes > 0 for holder in found.holders)


def test_a_device_that_is_too_small_is_said_to_be() -> None:
    setup = Setup(model="small", accelerator="RTX-3090", seq=256)
    needed = dry_run(setup).peak_reserved_bytes
    assert dry_run(setup, capacity_bytes=needed // 2).out_of_memory is not None
    assert dry_run(setup, capacity_bytes=2 * needed).out_of_memory is None


@pytest.mark.parametrize(("batch", "seq", "fits"), [(7, 512, True), (8, 512, False), (1, 2048, True), (2, 2048, False)])
def test_what_the_story_saw_on_its_card_is_what_the_dry_run_says(batch: int, seq: int, fits: bool) -> None:
    # Qwen1.5-0.5B in full, Trainer, fp16-mixed, AdamW, on an RTX 3090 with 2 GiB taken by the desktop: batch 7 at 512
    # tokens and not 8, batch 1 at 2,048 and not 2. The tensors of batch 8 would fit; the allocator's fragments do not.
    setup = Setup(
        model="qwen1.5-0.5b", precision="fp16-mixed", optimizer="adamw", batch=batch, seq=seq, accelerator="RTX-3090"
    )
    assert estimate(setup, request=RunRequest(reserve_bytes=2 * 2**30), dry_run=True).fits.fits is fits


def test_the_estimate_takes_its_memory_from_the_dry_run_when_asked() -> None:
    setup = Setup(model="small", accelerator="RTX-3090", seq=256)
    result = estimate(setup, dry_run=True)
    assert result.memory.method == "dry-run"
    assert result.memory.peak_allocated_bytes.value == dry_run(setup).peak_allocated_bytes
    assert sum(part.amount for part in result.memory.parts) == result.memory.peak_allocated_bytes.value


@pytest.mark.parametrize(
    "values",
    [
        {"method": "qlora", "base_quantization": "int8", "accelerator": "cpu"},
        {"optimizer": "adamw-8bit", "accelerator": "cpu"},
        {"loss": "cut-cross-entropy", "precision": "fp32"},
        {"offload": "optimizer"},
        {"framework": "megatron"},
        {"model": "8e9"},
        {"model": "grok-1-314b"},
    ],
    ids=str,
)
def test_what_no_dry_run_executes_is_one_line(values: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        dry_run(Setup(**({"model": "nano"} | values)))
    assert "\n" not in str(caught.value)


def test_an_estimate_without_a_dry_run_imports_nothing_of_it() -> None:
    code = "import sys, estimator.estimate as e, estimator.setup as s; e.estimate(s.Setup(model='nano')); print([m for m in sys.modules if 'dryrun' in m or m == 'torch'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
