"""From the allocated peak to what the allocator reserves, what the device and the host then hold, and how sure that is."""

from __future__ import annotations

from estimator.arrays import Number, maximum, minimum, where, whole
from estimator.conventions import conventions
from estimator.hardware import context_bytes, find_accelerator, is_cpu
from estimator.memory import PhaseMemory, peak_and_segment_bytes
from estimator.setup import Setup
from estimator.shape import ModelShape, count_parameters
from estimator.states import placement, states
from estimator.units import GB, Interval

# Relative half-widths of the formula's 90% intervals on published peaks (docs/accuracy.md), by framework: on one device,
# and what several, a quantized base and an inferred shape add.
_ALLOCATED = {
    "torch-loop": 0.02, "hf-trainer": 0.03, "hf-trainer+deepspeed": 0.004, "litgpt": 0.06, "torchtune": 0.08, "torchtitan": 0.08,
}  # fmt: skip
_OTHER_FRAMEWORK, _SEVERAL_DEVICES, _QUANTIZED, _INFERRED_SHAPE = 0.25, 0.04, 0.09, 0.12
_SEVERAL_DEEPSPEED = 0.15
# On a full device: what stays beyond the tensors once the allocator has given back what it can, as a share of them; with
# adapters under FSDP by published runs (70B on two devices fits to 43 of 79 GiB, and not to 66).
_FRAGMENTS, _FRAGMENTS_ADAPTERS_GATHERED = 0.03, 0.20
# The spread of published reserved and device peaks around the sum of the segments, relative: on one device, and what
# lengths that vary add; upwards also what a quantized base does.
_SEGMENTS, _SEGMENTS_DEEPSPEED, _SEGMENTS_VARYING, _SEGMENTS_QUANTIZED = 0.10, 0.055, 0.22, 0.12
# A CPU's allocator, the C library, with blocks of every size in one heap (profiled runs of the built-in models).
_FRAGMENTATION_CPU = Interval(value=0.16, low=0.0, high=0.95)


def _allocated_width(shape: ModelShape, setup: Setup) -> float:
    several = _SEVERAL_DEEPSPEED if setup.framework == "hf-trainer+deepspeed" else _SEVERAL_DEVICES
    width = _ALLOCATED.get(setup.framework, _OTHER_FRAMEWORK)
    width += (several if setup.accelerators > 1 else 0.0) + (_QUANTIZED if setup.base_quantization else 0.0)
    return width + (_INFERRED_SHAPE if shape.inferred else 0.0)


def formula_interval(shape: ModelShape, setup: Setup, peak: PhaseMemory) -> Interval:
    """The allocated peak in bytes, by the formula."""
    width = _allocated_width(shape, setup)
    return Interval.within(peak.bytes, below=width, above=width)


def reserved_interval(shape: ModelShape, setup: Setup, allocated: Interval, room_bytes: int | None) -> Interval:
    """The peak of the allocator's segments in bytes, from the allocated peak and the room that the device has."""
    if is_cpu(setup.accelerator):
        cpu = _FRAGMENTATION_CPU
        return whole_interval(
            allocated.value * (1 + cpu.value), allocated.low * (1 + cpu.low), allocated.high * (1 + cpu.high)
        )
    peak, segments = peak_and_segment_bytes(shape, setup)
    held = segments / peak
    one = setup.framework == "hf-trainer+deepspeed" and setup.accelerators == 1
    width = (_SEGMENTS_DEEPSPEED if one else _SEGMENTS) + (_SEGMENTS_VARYING if setup.varying_lengths else 0.0)
    above = width + (_SEGMENTS_QUANTIZED if setup.base_quantization else 0.0)
    # Half of the tensors' own uncertainty is in that spread already.
    low = (allocated.value + allocated.low) / 2 * held * (1 - width)
    high = (allocated.value + allocated.high) / 2 * held * (1 + above)
    return whole_interval(
        _within_room(setup, allocated.value * held, allocated.value, room_bytes),
        _within_room(setup, max(low, allocated.low), allocated.low, room_bytes),
        _within_room(setup, max(high, allocated.high), allocated.high, room_bytes),
    )


def device_bytes(
    shape: ModelShape, setup: Setup, room_bytes: int | None, *, allocated_bytes: Number | None = None
) -> Number:
    """The peak of a device's memory as ``device_interval`` has its value; an array where the setup's numbers are arrays.

    allocated_bytes: the allocated peak where it is known better than by the formula.
    """
    peak, segments = peak_and_segment_bytes(shape, setup)
    allocated = peak if allocated_bytes is None else allocated_bytes
    if is_cpu(setup.accelerator):
        reserved = allocated * (1 + _FRAGMENTATION_CPU.value)
    else:
        reserved = _within_room(setup, allocated * (segments / peak), allocated, room_bytes)
    return whole(whole(reserved) + context_bytes(setup.accelerator).value)


def _within_room(setup: Setup, reserved: Number, allocated: Number, room_bytes: int | None) -> Number:
    """Where the device is full the allocator gives its cache back: what stays are the tensors and fragments among them."""
    if room_bytes is None:
        return reserved
    grows = setup.expandable_segments or conventions(setup).expandable_segments
    fragments: Number = _FRAGMENTS
    if setup.method in ("lora", "dora", "qlora") and not grows:
        fragments = where(placement(setup).gathers, _FRAGMENTS_ADAPTERS_GATHERED, _FRAGMENTS)
    full = maximum(float(room_bytes), minimum(reserved, allocated * (1 + fragments)))
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
