"""What the ranks of one machine hold in host memory: loading, training and saving; bytes.

Read off transformers 5.23 and 4.48, accelerate 1.15, torch's FSDP and pinned-memory allocator, DeepSpeed 0.14, torchtune,
torchtitan and litgpt. The files of a checkpoint are mapped: ranks that keep its type share its pages, and a rank copies only
what it converts (checked on safetensors 0.8).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from estimator.arrays import Number
from estimator.conventions import shards_flat
from estimator.hardware import is_cpu
from estimator.memory.held import held
from estimator.memory.states import QUANTIZED_BYTES, as_built, keeps_master_weights, placement, states, widths
from estimator.model.shape import ModelShape, count_parameters, lora_modules
from estimator.setup import Setup
from estimator.units import GB, Interval

ADAPTERS = ("lora", "dora", "qlora")
_RUNTIME_BYTES = Interval(value=2.5 * GB, low=1.2 * GB, high=3.5 * GB)
"""A process with torch, the libraries of its device and a data loader."""
_FILE_WIDTH = 2
"""Bytes of a weight in a checkpoint's files."""
_SAVED_FILE = 50e9
"""transformers writes files of up to so many bytes, each put together on the host first."""
_OWN_SHARDS = ("torchtitan", "megatron", "megatron-deepspeed", "nemo", "mlperf", "internevo", "jax")
"""Frameworks whose ranks read and write their own shards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMoment:
    """One candidate for a machine's peak."""

    phase: str
    """loading, training or saving."""
    rank_zero_bytes: float
    """Of the machine's first process, which gathers, without the runtime."""
    other_rank_bytes: float
    """Of each other one."""
    mapped_bytes: float = 0.0
    """Pages of files that all of them share; the system takes them back where memory is short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """Of one machine, at its highest moment."""

    processes: int
    moment: HostMoment
    pinned_bytes: float
    """Of a rank's, what is pinned: its allocator rounds a block up to a power of two, which is included."""

    def machine_bytes(self, runtime: float) -> float:
        moment = self.moment
        ranks = moment.rank_zero_bytes + (self.processes - 1) * moment.other_rank_bytes
        return ranks + moment.mapped_bytes + self.processes * runtime


def host_memory(shape: ModelShape, setup: Setup) -> HostMemory:
    """Of the first machine, whose rank 0 gathers where one does (``setup`` resolved, on accelerators)."""
    shape = as_built(shape, setup)
    processes = min(setup.accelerators, setup.gpus_per_node)
    pinned = _pinned(shape, setup)
    kept = _training(shape, setup) + pinned
    gathered = _gathered_to_save(shape, setup)
    moments = (
        _loading(shape, setup),
        HostMoment(phase="training", rank_zero_bytes=kept, other_rank_bytes=kept),
        HostMoment(phase="saving", rank_zero_bytes=kept + gathered, other_rank_bytes=kept),
    )
    found = [HostMemory(processes=processes, moment=moment, pinned_bytes=pinned) for moment in moments]
    return max(found, key=lambda memory: memory.machine_bytes(0.0))


def host_interval(shape: ModelShape, setup: Setup, device: Interval) -> Interval:
    """A machine's host memory; that of a CPU is the device's."""
    if is_cpu(setup.accelerator):
        return device
    found, runtime = host_memory(shape, setup), _RUNTIME_BYTES
    # At the lowest the mapped pages are gone and a paged optimizer stays on the device; at the highest what the ranks hold
    # has a copy of a tenth of it (conversions, serialization, fragments of the C library's heap).
    held_there = found.machine_bytes(0.0) - found.moment.mapped_bytes
    paged = found.processes * _paged(shape, setup) if found.moment.phase != "loading" else 0.0
    low = held_there - paged + found.processes * runtime.low
    high = 1.1 * held_there + found.moment.mapped_bytes + found.processes * runtime.high
    return Interval(value=round(found.machine_bytes(runtime.value)), low=round(low), high=round(high))


# --- loading ----------------------------------------------------------------------------------------------------------


