"""FSDP2's ``CPUOffloadPolicy``: shards, their gradients and the optimizer in host memory. Loads torch on import.

Where tensors of a CPU stand for the device's, torch's ``to`` moves nothing; here it does. Sources: ``_fsdp_param.py`` (a
shard's copy on the device is what is cast and gathered), ``_fsdp_collectives.py`` (a reduced gradient goes to the host at once).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch

from estimator.dryrun.private_api import replaced
from estimator.dryrun.tracker import Tracker


@contextlib.contextmanager
def shards_on_host(tracker: Tracker) -> Iterator[None]:
    """Within the steps; what is on the host is not seen by ``tracker``."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    inputs, wrap = FSDPParam.all_gather_inputs.fget, FSDPParam.to_sharded_dtensor  # type: ignore[attr-defined]

    def copied_inputs(parameter: Any) -> list[torch.Tensor]:
        on_host = parameter._sharded_param_data
        parameter._sharded_param_data = on_host.clone()
        try:
            found: list[torch.Tensor] = inputs(parameter)
        finally:
            parameter._sharded_param_data = on_host
        return found

    def gradient_on_host(parameter: Any, gradient: torch.Tensor) -> Any:
        with tracker.blind():
            return wrap(parameter, gradient.clone())

    with (
        replaced(FSDPParam, "all_gather_inputs", cast("Any", property(copied_inputs))),
        replaced(FSDPParam, "to_sharded_dtensor", gradient_on_host),
    ):
        yield
