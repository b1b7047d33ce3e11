"""The local device: its name in the catalog, its memory, and the environment that rows carry."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import torch

from profiler.device import LocalDevice, catalog_name, host_memory, local_device, usable_cores
from profiler.environment import environment_json, version

GIB = 2**30


@pytest.mark.parametrize(
    ("vendor", "gib", "name"),
    [
        ("NVIDIA GeForce RTX 3090", 23.69, "RTX-3090"),
        ("NVIDIA GeForce RTX 4090", 23.64, "RTX-4090"),
        ("NVIDIA A100-SXM4-80GB", 79.15, "A100-SXM-80GB"),
        ("NVIDIA A100-SXM4-40GB", 39.39, "A100-SXM-40GB"),
        ("NVIDIA A100-PCIE-40GB", 39.39, "A100-PCIE-40GB"),
        ("NVIDIA A100 80GB PCIe", 79.15, "A100-PCIE-80GB"),
        ("NVIDIA H100 PCIe", 79.18, "H100-PCIe"),
        ("NVIDIA H100 80GB HBM3", 79.1, "H100-SXM-80GB"),
        ("NVIDIA H100 NVL", 93.1, "H100-NVL"),
        ("Tesla T4", 14.75, "T4"),
        ("Tesla V100-SXM2-16GB", 15.77, "V100-16GB"),
        ("NVIDIA RTX A6000", 47.4, "RTX-A6000"),
        ("NVIDIA A10G", 22.1, "A10G"),
        ("NVIDIA L4", 22.0, "L4"),
        ("NVIDIA GeForce GTX 1080", 8.0, "NVIDIA GeForce GTX 1080"),
    ],
)
def test_drivers_names_are_found_in_the_catalog(vendor: str, gib: float, name: str) -> None:
    assert catalog_name(vendor, round(gib * GIB)) == name


def test_host_memory_is_what_psutil_says() -> None:
    total, available = host_memory(cgroup=Path("/nowhere"))
    assert total == psutil.virtual_memory().total
    assert available == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_a_container_that_allows_less_than_the_host_counts(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 900 kB\n")
    (tmp_path / "memory.max").write_text("512000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 100000\n")
    assert host_memory(meminfo=meminfo, cgroup=tmp_path) == (512_000, 212_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory(meminfo=meminfo, cgroup=tmp_path) == (1_024_000, 921_600)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_cpu_trains() -> None:
    device = local_device()
    assert (device.name, device.kind) == ("cpu", "cpu")
    assert 0 < device.free_bytes <= device.capacity_bytes


def public(version: str | None) -> str:
    """Without the local part: a wheel built as 2.11.0 may call itself 2.11.0+cu130."""
    assert version is not None
    return version.partition("+")[0]


def test_the_environment_names_versions_and_device_and_not_the_host() -> None:
    device = LocalDevice(name="cpu", kind="cpu", description="Some CPU", capacity_bytes=5, free_bytes=4)
    text = environment_json(device, data="set", timed_steps=5)
    facts = json.loads(text)
    assert public(facts["libraries"]["torch"]) == public(torch.__version__)
    assert facts["threads"] == torch.get_num_threads()
    assert (facts["device"], facts["cores"], facts["data"], facts["timed_steps"]) == (
        "Some CPU",
        usable_cores(),
        "set",
        5,
    )
    import socket

    assert socket.gethostname() not in text


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert public(version("torch")) == public(torch.__version__)
    assert version("no-such-package-anywhere") is None