def _loading(shape: ModelShape, setup: Setup) -> HostMoment:
    parameters = float(count_parameters(shape).total)
    mapped = _FILE_WIDTH * parameters
    if setup.framework in _OWN_SHARDS:
        return HostMoment(phase="loading", rank_zero_bytes=0.0, other_rank_bytes=0.0)
    width = widths(setup).weight
    converted = width * parameters if width != _FILE_WIDTH else 0.0
    if setup.base_quantization:  # tensor by tensor to the device; sharded ones through the first rank's host memory
        packed = QUANTIZED_BYTES[setup.base_quantization] * parameters if placement(setup).gathers else 0.0
        return HostMoment(phase="loading", rank_zero_bytes=packed, other_rank_bytes=0.0, mapped_bytes=mapped)
    if str(setup.sharding) in ("zero1", "zero2") and keeps_master_weights(setup):
        # The engine copies what trains to the host, to put it together there.
        copies = 2 * _FILE_WIDTH * float(states(shape, setup).trainable)
        return HostMoment(phase="loading", rank_zero_bytes=copies, other_rank_bytes=copies, mapped_bytes=mapped)
    if setup.framework in ("litgpt", "torchtune"):  # straight from the mapped file
        return HostMoment(phase="loading", rank_zero_bytes=0.0, other_rank_bytes=0.0, mapped_bytes=mapped)
    # Stage 3 and accelerate's FSDP1 read on the first rank alone, which sends the others theirs; Trainer's FSDP2 does so only
    # where asked to (`cpu_ram_efficient_loading`).
    alone = setup.sharding == "zero3" or shards_flat(setup)
    return HostMoment(
        phase="loading",
        rank_zero_bytes=converted,
        other_rank_bytes=0.0 if alone else converted,
        mapped_bytes=mapped,
    )


# --- training ---------------------------------------------------------------------------------------------------------


def _training(shape: ModelShape, setup: Setup) -> float:
    """What an offloaded rank keeps on its host, without what is pinned."""
    if setup.offload == "activations":
        return _offloaded_activations(shape, setup) + _paged(shape, setup)
    if setup.offload is None:
        return _paged(shape, setup)
    persistent, place = states(shape, setup), placement(setup)
    if setup.sharding == "fsdp":  # the optimizer runs there, on gradients that went there; parameters are pinned
        gradients = persistent.trainable * persistent.gradient_width / place.gradients
        return float(persistent.host_optimizer - _offloaded_parameters(setup, shape) + gradients)
    if not keeps_master_weights(setup):
        return float(persistent.host_optimizer)
    # CPUAdam reads fp32 gradients beside fp32 weights and moments; stage 3 also keeps the half ones of a micro-batch there.
    wide = 4 + (2 if setup.sharding == "zero3" else 0)
    return float(persistent.host_optimizer + wide * persistent.trainable / place.optimizer)


def _paged(shape: ModelShape, setup: Setup) -> float:
    """States in unified memory, which the driver moves to the host where the device is full."""
    return float(states(shape, setup).host_optimizer) if "paged" in str(setup.optimizer) else 0.0


def _offloaded_activations(shape: ModelShape, setup: Setup) -> float:
    on_device = dataclasses.replace(setup, offload=None)
    return float(
        held(
            shape,
            on_device,
            widths(on_device),
            placement(on_device),
            tokens=setup.batch * setup.seq / setup.context_parallel,
            layers=shape.layers / setup.pipeline_parallel,
            in_flight=1,
        ).kept
    )


def _offloaded_parameters(setup: Setup, shape: ModelShape) -> Number:
    """Bytes of a rank's shard, where parameters live on the host."""
    if setup.offload != "optimizer+parameters":
        return 0.0
    return states(shape, dataclasses.replace(setup, offload=None)).parameters


def _pinned(shape: ModelShape, setup: Setup) -> float:
    """FSDP pins the shards of offloaded parameters (FSDP1 also their gradients'), each in a block of its own."""
    parameters = float(_offloaded_parameters(setup, shape))
    if setup.sharding != "fsdp" or not parameters:
        return 0.0
    shards = placement(setup).parameters
    if shards_flat(setup):
        layered = count_parameters(shape).layered / shape.layers
        units = [(layered, shape.layers), (count_parameters(shape).total - layered * shape.layers, 1)]
    else:
        table = float(shape.vocab * shape.hidden)
        matrices = [float(inputs * outputs) for _, inputs, outputs in lora_modules(shape, "all-linear")]
        units = [(table, 1 if shape.tied_embeddings else 2), *((matrix, shape.layers) for matrix in matrices)]
    width = parameters * shards / sum(elements * count for elements, count in units)
    return sum(_power_of_two(width * elements / shards) * count for elements, count in units)


def _power_of_two(size: float) -> float:
    return float(1 << max(int(size) - 1, 0).bit_length())


# --- saving -----------------------------------------------------------------------------------------------------------


def _gathered_to_save(shape: ModelShape, setup: Setup) -> float:
    """What the first rank puts together on its host for a checkpoint: the model, then (but for DeepSpeed's own files) the
    optimizer; torchtune holds both."""
    persistent, place = states(shape, dataclasses.replace(setup, offload=None)), placement(setup)
    if setup.framework in _OWN_SHARDS:
        return 0.0
    size = widths(setup)
    saved = size.trained * persistent.trainable if setup.method in ADAPTERS else size.weight * persistent.total
    if setup.sharding == "zero3":
        return float(saved)
    if setup.sharding != "fsdp":  # what is on the device whole is copied file by file
        return float(min(saved, _SAVED_FILE))
    moments = float(persistent.optimizer * place.optimizer)
    return float(saved + moments) if setup.framework == "torchtune" else max(float(saved), moments)
