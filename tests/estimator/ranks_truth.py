"""Real FSDP2 and DDP runs of two processes on this CPU: the peaks of each rank, as torch's profiler saw every allocation."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from estimator.setup import Setup

_ROOT = Path(__file__).parent.parent.parent
_STEPS = 2


def measured_ranks(setups: Sequence[Setup]) -> list[list[dict[str, int]]]:
    """Of each setup and rank, the highest level by phase. ``setups`` resolved, of the plain loop, for the CPU, and of the
    same number of accelerators."""
    world = setups[0].accelerators
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
        told = json.dumps([asdict(setup) for setup in setups])
        command = [sys.executable, __file__, told, f"file://{scratch}/rendezvous"]
        ranks = [
            subprocess.Popen(
                [*command, str(rank)],
                stdout=subprocess.PIPE,
                text=True,
                env=environment | _as_launched(rank, world),
            )
            for rank in range(world)
        ]
        answers = [process.communicate(timeout=600)[0] for process in ranks]
    assert all(process.returncode == 0 for process in ranks)
    by_rank = [json.loads(answer.splitlines()[-1]) for answer in answers]
    return [list(peaks) for peaks in zip(*by_rank, strict=True)]


def _as_launched(rank: int, world: int) -> dict[str, str]:
    """What torchrun would have set, which Trainer reads."""
    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": 1}
    return {name: str(value) for name, value in known.items()} | {"MASTER_ADDR": "localhost"}


def _run(setup: Setup) -> dict[str, int]:
    gc.collect()  # the run before, so that it does not end within this one
    if setup.framework == "hf-trainer" and setup.tensor_parallel > 1:
        import trainer_ranks

        return trainer_ranks.run(setup, _STEPS, _local)
    import numpy as np
    from torch.distributed.device_mesh import init_device_mesh
    from torch.nn.parallel import DistributedDataParallel

    from estimator.building.model import build_empty_model, build_model
    from estimator.dryrun.sharded import distribute
    from estimator.dryrun.tensor_parallel import split_loss
    from harness.token_dataset import TokenDataset
    from harness.torch_loop import TorchLoop
    from profiler.cpu_memory import CpuMemoryMeter

    alone = replace(
        setup, accelerators=1, data_parallel=1, tensor_parallel=1, context_parallel=1, sharding="none", shard_size=None,
        seq=setup.seq // setup.context_parallel,
    )  # fmt: skip
    # A quantized base is the dry run's stand-in, which needs no library and computes nothing, but on real tensors.
    model: Any = build_empty_model(alone).to_empty(device="cpu") if setup.base_quantization else build_model(alone)
    if setup.base_quantization:
        model.get_base_model().tie_weights()
    vocab = model.config.vocab_size
    meter = CpuMemoryMeter()
    if setup.sharding != "ddp":
        sizes = {"shard": setup.data_ranks * setup.context_parallel, "tensor": setup.tensor_parallel}
        sizes = {name: size for name, size in sizes.items() if size > 1}
        distribute(model, setup, init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes)))
        if setup.base_quantization is None:  # FSDP's policy takes the place of autocast
            alone = replace(alone, precision=setup.precision.replace("bf16-mixed", "fp32"))
    held = _local(model)
    if setup.sharding == "ddp":
        model = DistributedDataParallel(model)
    # The reducer's first buckets are not seen, nor their end: it makes others as the second step begins.
    meter.start(held)
    del held
    sequences = setup.batch * setup.accumulation * _STEPS
    ids = np.random.default_rng(0).integers(0, vocab, (sequences, alone.seq))
    data = TokenDataset(ids, None, length=len(ids), seed=0)
    loop = TorchLoop(alone, model, data, on_phase=meter.enter)
    with contextlib.ExitStack() as stack:
        if setup.tensor_parallel > 1:
            stack.enter_context(split_loss())
        if setup.context_parallel > 1:
            import ring_on_cpu

            from estimator.dryrun.context_parallel import ring_attention

            stack.enter_context(ring_on_cpu.kernels())
            mesh = init_device_mesh("cpu", (setup.context_parallel,), mesh_dim_names=("context",))
            stack.enter_context(ring_attention(mesh))
        loop.train(_STEPS)
    return {phase.phase: phase.allocated_bytes for phase in meter.stop().phases}


def _local(model: Any) -> Any:
    """A module of the tensors that this rank holds."""
    import torch

    held = torch.nn.Module()
    for number, tensor in enumerate([*model.parameters(), *model.buffers()]):
        held.register_buffer(str(number), getattr(tensor, "_local_tensor", tensor).detach())
    return held


def _given_back(collective: Callable[..., Any]) -> Callable[..., Any]:
    """gloo's thread holds a collective's buffers a moment longer than it lasts, and what it is the last to give back the
    profiler does not see. It has given them back by the time that it has done something else."""
    import torch
    import torch.distributed as dist

    plain = dist.all_reduce

    def called(*args: Any, **kwargs: Any) -> None:
        if kwargs.get("op") == dist.ReduceOp.AVG:  # which gloo has not
            kwargs["op"] = dist.ReduceOp.SUM
        work = collective(*args, **(kwargs | {"async_op": True}))
        work.wait()
        plain(torch.empty(1), group=kwargs.get("group"))
        del work

    return called


def _functional_given_back(collective: Any) -> Any:
    """The same of DTensor's collectives, whose work nobody else can hold: it ends with the wait."""
    import torch
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    plain = dist.all_reduce

    def called(*args: Any) -> Any:
        found = collective(*args)
        plain(torch.empty(1), group=distributed_c10d._resolve_process_group(args[-1]))
        torch.ops._c10d_functional.wait_tensor(found)
        return found

    called.default = collective.default  # type: ignore[attr-defined]
    return called


def _one_thread() -> type:
    import torch.distributed as dist

    class OneThread(dist.ProcessGroupGloo):
        def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
            options = dist.ProcessGroupGloo._Options()
            options._threads, options._timeout = 1, timeout
            options._devices = [dist.ProcessGroupGloo.create_default_device()]
            super().__init__(store, rank, size, options)

    return OneThread


def main() -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed import _functional_collectives, distributed_c10d

    told, rendezvous, rank = sys.argv[1:]
    setups = [Setup(**values) for values in json.loads(told)]
    distributed_c10d.ProcessGroupGloo = _one_thread()
    dist.init_process_group("gloo", init_method=rendezvous, rank=int(rank), world_size=setups[0].accelerators)
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "all_to_all_single"):
        functional = _functional_collectives.torch.ops._c10d_functional  # which registers them as it is loaded
        setattr(functional, name, _functional_given_back(getattr(functional, name)))
    for name in ("all_gather_single", "reduce_scatter_single", "all_reduce"):
        setattr(dist, name, _given_back(getattr(dist, name)))
    torch.manual_seed(0)
    print(json.dumps([_run(setup) for setup in setups]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
