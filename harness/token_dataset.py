"""Sequences of one exact length, as the map-style data set that Trainer reads. Loads torch on import."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

IGNORED_LABEL = -100
"""The label that cross entropy leaves out."""


class TokenDataset(Dataset[dict[str, torch.Tensor]]):
    """``length`` sequences out of ``len(ids)`` distinct ones; after each pass they come again in another order.

    ``ids`` is (sequences, seq) of token ids. ``lengths`` (tokens before the padding) is ``None`` where they are packed;
    where they are padded, an item also holds ``attention_mask``, and ``labels`` are -100 on the padding.
    """

    def __init__(
        self, ids: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any] | None, *, length: int, seed: int
    ) -> None:
        assert len(ids) > 0
        self._ids = ids
        self._lengths = lengths
        self._length = length
        self._seed = seed
        self._orders: dict[int, np.ndarray[Any, Any]] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self._length:
            raise IndexError(index)
        row = self._row(index)
        ids = torch.from_numpy(self._ids[row].astype(np.int64))
        if self._lengths is None:
            return {"input_ids": ids, "labels": ids}
        held = int(self._lengths[row])
        mask = torch.zeros_like(ids)
        mask[:held] = 1
        labels = ids.clone()
        labels[held:] = IGNORED_LABEL
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def _row(self, index: int) -> int:
        passes, position = divmod(index, len(self._ids))
        if not passes:
            return position
        if passes not in self._orders:
            self._orders[passes] = np.random.default_rng((self._seed, passes)).permutation(len(self._ids))
        return int(self._orders[passes][position])
