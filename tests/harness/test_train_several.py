"""Two real processes train what one device trains: the same losses, checkpoints that one device reads, the predicted memory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import harness.train
from estimator.errors import InputError
from estimator.setup import Setup
from harness.launch import launch
from harness.plan import TrainPlan
from harness.several import check_trainable
from harness.train_result import read_result
from harness.training_log import read_log
from profiler.device import local_device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the ranks are CPUs'")

SMALL = {"model": "nano", "precision": "fp32", "seq": 16, "batch": 2}
TWO = SMALL | {"accelerators": 2}
RUNS: dict[str, dict[str, Any]] = {
    "loop-ddp": TWO | {"framework": "torch-loop", "sharding": "ddp"},
    "loop-fsdp": TWO | {"framework": "torch-loop", "sharding": "fsdp"},
    "loop-fsdp-resumed": TWO | {"framework": "torch-loop", "sharding": "fsdp"},
    "loop-padded": TWO | {"framework": "torch-loop", "sharding": "ddp", "pack": False},
    "trainer-ddp": TWO | {"sharding": "ddp"},
    "trainer-fsdp": TWO | {"sharding": "fsdp"},
    "trainer-fsdp-resumed": TWO | {"sharding": "fsdp"},
    "lora-fsdp": TWO | {"framework": "torch-loop", "sharding": "fsdp", "method": "lora"},
    "tensor": TWO | {"framework": "torch-loop", "model": "micro", "tensor_parallel": 2},
}  # fmt: skip
ALONE: dict[str, dict[str, Any]] = {
    "loop": SMALL | {"framework": "torch-loop", "accumulation": 2},
    "loop-padded-alone": SMALL | {"framework": "torch-loop", "accumulation": 2, "pack": False},
    "trainer": SMALL | {"accumulation": 2},
    "lora": SMALL | {"framework": "torch-loop", "accumulation": 2, "method": "lora"},
    "tensor-alone": SMALL | {"framework": "torch-loop", "model": "micro"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Path]:
    """A directory with one of each run; those of two ranks in one start of them."""
    directory = tmp_path_factory.mktemp("several")
    data = directory / "data.jsonl"
    lines = [{"text": f"Sample {i}: " + " ".join(f"the word {i * j % 97} of it" for j in range(12))} for i in range(80)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def plan(name: str, setup: dict[str, Any]) -> TrainPlan:
        return TrainPlan(
            setup=Setup(**setup),
            out=directory / name,
            cache=cache,
            data=str(data),
            samples=16,
            epochs=2,
            learning_rate=1e-3,
        )

    device = local_device()
    prepared = []
    for name, setup in RUNS.items():
        asked = plan(name, setup)
        local = dataclasses.replace(asked, setup=harness.train._local_setup(asked.setup, device))
        prepared.append((local, device, harness.train._prepared(local, device, None, None).predicted))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        patch.setenv("OMP_NUM_THREADS", "1")
        import rank_functions

        launch(rank_functions.train_all, prepared, ranks=2)
    for name, setup in ALONE.items():
        harness.train.train(plan(name, setup))
    yield directory


def losses(directory: Path) -> list[tuple[int, str, float, float | None]]:
    return [(e.step, e.kind, e.loss, e.learning_rate) for e in read_log(directory / "training_log.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("several", "alone"),
    [
        ("loop-ddp", "loop"),
        ("loop-fsdp", "loop"),
        ("loop-fsdp-resumed", "loop"),
        ("loop-padded", "loop-padded-alone"),
        ("trainer-ddp", "trainer"),
        ("trainer-fsdp", "trainer"),
        ("trainer-fsdp-resumed", "trainer"),
        ("lora-fsdp", "lora"),
        ("tensor", "tensor-alone"),
    ],
)
def test_two_ranks_have_the_losses_of_one_device_with_the_same_global_batch(
    trained: Path, several: str, alone: str
) -> None:
    found, expected = losses(trained / several), losses(trained / alone)
    assert len(found) == len(expected) > 4 and found[-1][2] < found[0][2]
    assert [(step, kind, rate) for step, kind, _, rate in found] == [
        (step, kind, rate) for step, kind, _, rate in expected
    ]
    assert [loss for _, _, loss, _ in found] == pytest.approx([loss for _, _, loss, _ in expected], rel=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loop-ddp", "loop-fsdp", "trainer-fsdp", "tensor"])
def test_what_several_ranks_wrote_is_read_on_one_device(trained: Path, name: str) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    result = read_result(trained / name / "result.json")
    for directory in (result.last_checkpoint, result.model):
        model, said = AutoModelForCausalLM.from_pretrained(trained / name / directory, output_loading_info=True)
        assert not said["missing_keys"] and not said["unexpected_keys"]
    ids = torch.arange(16).unsqueeze(0)
    alone = {"loop-ddp": "loop", "loop-fsdp": "loop", "trainer-fsdp": "trainer", "tensor": "tensor-alone"}[name]
    theirs = AutoModelForCausalLM.from_pretrained(trained / alone / "model")
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-3, atol=1e-3)
    assert set(load_file(trained / name / "model" / "model.safetensors")) == set(
        load_file(trained / alone / "model" / "model.safetensors")
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loop-fsdp", "loop-ddp", "trainer-fsdp", "lora-fsdp", "loop-padded"])
def test_each_rank_takes_the_memory_that_was_predicted(trained: Path, name: str) -> None:
    """What gloo's threads are the last to give back the profiler does not see: up to a model's weights count twice then."""
    result = read_result(trained / name / "result.json")
    peak = next(row for row in result.comparisons if row.quantity == "peak allocated")
    assert peak.predicted is not None and len(result.allocated_by_rank) == 2
    assert peak.measured == max(result.allocated_by_rank)
    weights = (trained / "loop-ddp" / "model" / "model.safetensors").stat().st_size
    for measured in result.allocated_by_rank:
        assert 0.99 * peak.predicted.value < measured < 1.01 * peak.predicted.value + weights


@pytest.mark.parametrize(
    "changed", [{"tensor_parallel": 2, "precision": "bf16-mixed"}, {"tensor_parallel": 2, "model": "nano"}]
)
def test_what_is_not_trained_by_tensor_parallelism_is_refused_without_talk_of_dry_runs(changed: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="write --tensor-parallel 1") as refusal:
        check_trainable(Setup(**TWO | {"framework": "torch-loop", "model": "micro"} | changed).resolved())
    assert "dry" not in str(refusal.value)
