"""What FSDP2 pads: stacked experts that the ranks do not divide, by torch's own chunks, and against the dry run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from estimator.dryrun.run import dry_run
from estimator.memory.formula import memory_phases, peak_phase
from estimator.memory.states import states
from estimator.model.catalog import resolve_model
from estimator.model.shape import count_parameters
from estimator.setup import Setup

MIXTRAL = Setup(
    model="mixtral-8x7b", framework="torchtitan", accelerator="h100", accelerators=64, sharding="fsdp", precision="bf16-mixed",
    checkpointing="full", seq=512,
)  # fmt: skip


@pytest.mark.parametrize("ranks", [4, 8, 12, 64])
def test_the_fullest_rank_holds_a_chunk_of_the_stacked_experts(ranks: int) -> None:
    shape = resolve_model("mixtral-8x7b")
    count = count_parameters(shape)
    first = torch.empty(shape.experts, device="meta").chunk(ranks)[0].numel() / shape.experts
    found = states(shape, dataclasses.replace(MIXTRAL, accelerators=ranks).resolved())
    expected = count.experts * first + (count.total - count.experts) / ranks
    assert found.parameters == pytest.approx(4 * expected)
    assert found.gradients == pytest.approx(4 * expected)
    assert found.optimizer == pytest.approx(8 * expected)


def test_gathered_experts_are_padded_to_a_chunk_for_every_rank(tmp_path: Path) -> None:
    config = {
        "model_type": "mixtral", "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8,
        "intermediate_size": 1024, "vocab_size": 1024, "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    setup = dataclasses.replace(MIXTRAL, model=str(tmp_path / "config.json"), seq=64, accelerators=16)
    formula = peak_phase(memory_phases(resolve_model(setup.model), setup.resolved()))
    assert formula.bytes == pytest.approx(dry_run(setup).peak_allocated_bytes, rel=0.02)


def test_the_end_of_fsdp1s_backward_has_three_roots(tmp_path: Path) -> None:
    # Two processes (gloo, torch 2.13's FullyShardedDataParallel, fp32): a step of this model at 16 tokens peaks 199.2 MB over
    # its shards, as the tables' gradients (65.5 MB) are put together beside the gathered tables.
    config = {
        "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 512, "vocab_size": 32_000, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    setup = Setup(
        model=str(tmp_path / "config.json"), framework="torch-loop", accelerator="h100", accelerators=2, sharding="fsdp",
        flat_parameters=True, precision="fp32", optimizer="sgd", seq=16,
    )  # fmt: skip
    found = dry_run(setup)
    assert found.peak_phase == "backward"
    shards = {phase.phase: phase.peak_allocated_bytes for phase in found.phases}["load"]
    beside = found.peak_allocated_bytes - dict(found.categories_bytes)["workspace"] - shards
    assert beside == pytest.approx(199.2e6, rel=0.03)
