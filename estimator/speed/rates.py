"""The rates of a setup's hardware: peaks by type of number, bandwidth, and the seconds that a byte takes between devices."""

from __future__ import annotations

from dataclasses import dataclass

from estimator.arrays import Number, maximum, minimum, where
from estimator.hardware import Accelerator
from estimator.setup import Setup
from estimator.units import GB

_PCIE_BYTES_PER_SECOND = 25 * GB
"""Of a device whose bus no source states: a fourth-generation slot in practice."""
_NETWORK_BYTES_PER_SECOND = 12.5 * GB
"""Of a device whose network no source states: 100 Gbit/s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Of one device, by datasheet; numbers, or arrays over a grid."""

    flops: Number
    """Matrix products in the setup's precision."""
    half_flops: Number
    """What attention and the head compute in where the layers are narrower: bf16 or fp16."""
    bandwidth: Number
    """Bytes/s of the device's memory."""
    host_link: Number
    """Bytes/s between the device and its host."""
    tensor: Number
    """Seconds for a byte that a tensor-parallel rank sends; the next three alike."""
    context: Number
    expert: Number
    pipeline: Number
    data: Number
    """Seconds for a byte that all data-parallel ranks gather: a machine's ranks fetch it over the network together, once,
    and hand it on over their link."""


def rates(setup: Setup, accelerator: Accelerator) -> Rates | None:
    """The rates, or ``None`` where the catalog has no peak of the precision or no bandwidth.

    Ranks are numbered as Megatron does: tensor parallelism innermost, then context, data (and expert), and pipeline.
    """
    flops = accelerator.matrix_flops(setup.precision)
    bandwidth = accelerator.bandwidth_bytes_per_second
    if flops is None or bandwidth is None:
        return None
    narrow = setup.precision.startswith(("fp8", "mxfp8", "nvfp4"))
    half = accelerator.matrix_flops("bf16") or accelerator.matrix_flops("fp16") if narrow else flops
    bus = accelerator.pcie_bytes_per_second or _PCIE_BYTES_PER_SECOND
    link = accelerator.link_bytes_per_second or bus
    network = accelerator.network_bytes_per_second or _NETWORK_BYTES_PER_SECOND
    if setup.internode_gbps is not None:
        network = setup.internode_gbps * GB / 8
    joined = accelerator.link_devices or 1
    machine = max(joined, setup.gpus_per_node)

    def within(devices: Number) -> Number:
        """Seconds for a byte in a group of so many neighbours in one machine."""
        return where(devices > joined, 1 / bus, 1 / link)

    def across(devices: Number) -> Number:
        return where(devices > machine, 1 / network, within(devices))

    tensor, expert = setup.tensor_parallel, setup.expert_parallel
    # Of the ranks that exchange tokens, those in the sender's own machine.
    near = minimum(expert, maximum(1, machine // tensor))
    outside = (expert - near) / maximum(expert - 1, 1)
    ranks = setup.data_ranks * setup.context_parallel
    local = minimum(ranks, maximum(1, machine // tensor))
    return Rates(
        flops=flops,
        half_flops=half or flops,
        bandwidth=bandwidth,
        host_link=bus,
        tensor=across(tensor),
        context=across(tensor * setup.context_parallel),
        expert=outside / network + (1 - outside) * within(minimum(expert * tensor, machine)),
        pipeline=across(setup.accelerators),
        data=maximum(
            (local - 1) / local * within(local * tensor), (ranks - local) / maximum(ranks, 1) / (local * network)
        ),
    )
