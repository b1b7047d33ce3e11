"""DistributedDataParallel: the plain step, and beside its gradients the reducer's buckets. Loads torch on import.

From torch 2.13 (``nn/parallel/distributed.py``, ``csrc/distributed/c10d/reducer.cpp``), ``gradient_as_bucket_view`` off: every
gradient is copied into its bucket, summed there and copied back, so that the buckets are as large as all gradients and
stay. Of 25 MiB each, the first of 1 MiB, in the order of the gradients; written here as one allocation.
"""

from __future__ import annotations

from estimator.building.model import decoder_layers
from estimator.dryrun.events import Storage
from estimator.dryrun.steps import Loop
from estimator.model.catalog import resolve_model
from estimator.model.shape import count_parameters

_BROADCAST_BYTES = 250 * 2**20
"""``broadcast_bucket_size``: what the first rank sends of its weights at once, two at a time."""


class DdpLoop(Loop):
    """One rank."""

    def _load(self) -> None:
        super()._load()
        every = [(p.numel() * p.element_size(), p) for p in self._model.parameters()]
        # Of all layers, also where only some are run.
        width = max(p.element_size() for _, p in every)
        sent = min(_BROADCAST_BYTES, count_parameters(resolve_model(self._setup.model)).total * width)
        pair = [self._take("temporaries", sent) for _ in range(2)]
        for index in pair:
            self._tracker.stream.death(index, None)
        trained = [(size, p) for size, p in every if p.requires_grad]
        layers = {
            index: sum(p.numel() * p.element_size() for p in layer.parameters() if p.requires_grad)
            for index, layer in enumerate(decoder_layers(self._model))
        }
        self._take("communication", sum(size for size, _ in trained), layers)

    def _take(self, category: str, amount: int, layers: dict[int, int] | None = None) -> int:
        storage = Storage(
            bytes=amount, category=category, layer=None, holder="DDP's reducer", bytes_of_layers=layers or {}
        )
        return self._tracker.stream.birth(storage, None)
