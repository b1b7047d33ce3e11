"""The dry run of methods on one device beyond the common ones: experts under adapters and quantization, GaLore, and the
configs of models that are no decoders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from estimator.building.model import check_buildable
from estimator.dryrun.run import dry_run
from estimator.errors import InputError
from estimator.estimate import estimate
from estimator.memory.galore import RANK
from estimator.model.catalog import resolve_model
from estimator.setup import Setup

sys.path.insert(0, str(Path(__file__).parent))
from cpu_truth import measured_peaks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

_MIXTURE = {
    "model_type": "mixtral", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 7,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None,
}  # fmt: skip


def _config(folder: Path, **changes: Any) -> str:
    (folder / "config.json").write_text(json.dumps(_MIXTURE | changes), encoding="utf-8")
    return str(folder / "config.json")


@pytest.mark.parametrize(
    "values",
    [
        {"model": "nano", "checkpointing": "selective"},
        {"model": "nano", "method": "dora", "precision": "bf16-mixed"},
        {"model": "nano", "method": "dora", "checkpointing": "selective"},
        {"model": "nano", "method": "freeze", "trainable_layers": 2, "checkpointing": "full"},
        {"model": "nano", "method": "lora", "precision": "bf16", "accumulation": 2},
        {"checkpointing": "selective"},
        {"method": "dora"},
        {"method": "lora", "lora_targets": "all-linear"},  # experts are adapted as one tensor
        {"method": "lora", "framework": "torch-loop", "precision": "bf16-mixed", "accumulation": 2},
    ],
    ids=str,
)
def test_a_real_step_on_this_cpu_peaks_where_the_dry_run_says(values: dict[str, Any], tmp_path: Path) -> None:
    # What is left, at most 0.2%, are buffers inside kernels (attention's backward, reductions).
    common = {"model": _config(tmp_path), "precision": "fp32", "seq": 64, "batch": 2, "accelerator": "cpu"}
    setup = Setup(**(common | values)).resolved()
    highest = max(measured_peaks(setup).phases, key=lambda phase: phase.allocated_bytes)
    found = dry_run(setup)
    assert found.peak_allocated_bytes == pytest.approx(highest.allocated_bytes, rel=0.002)
    assert found.peak_phase == highest.phase


def test_dora_of_experts_is_one_line(tmp_path: Path) -> None:
    setup = Setup(model=_config(tmp_path), method="dora", lora_targets="all-linear", seq=64)
    with pytest.raises(InputError, match="peft has no DoRA of experts"):
        dry_run(setup)


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
def test_experts_are_left_as_loaded_by_bitsandbytes(precision: str, tmp_path: Path) -> None:
    # transformers 5 (integrations/bitsandbytes.py) replaces nn.Linear; experts are one parameter of three dimensions.
    setup = Setup(
        model=_config(tmp_path, hidden_size=512, intermediate_size=2048),
        method="qlora", precision=precision, seq=64, accelerator="H100-SXM-80GB",
    )  # fmt: skip
    held = {holder.module: holder.bytes for holder in dry_run(setup).holders if holder.category == "parameters"}
    experts = 7 * 4 * 3 * 512 * 2048
    assert held["base_model.model.model.layers.*.mlp.experts"] == experts * (2 if precision == "bf16" else 4)
    formula, dry = (estimate(setup, dry_run=run).memory.peak_allocated_bytes.value for run in (False, True))
    assert formula == pytest.approx(dry, rel=0.03)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_galore_keeps_moments_of_its_rank(precision: str) -> None:
    # galore-torch 1.0: a matrix of [long, short] keeps two moments [long, 128] and a projection [128, short]; in fp32 that is
    # a view of all singular vectors, [short, short].
    shape = resolve_model("qwen1.5-0.5b")
    setup = Setup(model=shape.name, optimizer="galore", precision=precision, seq=64, accelerator="A100-SXM-80GB")
    found = dry_run(setup)
    h, f, width = shape.hidden, shape.ffn, 2 if precision == "bf16" else 4
    kept = h if precision == "fp32" else RANK
    layer = (
        4 * (2 * RANK * h + kept * h) + 3 * (2 * RANK * f + kept * h) + 2 * (2 * h + 3 * h)
    )  # norms, biases of q, k, v
    states = width * (shape.layers * layer + 2 * (shape.vocab * h + h))
    between = next(phase.peak_allocated_bytes for phase in found.phases if phase.phase == "between")
    parameters = dict(found.categories_bytes)["parameters"] + dict(found.categories_bytes)["workspace"]
    assert between - parameters == pytest.approx(states, rel=0.01)
    assert estimate(setup).memory.peak_allocated_bytes.value == pytest.approx(found.peak_allocated_bytes, rel=0.02)


def test_galore_is_trainers_and_of_training_in_full() -> None:
    for values in ({"framework": "torch-loop"}, {"method": "lora"}, {"accelerators": 2}):
        with pytest.raises(InputError, match="galore is Trainer's"):
            Setup(model="nano", optimizer="galore", **values)
    with pytest.raises(InputError, match="optimizer: galore can be estimated but not run"):
        check_buildable(Setup(model="nano", optimizer="galore").resolved())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "bert"}, "bert is an encoder"),
        ({"model_type": "xlm-roberta"}, "xlm-roberta is an encoder"),
        ({"model_type": "t5"}, "t5 has an encoder beside its decoder"),
        ({"model_type": "git"}, "git reads pictures before its text"),
    ],
)
def test_what_is_no_decoder_is_refused_by_name(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=problem):
        estimate(Setup(model=_config(tmp_path, **changes)))


def test_code_that_asks_for_values_is_one_line(tmp_path: Path) -> None:
    # JetMoE splits tokens by counts that it reads from a tensor.
    config = _config(
        tmp_path, model_type="jetmoe", num_key_value_heads=2, kv_channels=16, num_local_experts=4, num_experts_per_tok=2
    )
    with pytest.raises(InputError, match="asks what its tensors hold"):
        dry_run(Setup(model=config, seq=32))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gemma3_text", "head_dim": 32},
        {"model_type": "arcee", "head_dim": 16},
        {"model_type": "jais2", "head_dim": 16},
        {"model_type": "ernie4_5_moe", "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1, "moe_num_shared_experts": 2},
        {"model_type": "aria_text", "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 2},
        {"model_type": "llama4_text", "head_dim": 16, "intermediate_size_mlp": 96},
    ],
    ids=lambda changes: str(changes["model_type"]),
)  # fmt: skip
def test_parameters_of_further_families_are_transformers_count(changes: dict[str, Any], tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from estimator.model.shape import count_parameters

    kept = {
        key: value for key, value in _MIXTURE.items() if changes["model_type"] == "llama4_text" or "expert" not in key
    }
    (tmp_path / "config.json").write_text(json.dumps(kept | changes | {"pad_token_id": None}), encoding="utf-8")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(resolve_model(str(tmp_path))).total == pytest.approx(counted, rel=1e-3)
