"""Trainer as a setup configures it, and the phases that it reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Subset
from transformers import Trainer

from estimator.building.model import build_model
from estimator.errors import InputError, MissingError
from estimator.setup import Setup
from harness.data import load_tokens
from harness.trainer import PhaseTrainer, training_arguments


def setup_of(**settings: Any) -> Setup:
    return Setup(**({"model": "nano", "precision": "fp32", "seq": 16, "batch": 2} | settings))


def trainer_of(kind: type[Trainer], setup: Setup, cache: Path, out: Path, **more: Any) -> Trainer:
    data = load_tokens(None, model=setup.model, seq=setup.seq, pack=setup.pack, sequences=None, cache=cache)
    arguments = training_arguments(setup, output_dir=out, max_steps=3, logging_strategy="steps", logging_steps=1)
    return kind(
        model=build_model(setup),
        args=arguments,
        train_dataset=data.train,
        eval_dataset=Subset(data.evaluation, range(4)),
        **more,
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"optim": "adamw_torch_fused", "bf16": False, "fp16": False, "per_device_train_batch_size": 2}),
        ({"precision": "bf16-mixed"}, {"bf16": True, "mixed_precision": "bf16"}),
        ({"precision": "bf16"}, {"bf16": False, "mixed_precision": "no"}),
        ({"precision": "bf16", "autocast": "bf16"}, {"bf16": True}),
        ({"optimizer": "adamw"}, {"optim": "adamw_torch"}),
        ({"optimizer": "adafactor"}, {"optim": "adafactor"}),
        ({"optimizer": "sgd", "accumulation": 5}, {"optim": "sgd", "gradient_accumulation_steps": 5}),
        ({"eval_batch": 7}, {"per_device_eval_batch_size": 7}),
        ({}, {"max_grad_norm": 1.0, "report_to": [], "push_to_hub": False, "disable_tqdm": True}),
    ],
)
def test_each_setting_becomes_trainers_argument(
    tmp_path: Path, settings: dict[str, Any], expected: dict[str, Any]
) -> None:
    arguments = training_arguments(setup_of(**settings), output_dir=tmp_path)
    assert {name: getattr(arguments, name) for name in expected} == expected


def test_the_environment_does_not_decide_the_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert training_arguments(setup_of(), output_dir=tmp_path).mixed_precision == "no"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"framework": "megatron"}, InputError, "framework: megatron can be estimated but not run here"),
        ({"zero_grad": "zero"}, InputError, "write --zero-grad none"),
        ({"optimizer": "adamw-8bit"}, MissingError, "optimizer: adamw-8bit needs bitsandbytes; pip install"),
    ],
)
def test_what_trainer_cannot_do_is_one_clear_line(
    tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(error) as raised:
        training_arguments(setup_of(**settings), output_dir=tmp_path)
    assert message in str(raised.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where fp16 trains")
def test_fp16_autocast_without_a_gpu_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="write --precision bf16-mixed or fp32"):
        training_arguments(setup_of(precision="fp16-mixed"), output_dir=tmp_path)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_phase_of_every_step_is_announced_in_order(cache: Path, tmp_path: Path, accumulation: int) -> None:
    phases: list[str] = []
    setup = setup_of(accumulation=accumulation)
    trainer_of(PhaseTrainer, setup, cache, tmp_path, on_phase=phases.append).train()
    assert phases == (["forward", "backward"] * accumulation + ["optimizer", "between"]) * 3


def test_an_evaluation_is_a_phase_of_its_own(cache: Path, tmp_path: Path) -> None:
    phases: list[str] = []
    trainer = trainer_of(PhaseTrainer, setup_of(), cache, tmp_path, on_phase=phases.append)
    trainer.evaluate()
    assert phases == ["evaluation", "between"]


def test_phases_begin_where_they_say(cache: Path, tmp_path: Path) -> None:
    """At "backward" no gradient is there yet, at "optimizer" all are and no weight has moved, at "between" none is left."""
    seen: list[tuple[str, bool, bool]] = []
    trainer = trainer_of(PhaseTrainer, setup_of(), cache, tmp_path, on_phase=lambda phase: look(phase))
    model = trainer.model
    assert model is not None
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def look(phase: str) -> None:
        if len(seen) < 4:
            gradients = all(parameter.grad is not None for parameter in model.parameters())
            moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            seen.append((phase, gradients, moved))

    trainer.train()
    assert seen == [
        ("forward", False, False),
        ("backward", False, False),
        ("optimizer", True, False),
        ("between", False, True),
    ]


def test_announcing_phases_changes_no_loss(cache: Path, tmp_path: Path) -> None:
    losses = []
    for kind, more in ((Trainer, {}), (PhaseTrainer, {}), (PhaseTrainer, {"on_phase": lambda phase: None})):
        trainer = trainer_of(kind, setup_of(), cache, tmp_path, **more)
        trainer.train()
        losses.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
    assert len(losses[0]) == 3
    assert losses[0] == losses[1] == losses[2]


def test_it_writes_nothing_to_the_terminal(cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_of(PhaseTrainer, setup_of(), cache, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert capfd.readouterr() == ("", "")
