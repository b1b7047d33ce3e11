"""The dry run of context parallelism: two real processes on this CPU peak where it says, and the same at any depth that is run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from estimator.dryrun import parallel
from estimator.dryrun.run import dry_run
from estimator.errors import InputError
from estimator.setup import Setup

sys.path.insert(0, str(Path(__file__).parent))
from ranks_truth import measured_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def _setup(**values: Any) -> Setup:
    usual = {"model": "base-llama", "framework": "torchtitan", "accelerator": "h100", "sharding": "fsdp", "seq": 512}
    return Setup(**(usual | {"accelerators": 2, "context_parallel": 2} | values)).resolved()


def test_each_rank_of_a_real_run_peaks_where_the_dry_run_says(monkeypatch: pytest.MonkeyPatch) -> None:
    import ring_on_cpu

    monkeypatch.setattr(parallel, "_check_context_parallel", lambda setup: None)  # which refuses a CPU
    tiny = {"model": "nano", "framework": "torch-loop", "accelerator": "cpu", "precision": "fp32", "batch": 2}
    setups = [_setup(**tiny, seq=128), _setup(**tiny, seq=256, checkpointing="full")]
    for setup, ranks in zip(setups, measured_ranks(setups), strict=True):
        with ring_on_cpu.kernels():
            found = {phase.phase: phase.peak_allocated_bytes for phase in dry_run(setup).phases}
        for phase in ("forward", "backward", "optimizer"):
            # The first rank, which is dry-run, is the fullest: the last one's attention puts no halves together.
            assert found[phase] == pytest.approx(ranks[0][phase], rel=0.002)
            assert 0.985 * ranks[0][phase] < ranks[1][phase] < 1.002 * ranks[0][phase]


@pytest.mark.parametrize(
    "values",
    [
        {"checkpointing": "full", "framework": "hf-trainer"},
        {"method": "lora", "accelerators": 8, "context_parallel": 4, "attention_kernel": "cudnn"},
        {"tensor_parallel": 2, "accelerators": 4},
    ],
    ids=str,
)
def test_a_few_layers_written_out_are_the_full_model_to_the_byte(values: dict[str, Any]) -> None:
    few, all_layers = dry_run(_setup(**values)), dry_run(_setup(**values), every_layer=True)
    assert few.layers_run < all_layers.layers_run
    assert few.peak_allocated_bytes == all_layers.peak_allocated_bytes
    assert few.peak_reserved_bytes == all_layers.peak_reserved_bytes
    assert few.phases == all_layers.phases


def test_ranks_that_share_a_sequence_share_the_parameters_too() -> None:
    parts = [
        dict(dry_run(_setup(**values)).categories_bytes)
        for values in ({"seq": 8192}, {"seq": 8192, "context_parallel": 1})
    ]
    assert parts[0]["parameters"] == parts[1]["parameters"]
    assert parts[0]["logits"] == pytest.approx(parts[1]["logits"] / 2, rel=0.01)


@pytest.mark.parametrize(
    "values",
    [
        {"sharding": "none"},
        {"seq": 510},
        {"accelerator": "cpu"},
        {"model": "gemma-2-9b"},
        {"precision": "fp32", "model": "llama-3.2-1b"},
        {"attention": "eager"},
        {"attention_kernel": "math"},
        {"compile": True},
        {"accelerators": 8, "shard_size": 1},
    ],
    ids=str,
)
def test_what_torch_has_no_ring_for_is_one_line(values: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        dry_run(_setup(**values))
    assert "\n" not in str(caught.value)
