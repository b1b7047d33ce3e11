"""Configs that anybody wrote: what of them is predicted or dry-run, and the one line that the others get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from estimator.errors import InputError
from estimator.estimate import estimate
from estimator.fits import fits_on_each
from estimator.model.catalog import resolve_model
from estimator.model.shape import count_parameters
from estimator.run.cost import RunRequest
from estimator.setup import Setup

_BASE = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 7,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
_MODEL_CODE = 'raise SystemExit("executed")\n'


def _config(folder: Path, text: str | None = None, **changes: Any) -> str:
    content = text if text is not None else json.dumps({**_BASE, **changes})
    (folder / "config.json").write_text(content, encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(
    ("text", "problem"),
    [('{"hidden_size": ' + "9" * 5000 + "}", "is not JSON"), ("[" * 100_000, "is not JSON")],
    ids=["digits", "brackets"],
)
def test_json_that_python_gives_up_on_is_one_line(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        resolve_model(_config(tmp_path, text))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_hidden_layers": 10**9}, "beyond 10,000 layers"),
        ({"hidden_size": 10**30}, "1e14 parameters"),
        ({"is_encoder_decoder": True}, "encoder beside its decoder"),
    ],
)
def test_what_is_no_decoder_of_this_world_is_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        resolve_model(_config(tmp_path, **changes))


@pytest.mark.parametrize("changes", [{"model_type": "mamba2"}, {"model_type": "jamba", "attn_layer_period": 2}, {"model_type": "lfm2"}], ids=str)  # fmt: skip
def test_layers_that_no_formula_knows_are_for_the_dry_run(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="no formula knows its layers"):
        estimate(Setup(model=_config(tmp_path, **changes)))


def test_a_pattern_of_layers_leaves_one_period_between_the_ends() -> None:
    from estimator.dryrun.cut import shortest

    cut = shortest("aaab" * 12)
    assert cut.kept == (0, 1, 2, 43, 44, 45, 46, 47)
    assert sum(cut.repeats) == 48
    assert shortest("a" * 80).kept == (0, 1, 2, 78, 79)
    assert shortest("abcdefg").kept == tuple(range(7))


def test_sliding_and_full_attention_written_out_are_the_full_model(tmp_path: Path) -> None:
    from estimator.dryrun.run import dry_run

    folder = _config(tmp_path, model_type="gemma3_text", num_hidden_layers=26, sliding_window=64, head_dim=32)
    setup = Setup(model=folder, seq=96, precision="bf16", accelerator="RTX-3090")
    few, every = dry_run(setup), dry_run(setup, every_layer=True)
    assert (few.layers_run, every.layers_run) == (14, 26)
    assert few.phases == every.phases and few.holders == every.holders


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({"model_type": "qwen3"}, ()),  # its heads are 128 wide, whatever the model is
        ({"model_type": "gemma"}, ()),  # tied, and 256 wide
        ({"model_type": "starcoder2", "tie_word_embeddings": False}, ()),  # no gate
        ({"model_type": "llama"}, ("num_attention_heads", "num_key_value_heads")),
    ],
)
def test_keys_left_out_are_what_transformers_takes(tmp_path: Path, changes: dict[str, Any], absent: tuple[str, ...]) -> None:  # fmt: skip
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kept = {key: value for key, value in {**_BASE, **changes}.items() if key not in absent}
    folder = _config(tmp_path, json.dumps(kept))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert count_parameters(resolve_model(folder)).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hidden_act": "frob"}, "model: transformers cannot build .*frob"),
        ({"hidden_act": 7}, "model: transformers cannot build .*hidden_act"),
        ({"pad_token_id": 99_999}, "model: transformers cannot build .*Padding_idx"),
        ({"torch_dtype": "float99"}, "model: transformers cannot build .*float99"),
        ({"rope_scaling": [1]}, "model: transformers cannot build "),
        ({"model_type": "frobnicator"}, "knows no model_type"),
        ({"model_type": "gemma2"}, "write --attention eager"),
        ({"model_type": "gpt2", "n_positions": 1024}, "seq: .* has 1024 learned positions; write --seq 1024"),
    ],
)
def test_a_dry_run_of_what_transformers_cannot_build_is_one_line(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:  # fmt: skip
    with pytest.raises(InputError, match=problem) as raised:
        estimate(Setup(model=_config(tmp_path, **changes)), dry_run=True)
    assert len(str(raised.value)) < 400 and "\n" not in str(raised.value)


def test_a_model_s_own_code_is_not_executed(tmp_path: Path) -> None:
    own = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    for name in ("configuration_own.py", "modeling_own.py"):
        (tmp_path / name).write_text(_MODEL_CODE)
    folder = _config(tmp_path, model_type="of_my_own", auto_map=own)
    with pytest.raises(InputError, match="code of its own, which is never executed"):
        estimate(Setup(model=folder), dry_run=True)


def test_libraries_say_nothing_of_a_config_that_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # Tokens that the vocabulary has not: transformers warns of them.
    folder = _config(tmp_path, bos_token_id=50_256, eos_token_id=50_256)
    estimate(Setup(model=folder, seq=32), dry_run=True)
    assert capfd.readouterr().err == ""


def test_tensors_beyond_63_bits_are_one_line() -> None:
    with pytest.raises(InputError, match="dry_run: a tensor of this setup has 2\\^63 bytes"):
        estimate(Setup(model="nano", seq=10**12, batch=10**12), dry_run=True)


def test_a_model_that_sees_is_cut_in_the_depth_of_its_text_model() -> None:
    from transformers import Gemma3Config

    from estimator.building.model import cut_depth

    config = Gemma3Config(text_config={"num_hidden_layers": 7})
    cut_depth(config, range(5))
    assert config.text_config.num_hidden_layers == len(config.text_config.layer_types) == 5


def test_flex_attention_s_output_is_as_wide_as_its_values() -> None:
    import torch

    from estimator.dryrun.flex import _attention

    query, key = torch.empty(1, 2, 8, 32).requires_grad_(), torch.empty(1, 2, 8, 32)
    assert _attention(query, key, torch.empty(1, 2, 8, 16)).shape == (1, 2, 8, 16)


@pytest.mark.parametrize("model", ["nano", "qwen1.5-0.5b", "llama-3.1-8b"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_fits_where_is_what_each_accelerator_is_told_alone(model: str, method: str) -> None:
    setup = Setup(model=model, method=method).resolved()
    for fit in fits_on_each(resolve_model(model), setup, 2**30):
        alone = estimate(
            Setup(model=model, method=method, accelerator=fit.gpu), request=RunRequest(reserve_bytes=2**30)
        )
        assert alone.fits.margin_bytes == fit.margin_bytes
