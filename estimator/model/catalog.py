"""Where a model's shape comes from: the catalog, a transformers config, a directory, or a bare parameter count."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from estimator.data import read_data
from estimator.errors import InputError, MissingError
from estimator.model.config_shape import shape_from_config_file
from estimator.model.families import shape_of_family, transformers_class
from estimator.model.inferred_shape import infer_shape
from estimator.model.mixer import Mixer
from estimator.model.names import catalog_name, near_names
from estimator.model.shape import ModelShape
from estimator.units import parse_count

__all__ = [
    "built_in_names",
    "infer_shape",
    "listed_name",
    "model_names",
    "read_data",
    "resolve_model",
    "rotary_positions",
    "transformers_class",
]


@functools.cache
def _rows() -> dict[str, dict[str, str]]:
    return {row["model"]: row for row in read_data("models.csv")}


def model_names() -> list[str]:
    """The catalog's names, built-in models first."""
    return list(_rows())


def built_in_names() -> list[str]:
    """Models with random weights that need no download."""
    return [name for name, row in _rows().items() if row["source"].startswith("built in")]


@functools.cache
def listed_name(model: str) -> str:
    """What the catalog calls a model; ``model`` itself where it is none of the catalog's."""
    if model[:1].isdigit() and not {"-", "/"} & set(model):
        return model  # a count
    return model.lower() if model.lower() in _rows() else catalog_name(model) or model


def resolve_model(model: str) -> ModelShape:
    """The shape of what ``--model`` or ``--params`` names.

    A parameter count ("8e9", "8B"), a name of the catalog as anybody writes it (``estimator.model.names``), a path to a
    config.json or to a directory that holds one, or the id of a model in the local hub cache. Raises InputError with the nearest names otherwise.
    """
    text = model.strip()
    if text.startswith(tuple("0123456789+-.")) and "/" not in text:
        try:
            return infer_shape(parse_count(text, "params"))
        except InputError:
            if not _exists(text) and catalog_name(text) is None:
                raise
    name = listed_name(text)
    if name in _rows() and (name == text.lower() or not _exists(text)):
        return _shape_of(name)
    if _exists(text) or text.endswith(".json") or text.startswith((".", "/", "~")):
        return shape_from_config_file(Path(text))
    if "/" in text:
        return _shape_from_hub(text)
    near = near_names(text)
    hint = f"did you mean {', '.join(near)}?" if near else "see `vramcalc models`"
    raise InputError(f"model: {model!r} is not in the catalog, a config.json, a directory or a hub id; {hint}")


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError):  # longer than a file's name can be; nobody's home
        return False


def rotary_positions(name: str) -> int | None:
    """Positions that the rotary embedding of a catalog model is made for (``max_position_embeddings``), where known."""
    return next((int(row["positions"]) for row in read_data("rotary_positions.csv") if row["model"] == name), None)


@functools.cache
def _shape_of(name: str) -> ModelShape:
    row = _rows()[name]
    extra = dict(item.split("=", 1) for item in row["extra"].split())
    numbers: dict[str, Any] = {
        key: value if key == "attention_bias" else int(value)
        for key, value in extra.items()
        if not key.startswith("mixer_")
    }
    mixer = {key.removeprefix("mixer_"): int(value) for key, value in extra.items() if key.startswith("mixer_")}
    if mixer:
        numbers["mixer"] = Mixer(**(mixer | {"delta_rule": bool(mixer.get("delta_rule"))}))  # type: ignore[arg-type]
    return shape_of_family(
        row["family"],
        name=name,
        layers=int(row["layers"]),
        hidden=int(row["hidden"]),
        heads=int(row["heads"]),
        kv_heads=int(row["kv_heads"]),
        head_dim=int(row["head_dim"]),
        ffn=int(row["ffn"]),
        gated=row["mlp"] == "gated",
        vocab=int(row["vocab"]),
        tied_embeddings=row["tied_embeddings"] == "1",
        experts=int(row["experts"]),
        active_experts=int(row["active_experts"]),
        **numbers,
    )


def _shape_from_hub(model: str) -> ModelShape:
    """The shape of a hub model through transformers: from the local cache, or from the hub when it can be reached."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise MissingError(
            f"model: {model!r} looks like a hub id, which needs huggingface_hub; pip install 'vramcalc-toolkit[all]', "
            "or give a config.json"
        ) from None
    from estimator.model.hub import settle_for_the_cache_without_a_network

    settle_for_the_cache_without_a_network()
    try:
        return shape_from_config_file(Path(hf_hub_download(model, "config.json")))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        near = near_names(model)
        raise InputError(
            f"model: {model!r} is neither in the catalog nor to be had from the hub ({reason}); give a local config.json"
            + (f", or one of {', '.join(near)}" if near else "")
        ) from None
