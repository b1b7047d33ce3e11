"""Families of models: what their configs do not say, and which transformers class builds them."""

from __future__ import annotations

import functools
from typing import Any

from estimator.data import read_data
from estimator.model.shape import ModelShape


@functools.cache
def families() -> dict[str, dict[str, str]]:
    """The rows of families.csv by name."""
    return {row["family"]: row for row in read_data("families.csv")}


def transformers_class(family: str) -> str | None:
    """The transformers config class that builds this family, if there is one."""
    return families()[family]["transformers_class"] or None if family in families() else None


def shape_of_family(family: str, **dimensions: Any) -> ModelShape:
    """A shape with these dimensions, the rest as the family has it."""
    facts = families()[family]
    values: dict[str, Any] = {
        "family": family,
        "rms_norm": facts["norm"] == "rms",
        "norm_bias": facts["norm_bias"] == "1",
        "attention_bias": facts["attention_bias"],
        "mlp_bias": facts["mlp_bias"] == "1",
        "qk_norm": facts["qk_norm"] != "0",
        "wide_qk_norm": facts["qk_norm"] == "wide",
        "norms_per_layer": int(facts["norms_per_layer"]),
        "extra_norms": int(facts["extra_norms"]),
        "positions": int(facts["positions"]),
        "head_bias": facts["head_bias"] == "1",
    }
    return ModelShape(**(values | dimensions))
