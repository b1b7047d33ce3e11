"""From the allocated peak to what the allocator reserves, what the device and the host then hold, and how sure that is."""

from __future__ import annotations

from estimator.arrays import Number, maximum, minimum, where, whole
from estimator.hardware import context_bytes, find_accelerator, is_cpu
from estimator.memory import PhaseMemory
from estimator.setup import Setup
from estimator.shape import ModelShape, count_parameters
from estimator.states import states
from estimator.units import GB, Interval

# Relative half-widths of the formula's 90% intervals on published peaks (docs/accuracy.md): the frameworks whose code
# was read, the others, several devices, and what an inferred shape adds.
_KNOWN_FRAMEWORK, _OTHER_FRAMEWORK, _SEVERAL_DEVICES, _INFERRED_SHAPE = 0.06, 0.25, 0.15, 0.12
# What the caching allocator holds beyond the tensors, as a share of them: without checkpointing or sharding, and what
# each of these adds (medians of published reserved and device peaks: 1.02-1.12, 1.26, 1.2-1.45).
_FRAGMENTATION = Interval(value=0.04, low=0.0, high=0.25)
_CHECKPOINTED, _SHARDED = 0.12, 0.10
_FRAGMENTS = 0.03
_FRAGMENTATION_EXPANDABLE = Interval(value=0.01, low=0.0, high=0.10)
# A CPU's allocator, the C library, with blocks of every size in one heap (profiled runs of the built-in models).
_FRAGMENTATION_CPU = Interval(value=0.16, low=0.0, high=0.95)


def formula_interval(shape: ModelShape, setup: Setup, peak: PhaseMemory) -> Interval:
    """The allocated peak in bytes, by the formula."""
    known = setup.framework in ("hf-trainer", "torch-loop")
    width = _KNOWN_FRAMEWORK if known else _OTHER_FRAMEWORK
    width += (_SEVERAL_DEVICES if setup.accelerators > 1 else 0.0) + (_INFERRED_SHAPE if shape.inferred else 0.0)
    return Interval.within(peak.bytes, below=width, above=width)


def _reserved_share(setup: Setup) -> Interval:
    """What the allocator holds beyond the tensors, as a share of them."""
    if is_cpu(setup.accelerator):
        return _FRAGMENTATION_CPU
    share = _FRAGMENTATION_EXPANDABLE if setup.expandable_segments else _FRAGMENTATION
    sharded = setup.sharding not in ("none", "ddp")
    more = (_CHECKPOINTED if setup.checkpointing != "none" else 0.0) + (_SHARDED if sharded else 0.0)
    return Interval(value=share.value + more, low=share.low, high=share.high + 2 * more)


def reserved_interval(setup: Setup, allocated: Interval, room_bytes: int | None) -> Interval:
    """The peak of the allocator's segments in bytes, from the allocated peak and the room that the device has."""
    share = _reserved_share(setup)
    return whole_interval(
        _within_room(allocated.value, share.value, room_bytes),
        _within_room(allocated.low, share.low, room_bytes),
        _within_room(allocated.high, share.high, room_bytes),
    )


def device_bytes(setup: Setup, allocated: Number, room_bytes: int | None) -> Number:
    """The peak of a device's memory as ``device_interval`` has its value; an array where ``allocated`` is one."""
    reserved = _within_room(allocated, _reserved_share(setup).value, room_bytes)
    return whole(whole(reserved) + context_bytes(setup.accelerator).value)


def _within_room(allocated: Number, share: float, room_bytes: int | None) -> Number:
    """Where the device is full the allocator gives its cache back: what stays are the tensors and fragments among them."""
    reserved = allocated * (1 + share)
    if room_bytes is None:
        return reserved
    full = maximum(float(room_bytes), minimum(reserved, allocated * (1 + _FRAGMENTS)))
    return where(reserved <= room_bytes, reserved, full)


def allocator_room_bytes(setup: Setup, reserve_bytes: int, capacity_bytes: int | None) -> int | None:
    """What a GPU has for the allocator; ``None`` where that is unknown."""
    if setup.accelerator is None or is_cpu(setup.accelerator):
        return None
    capacity = capacity_bytes or find_accelerator(setup.accelerator).usable_bytes
    if capacity is None:
        return None
    return max(capacity - reserve_bytes - round(context_bytes(setup.accelerator).value), 0)


def device_interval(setup: Setup, reserved: Interval) -> Interval:
    """What the device holds: the segments, the driver's context and the libraries."""
    context = context_bytes(setup.accelerator)
    return whole_interval(reserved.value + context.value, reserved.low + context.low, reserved.high + context.high)


def whole_interval(value: float, low: float, high: float) -> Interval:
    """Whole bytes."""
    return Interval(value=round(value), low=round(low), high=round(high))


def host_interval(shape: ModelShape, setup: Setup, device: Interval) -> Interval:
    """Of one machine: its processes, what is offloaded, and one full model at loading or gathering for a save."""
    if is_cpu(setup.accelerator):
        return device
    persistent = states(shape, setup)
    processes = min(setup.accelerators, setup.gpus_per_node)
    model = count_parameters(shape).total * (2.0 if setup.precision in ("bf16", "fp16") else 4.0)
    fixed = processes * (2.5 * GB + persistent.host_optimizer)
    return whole_interval(fixed + model, fixed * 0.5, 1.3 * fixed + 2 * model)
