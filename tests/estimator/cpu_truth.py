"""Real training steps on this CPU, and the peaks of each phase as torch's profiler saw every allocation."""

from __future__ import annotations

import tempfile
from pathlib import Path

from estimator.setup import Setup
from profiler.memory import MemoryPeaks


def measured_peaks(setup: Setup, steps: int = 2) -> MemoryPeaks:
    """Of ``steps`` steps of the loop that the setup's framework names. ``setup`` resolved, for the CPU."""
    import numpy as np
    import torch

    from estimator.building.model import build_model
    from harness.token_dataset import TokenDataset
    from harness.torch_loop import TorchLoop
    from harness.trainer import PhaseTrainer, training_arguments
    from profiler.cpu_memory import CpuMemoryMeter

    torch.manual_seed(0)
    model = build_model(setup)
    sequences = setup.batch * setup.accumulation * steps
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (sequences, setup.seq))
    lengths = None if setup.pack else np.full(sequences, setup.seq // 2)
    data = TokenDataset(ids, lengths, length=sequences, seed=0)
    meter = CpuMemoryMeter()
    with tempfile.TemporaryDirectory() as scratch:
        if setup.framework == "torch-loop":
            loop = TorchLoop(setup, model, data, on_phase=meter.enter)
            meter.start(model)
            loop.train(steps)
        else:
            arguments = training_arguments(setup, output_dir=Path(scratch), max_steps=steps)
            trainer = PhaseTrainer(model=model, args=arguments, train_dataset=data, on_phase=meter.enter)
            meter.start(model)
            trainer.train()
    return meter.stop()
