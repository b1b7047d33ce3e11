"""What the code of a family's decoder layers makes autograd keep: the rows of layer_facts.csv."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from estimator.data import read_data


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """Of one family."""

    norm: str
    """``rms``: casts its result back before the weight multiplies it; ``rms-fp32``: after; ``layer``: torch's LayerNorm."""
    one_stream: bool
    """Attention and feed-forward read the same residual stream, side by side."""
    fused_qkv: bool
    """One projection makes queries, keys and values."""
    activation: str
    """``silu``, ``gelu``, ``relu``, ``relu2``; ``gelu-written``: in single operators; ``clamped``: gpt-oss's gate."""
    softmax: str
    """Of eager attention: in ``fp32`` in any case, or in the type of the residual ``stream`` (which the mask has)."""
    score_cap: bool
    """Eager attention's scores go through tanh."""
    logit_cap: bool
    """The logits do."""
    rotation: str
    """How queries and keys get their positions: ``whole``, ``cat`` (parts put together again), or ``none``."""
    transposed: bool
    """Products take a view of the weight, whose half copies autocast's cache does not keep."""
    modules: frozenset[str]
    """What transformers calls a layer's matrices."""


_DEFAULT = "llama"


@functools.cache
def layer_facts(family: str) -> LayerFacts:
    """Llama's where the family has no row."""
    rows = {row["family"]: row for row in read_data("layer_facts.csv")}
    row = rows.get(family, rows[_DEFAULT])
    return LayerFacts(
        norm=row["norm"],
        one_stream=row["one_stream"] == "1",
        fused_qkv=row["fused_qkv"] == "1",
        activation=row["activation"],
        softmax=row["softmax"],
        score_cap=row["score_cap"] == "1",
        logit_cap=row["logit_cap"] == "1",
        rotation=row["rotation"],
        transposed=row["transposed"] == "1",
        modules=frozenset(row["modules"].split()),
    )
