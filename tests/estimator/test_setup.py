"""Setups from outside: what is refused, what is filled in, and that they survive a round trip."""

from __future__ import annotations

import re
from typing import Any

import pytest

from estimator.errors import InputError
from estimator.measured import from_row
from estimator.setup import Setup


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"model": "nano", "batch": "0"}, "batch"),
        ({"model": "nano", "seq": "-5"}, "seq"),
        ({"model": "nano", "seq": "many"}, "seq"),
        ({"model": "nano", "seq": "2.5"}, "seq"),
        ({"model": "nano", "precision": "bf17"}, "precision"),
        ({"model": "nano", "no_such": "1"}, "no_such"),
        ({"seq": "5"}, "model"),
        ({"model": "nano", "method": "full", "lora_rank": "8"}, "lora_rank"),
        ({"model": "nano", "method": "freeze"}, "trainable_layers"),
        ({"model": "nano", "accelerators": "6", "tensor_parallel": "4"}, "accelerators"),
        ({"model": "nano", "accelerators": "8", "data_parallel": "3"}, "data_parallel"),
        ({"model": "nano", "compile": "perhaps"}, "compile"),
        ({"model": "nano", "internode_gbps": "0"}, "internode_gbps"),
        ({"model": "nano", "seq": "1e400"}, "seq"),
        ({"model": "nano", "seq": "1e300"}, "seq"),
        ({"model": "nano", "accumulation": "1e13"}, "accumulation"),
        ({"model": "nano", "internode_gbps": "1e-320"}, "internode_gbps"),
        ({"model": "nano", "internode_gbps": "nan"}, "internode_gbps"),
        ({"model": "nano", "seq": True}, "seq"),
        ({"model": "nano", "seq": [128]}, "seq"),
        ({"model": True}, "model"),
        ({"model": "nano", "precision": ["fp32"]}, "precision"),
    ],
)
def test_a_bad_setting_is_one_line_that_starts_with_its_name(values: dict[str, Any], names: str) -> None:
    with pytest.raises(InputError) as caught:
        Setup.from_mapping(values)
    assert str(caught.value).startswith(f"{names}:")
    assert "\n" not in str(caught.value)


def test_text_and_numbers_of_a_table_mean_the_same() -> None:
    text = Setup.from_mapping({"model": "nano", "seq": "128", "compile": "true", "accelerators": "2.0"})
    numbers = Setup.from_mapping({"model": "nano", "seq": 128, "compile": True, "accelerators": 2})
    assert text == numbers


def test_a_setup_survives_its_own_dictionary() -> None:
    setup = Setup(model="8e9", method="lora", lora_targets="q_proj v_proj", accelerators=8).resolved()
    assert Setup.from_mapping(setup.as_dict()) == setup


def test_resolving_writes_the_frameworks_defaults_and_keeps_what_is_given() -> None:
    # transformers 5: TrainingArguments.optim is adamw_torch_fused.
    assert Setup(model="nano").resolved().optimizer == "adamw-fused"
    assert Setup(model="nano", framework="torch-loop").resolved().optimizer == "adamw"
    assert Setup(model="nano", optimizer="sgd").resolved().optimizer == "sgd"
    resolved = Setup(model="nano", accelerators=8, tensor_parallel=2).resolved()
    assert (resolved.sharding, resolved.data_parallel) == ("fsdp", 4)


def test_the_tokens_of_a_step_count_every_data_parallel_rank() -> None:
    setup = Setup(model="nano", seq=100, batch=3, accumulation=2, accelerators=8, tensor_parallel=4)
    assert setup.tokens_per_step == 100 * 3 * 2 * 2


def test_adapters_get_a_rank_and_qlora_a_quantization() -> None:
    setup = Setup(model="nano", method="qlora")
    assert (setup.lora_rank, setup.base_quantization) == (16, "nf4")


def test_every_refused_choice_names_what_to_write_instead() -> None:
    with pytest.raises(InputError, match=re.escape("one of full, freeze, lora, dora, qlora")):
        Setup(model="nano", method="galore")


@pytest.mark.parametrize(
    ("written", "targets"),
    [
        ("c_attn (DEFAULT)", "c_attn"),
        ("DEFAULT", None),
        ("all linear", "all-linear"),
        ("q_proj v_proj output_proj + MLP (apply_lora_to_mlp)", "q_proj v_proj output_proj mlp"),
    ],
)
def test_adapter_targets_are_read_as_published_tables_write_them(written: str, targets: str | None) -> None:
    row = {"run": "r1", "model": "llama-2-7b", "method": "lora", "lora_targets": written}
    assert from_row(row).setup.lora_targets == targets


@pytest.mark.parametrize(
    ("values", "sharding"),
    [
        ({}, "none"),
        ({"accelerators": 4}, "fsdp"),
        ({"accelerators": 4, "context_parallel": 4}, "fsdp"),
        ({"accelerators": 4, "context_parallel": 4, "framework": "megatron"}, "zero1"),
        ({"accelerators": 4, "tensor_parallel": 4}, "none"),
        ({"accelerators": 4, "context_parallel": 4, "sharding": "ddp"}, "ddp"),
    ],
)
def test_context_parallel_ranks_share_the_parameters_as_data_parallel_ones_do(
    values: dict[str, Any], sharding: str
) -> None:
    assert Setup(model="nano", **values).resolved().sharding == sharding


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lora_targets": "q_proj"}, "lora_targets: means nothing"),
        ({"attention": "eager", "attention_kernel": "flash"}, "attention_kernel: flash"),
        ({"attention": "flash", "attention_kernel": "math"}, "attention_kernel: math"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, str], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Setup(model="nano", **settings)  # type: ignore[arg-type]
