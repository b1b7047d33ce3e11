"""What kind each layer of a model is: its modules, their shapes and settings, and its entries in the config. Loads torch on import."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from estimator.building.model import build_empty_model, decoder_layers
from estimator.dryrun.cut import Cut, shortest, whole
from estimator.setup import Setup

_LISTED = ("layer_types", "layers_block_type", "mlp_layer_types")
"""Lists of configs that some classes make up when asked."""


def plan_cut(setup: Setup, *, every: bool) -> Cut:
    """Which layers of the setup's model are run; ``every``: all. Raises InputError as ``build_empty_model``."""
    bare = Setup(model=setup.model, attention=setup.attention, precision=setup.precision)
    model: Any = build_empty_model(bare)
    layers = len(decoder_layers(model))
    trained = setup.trainable_layers or layers
    kinds = None if every or trained > layers else layer_kinds(model)
    if kinds is None:
        return whole(layers)
    found = shortest([(kind, layer >= layers - trained) for layer, kind in enumerate(kinds)])
    if len(found.kept) == layers:
        return found
    # Whether a config cut that way means these layers is seen by what is built from it.
    shorter = build_empty_model(bare, layers=found.kept)
    built = layer_kinds(shorter)
    if (
        built is None
        or not _same(built, [kinds[layer] for layer in found.kept])
        or _outside(model) != _outside(shorter)
    ):
        return whole(layers)
    return found


def layer_kinds(model: Any) -> list[int] | None:
    """A number for each decoder layer, equal for those that do the same; ``None`` where layers share parameters.

    What merely counts layers is no difference, nor is the value of a fraction.
    """
    layers = decoder_layers(model)
    if model.config.get_text_config().num_hidden_layers != len(layers):
        return None
    owners: dict[int, int] = {}
    for index, layer in enumerate(layers):
        if any(owners.setdefault(id(parameter), index) != index for parameter in layer.parameters()):
            return None
    facts = [_facts(layer) for layer in layers]
    _drop_counters(facts)
    for name, values in _lists(model.config.get_text_config(), len(layers)).items():
        for fact, value in zip(facts, values, strict=True):
            fact[name] = repr(value)
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(frozenset(fact.items()), len(numbers)) for fact in facts]


def _outside(model: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of what is in no decoder layer: tables that are as wide as there are layers would shrink with them."""
    inside = {id(parameter) for parameter in decoder_layers(model).parameters()}
    return {name: tuple(p.shape) for name, p in model.named_parameters() if id(p) not in inside}


def _same(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two lists differ in nothing but how their kinds are numbered."""
    pairs = set(zip(one, other, strict=False))
    return len(one) == len(other) and len(pairs) == len(set(one)) == len(set(other))


def _facts(layer: torch.nn.Module) -> dict[str, Hashable]:
    found: dict[str, Hashable] = {}
    for name, module in layer.named_modules():
        found[name] = type(module).__qualname__
        for key, value in vars(module).items():
            if not key.startswith("_"):
                found |= _setting(f"{name}.{key}", value)
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            found[f"{name}.{key}"] = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
    return found


def _setting(name: str, value: Any) -> dict[str, Hashable]:
    if value is None or isinstance(value, (bool, int, str, torch.dtype)):
        return {name: value}
    if isinstance(value, float):
        return {name: value != 0}
    if isinstance(value, (list, tuple)):
        return {name: repr(value)}
    return {name: getattr(value, "__qualname__", type(value).__qualname__)}


def _drop_counters(facts: list[dict[str, Hashable]]) -> None:
    """Takes away whole numbers that go up evenly with the layer."""
    values: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for index, fact in enumerate(facts):
        for name, value in fact.items():
            if type(value) is int:
                values[name].append((index, value))
    for name, points in values.items():
        if len(points) > 1 and _counts(points):
            for fact in facts:
                fact.pop(name, None)


def _counts(points: list[tuple[int, int]]) -> bool:
    (first, start), (second, following) = points[:2]
    rate = (following - start) / (second - first)
    even = all(value - start == rate * (index - first) for index, value in points)
    return even and (rate == 1 or (rate > 0 and len(points) > 2))


def _lists(config: Any, layers: int) -> dict[str, list[Any]]:
    """The config's lists that have an entry for each layer."""
    named = {**vars(config), **{name: getattr(config, name, None) for name in _LISTED}}
    return {name: list(v) for name, v in named.items() if isinstance(v, (list, tuple)) and len(v) == layers}
