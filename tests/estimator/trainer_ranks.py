"""One rank of a real run of transformers' Trainer, with the model split as transformers splits it while it loads."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from estimator.setup import Setup


def run(setup: Setup, steps: int, held: Any) -> dict[str, int]:
    """The highest level by phase; ``held`` makes a module of what this rank holds. Of a process group that exists."""
    import numpy as np
    import torch
    import torch.distributed as dist
    from accelerate import ParallelismConfig
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from estimator.building.methods import apply_method
    from estimator.building.model import build_model, enable_checkpointing, weight_dtype
    from harness.token_dataset import TokenDataset
    from harness.trainer import PhaseTrainer, training_arguments
    from profiler.cpu_memory import CpuMemoryMeter

    # accelerate asks for GPUs, for no reason that a step has.
    ParallelismConfig._validate_accelerator = lambda config, accelerator: None  # type: ignore[method-assign]
    alone = replace(setup, accelerators=1, data_parallel=1, tensor_parallel=1, sharding="none", shard_size=None)
    vocab, meter = 0, CpuMemoryMeter()
    with tempfile.TemporaryDirectory() as scratch:
        where = [scratch]
        dist.broadcast_object_list(where, src=0)
        if dist.get_rank() == 0:
            build_model(
                Setup(model=setup.model, precision=setup.precision, accelerator="cpu").resolved()
            ).save_pretrained(scratch)
        dist.barrier()
        sizes = DistributedConfig(tp_size=setup.tensor_parallel, fsdp_size=setup.data_ranks)
        model: Any = AutoModelForCausalLM.from_pretrained(
            where[0], distributed_config=sizes, dtype=weight_dtype(setup), attn_implementation=setup.attention
        )
        dist.barrier()
        model.config.use_cache = False
        vocab = model.config.vocab_size
        if setup.checkpointing != "none":
            enable_checkpointing(model, setup)
        model = apply_method(model, setup)
        for module in model.modules():
            # peft 0.21 makes these of a split layer's own width, where transformers 5.23 takes it for the whole one's.
            for adapter in getattr(module, "lora_A", {}).values():
                adapter.in_features = module.base_layer.in_features
        sequences = setup.batch * setup.accumulation * steps * setup.data_ranks
        ids = np.random.default_rng(0).integers(0, vocab, (sequences, setup.seq))
        data = TokenDataset(ids, None, length=sequences, seed=0)
        arguments = training_arguments(alone, output_dir=Path(scratch), max_steps=steps)
        trainer = PhaseTrainer(model=model, args=arguments, train_dataset=data, on_phase=meter.enter)
        for parameter in model.parameters():
            if hasattr(parameter, "_local_tensor"):  # on a CPU a slice of the whole, which is kept
                parameter._local_tensor = parameter._local_tensor.clone()
        meter.start(held(model))
        trainer.train()
        del trainer, model
    torch.manual_seed(0)
    return {phase.phase: phase.allocated_bytes for phase in meter.stop().phases}
