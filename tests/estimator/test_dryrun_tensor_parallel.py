"""The dry run of tensor parallelism: the split model computes what the whole one does, real processes on this CPU peak where it
says, alone and with FSDP2, and the same at any depth that is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from estimator.dryrun.run import dry_run
from estimator.errors import InputError
from estimator.setup import Setup

sys.path.insert(0, str(Path(__file__).parent))
from ranks_truth import measured_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

_ROOT = Path(__file__).parent.parent.parent
# 4 layers of micro's widths, norms of each head, and a vocabulary that two ranks share unevenly.
_QWEN3 = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 8191, "hidden_size": 256, "head_dim": 64,
    "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
_MIXTRAL = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 8192, "hidden_size": 256,
    "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
_MODELS = ("micro-llama", "micro", "qwen3")
TWO_RANKS: list[dict[str, Any]] = [
    {"seq": 256},  # the loss is the peak
    {"precision": "bf16", "batch": 1, "checkpointing": "selective", "accumulation": 2},
    {"model": "qwen3", "checkpointing": "full"},
    {"model": "micro", "method": "freeze", "trainable_layers": 2},
]
BY_TRANSFORMERS_PLAN: list[dict[str, Any]] = [
    {"precision": "bf16-mixed"},
    {"method": "lora", "lora_targets": "all-linear", "precision": "bf16", "checkpointing": "full"},
    {"model": "mixtral"},
]
FOUR_RANKS: list[dict[str, Any]] = [{"precision": "bf16-mixed", "checkpointing": "full"}, {"model": "qwen3"}]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _written(tmp_path_factory, _QWEN3)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _written(tmp_path_factory, _MIXTRAL)


def _written(directories: pytest.TempPathFactory, config: dict[str, Any]) -> str:
    path = directories.mktemp("model") / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


def _tiny(values: dict[str, Any], qwen3: str) -> Setup:
    usual = {"model": "micro-llama", "precision": "fp32", "seq": 64, "batch": 2, "framework": "torch-loop"}
    named = usual | {"accelerator": "cpu", "accelerators": 2, "tensor_parallel": 2} | values
    return Setup(**(named | ({"model": qwen3} if named["model"] == "qwen3" else {}))).resolved()


@pytest.mark.parametrize(("ranks", "many"), [(2, TWO_RANKS), (4, FOUR_RANKS)], ids=["alone", "with FSDP2"])
def test_each_rank_of_a_real_run_peaks_where_the_dry_run_says(
    ranks: int, many: list[dict[str, Any]], qwen3: str
) -> None:
    setups = [_tiny(values | {"accelerators": ranks}, qwen3) for values in many]
    # What is left, at most 0.1%, are the random states that checkpoints keep, and buffers of gloo's.
    for setup, peaks in zip(setups, measured_ranks(setups), strict=True):
        found = {phase.phase: phase.peak_allocated_bytes for phase in dry_run(setup).phases}
        for rank in peaks:
            for phase in ("forward", "backward", "optimizer"):
                assert found[phase] == pytest.approx(rank[phase], rel=0.002)


def test_each_rank_of_trainer_with_transformers_own_plan_peaks_where_the_dry_run_says(mixtral: str) -> None:
    setups = [
        _tiny({"framework": "hf-trainer"} | values | ({"model": mixtral} if "model" in values else {}), "")
        for values in BY_TRANSFORMERS_PLAN
    ]
    for setup, peaks in zip(setups, measured_ranks(setups), strict=True):
        found = {phase.phase: phase.peak_allocated_bytes for phase in dry_run(setup).phases}
        for rank in peaks:
            for phase in ("forward", "backward", "optimizer"):
                assert found[phase] == pytest.approx(rank[phase], rel=0.002)


def test_the_split_model_has_the_loss_and_the_gradients_of_the_whole_one(qwen3: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, qwen3, f"file://{tmp_path}/rendezvous"]
    processes = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, env=environment) for rank in (0, 1)]
    answers = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    for errors in json.loads(answers[0].splitlines()[-1]):
        assert max(errors.values()) < 1e-5


@pytest.mark.parametrize(
    "values",
    [
        {"precision": "bf16", "accelerators": 2},
        {"checkpointing": "full"},
        {"framework": "torch-loop", "checkpointing": "selective", "accumulation": 2},
        {"framework": "hf-trainer", "accelerators": 2, "method": "lora"},
        {"framework": "hf-trainer", "accelerators": 2, "checkpointing": "full"},
    ],
    ids=str,
)
def test_a_few_split_layers_written_out_are_the_full_model_to_the_byte(values: dict[str, Any]) -> None:
    usual = {"model": "base-llama", "framework": "torchtitan", "accelerator": "h100", "accelerators": 4, "seq": 256}
    setup = Setup(**(usual | {"tensor_parallel": 2, "precision": "bf16-mixed"} | values))
    few, all_layers = dry_run(setup), dry_run(setup, every_layer=True)
    assert few.layers_run < all_layers.layers_run
    assert few.peak_allocated_bytes == all_layers.peak_allocated_bytes
    assert few.peak_reserved_bytes == all_layers.peak_reserved_bytes
    assert few.categories_bytes == all_layers.categories_bytes
    assert few.phases == all_layers.phases


def test_sixteen_thousand_ranks_hold_their_share_of_70_billion_parameters() -> None:
    setup = Setup(
        model="llama-3.1-70b", framework="torchtitan", accelerator="h100", accelerators=16_384, tensor_parallel=8,
        shard_size=64, seq=8192, checkpointing="full",
    )  # fmt: skip
    parts = dict(dry_run(setup).categories_bytes)
    # What blocks are larger than requests is in these; norms are whole on every tensor-parallel rank.
    assert parts["parameters"] + parts["optimizer"] == pytest.approx(70_553_706_496 * 12 / 512, rel=0.02)


def test_a_dry_run_does_not_depend_on_the_meshes_of_those_before(qwen3: str) -> None:
    alone, sharded = _tiny({}, qwen3), _tiny({"accelerators": 4}, qwen3)
    first = [dry_run(setup).phases for setup in (sharded, alone)]
    assert [dry_run(setup).phases for setup in (alone, sharded)] == first[::-1]


@pytest.mark.parametrize(
    "values",
    [
        {"framework": "hf-trainer", "method": "dora"},
        {"framework": "hf-trainer", "method": "lora", "accelerators": 4},  # beside FSDP
        {"framework": "hf-trainer", "accelerators": 4},  # tied tables beside FSDP
        {"framework": "hf-trainer", "model": "gpt2-124m"},  # which transformers has no plan for
        {"sharding": "ddp", "accelerators": 4},
        {"tensor_parallel": 4, "accelerators": 4},  # of 2 key heads
        {"seq": 65},
        {"method": "lora"},
        {"attention": "eager"},
        {"compile": True},
        {"loss": "chunked"},
        {"precision": "bf16-mixed"},
        {"model": "gpt2-124m"},
        {"context_parallel": 2, "accelerators": 4},
    ],
    ids=str,
)
def test_what_no_dry_run_splits_is_one_line(values: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        dry_run(_tiny({"accelerator": "h100"} | values, ""))
    assert "\n" not in str(caught.value)


def _compare(name: str, mesh: Any) -> dict[str, float]:
    """The relative error of the loss and of every gradient."""
    import torch

    from estimator.building.model import build_model
    from estimator.dryrun.tensor_parallel import parallelize, split_loss

    model: Any = build_model(Setup(model=name, precision="fp32", accelerator="cpu", framework="torch-loop").resolved())
    ids = torch.randint(0, 8000, (2, 64), generator=torch.Generator().manual_seed(1))
    whole = model(input_ids=ids, labels=ids).loss
    whole.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    parallelize(model, mesh, tokens=64)
    with split_loss():
        split = model(input_ids=ids, labels=ids).loss
        split.backward()
    errors = {"loss": abs(float(split.full_tensor() / whole) - 1)}
    for name, parameter in model.named_parameters():
        known = gradients[name]
        errors[name] = float((parameter.grad.full_tensor() - known).norm() / known.norm())
    return errors


def main() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    qwen3, rendezvous, rank = sys.argv[1:]
    dist.init_process_group("gloo", init_method=rendezvous, rank=int(rank), world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    print(json.dumps([_compare(qwen3 if name == "qwen3" else name, mesh) for name in _MODELS]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
