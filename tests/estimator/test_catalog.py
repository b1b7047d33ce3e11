"""Shapes: their parameters against torch and published counts, and every way a model can be named."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from estimator.building.model import model_config
from estimator.errors import InputError
from estimator.memory.checkpoint import weight_tensors
from estimator.model.catalog import built_in_names, infer_shape, model_names, resolve_model, transformers_class
from estimator.model.shape import active_parameters, count_parameters, lora_parameters
from estimator.setup import Setup

# One of every family that transformers builds, and the mixtures of experts.
BUILT = [
    "nano", "nano-llama", "qwen1.5-0.5b", "llama-3.1-8b", "qwen3-8b", "qwen3-30b-a3b", "mistral-7b", "mixtral-8x7b", "gemma-2b",
    "gpt2-124m", "santacoder", "phi-2", "opt-1.3b", "falcon-7b", "stablelm-alpha-3b", "nemotron4-15b", "deepseek-v3", "powerlm-3b",
]  # fmt: skip
EAGER = ["gemma-2-9b", "bloom-7b1", "gpt-oss-20b"]


@pytest.mark.parametrize("name", [*BUILT, *EAGER])
def test_the_count_is_the_one_that_torch_finds_on_the_meta_device(name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    config = model_config(Setup(model=name, attention="eager" if name in EAGER else "sdpa"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert count_parameters(resolve_model(name)).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "billions"),
    # The papers and model cards.
    [
        ("llama-3.1-405b", 405.85),
        ("llama-2-70b", 68.98),
        ("deepseek-v3", 671.03),
        ("qwen2.5-7b", 7.616),
        ("gpt3-175b", 174.6),
        ("kimi-k2", 1026.4),
    ],
)
def test_large_models_have_their_published_counts(name: str, billions: float) -> None:
    assert count_parameters(resolve_model(name)).total / 1e9 == pytest.approx(billions, rel=1e-3)


def test_active_parameters_are_those_of_the_model_cards() -> None:
    assert active_parameters(resolve_model("mixtral-8x7b")) / 1e9 == pytest.approx(12.9, rel=0.01)
    assert active_parameters(resolve_model("qwen3-235b-a22b")) / 1e9 == pytest.approx(22, rel=0.01)
    assert active_parameters(resolve_model("deepseek-v3")) / 1e9 == pytest.approx(37, rel=0.02)


def test_tensors_by_size_hold_every_parameter() -> None:
    for name in model_names():
        shape = resolve_model(name)
        assert sum(g.rows * g.columns * g.count for g in weight_tensors(shape)) == count_parameters(shape).total, name


def test_lora_on_all_linear_layers_counts_what_peft_adds() -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(Setup(model="micro")))
        adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert lora_parameters(resolve_model("micro"), 8, "all-linear") == trained


def test_the_built_in_models_have_the_sizes_they_promise() -> None:
    sizes = {"nano": 1e6, "micro": 5e6, "mini": 20e6, "small": 60e6, "base": 125e6}
    for name in built_in_names():
        assert count_parameters(resolve_model(name)).total == pytest.approx(sizes[name.removesuffix("-llama")], rel=0.2)


def test_an_inferred_shape_has_exactly_the_count_that_was_asked_for() -> None:
    for parameters in (3 * 10**6, 10**8, 8 * 10**9, 400 * 10**9, 18 * 10**11):
        shape = infer_shape(parameters)
        assert count_parameters(shape).total == parameters
        assert shape.extra_parameters < 0.3 * parameters


def test_an_inferred_8b_looks_like_llama_8b() -> None:
    shape, llama = infer_shape(8 * 10**9), resolve_model("llama-3.1-8b")
    assert (shape.layers, shape.hidden, shape.kv_heads, shape.vocab) == (
        llama.layers,
        llama.hidden,
        llama.kv_heads,
        llama.vocab,
    )


def test_larger_counts_never_give_a_smaller_shape() -> None:
    shapes = [infer_shape(int(3e6 * 1.1**i)) for i in range(150)]
    for smaller, larger in pairwise(shapes):
        for dimension in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab"):
            assert getattr(larger, dimension) >= getattr(smaller, dimension)


@pytest.mark.parametrize(
    "name", ["nano", "llama-3.1-8b", "mixtral-8x7b", "gpt2-124m", "falcon-7b", "deepseek-v3", "qwen3-8b"]
)
def test_the_config_that_transformers_writes_is_read_back_as_the_same_shape(name: str, tmp_path: Path) -> None:
    model_config(Setup(model=name)).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    # A published config states what kind of model it is; transformers writes it too.
    assert "model_type" in json.loads(config.read_text())
    read, known = resolve_model(str(config)), resolve_model(name)
    assert count_parameters(read).total == count_parameters(known).total
    assert (read.layers, read.hidden, read.kv_heads, read.head_dim) == (
        known.layers,
        known.hidden,
        known.kv_heads,
        known.head_dim,
    )


def test_hub_ids_of_catalog_models_need_no_hub() -> None:
    assert resolve_model("Qwen/Qwen1.5-0.5B").name == "qwen1.5-0.5b"
    assert resolve_model("meta-llama/Llama-3.1-8B-Instruct").name == "llama-3.1-8b"


@pytest.mark.parametrize("text", ["llama-9b-that-never-was", "-8e9", "8x9", "1e3", "1e30", ""])
def test_an_unknown_model_is_one_line(text: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_model(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"hidden_size": "wide"}',
        '{"hidden_size": 0, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}',
        "\xff\xfe",
    ],
)
def test_a_config_that_describes_no_model_is_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError) as caught:
        resolve_model(str(path))
    assert "\n" not in str(caught.value)


def test_every_family_of_the_catalog_says_how_it_is_built_or_that_it_cannot_be() -> None:
    assert transformers_class("llama") == "LlamaConfig"
    assert transformers_class("grok") is None
    with pytest.raises(InputError, match="no class that builds"):
        model_config(Setup(model="grok-1-314b"))


def test_a_path_that_begins_with_a_dot_or_a_digit_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for directory in ("plain", "7b-model"):
        model_config(Setup(model="nano")).save_pretrained(tmp_path / directory)
    nano = count_parameters(resolve_model("nano")).total
    for text in ("./plain", "./plain/config.json", "7b-model", "plain/../7b-model/config.json"):
        assert count_parameters(resolve_model(text)).total == nano, text


def test_a_count_beyond_all_sense_is_one_line() -> None:
    with pytest.raises(InputError, match="too large"):
        resolve_model("9" * 30)
