"""Every setting of a setup as a flag, generated from ``estimator.setup.Setup``: one value, or lists for a grid."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer

from estimator.errors import InputError
from estimator.setup import Setup, setting_types
from estimator.units import parse_count

# What people type, besides the column's own name.
_SHORT = {"accelerator": "--gpu", "accelerators": "--gpus", "base_quantization": "--quantization"}
_LONG = {"params": "model"} | {flag.removeprefix("--"): name for name, flag in _SHORT.items()}
_PANEL = "The setup"
_FILLED_IN = ("optimizer", "zero_grad", "sharding", "data_parallel", "pipeline_schedule")


def setup_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command that takes ``setup: Setup`` a flag for each setting, ``--params`` and ``--config``."""
    return _with_flags(command, "setup", lambda values, config: _one(values, config))


def grid_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command that takes ``setups: tuple[Setup, ...]`` the same flags, each a comma-separated list."""
    return _with_flags(command, "setups", lambda values, config: _grid(values, config))


def axes_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command that takes ``axes: dict[str, list[Any]]`` the same flags and lists: only those that were written."""
    return _with_flags(command, "axes", lambda values, config: _axes(values, config))


def _with_flags(
    command: Callable[..., Any], name: str, build: Callable[[dict[str, str], Path | None], Any]
) -> Callable[..., Any]:
    own = inspect.signature(command, eval_str=True)
    lists = name != "setup"

    @functools.wraps(command)
    def wrapper(**given: Any) -> Any:
        values = {spec.name: given.pop(spec.name) for spec in fields(Setup)}
        params, config = given.pop("params"), given.pop("config")
        if params is not None:
            if values["model"] is not None:
                raise InputError("params: give --params or --model, not both")
            for count in _split("params", params) if lists else [params]:
                parse_count(count, "params")
            values["model"] = params
        return command(**{name: build({k: str(v) for k, v in values.items() if v is not None}, config)}, **given)

    added = [
        _option("params", str | None, "--params", help="Parameters, for a model known by its size alone: 8e9, 70B."),
        *(_flag(spec, lists=lists) for spec in fields(Setup)),
        _option("config", Path | None, "--config", help="A TOML file of settings; flags override it."),
    ]
    kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.parameters.values() if p.name != name]
    wrapper.__signature__ = own.replace(parameters=[*added[:2], *kept, *added[2:]])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {}
    del wrapper.__wrapped__
    return wrapper


def _flag(spec: Any, *, lists: bool) -> inspect.Parameter:
    flag = "--" + spec.name.replace("_", "-")
    names = [_SHORT[spec.name], flag] if spec.name in _SHORT else [flag]
    kind, choices = setting_types()[spec.name], spec.metadata["choices"]
    text = spec.metadata["help"]
    if choices and len(choices) <= 8:
        text = f"{text.rstrip('.')}: {', '.join(choices)}."
    default = spec.default
    if isinstance(default, str | int | float) and not isinstance(default, bool):
        text += f" Default {default}."
    if kind is bool and not lists:
        opposite = "--pad" if spec.name == "pack" else "--no-" + spec.name.replace("_", "-")
        return _option(spec.name, bool | None, f"{names[0]}/{opposite}", help=text)
    metavar = {int: "N", float: "X", bool: "true|false"}.get(kind, "NAME") + (",..." if lists else "")
    return _option(spec.name, str | None, *names, help=text, metavar=metavar)


def _option(name: str, kind: Any, *flags: str, help: str, metavar: str | None = None) -> inspect.Parameter:
    option = typer.Option(None, *flags, help=help, metavar=metavar, rich_help_panel=_PANEL, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)


def _one(values: Mapping[str, str], config: Path | None) -> Setup:
    setup = Setup.from_mapping({**_read_config(config), **values})
    # A table may hold such columns for all of its rows; whoever types the flag expects it to do something.
    for name, methods in (("lora_targets", ("lora", "dora", "qlora")), ("trainable_layers", ("freeze",))):
        if getattr(setup, name) is not None and setup.method not in methods:
            raise InputError(f"{name}: means nothing with --method {setup.method}; write --method {methods[0]}")
    return setup


def _grid(values: Mapping[str, str], config: Path | None) -> tuple[Setup, ...]:
    """Every combination; settings vary from right to left, as nested loops in the order of declaration."""
    axes = _axes(values, config)
    if not axes.get("model"):
        raise InputError("model: write --model NAME[,NAME...] or --params N[,N...]")
    combinations = itertools.product(*axes.values())
    return tuple(Setup.from_mapping(dict(zip(axes, point, strict=True))) for point in combinations)


def _axes(values: Mapping[str, str], config: Path | None) -> dict[str, list[Any]]:
    """The values of each setting that was written, in the order of declaration."""
    merged = {**_read_config(config), **values}
    axes: dict[str, list[Any]] = {}
    for spec in fields(Setup):
        if spec.name in merged:
            value = merged.pop(spec.name)
            if value == []:
                raise InputError(f"{spec.name}: an empty list is no value; write at least one, or leave it out")
            axes[spec.name] = value if isinstance(value, list) else _split(spec.name, str(value))
    if merged:
        Setup.from_mapping(merged)  # names the setting that does not exist
    return axes


def _split(name: str, text: str) -> list[str]:
    if name == "lora_targets":
        return [part.strip() for part in text.split(";")]  # a list of module names is one value
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InputError(f"{name}: {text!r} has an empty item; write values with single commas between them")
    return parts


def _read_config(path: Path | None) -> dict[str, Any]:
    """The settings of a TOML file, by the names of their flags; dashes and underscores mean the same."""
    if path is None:
        return {}
    import tomllib

    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config: cannot read {path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"config: {path} is not TOML: {error}") from None
    settings: dict[str, Any] = {}
    for written, value in table.items():
        name = _LONG.get(written.replace("-", "_"), written.replace("-", "_"))
        if name in settings:
            raise InputError(f"{name}: {path} gives it twice, once as {written}; write it once")
        settings[name] = value
    return settings


def flags_of(setup: Setup) -> list[str]:
    """The flags that give ``setup`` again: each setting that is not its default, quoted for a shell."""
    import shlex

    # What the framework would fill in by itself.
    unfilled: dict[str, Any] = dict.fromkeys(_FILLED_IN)
    filled = dataclasses.replace(setup, **unfilled).resolved()
    words = []
    for spec in fields(Setup):
        value = getattr(setup, spec.name)
        if value == spec.default or (spec.name in _FILLED_IN and value == getattr(filled, spec.name)):
            continue
        flag = _SHORT.get(spec.name, "--" + spec.name.replace("_", "-"))
        if isinstance(value, bool):
            words.append(flag if value else "--pad" if spec.name == "pack" else flag.replace("--", "--no-", 1))
        else:
            words += [flag, shlex.quote(str(value))]
    return words
