"""Checkpoint bytes against files that the installed libraries write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from estimator.memory.checkpoint import checkpoint_bytes, checkpoint_estimate
from estimator.model.catalog import resolve_model
from estimator.setup import Setup


def written(setup: Setup, directory: Path) -> tuple[int, int]:
    """(model, optimizer) bytes that ``save_pretrained`` and ``torch.save`` write after one real step."""
    import torch

    from estimator.building.model import build_model

    model: Any = build_model(setup)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained) if setup.optimizer == "sgd" else torch.optim.AdamW(trained, fused=True)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    model.save_pretrained(directory)
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    return sum(f.stat().st_size for f in directory.glob("*.safetensors")), (directory / "optimizer.pt").stat().st_size


@pytest.mark.parametrize(
    "values",
    [
        {"model": "nano", "precision": "fp32"},
        {"model": "micro-llama", "precision": "fp32"},
        {"model": "mini", "precision": "bf16"},
        {"model": "nano", "precision": "fp32", "method": "lora"},
        {"model": "nano", "precision": "fp32", "method": "dora", "lora_rank": 4},
        {"model": "micro", "precision": "bf16", "method": "lora", "lora_targets": "all-linear"},
        {"model": "micro", "precision": "fp32", "method": "freeze", "trainable_layers": 1},
    ],
    ids=lambda v: " ".join(str(x) for x in v.values()),
)
def test_a_checkpoint_is_predicted_within_half_a_percent_of_what_is_written(
    values: dict[str, Any], tmp_path: Path
) -> None:
    setup = Setup(**values).resolved()
    model, optimizer = written(setup, tmp_path)
    predicted_model, predicted_optimizer = checkpoint_bytes(resolve_model(setup.model), setup)
    assert predicted_model == pytest.approx(model, rel=0.005)
    assert predicted_optimizer == pytest.approx(optimizer, rel=0.005)


def test_the_optimizer_of_sgd_takes_next_to_nothing(tmp_path: Path) -> None:
    setup = Setup(model="nano", precision="fp32", optimizer="sgd").resolved()
    _, optimizer = written(setup, tmp_path)
    assert abs(checkpoint_bytes(resolve_model("nano"), setup)[1] - optimizer) < 2_000


@pytest.mark.parametrize(("model", "written"), [("micro-llama", 22_826_571)])
def test_8_bit_moments_leave_embeddings_wide(model: str, written: int) -> None:
    # As measured with bitsandbytes 0.50.2 and transformers 5.23: benchmarks/results/cpu-2026-11-24, run p5cf5c0a74dde.
    setup = Setup(model=model, precision="bf16-mixed", optimizer="adamw-8bit").resolved()
    assert checkpoint_bytes(resolve_model(model), setup)[1] == pytest.approx(written, rel=0.005)


def test_the_storys_checkpoint_is_5_57_gigabytes() -> None:
    # Qwen1.5-0.5B, fp32, AdamW: 463,987,712 parameters x 4 B x 3 = 5.57 GB, the tied head written once.
    setup = Setup(model="qwen1.5-0.5b", precision="fp32").resolved()
    estimate = checkpoint_estimate(resolve_model(setup.model), setup)
    assert estimate.bytes / 1e9 == pytest.approx(5.57, abs=0.005)
    assert estimate.model_bytes / 1e9 == pytest.approx(1.86, abs=0.005)
    assert estimate.optimizer_bytes / 1e9 == pytest.approx(3.71, abs=0.005)


def test_keeping_more_checkpoints_takes_that_much_more_disk() -> None:
    setup = Setup(model="nano").resolved()
    two, five = (checkpoint_estimate(resolve_model("nano"), setup, kept=kept) for kept in (2, 5))
    assert five.run_disk_bytes - two.run_disk_bytes == 3 * two.bytes
