"""Shapes: their parameters against torch and published counts, and every way a model can be named."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from estimator.building.model import model_config
from estimator.data import read_data
from estimator.errors import InputError
from estimator.memory.checkpoint import weight_tensors
from estimator.model.catalog import built_in_names, infer_shape, model_names, resolve_model, transformers_class
from estimator.model.config_shape import shape_from_config
from estimator.model.shape import ModelShape, active_parameters, count_parameters, lora_parameters
from estimator.setup import Setup

# One of every family that transformers builds, and the mixtures of experts.
BUILT = [
    "nano", "nano-llama", "qwen1.5-0.5b", "llama-3.1-8b", "qwen3-8b", "qwen3-30b-a3b", "mistral-7b", "mixtral-8x7b", "gemma-2b",
    "gpt2-124m", "santacoder", "phi-2", "opt-1.3b", "falcon-7b", "stablelm-alpha-3b", "nemotron4-15b", "deepseek-v3", "powerlm-3b",
    "qwen1.5-moe-a2.7b", "granite-3.1-1b-a400m-instruct", "olmo-2-1b", "olmoe-1b-7b", "minimax-m2", "glm-4.5", "command-r-v01", "stablelm-2-1.6b",
    "phi-3.5-moe", "afm-4.5b", "starcoder2-3b", "gemma-3-1b",
]  # fmt: skip
EAGER = ["gemma-2-9b", "bloom-7b1", "gpt-oss-20b", "gpt-j-6b", "gpt-neo-1.3b"]


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


@pytest.mark.parametrize(
    ("name", "parameters"),
    # What their files on the hub hold, to the last one.
    [
        ("qwen2.5-7b", 7_615_616_512), ("deepseek-r1-distill-qwen-1.5b", 1_777_088_000), ("qwen3-30b-a3b", 30_532_122_624),
        ("qwen1.5-moe-a2.7b", 14_315_784_192), ("mistral-7b-v0.3", 7_248_023_552), ("ministral-8b", 8_019_808_256),
        ("gemma-2-27b", 27_227_128_320), ("phi-4", 14_659_507_200), ("olmoe-1b-7b", 6_919_161_856), ("smollm3-3b", 3_075_098_624),
        ("starcoder2-7b", 7_173_923_840), ("starcoder-15b", 15_517_456_384), ("pythia-6.9b", 6_857_302_016), ("gpt-j-6b", 6_050_882_784),
        ("gpt-neo-2.7b", 2_651_307_520), ("gpt-neox-20b", 20_554_567_680), ("bloom-560m", 559_214_592), ("dbrx", 131_596_523_520),
    ],
)  # fmt: skip
def test_published_files_hold_as_many_parameters(name: str, parameters: int) -> None:
    assert count_parameters(resolve_model(name)).total == parameters


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


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"), ("unsloth/Meta-Llama-3.1-8B-bnb-4bit", "llama-3.1-8b"), ("llama3_1_8b", "llama-3.1-8b"),
        ("meta-llama-llama-3.1-8b", "llama-3.1-8b"), ("TheBloke/Llama-2-13B-chat-GPTQ", "llama-2-13b"), ("gpt-2-small", "gpt2-124m"),
        ("EleutherAI/pythia-70m-deduped", "pythia-70m"), ("deepseek-ai/DeepSeek-R1", "deepseek-v3"), ("01-ai-yi-1.5-34b-chat", "yi-34b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"), ("Qwen/Qwen2.5-72B-Instruct-GPTQ-Int4", "qwen2.5-72b-instruct-awq"),
    ],
)  # fmt: skip
def test_a_model_has_many_spellings(text: str, name: str) -> None:
    assert resolve_model(text).name == name


# Of these there are several: other vocabularies of Granite's base models, two Small Mistrals, a tuned model with a longer table.
@pytest.mark.parametrize("text", ["granite-3.0-8b", "mistral-small", "llama", "llama-3-8b-262k", "nano-chat"])
def test_a_name_that_says_too_little_is_not_guessed(text: str) -> None:
    with pytest.raises(InputError, match="did you mean"):
        resolve_model(text)


def test_names_with_the_same_letters_and_numbers_have_the_same_shape() -> None:
    shapes: dict[tuple[str, ...], ModelShape] = {}
    models = {row["model"] for row in read_data("models.csv")}
    rows = [(name, name) for name in models] + [(row["alias"], row["model"]) for row in read_data("model_aliases.csv")]
    for name, model in rows:
        assert model in models, name
        shape = dataclasses.replace(resolve_model(model), name="")
        assert shapes.setdefault(tuple(re.findall(r"[a-z]+|[0-9]+", name)), shape) == shape, name


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


@pytest.mark.parametrize("text", ["x" * 5000, "/" + "x" * 5000, "~nobody-at-all/model", "x" * 300 + "/" + "y" * 300])
def test_a_name_that_no_file_can_have_is_one_line(text: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_model(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("without", "every"), [([0, 3], 1), ([1, 2, 5], 2), ([0, 99], 3)])
def test_layers_that_a_config_leaves_without_experts_are_counted_as_transformers_builds_them(
    without: list[int], every: int
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen2MoeConfig

    config = Qwen2MoeConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=7, num_attention_heads=4, num_key_value_heads=2, intermediate_size=160,
        moe_intermediate_size=48, shared_expert_intermediate_size=48, num_experts=4, num_experts_per_tok=2, mlp_only_layers=without,
        decoder_sparse_step=every,
    )  # fmt: skip
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    shape = shape_from_config(json.loads(config.to_json_string()), "mixture")
    assert count_parameters(shape).total == sum(parameter.numel() for parameter in built.parameters())
