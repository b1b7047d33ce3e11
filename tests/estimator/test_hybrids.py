"""Hybrids: their parameters against transformers' own modules, and what their layers add to a step."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from estimator.estimate import estimate
from estimator.memory.checkpoint import weight_tensors
from estimator.model.catalog import model_names, resolve_model
from estimator.model.config_shape import shape_from_config
from estimator.model.mixer import mixer_activation_bytes, scan_flops
from estimator.model.shape import active_parameters, count_parameters, with_predictions
from estimator.setup import Setup
from estimator.speed.compute import step_work

_SMALL = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000}
_NEMOTRON = _SMALL | {
    "hybrid_override_pattern": "MEMEM*EME", "head_dim": 64, "mamba_num_heads": 8, "mamba_head_dim": 64, "ssm_state_size": 64, "n_groups": 2,
    "moe_intermediate_size": 128, "moe_shared_expert_intermediate_size": 256, "n_routed_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": ("nemotron_h", _NEMOTRON),
    "latent experts": ("nemotron_h", _NEMOTRON | {"moe_latent_size": 64}),
    "without experts": ("nemotron_h", _SMALL | {"hybrid_override_pattern": "M-M-M*-M-", "intermediate_size": 512}),
    "granite": ("granitemoehybrid", _SMALL | {"intermediate_size": 128, "shared_intermediate_size": 256, "num_hidden_layers": 4,
                "layer_types": ["mamba", "mamba", "attention", "mamba"], "mamba_n_heads": 8, "mamba_d_state": 64,
                "num_local_experts": 6, "num_experts_per_tok": 2}),
    "bamba": ("bamba", _SMALL | {"intermediate_size": 512, "num_hidden_layers": 4, "attn_layer_indices": [2],
              "mamba_n_heads": 8, "mamba_d_state": 64}),
    "falcon-h1": ("falcon_h1", _SMALL | {"intermediate_size": 512, "num_hidden_layers": 4, "mamba_n_heads": 8, "mamba_d_ssm": 256,
                  "mamba_d_head": 32, "mamba_d_state": 64}),
    "qwen3-next": ("qwen3_next", _SMALL | {"num_hidden_layers": 4, "linear_num_value_heads": 8, "linear_num_key_heads": 4,
                   "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
                   "shared_expert_intermediate_size": 128}),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_hybrid_has_as_many_parameters_as_transformers_gives_it(case: str) -> None:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind, config = CONFIGS[case]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**config))
    shape = shape_from_config(config | {"model_type": kind}, case)
    assert count_parameters(shape).total == sum(weight.numel() for weight in model.parameters())
    assert sum(group.rows * group.columns * group.count for group in weight_tensors(shape)) == model.num_parameters()


@pytest.mark.parametrize(
    ("model", "total", "active"),
    [("nemotron-3-nano", 31.6e9, 3.6e9), ("nemotron-3-super", 120.6e9, 12.7e9), ("nemotron-3-ultra", 550e9, 55e9),
     ("nemotron-h-56b", 56.3e9, 56.3e9), ("qwen3-next-80b-a3b", 79.7e9, 3.9e9)],
)  # fmt: skip
def test_the_catalogs_hybrids_have_the_sizes_that_their_reports_state(model: str, total: float, active: float) -> None:
    shape = resolve_model(model)
    assert count_parameters(shape).total == pytest.approx(total, rel=0.02)
    assert active_parameters(shape) == pytest.approx(active, rel=0.02)


def test_the_tensors_of_every_model_are_its_parameters() -> None:
    for name in model_names():
        shape = resolve_model(name)
        assert sum(g.rows * g.columns * g.count for g in weight_tensors(shape)) == count_parameters(shape).total, name


def test_a_mixers_work_grows_with_the_sequence_as_its_tokens_do_and_attentions_faster() -> None:
    short, long = (
        step_work(resolve_model("nemotron-3-nano"), Setup(model="nemotron-3-nano", seq=seq).resolved())
        for seq in (2048, 4096)
    )
    assert long.scan_flops == pytest.approx(2 * short.scan_flops)
    assert long.scan_bytes == pytest.approx(2 * short.scan_bytes)
    assert long.attention_flops == pytest.approx(4 * short.attention_flops)


def test_the_scan_of_a_mixer_takes_what_its_products_take() -> None:
    # Chunks of Q tokens: C·B is Q x n x Q a group, the sums over it Q x Q x p a head, states n x Q x p twice.
    mixer = resolve_model("nemotron-3-nano").mixer
    assert mixer is not None
    q, n, p = mixer.chunk, mixer.state, mixer.head_dim
    of_chunk = 2 * (mixer.groups * q * n * q + mixer.heads * (q * q * p + 2 * n * q * p))
    assert scan_flops(mixer) == pytest.approx(of_chunk / q)


def test_mixers_and_latent_experts_keep_what_they_write() -> None:
    kept = {}
    for case in ("experts", "latent experts"):
        kind, config = CONFIGS[case]
        shape = shape_from_config(config | {"model_type": kind}, case)
        assert shape.mixer is not None
        # in: two of d, two of g n, a head each; the scan's result twice.
        assert mixer_activation_bytes(shape.mixer, 2, trains=True) == 2 * (2 * 512 + 2 * 128 + 8 + 2 * 512) + 4 * 8
        kept[case] = step_work(
            shape, Setup(model="nemotron-3-nano", seq=512, accelerators=8, expert_parallel=8).resolved()
        )
    assert kept["latent experts"].expert_bytes == kept["experts"].expert_bytes / 4  # 64 of 256 wide
    assert kept["latent experts"].expert_flops == kept["experts"].expert_flops / 4


def test_megatron_trains_the_layers_that_predict_ahead_and_trainer_does_not() -> None:
    shape = resolve_model("deepseek-v3")
    assert with_predictions(shape).layers == shape.layers + 1
    without = dataclasses.replace(shape, predicted_ahead=0)
    for framework, share in (("megatron", 1.05), ("hf-trainer", 1.0)):
        setup = Setup(model="deepseek-v3", framework=framework, seq=4096).resolved()
        work, plain = step_work(shape, setup), step_work(without, setup)
        assert (work.head_flops, work.model_flops) == ((2 if share > 1 else 1) * plain.head_flops, plain.model_flops)
        assert work.matmul_flops == pytest.approx(share * plain.matmul_flops, rel=0.04)


def test_a_hybrid_has_an_estimate_of_memory_and_time() -> None:
    found = estimate(
        Setup(model="nemotron-3-super", framework="megatron", precision="mxfp8-mixed", accelerator="gb300", accelerators=64,
              expert_parallel=64, accumulation=8, seq=8192)
    )  # fmt: skip
    assert found.time is not None
    # Published: 9,243 to 9,728 tokens/s a device (Megatron-Bridge, releases of 2026); the law was fitted to these among others.
    assert 8192 * 8 / found.time.step_seconds.value == pytest.approx(9500, rel=0.15)
    assert 100e9 < found.memory.peak_device_bytes.value < 288e9
