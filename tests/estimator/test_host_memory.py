"""Host memory by rank, against what the frameworks' code holds (sources in ``estimator.memory.host``)."""

from __future__ import annotations

import pytest

from estimator.estimate import estimate
from estimator.memory.host import HostMemory, host_memory
from estimator.model.catalog import resolve_model
from estimator.setup import Setup

SHAPE = resolve_model("llama-3.1-8b")
PARAMETERS = 8_030_261_248
EIGHT = {"model": "llama-3.1-8b", "accelerator": "H100-SXM-80GB", "accelerators": 8}


def _of(**settings: object) -> HostMemory:
    return host_memory(SHAPE, Setup(**(EIGHT | settings)).resolved())  # type: ignore[arg-type]


def test_trainer_loads_on_every_rank_what_it_converts_to_fp32() -> None:
    moment = _of(precision="bf16-mixed", sharding="ddp").moment
    assert moment.phase == "loading" and moment.rank_zero_bytes == moment.other_rank_bytes == 4 * PARAMETERS
    assert moment.mapped_bytes == 2 * PARAMETERS
    half = _of(precision="bf16", sharding="ddp").moment  # nothing is converted
    assert half.rank_zero_bytes == half.other_rank_bytes == 0 and half.mapped_bytes == 2 * PARAMETERS


@pytest.mark.parametrize("settings", [{"sharding": "fsdp", "flat_parameters": True}, {"sharding": "fsdp"}])
def test_fsdp1_loads_on_the_first_rank_alone(settings: dict[str, object]) -> None:
    found = _of(precision="bf16-mixed", **settings)
    if settings.get("flat_parameters"):  # 4 B of weights to load, but 8 B of moments to save
        assert found.moment.phase == "saving" and found.moment.other_rank_bytes == 0
        assert found.moment.rank_zero_bytes == pytest.approx(8 * PARAMETERS)
    else:
        assert found.moment.phase == "loading" and found.machine_bytes(0) == pytest.approx(34 * PARAMETERS)


def test_torchtune_gathers_weights_and_moments_and_torchtitan_nothing() -> None:
    tune = _of(framework="torchtune", precision="bf16", sharding="fsdp")
    assert tune.moment.phase == "saving" and tune.moment.rank_zero_bytes == pytest.approx(6 * PARAMETERS)
    titan = _of(framework="torchtitan", precision="bf16-mixed", sharding="fsdp")
    assert titan.machine_bytes(0) == 0 and titan.machine_bytes(1e9) == 8e9


@pytest.mark.parametrize(
    ("sharding", "offload", "each"),
    # CPUAdam: fp32 weights, two moments and gradients; stage 3 half gradients as well, and half weights where they go too.
    [("zero2", "optimizer", 16), ("zero3", "optimizer", 18), ("zero3", "optimizer+parameters", 20)],
)
def test_deepspeed_offloads_sixteen_bytes_and_more(sharding: str, offload: str, each: int) -> None:
    found = _of(framework="hf-trainer+deepspeed", precision="bf16-mixed", sharding=sharding, offload=offload)
    if sharding == "zero2":  # to put its flat buffers together each rank has two half copies of all that trains
        assert found.moment.phase == "loading" and found.moment.other_rank_bytes == 4 * PARAMETERS
        found = _of(
            framework="hf-trainer+deepspeed", precision="bf16-mixed", sharding=sharding, offload=offload, accelerators=2
        )
        assert found.moment.phase == "saving" and found.moment.other_rank_bytes == pytest.approx(16 * PARAMETERS / 2)
        return
    assert found.moment.other_rank_bytes == pytest.approx(each * PARAMETERS / 8)
    # the first rank gathers half weights at a save
    assert found.moment.rank_zero_bytes - found.moment.other_rank_bytes == pytest.approx(2 * PARAMETERS)


def test_fsdp_pins_what_it_offloads_in_blocks_of_powers_of_two() -> None:
    settings = {"precision": "bf16", "sharding": "fsdp", "offload": "optimizer+parameters"}
    one, two = _of(**settings), _of(**settings, flat_parameters=True)
    shard = 2 * PARAMETERS / 8
    assert shard < one.pinned_bytes < 2 * shard and shard < two.pinned_bytes < 2 * shard
    # Llama's matrices are powers of two but for the feed-forward's and the tables'; a layer in one is not.
    assert one.pinned_bytes != two.pinned_bytes


def test_paged_optimizers_may_stay_on_the_device() -> None:
    found = estimate(
        Setup(model="llama-3.1-8b", accelerator="A100-SXM-80GB", precision="bf16", optimizer="adamw-paged")
    )
    host = found.memory.peak_host_bytes
    assert host.value > 4 * PARAMETERS and host.low < 3 * PARAMETERS
    beside = Setup(model="8e9", precision="bf16", optimizer="adamw-paged", offload="activations", checkpointing="full")
    assert estimate(beside).memory.peak_host_bytes.low > 0  # what may stay there was counted on the host before


def test_a_second_machine_adds_nothing_to_the_first() -> None:
    one = _of(precision="bf16-mixed", sharding="fsdp")
    two = _of(precision="bf16-mixed", sharding="fsdp", accelerators=16)
    assert one.processes == two.processes == 8 and one.machine_bytes(0) == pytest.approx(two.machine_bytes(0))


def test_offloaded_activations_are_on_the_host() -> None:
    settings = {"precision": "bf16", "sharding": "ddp", "seq": 8192, "batch": 4}
    plain, offloaded = _of(**settings), _of(**settings, offload="activations")
    assert offloaded.machine_bytes(0) > 5 * plain.machine_bytes(0)
