"""Random weights quantized as transformers quantizes what it loads: with bitsandbytes, and with a stand-in for it."""

from __future__ import annotations

import importlib.util
import sys
import types
import warnings
from typing import Any

import pytest
import torch

from estimator.building.model import build_model
from estimator.building.quantized_base import linear_layers, quantize_base
from estimator.errors import MissingError
from estimator.setup import Setup

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
QLORA = Setup(model="nano-llama", method="qlora", base_quantization="nf4", precision="bf16-mixed", seq=64).resolved()


@pytest.mark.skipif(INSTALLED, reason="bitsandbytes is installed")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_without_bitsandbytes_a_quantized_base_is_refused_in_one_line(device: str) -> None:
    with (
        pytest.raises(MissingError, match="base_quantization: nf4 needs bitsandbytes; pip install") as raised,
        torch.device(device),
    ):
        build_model(QLORA)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "int8"])
def test_with_bitsandbytes_a_quantized_base_learns_with_adapters(kind: str) -> None:
    model: Any = build_model(Setup(model="nano-llama", method="qlora", base_quantization=kind, precision="fp32"))
    ids = torch.arange(64)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


class Weight(torch.nn.Parameter):
    """What both of bitsandbytes' parameters are to who makes them; it quantizes by rounding."""

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False, **further: Any) -> Any:
        made = super().__new__(cls, data, requires_grad)
        made.further = further  # type: ignore[attr-defined]
        return made

    def to(self, device: Any) -> Any:
        return torch.nn.Parameter((self.data * 100).round().to(torch.int8).to(device), requires_grad=False)


class Layer(torch.nn.Linear):
    def __init__(self, inputs: int, outputs: int, bias: bool, **further: Any) -> None:
        super().__init__(inputs, outputs, bias)
        self.further = further


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("bitsandbytes")
    package.__spec__ = importlib.util.spec_from_loader("bitsandbytes", None)
    package.nn = types.SimpleNamespace(Linear4bit=Layer, Linear8bitLt=Layer, Params4bit=Weight, Int8Params=Weight)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "int8"])
@pytest.mark.parametrize("name", ["nano-llama", "nano", "gpt2-124m"])
def test_every_linear_layer_but_the_head_is_replaced_by_its_own_weights(kind: str, name: str) -> None:
    with torch.device("meta" if name == "gpt2-124m" else "cpu"):
        model: Any = build_model(Setup(model=name, precision="fp32"))
    weights = {found: module.weight.data for found, module in linear_layers(model)}
    assert weights and "lm_head" not in weights
    quantize_base(model, kind, half=torch.bfloat16, drawn=True)
    replaced = {found: module for found, module in model.named_modules() if isinstance(module, Layer)}
    if name == "gpt2-124m":  # nothing is quantized where there is no memory
        assert not replaced
        return
    assert replaced.keys() == weights.keys() and type(model.lm_head) is torch.nn.Linear
    for found, module in replaced.items():
        assert torch.equal(module.weight, (weights[found].bfloat16() * 100).round().to(torch.int8))
    assert getattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit")
    if kind != "int8":
        assert {module.further["compress_statistics"] for module in replaced.values()} == {kind == "nf4-dq"}


@pytest.mark.usefixtures("stand_in")
def test_weights_that_mean_nothing_are_drawn_as_they_are_quantized() -> None:
    model: Any = build_model(Setup(model="nano", precision="fp32"))
    for _, module in linear_layers(model):
        module.weight.data.fill_(float("nan"))
    torch.manual_seed(0)
    quantize_base(model, "nf4", half=torch.float32, drawn=False)
    codes = torch.cat([module.weight.flatten() for module in model.modules() if isinstance(module, Layer)])
    assert codes.float().std() == pytest.approx(2, abs=0.1)  # transformers draws with a deviation of 0.02


def test_a_quantized_weight_is_not_drawn_again() -> None:
    from harness.cuda_process import draw_weights

    model: Any = build_model(Setup(model="nano", precision="fp32"))
    codes = torch.nn.Parameter(torch.full((4, 4), 7, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].mlp.up_proj.weight = codes
    draw_weights(model)
    assert torch.equal(codes, torch.full((4, 4), 7, dtype=torch.uint8))


def test_adapters_are_made_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        build_model(Setup(model="nano", method="lora"))
