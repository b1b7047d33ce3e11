"""From the allocated peak to what the allocator reserves, what the device and the host then hold, and how sure that is."""

from __future__ import annotations

from estimator.arrays import Number, maximum, minimum, where, whole
from estimator.conventions import conventions, shards_flat
from estimator.hardware import context_bytes, find_accelerator, is_cpu
from estimator.memory.formula import PhaseMemory, peak_and_segment_bytes
from estimator.memory.segments import LATE_BLOCKS
from estimator.memory.states import placement
from estimator.model.shape import ModelShape
from estimator.setup import Setup
from estimator.units import Interval

# Relative half-widths of the formula's 90% intervals on published peaks (docs/accuracy.md), by framework: on one device,
# and what several, a quantized base, lengths that vary and an inferred shape add.
_ALLOCATED = {
    "torch-loop": 0.02, "hf-trainer": 0.013, "hf-trainer+deepspeed": 0.003, "litgpt": 0.048, "torchtune": 0.08, "torchtitan": 0.08,
}  # fmt: skip
_SEVERAL_DEVICES = {"hf-trainer": 0.013, "hf-trainer+deepspeed": 0.15, "litgpt": 0.005}
_QUANTIZED = {"hf-trainer": 0.016, "litgpt": 0.03}
_OTHER_FRAMEWORK, _OTHER_SEVERAL_DEVICES, _OTHER_QUANTIZED = 0.25, 0.04, 0.09
_VARYING, _UNEVEN, _INFERRED_SHAPE = 0.04, 0.20, 0.12
# On a full device: what stays beyond the tensors once the allocator has given back what it can, as a share of them. Segments
# that grow leave little; others also keep a share of what they had with all the room.
_FRAGMENTS, _FRAGMENTS_GROWN, _FRAGMENTS_KEPT = 0.03, 0.01, 0.10
# The spread of published reserved and device peaks around the sum of the segments, relative, and what lengths that vary,
# and unequal loads (as above) add; upwards also what a quantized base does. torchtitan's releases differ by so much in one
# and the same setup.
_SEGMENTS, _SEGMENTS_DEEPSPEED, _SEGMENTS_TORCHTITAN = 0.13, 0.055, 0.25
_SEGMENTS_VARYING, _SEGMENTS_QUANTIZED = 0.22, 0.12
# A CPU's allocator, the C library, with blocks of every size in one heap (profiled runs of the built-in models).
_FRAGMENTATION_CPU = Interval(value=0.16, low=0.0, high=0.95)


def _allocated_width(shape: ModelShape, setup: Setup) -> float:
    framework = setup.framework
    width = _ALLOCATED.get(framework, _OTHER_FRAMEWORK)
    if setup.accelerators > 1:
        width += _SEVERAL_DEVICES.get(framework, _OTHER_SEVERAL_DEVICES)
    if setup.base_quantization:
        width += _QUANTIZED.get(framework, _OTHER_QUANTIZED)
    width += (_VARYING if setup.varying_lengths else 0.0) + (_UNEVEN if _is_uneven(setup) else 0.0)
    return width + (_INFERRED_SHAPE if shape.inferred else 0.0)


def _is_uneven(setup: Setup) -> bool:
    """Loads differ between devices by what no setting says: where tokens go, and how a pipeline cuts its batches."""
    return setup.expert_parallel > 1 or setup.pipeline_parallel > 1


def _segments_width(setup: Setup) -> tuple[float, float]:
    """(below, above), relative."""
    if setup.framework == "hf-trainer+deepspeed" and setup.accelerators == 1:
        width = _SEGMENTS_DEEPSPEED
    else:
        width = _SEGMENTS_TORCHTITAN if setup.framework == "torchtitan" else _SEGMENTS
    width += _SEGMENTS_VARYING if setup.varying_lengths else 0.0
    width += _UNEVEN if _is_uneven(setup) else 0.0
    return width, width + (_SEGMENTS_QUANTIZED if setup.base_quantization else 0.0)


def formula_interval(shape: ModelShape, setup: Setup, peak: PhaseMemory) -> Interval:
    """The allocated peak in bytes, by the formula."""
    width = _allocated_width(shape, setup)
    return whole_interval(peak.bytes, peak.bytes * (1 - width), peak.bytes * (1 + width))


def reserved_interval(shape: ModelShape, setup: Setup, allocated: Interval, room_bytes: int | None) -> Interval:
    """The peak of the allocator's segments in bytes, from the allocated peak and the room that the device has."""
    if is_cpu(setup.accelerator):
        cpu = _FRAGMENTATION_CPU
        return whole_interval(
            allocated.value * (1 + cpu.value), allocated.low * (1 + cpu.low), allocated.high * (1 + cpu.high)
        )
    peak, segments = peak_and_segment_bytes(shape, setup)
    held = segments / peak
    below, above = _segments_width(setup)
    # Half of the tensors' own uncertainty is in that spread already.
    low = (allocated.value + allocated.low) / 2 * held * (1 - below)
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
    fragments: Number = _FRAGMENTS_GROWN
    if not (setup.expandable_segments or conventions(setup).expandable_segments):
        fragments = _FRAGMENTS + _FRAGMENTS_KEPT * (reserved / allocated - 1)
        if setup.method in ("lora", "dora", "qlora") and shards_flat(setup):
            fragments = where(placement(setup).gathers, LATE_BLOCKS, fragments)
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
