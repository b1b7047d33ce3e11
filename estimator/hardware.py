"""Accelerators: peak rates, memory, links and power, from the catalog; and what their software takes of the memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from estimator.errors import InputError
from estimator.model.catalog import read_data
from estimator.units import GB, GIB, MIB, Interval

CPU = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One device. Rates by datasheet, dense; ``None`` where no source states them."""

    name: str
    architecture: str
    bf16_flops: float | None
    fp16_flops: float | None
    fp8_flops: float | None
    fp4_flops: float | None
    tf32_flops: float | None
    fp32_flops: float | None
    measured_bf16_flops: float | None
    """The best bf16 matrix rate that somebody measured."""
    usable_bytes: int | None
    """What the driver reports; where nobody has published that, what its generation leads to expect."""
    usable_low_bytes: int | None
    """The least that it may be: where it is only expected, less than ``usable_bytes``."""
    marketing_bytes: int | None
    bandwidth_bytes_per_second: float | None
    power_watts: float | None
    link_bytes_per_second: float | None
    """To its neighbours in the same machine, one way."""
    link_devices: int | None
    """How many that link joins: a machine, a rack, or a pair."""
    pcie_bytes_per_second: float | None
    network_bytes_per_second: float | None
    """Of one device to other machines, one way, as such machines are built."""
    source: str

    @property
    def usable_is_expected(self) -> bool:
        """No source states what its driver reports."""
        return self.usable_bytes != self.usable_low_bytes

    @property
    def large_workspace(self) -> bool:
        """cuBLAS takes the large workspace: Hopper and later."""
        return self.architecture in ("Hopper", "Blackwell", "Blackwell Ultra")

    def matrix_flops(self, precision: str) -> float | None:
        """The peak rate of matrix products that a precision's compute type reaches."""
        if precision.startswith("nvfp4"):
            return self.fp4_flops or self.fp8_flops
        if precision.startswith(("fp8", "mxfp8")):
            return self.fp8_flops
        if precision.startswith("bf16"):
            return self.bf16_flops
        if precision.startswith("fp16"):
            return self.fp16_flops or self.bf16_flops
        return self.fp32_flops  # torch's default: no TF32


@functools.cache
def accelerators() -> dict[str, Accelerator]:
    """The catalog by lower-case name."""

    def scaled(row: dict[str, str], column: str, factor: float) -> float | None:
        return float(row[column]) * factor if row[column] else None

    def whole(row: dict[str, str], column: str, factor: float) -> int | None:
        value = scaled(row, column, factor)
        return None if value is None else round(value)

    found = {}
    for row in read_data("accelerators.csv"):
        found[row["accelerator"].lower()] = Accelerator(
            name=row["accelerator"],
            architecture=row["arch"],
            bf16_flops=scaled(row, "bf16_dense_tflops", 1e12),
            fp16_flops=scaled(row, "fp16_dense_tflops", 1e12),
            fp8_flops=scaled(row, "fp8_dense_tflops", 1e12),
            fp4_flops=scaled(row, "fp4_dense_tflops", 1e12),
            tf32_flops=scaled(row, "tf32_dense_tflops", 1e12),
            fp32_flops=scaled(row, "fp32_tflops", 1e12),
            measured_bf16_flops=scaled(row, "measured_max_bf16_tflops", 1e12),
            usable_bytes=whole(row, "usable_gib", GIB),
            usable_low_bytes=whole(row, "usable_low_gib" if row["usable_low_gib"] else "usable_gib", GIB),
            marketing_bytes=whole(row, "mem_gb", GB),
            bandwidth_bytes_per_second=scaled(row, "mem_bw_gb_s", GB),
            power_watts=scaled(row, "tdp_w", 1),
            link_bytes_per_second=scaled(row, "nvlink_unidir_gb_s", GB),
            link_devices=whole(row, "nvlink_devices", 1),
            pcie_bytes_per_second=scaled(row, "pcie_unidir_gb_s", GB),
            network_bytes_per_second=scaled(row, "network_unidir_gb_s", GB),
            source=row["source"],
        )
    return found


# What people write for the commonest form of a card.
_ALIASES = {
    "h100": "h100-sxm-80gb", "h100-80gb": "h100-sxm-80gb", "h100-sxm": "h100-sxm-80gb", "a100": "a100-sxm-80gb", "a100-80gb": "a100-sxm-80gb",
    "a100-40gb": "a100-sxm-40gb", "3090": "rtx-3090", "4090": "rtx-4090", "5090": "rtx-5090", "rtx3090": "rtx-3090", "rtx4090": "rtx-4090",
    "rtx5090": "rtx-5090", "a6000": "rtx-a6000", "v100": "v100-32gb", "h800": "h800-sxm",
}  # fmt: skip


def is_cpu(name: str | None) -> bool:
    return name is not None and name.lower() == CPU


def find_accelerator(name: str) -> Accelerator:
    """By name or common short name, case and spaces ignored. Raises InputError with the nearest names."""
    key = name.strip().lower().replace(" ", "-").replace("_", "-")
    key = key if key in accelerators() else _ALIASES.get(key, key)
    if key in accelerators():
        return accelerators()[key]
    import difflib

    near = difflib.get_close_matches(key, [*accelerators(), *_ALIASES], n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "see `vramcalc models`"
    raise InputError(f"accelerator: {name!r} is not in the catalog; {hint}")


# cuBLAS takes a workspace for each thread that calls it, forward's and backward's: 8,519,680 B, and 32 MiB from Hopper
# on (PyTorch's CUDABlas.cpp; measured on an A6000 by the A+ rows of the evidence).
_SMALL_WORKSPACE, _LARGE_WORKSPACE = 8_519_680, 32 * 2**20


def workspace_bytes(name: str | None) -> int:
    """cuBLAS workspaces of the two threads of a training step; 0 on a CPU."""
    if is_cpu(name):
        return 0
    large = name is not None and find_accelerator(name).large_workspace
    return 2 * (_LARGE_WORKSPACE if large else _SMALL_WORKSPACE)


def context_bytes(name: str | None) -> Interval:
    """What the driver's context and the loaded libraries take of one device, beyond the allocator's segments.

    An A6000 with CUDA 13 takes 744,685,568 B (A+ rows), a V100 of 2022 1,343 MiB (transformers' documentation on one GPU);
    other generations are known only roughly.
    """
    if is_cpu(name):
        return Interval(value=425e6, low=250e6, high=700e6)  # interpreter and libraries, resident
    if name is not None and find_accelerator(name).architecture == "Volta":
        return Interval(value=1343 * MIB, low=400e6, high=1.6e9)
    return Interval(value=745e6, low=400e6, high=1.3e9)
