"""The dry run beyond a plain step, against real execution on this CPU: evaluation, optimizers in backward, experts."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from estimator.building.model import build_model
from estimator.dryrun.result import DryRun
from estimator.dryrun.run import dry_run
from estimator.setup import Setup
from profiler.memory import MemoryPeaks

sys.path.insert(0, str(Path(__file__).parent))
from cpu_truth import measured_peaks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def _setup(**values: Any) -> Setup:
    return Setup(**({"model": "nano", "precision": "fp32", "seq": 64, "batch": 2, "accelerator": "cpu"} | values)).resolved()  # fmt: skip


def _phase(found: DryRun, name: str) -> int:
    return next(phase.peak_allocated_bytes for phase in found.phases if phase.phase == name)


def _evaluated(setup: Setup) -> MemoryPeaks:
    """Two steps of Trainer and an evaluation of one batch."""
    import numpy as np
    import torch

    from harness.token_dataset import TokenDataset
    from harness.trainer import PhaseTrainer, training_arguments
    from profiler.cpu_memory import CpuMemoryMeter

    torch.manual_seed(0)
    model = build_model(setup)
    random = np.random.default_rng(0)
    assert setup.eval_batch is not None
    data, held_out = (
        TokenDataset(random.integers(0, model.config.vocab_size, (count, setup.seq)), None, length=count, seed=0)
        for count in (2 * setup.batch, setup.eval_batch)
    )
    meter = CpuMemoryMeter()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = training_arguments(setup, output_dir=Path(scratch), max_steps=2, prediction_loss_only=True)
        trainer = PhaseTrainer(model=model, args=arguments, train_dataset=data, on_phase=meter.enter)
        meter.start(model)
        trainer.train()
        trainer.evaluate(eval_dataset=held_out)
    return meter.stop()


@pytest.mark.parametrize(
    "values",
    [
        {"eval_batch": 8},
        {"eval_batch": 8, "precision": "bf16-mixed"},
        {"eval_batch": 6, "precision": "bf16", "checkpointing": "full"},
        {"eval_batch": 8, "precision": "bf16", "autocast": "bf16", "method": "lora"},
        {"eval_batch": 8, "model": "nano-llama", "optimizer": "sgd"},
    ],
    ids=str,
)
def test_a_real_evaluation_peaks_where_the_dry_run_says(values: dict[str, Any]) -> None:
    setup = _setup(**values)
    measured = next(p.allocated_bytes for p in _evaluated(setup).phases if p.phase == "evaluation")
    assert _phase(dry_run(setup), "evaluation") == pytest.approx(measured, rel=0.002)


def _evaluated_plainly(setup: Setup) -> MemoryPeaks:
    """Two steps of the plain loop, and its model on one batch without gradients."""
    import numpy as np
    import torch

    from harness.token_dataset import TokenDataset
    from harness.torch_loop import TorchLoop
    from profiler.cpu_memory import CpuMemoryMeter

    torch.manual_seed(0)
    model: Any = build_model(setup)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2 * setup.batch, setup.seq))
    meter = CpuMemoryMeter()
    loop = TorchLoop(setup, model, TokenDataset(ids, None, length=len(ids), seed=0), on_phase=meter.enter)
    meter.start(model)
    loop.train(2)
    meter.enter("evaluation")
    assert setup.eval_batch is not None
    held_out = torch.zeros(setup.eval_batch, setup.seq, dtype=torch.int64)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=setup.precision == "bf16-mixed")
    with torch.no_grad(), autocast:
        outputs = model.eval()(input_ids=held_out, labels=held_out)
        del outputs
    meter.enter("between")
    return meter.stop()


@pytest.mark.parametrize(
    "values",
    [{"eval_batch": 8}, {"eval_batch": 8, "precision": "bf16-mixed"}, {"eval_batch": 8, "loss": "chunked"}],
    ids=str,
)
def test_a_plain_loops_evaluation_peaks_where_the_dry_run_says(values: dict[str, Any]) -> None:
    setup = _setup(framework="torch-loop", **values)
    measured = next(p.allocated_bytes for p in _evaluated_plainly(setup).phases if p.phase == "evaluation")
    assert _phase(dry_run(setup), "evaluation") == pytest.approx(measured, rel=0.003)


def _trainer_stepped_in_backward(setup: Setup) -> MemoryPeaks:
    """Two steps of Trainer with its own dummy optimizer, as it runs layer-wise ones: hooks step, nothing else does."""
    import numpy as np
    import torch
    from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

    from harness.token_dataset import TokenDataset
    from harness.torch_loop import LEARNING_RATE
    from harness.trainer import PhaseTrainer, training_arguments
    from profiler.cpu_memory import CpuMemoryMeter

    torch.manual_seed(0)
    model: Any = build_model(dataclasses.replace(setup, optimizer_in_backward=False))
    optimizers = {p: torch.optim.AdamW([p], lr=LEARNING_RATE, foreach=False, fused=False) for p in model.parameters()}

    def step(parameter: Any) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step)
    dummy = LayerWiseDummyOptimizer(optimizer_dict=optimizers, lr=LEARNING_RATE)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2 * setup.batch, setup.seq))
    meter = CpuMemoryMeter()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = PhaseTrainer(
            model=model,
            args=training_arguments(setup, output_dir=Path(scratch), max_steps=2, max_grad_norm=0.0),
            train_dataset=TokenDataset(ids, None, length=len(ids), seed=0),
            optimizers=(dummy, torch.optim.lr_scheduler.LambdaLR(dummy, lambda _: 1.0)),
            on_phase=meter.enter,
        )
        meter.start(model)
        trainer.train()
    return meter.stop()


@pytest.mark.parametrize("values", [{}, {"precision": "bf16-mixed", "checkpointing": "full"}], ids=str)
def test_trainers_steps_in_backward_peak_where_the_dry_run_says(values: dict[str, Any]) -> None:
    setup = _setup(optimizer="adamw", optimizer_in_backward=True, **values)
    measured = max(p.allocated_bytes for p in _trainer_stepped_in_backward(setup).phases)
    assert dry_run(setup).peak_allocated_bytes == pytest.approx(measured, rel=0.003)


def _stepped_in_backward(setup: Setup) -> MemoryPeaks:
    """Two steps in which a hook of each parameter steps its optimizer and drops its gradient."""
    import torch

    from harness.torch_loop import LEARNING_RATE
    from profiler.cpu_memory import CpuMemoryMeter

    torch.manual_seed(0)
    model: Any = build_model(dataclasses.replace(setup, optimizer_in_backward=False)).train()
    optimizers = {p: torch.optim.AdamW([p], lr=LEARNING_RATE, foreach=True) for p in model.parameters()}

    def step(parameter: Any) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step)
    ids = torch.randint(0, model.config.vocab_size, (setup.batch, setup.seq))
    meter = CpuMemoryMeter()
    meter.start(model)
    for _ in range(2):
        meter.enter("forward")
        outputs = model(input_ids=ids, labels=ids)
        meter.enter("backward")
        outputs.loss.backward()
        del outputs
        meter.enter("between")
    return meter.stop()


@pytest.mark.parametrize("values", [{}, {"precision": "bf16", "checkpointing": "full"}, {"model": "nano-llama"}], ids=str)  # fmt: skip
def test_real_steps_in_backward_peak_where_the_dry_run_says(values: dict[str, Any]) -> None:
    setup = _setup(framework="torch-loop", optimizer="adamw", optimizer_in_backward=True, **values)
    measured = max(p.allocated_bytes for p in _stepped_in_backward(setup).phases)
    found = dry_run(setup)
    # The batch of this loop exists before the meter: 1 KiB.
    assert found.peak_allocated_bytes == pytest.approx(measured, rel=0.002)
    assert all(phase.phase != "optimizer" for phase in found.phases)


@pytest.mark.parametrize(
    "values",
    [
        {"eval_batch": 16, "precision": "bf16-mixed"},
        {"optimizer_in_backward": True, "precision": "bf16", "checkpointing": "full"},
    ],
    ids=str,
)
def test_variants_written_out_are_the_full_model_to_the_byte(values: dict[str, Any]) -> None:
    setup = Setup(**({"model": "base", "seq": 256, "batch": 2, "accelerator": "RTX-3090"} | values))
    few, all_layers = dry_run(setup), dry_run(setup, every_layer=True)
    assert few.layers_run < all_layers.layers_run
    assert few.phases == all_layers.phases
    assert few.peak_reserved_bytes == all_layers.peak_reserved_bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
def test_a_mixture_of_experts_from_a_bare_config_peaks_where_a_real_step_does(precision: str, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "model_type": "mixtral", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "vocab_size": 4000,
                "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
            }
        )
    )  # fmt: skip
    setup = _setup(model=str(config), precision=precision)
    highest = max(measured_peaks(setup).phases, key=lambda phase: phase.allocated_bytes)
    found = dry_run(setup)
    assert found.peak_allocated_bytes == pytest.approx(highest.allocated_bytes, rel=0.001)
    assert found.peak_phase == highest.phase
