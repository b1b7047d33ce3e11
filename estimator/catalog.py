"""Where a model's shape comes from: the catalog, a transformers config, a directory, or a bare parameter count."""

from __future__ import annotations

import csv
import functools
import itertools
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from estimator.errors import InputError, MissingError
from estimator.shape import ModelShape, count_parameters
from estimator.units import parse_count


def read_data(name: str) -> list[dict[str, str]]:
    """Rows of a CSV file of ``estimator/data``."""
    text = (resources.files("estimator.data") / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


@functools.cache
def _families() -> dict[str, dict[str, str]]:
    return {row["family"]: row for row in read_data("families.csv")}


@functools.cache
def _rows() -> dict[str, dict[str, str]]:
    return {row["model"]: row for row in read_data("models.csv")}


def model_names() -> list[str]:
    """The catalog's names, built-in models first."""
    return list(_rows())


def built_in_names() -> list[str]:
    """Models with random weights that need no download."""
    return [name for name, row in _rows().items() if row["source"].startswith("built in")]


def transformers_class(family: str) -> str | None:
    """The transformers config class that builds this family, if there is one."""
    return _families()[family]["transformers_class"] or None if family in _families() else None


def resolve_model(model: str) -> ModelShape:
    """The shape of what ``--model`` or ``--params`` names.

    A parameter count ("8e9", "8B"), a catalog name, a path to a config.json or to a directory that holds one, or the
    id of a model in the local hub cache. Raises InputError with the nearest names otherwise.
    """
    text = model.strip()
    if text.startswith(tuple("0123456789+-.")) and "/" not in text:
        try:
            return infer_shape(parse_count(text, "params"))
        except InputError:
            if not Path(text).exists():
                raise
    name = text.lower()
    if name not in _rows():
        name = name.rsplit("/", 1)[-1].removesuffix("-hf")
        name = name.removesuffix("-instruct") if name.removesuffix("-instruct") in _rows() else name
    if text.lower() in _rows() or (name in _rows() and not Path(text).exists()):
        return _shape_of(name)
    path = Path(text).expanduser()
    if path.exists() or text.endswith(".json") or text.startswith((".", "/", "~")):
        return shape_from_config_file(path)
    if "/" in text:
        return _shape_from_hub(text)
    import difflib

    near = difflib.get_close_matches(name, _rows(), n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else "see `vramcalc models`"
    raise InputError(f"model: {model!r} is not in the catalog, a config.json, a directory or a hub id; {hint}")


def rotary_positions(name: str) -> int | None:
    """Positions that the rotary embedding of a catalog model is made for (``max_position_embeddings``), where known."""
    return next((int(row["positions"]) for row in read_data("rotary_positions.csv") if row["model"] == name), None)


@functools.cache
def _shape_of(name: str) -> ModelShape:
    row = _rows()[name]
    extra = dict(item.split("=", 1) for item in row["extra"].split())
    numbers = {key: int(value) for key, value in extra.items()}
    return _with_family(
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


def _with_family(family: str, **dimensions: Any) -> ModelShape:
    facts = _families()[family]
    values: dict[str, Any] = {
        "family": family,
        "rms_norm": facts["norm"] == "rms",
        "norm_bias": facts["norm_bias"] == "1",
        "attention_bias": facts["attention_bias"],
        "mlp_bias": facts["mlp_bias"] == "1",
        "qk_norm": facts["qk_norm"] == "1",
        "norms_per_layer": int(facts["norms_per_layer"]),
        "extra_norms": int(facts["extra_norms"]),
        "positions": int(facts["positions"]),
        "head_bias": facts["head_bias"] == "1",
    }
    return ModelShape(**(values | dimensions))


# What transformers' configs call each dimension.
_KEYS = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "vocab": ("vocab_size", "padded_vocab_size"),
}
_ALIASES = {
    "num_attention_heads": _KEYS["heads"],
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "multi_query"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim"),
}
_RECURRENT = (
    "mamba_d_state", "mamba_num_heads", "mamba_n_heads", "ssm_state_size", "state_size", "linear_num_value_heads", "attn_layer_period", "lru_width",
)  # fmt: skip
"""Keys of configs whose layers carry a state along the sequence."""
_MOST_LAYERS, _MOST_PARAMETERS = 10_000, 10**14
_FAMILY_OF_TYPE = {"code_llama": "llama", "mixtral": "mixtral", "qwen2_moe": "qwen3_moe", "deepseek_v2": "deepseek_v3"}


@functools.cache
def _defaults() -> dict[str, dict[str, int]]:
    """What transformers takes for the keys that a config leaves out, by model type."""
    rows = read_data("config_defaults.csv")
    return {
        row["model_type"]: {key: int(value) for key, value in (item.split("=") for item in row["defaults"].split())}
        for row in rows
    }


def _completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's keys, with the defaults of its type for those that stand there under no name."""
    text = config.get("text_config")
    given = {**config, **text} if isinstance(text, dict) else dict(config)
    for key, value in _defaults().get(str(given.get("model_type", "")), {}).items():
        if not any(alias in given for alias in _ALIASES.get(key, (key,))):
            given[key] = bool(value) if key == "tie_word_embeddings" else value
    return given


def _check_decoder(config: Mapping[str, Any], name: str) -> None:
    kind = str(config.get("model_type", "it"))
    found = (
        "a recurrent state"
        if any(config.get(key) for key in _RECURRENT) or kind.startswith(("mamba", "rwkv"))
        else None
    )
    if config.get("is_encoder_decoder") is True or (config.get("encoder_layers") and config.get("decoder_layers")):
        found = "an encoder beside its decoder"
    if found:
        raise InputError(
            f"model {name}: {kind} has {found}; only decoder-only transformers are predicted, see `vramcalc models`"
        )


def shape_from_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape that a transformers ``config.json`` describes. Raises InputError naming the missing key, for what is no
    decoder-only transformer, and for more than 10,000 layers or 10^14 parameters."""
    config = _completed(config)
    _check_decoder(config, name)

    def first(dimension: str) -> int:
        for key in _KEYS[dimension]:
            if config.get(key) is not None:
                return _whole(key, config[key])
        raise InputError(f"model {name}: its config has none of {', '.join(_KEYS[dimension])}")

    def whole(key: str, default: int) -> int:
        return _whole(key, config[key]) if config.get(key) is not None else default

    kind = str(config.get("model_type", ""))
    family = kind if kind in _families() else _FAMILY_OF_TYPE.get(kind)
    if family is None:
        # A decoder of an unknown type: the Llama layout unless its keys say otherwise.
        family = "llama" if "rms_norm_eps" in config or "num_key_value_heads" in config else "gpt"
    hidden, heads = first("hidden"), first("heads")
    if not heads:
        raise InputError(f"model {name}: num_attention_heads is 0")
    kv_heads = whole("num_key_value_heads", whole("num_kv_heads", 0)) or whole("multi_query_group_num", 0)
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        kv_heads = 1  # Falcon's configs name as many kv heads as heads beside it
    kv_heads = kv_heads or heads
    positions = int(_families()[family]["positions"])
    if positions:
        learned = whole("n_positions", whole("max_position_embeddings", positions))
        positions = learned + 2 if family == "opt" and "max_position_embeddings" in config else learned
    experts = whole("num_local_experts", whole("num_experts", whole("n_routed_experts", 0)))
    extra: dict[str, Any] = {}
    for key in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        extra[key] = whole(key, 0)
    if config.get("attention_bias") is True and family in ("llama", "qwen3", "granite", "mistral"):
        extra["attention_bias"] = "qkvo"
    if config.get("mlp_bias") is True:
        extra["mlp_bias"] = True
    gated = family not in (
        "gpt2",
        "gpt",
        "gpt_bigcode",
        "gpt_neox",
        "opt",
        "bloom",
        "falcon",
        "phi",
        "mpt",
        "nemotron",
        "bert",
        "starcoder2",
    )
    ffn = whole("intermediate_size", whole("n_inner", whole("ffn_hidden_size", whole("ffn_dim", 4 * hidden))))
    if experts and config.get("moe_intermediate_size") is not None:
        extra["dense_ffn"] = ffn
        extra["dense_layers"] = whole("first_k_dense_replace", 0)
        extra["moe_every"] = whole("decoder_sparse_step", 1)
        ffn = whole("moe_intermediate_size", ffn)
        shared = whole("shared_expert_intermediate_size", 0)  # one, as wide as several
        extra["shared_experts"] = whole("n_shared_experts", round(shared / max(ffn, 1)))
    head_dim = whole("head_dim", hidden // heads)
    if extra["kv_lora_rank"]:
        head_dim = extra["qk_nope_head_dim"] + extra["qk_rope_head_dim"]
    tied_default = family in ("gpt2", "gpt", "gpt_bigcode", "opt", "bloom", "falcon", "gemma", "gemma2", "mpt", "bert")
    shape = _with_family(
        family,
        name=name,
        layers=first("layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn,
        gated=gated,
        vocab=first("vocab"),
        tied_embeddings=bool(config.get("tie_word_embeddings", tied_default)),
        experts=experts,
        active_experts=whole("num_experts_per_tok", 0) if experts else 0,
        positions=positions,
        **extra,
    )
    if shape.layers > _MOST_LAYERS or count_parameters(shape).total > _MOST_PARAMETERS:
        raise InputError(
            f"model {name}: {shape.layers:.4g} layers of width {shape.hidden:.4g} are beyond {_MOST_LAYERS:,} layers or 1e14 "
            "parameters; correct its config"
        )
    return shape


def _whole(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"model config: {key} is {value!r}; it must be a whole number")
    return value


def shape_from_config_file(path: Path) -> ModelShape:
    """The shape of a ``config.json`` or of a directory that holds one. Raises InputError."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"model: cannot read {file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # of too many digits, or brackets
        raise InputError(f"model: {file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"model: {file} does not hold a JSON object")
    return shape_from_config(config, name=str(path))


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
    from estimator.hub import settle_for_the_cache_without_a_network

    settle_for_the_cache_without_a_network()
    try:
        return shape_from_config_file(Path(hf_hub_download(model, "config.json")))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"model: {model!r} is neither in the catalog nor to be had from the hub ({reason}); give a local config.json"
        ) from None


# (layers, hidden) of well-known decoders that the inferred chain passes through: SmolLM2-135M, Llama-3.2-1B and 3B,
# Llama-3.1 8B, 70B and 405B, and GPT-1T (models.csv).
_ANCHORS = ((1, 64), (4, 256), (12, 768), (16, 2048), (28, 3072), (32, 4096), (80, 8192), (126, 16384), (160, 25600))


@functools.cache
def _chain() -> list[tuple[int, int]]:
    """(layers, hidden) in small steps, neither ever falling, so that a larger count never gives a smaller shape."""
    steps: list[tuple[int, int]] = []
    for (layers, hidden), (next_layers, next_hidden) in itertools.pairwise(_ANCHORS):
        count = max(next_layers - layers, (next_hidden - hidden) // 64)
        for i in range(count):
            depth = layers + (next_layers - layers) * i // count
            width = hidden + (next_hidden - hidden) * i // count // 64 * 64
            if not steps or steps[-1] != (depth, width):
                steps.append((depth, width))
    layers, hidden = _ANCHORS[-1]
    steps += [(layers + 4 * i, hidden + 512 * i) for i in range(400)]
    return steps


def _chain_shape(layers: int, hidden: int) -> ModelShape:
    heads = max(1, hidden // 128)
    vocab = 32_000 + 96_256 * min(max(hidden - 768, 0), 1280) // 1280
    return _with_family(
        "llama",
        name="inferred",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=min(heads, 8),
        head_dim=128,
        ffn=hidden * 55 // 16,
        gated=True,
        vocab=vocab,
        tied_embeddings=hidden <= 3072,
        inferred=True,
    )


def infer_shape(parameters: int) -> ModelShape:
    """A Llama-like shape with exactly this many parameters: grouped queries, gated feed-forward of 3.4 h.

    The largest member of a chain of shapes that holds no more; what is left over counts in states and checkpoints
    (``extra_parameters``), so that more parameters never lower an estimate. Raises InputError outside 3·10^6 to 10^14.
    """
    if not 3 * 10**6 <= parameters <= 10**14:
        raise InputError(f"params: {parameters:g} is outside 3e6 to 1e14; write for example --params 8e9")
    import bisect
    import dataclasses

    def total(step: tuple[int, int]) -> int:
        return count_parameters(_chain_shape(*step)).total

    steps = _chain()
    index = bisect.bisect_right(steps, parameters, key=total) - 1
    shape = _chain_shape(*steps[max(index, 0)])
    left = parameters - count_parameters(shape).total
    return dataclasses.replace(shape, name=f"{parameters:.4g} parameters", extra_parameters=left)
