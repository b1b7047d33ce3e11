"""Setups that cannot exist are refused in one line that says what to write."""

from __future__ import annotations

import dataclasses

import numpy
import pytest

from estimator.errors import InputError
from estimator.estimate import estimate
from estimator.grid import setup_grid
from estimator.model.catalog import resolve_model
from estimator.possible import possible
from estimator.setup import Setup

IMPOSSIBLE = {
    "more stages than layers": ({"pipeline_parallel": 64, "accelerators": 64}, "pipeline_parallel: 64 stages .* 32 layers"),
    "heads not divided": ({"tensor_parallel": 3, "accelerators": 3}, "tensor_parallel: 3 ranks do not divide the 32"),
    "experts of a dense model": ({"expert_parallel": 8, "accelerators": 8}, "expert_parallel: llama-3.1-8b has no experts"),
    "more experts' ranks than devices": ({"model": "mixtral-8x7b", "expert_parallel": 8, "accelerators": 4}, "8 ranks do not divide the 4"),
    "and than a stage has": ({"model": "mixtral-8x7b", "expert_parallel": 8, "accelerators": 8, "pipeline_parallel": 2}, "the 4 .* of a pipeline stage"),
    "experts not divided": ({"model": "mixtral-8x7b", "expert_parallel": 3, "accelerators": 6}, "3 ranks do not divide the 8"),
    "more ranks than tokens": ({"context_parallel": 8, "accelerators": 8, "seq": 4}, "context_parallel: 8 ranks .* 4 tokens"),
    "a sequence in uneven pieces": ({"context_parallel": 4, "accelerators": 4, "seq": 32770}, "8 even pieces.* write --seq 32776"),
    "int8 in shards": ({"method": "qlora", "base_quantization": "int8", "accelerators": 2, "sharding": "fsdp"}, "int8 weights cannot be sharded by fsdp"),
    "shards that do not divide": ({"shard_size": 3, "accelerators": 8, "sharding": "fsdp"}, "shard_size: 3 does not divide the 8"),
    "a rank beyond the width": ({"method": "lora", "lora_rank": 5000}, "lora_rank: 5000 is more than the width"),
    "too many heads' ranks of an inferred shape": ({"model": "8e9", "tensor_parallel": 1024, "accelerators": 1024}, "1024 ranks are more"),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_is_refused(name: str) -> None:
    settings, message = IMPOSSIBLE[name]
    with pytest.raises(InputError, match=message):
        estimate(Setup(**{"model": "llama-3.1-8b", **settings}))


def test_a_grid_knows_which_of_its_setups_can_be() -> None:
    base = Setup(model="llama-3.1-8b", sharding="fsdp").resolved()
    shape = resolve_model(base.model)
    degrees = numpy.array([1, 2, 3, 8])
    grid = setup_grid(base, tensor_parallel=degrees, accelerators=8 * degrees)
    assert list(possible(shape, grid)) == [True, True, False, True]
    for degree, can in zip(degrees, possible(shape, grid), strict=True):
        one = dataclasses.replace(base, data_parallel=None, tensor_parallel=int(degree), accelerators=8 * int(degree))
        assert possible(shape, one.resolved()) == can
