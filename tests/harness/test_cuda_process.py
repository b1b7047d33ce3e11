"""What a process prepares before it trains on a GPU; everything that needs no GPU to be checked."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from estimator.building.model import build_model
from estimator.setup import Setup
from harness.cuda_process import (
    allocator_settings,
    attention_held_to,
    chosen_attention,
    draw_weights,
    settle_allocator,
)
from harness.fork_server import _one_gpu


@pytest.mark.parametrize(
    ("given", "expandable", "settings"),
    [
        ("", False, ""),
        ("", True, "expandable_segments:True"),
        ("max_split_size_mb:64", True, "max_split_size_mb:64,expandable_segments:True"),
        ("max_split_size_mb:64", False, "max_split_size_mb:64"),
        ("expandable_segments:True", False, "expandable_segments:False"),
        (
            "roundup_power2_divisions:[256:1,512:2], expandable_segments:True",
            False,
            "roundup_power2_divisions:[256:1,512:2],expandable_segments:False",
        ),
    ],
)
def test_the_setup_decides_about_expandable_segments_alone(given: str, expandable: bool, settings: str) -> None:
    assert allocator_settings(given, expandable=expandable) == settings


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The settings that torch is given, instead of applied."""
    found: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", found.append, raising=False)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
    return found


def test_both_variables_and_torch_itself_are_told(applied: list[str]) -> None:
    settle_allocator(Setup(model="nano"))
    assert (applied, os.environ["PYTORCH_ALLOC_CONF"]) == ([], "")
    settle_allocator(Setup(model="nano", expandable_segments=True))
    expected = "expandable_segments:True"
    assert applied == [expected]
    assert (os.environ["PYTORCH_ALLOC_CONF"], os.environ["PYTORCH_CUDA_ALLOC_CONF"]) == (expected, expected)


def test_what_the_environment_says_otherwise_is_undone(applied: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    settle_allocator(Setup(model="nano"))
    assert applied == ["expandable_segments:False"]


def test_attention_is_held_to_a_kernel_and_let_go() -> None:
    def allowed() -> tuple[bool, bool]:
        return torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()

    before = allowed()
    with attention_held_to("math"):
        assert allowed() == (False, True)
    with attention_held_to("flash"):
        assert allowed() == (True, False)
    with attention_held_to(None):
        assert allowed() == before
    assert allowed() == before


def test_the_kernel_that_sdpa_picks_is_asked_of_torch() -> None:
    assert chosen_attention(Setup(model="nano")) == "flash"  # a CPU's own
    assert chosen_attention(Setup(model="nano", attention="eager")) is None
    with attention_held_to("math"):
        assert chosen_attention(Setup(model="llama-3.2-1b", precision="fp32")) == "math"


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("model", ["nano", "nano-llama", "gpt2-124m"])
def test_weights_drawn_later_are_those_of_an_initialised_model_in_kind(model: str) -> None:
    setup = Setup(model=model, precision="fp32", seq=64)
    usual, drawn = build_model(setup), build_model(setup, drawn=False)
    assert shapes(usual) == shapes(drawn)
    for parameter in drawn.parameters():  # whatever the memory held
        parameter.data.fill_(float("nan"))
    # What no initialiser draws is made by the module itself, and was overwritten just now.
    made = {name for name, parameter in usual.named_parameters() if parameter.dim() == 1 and "ln_" not in name}
    for name, parameter in drawn.named_parameters():
        if name in made and not name.endswith("bias"):
            parameter.data.fill_(1.0)
    draw_weights(drawn)
    for (name, expected), (_, found) in zip(usual.named_parameters(), drawn.named_parameters(), strict=True):
        assert torch.isfinite(found).all(), name
        if expected.dim() == 1:
            assert torch.equal(expected, found), name
        else:  # gpt2 divides some by the depth
            assert 0.015 < found.std() < 0.025 and expected.std() < 0.025, name
    ids = torch.arange(64)[None]
    losses = [model(input_ids=ids, labels=ids).loss.item() for model in (usual, drawn)]  # type: ignore[operator]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_tied_head_stays_tied_and_adapters_keep_their_values() -> None:
    model: Any = build_model(Setup(model="nano", precision="fp32", seq=64, method="lora", lora_rank=4), drawn=False)
    adapters = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    draw_weights(model)
    assert adapters and all(
        torch.equal(dict(model.named_parameters())[name], value) for name, value in adapters.items()
    )
    base = model.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.weight


@pytest.mark.parametrize(("visible", "one"), [(None, "0"), ("2,3", "2"), ("GPU-ab", "GPU-ab"), ("", "")])
def test_children_see_one_gpu(visible: str | None, one: str) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert _one_gpu(environment) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": one}
