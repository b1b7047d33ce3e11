"""A grid of setups has the answers of its setups one by one."""

from __future__ import annotations

import dataclasses
import itertools

import numpy
import pytest

from estimator.estimate import estimate
from estimator.grid import grid_device_bytes, setup_grid
from estimator.memory.formula import memory_phases, peak_bytes, peak_phase
from estimator.model.catalog import resolve_model
from estimator.possible import possible
from estimator.setup import Setup

BASES = {
    "plain": {"model": "qwen2.5-0.5b"},
    "fsdp": {"model": "llama-3.1-8b", "sharding": "fsdp"},
    "lora, fsdp, checkpointing": {"model": "llama-3.1-8b", "method": "lora", "sharding": "fsdp", "checkpointing": "full"},
    "qlora": {"model": "llama-3.1-8b", "method": "qlora", "precision": "bf16", "optimizer": "adamw-8bit-paged"},
    "zero2": {"model": "mixtral-8x7b", "sharding": "zero2", "checkpointing": "selective"},
    "zero3": {"model": "qwen1.5-0.5b", "sharding": "zero3", "precision": "fp16-mixed"},
    "ddp, gpipe": {"model": "gpt2-xl", "sharding": "ddp", "pipeline_schedule": "gpipe", "attention": "eager"},
    "the plain loop": {"model": "qwen3-0.6b", "framework": "torch-loop", "precision": "bf16", "eval_batch": 4},
    "freeze, fused-linear": {"model": "qwen3-4b", "method": "freeze", "trainable_layers": 3, "loss": "fused-linear"},
    "hybrid, offload": {"model": "qwen3-30b-a3b", "sharding": "fsdp", "shard_size": 2, "offload": "optimizer"},
}  # fmt: skip
# (accelerators, tensor, pipeline, context, batch, seq, accumulation)
POINTS = [
    (data * tensor * pipeline * context, tensor, pipeline, context, batch, seq, accumulation)
    for data, tensor, pipeline, context, batch, seq, accumulation in itertools.product(
        (1, 4), (1, 2), (1, 4), (1, 2), (1, 3), (512, 4096), (1, 8)
    )
]
NAMES = (
    "accelerators", "tensor_parallel", "pipeline_parallel", "context_parallel", "batch", "seq", "accumulation",
)  # fmt: skip


@pytest.mark.parametrize("name", BASES)
def test_a_grid_has_the_peaks_of_its_setups(name: str) -> None:
    base = Setup(accelerator="H100-SXM-80GB", **{"sharding": "none", **BASES[name]}).resolved()
    shape = resolve_model(base.model)
    grid = setup_grid(
        base, **{name: numpy.array(column) for name, column in zip(NAMES, zip(*POINTS, strict=True), strict=True)}
    )
    peaks, devices = peak_bytes(shape, grid), grid_device_bytes(shape, grid)
    assert peaks.shape == (len(POINTS),)
    for index, point in enumerate(POINTS):
        one = dataclasses.replace(base, data_parallel=None, **dict(zip(NAMES, point, strict=True))).resolved()
        assert peaks[index] == peak_phase(memory_phases(shape, one)).bytes == peak_bytes(shape, one)
        if index % 16 == 0 and possible(shape, one):
            assert devices[index] == estimate(one).memory.peak_device_bytes.value


def test_axes_broadcast() -> None:
    base = Setup(model="qwen2.5-0.5b", accelerator="RTX-3090").resolved()
    shape = resolve_model(base.model)
    grid = setup_grid(base, batch=numpy.arange(1, 5)[:, None], seq=numpy.array([256, 512, 1024])[None, :])
    assert peak_bytes(shape, grid).shape == (4, 3)


def test_only_numbers_vary() -> None:
    with pytest.raises(AssertionError, match="precision"):
        setup_grid(Setup(model="gpt2-xl").resolved(), precision=["bf16", "fp32"])
