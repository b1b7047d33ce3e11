"""Which sequences a rank reads in which step: the same ones make up a step, however many ranks share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


def step_indices(
    step: int, *, seed: int, samples: int, batch: int, accumulation: int, ranks: int, rank: int
) -> list[list[int]]:
    """The micro-batches of ``rank`` in optimizer step ``step`` (from 0), over epochs of ``samples`` sequences.

    Each epoch has an order of its own. A micro-batch is shared out over the ranks one batch after the other, so that one
    rank with twice the accumulation reads what two ranks read.
    """
    each = batch * accumulation * ranks
    epoch, position = divmod(step, samples // each)
    order = np.random.default_rng((seed, epoch)).permutation(samples)[position * each : (position + 1) * each]
    shares = order.reshape(accumulation, ranks, batch)
    return [[int(index) for index in share] for share in shares[:, rank]]


def evaluation_indices(count: int, *, batch: int, ranks: int, rank: int) -> list[list[int]]:
    """The batches of ``rank`` over ``count`` sequences, as many on every rank; some are short or empty."""
    rounds = -(-count // (batch * ranks))
    starts = [(number * ranks + rank) * batch for number in range(rounds)]
    return [list(range(min(start, count), min(start + batch, count))) for start in starts]


def stacked(data: Dataset[Any], indices: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
    """[batch, seq] of each of the items' tensors, on ``device``."""
    items = [data[index] for index in indices]
    return {name: torch.stack([item[name] for item in items]).to(device) for name in items[0]}


def targets(batch: dict[str, torch.Tensor]) -> int:
    """Tokens whose loss counts."""
    return int((batch["labels"][:, 1:] != -100).sum())
