"""What people call a model of the catalog: hub ids, other spellings, other names for the same shape.

A name is its letters and numbers in order, whatever stands between them: "Llama-3.1-8B", "llama3_1_8b" and "llama 3.1 8b" are one.
An organisation before it and words behind it that change no shape ("-instruct", "-bnb-4bit") are dropped. Where these do change
it, as in a larger vocabulary or a feed-forward padded for quantization, the catalog has the longer name itself.
"""

from __future__ import annotations

import functools
import re

from estimator.data import read_data

Key = tuple[str, ...]

_ORGANISATIONS = (
    "01-ai", "ai21labs", "allenai", "arcee-ai", "baichuan-inc", "bigcode", "bigscience", "bsc-lt", "bytedance-seed", "cerebras", "codellama",
    "cohereforai", "coherelabs", "databricks", "deepseek-ai", "eleutherai", "facebook", "google", "h2oai", "huggingfaceh4", "huggingfacetb",
    "huggyllama", "ibm-granite", "internlm", "lgai-exaone", "lmsys", "meta", "meta-llama", "microsoft", "minimaxai", "mistral-community",
    "mistralai", "moonshotai", "mosaicml", "nousresearch", "nvidia", "openai", "openai-community", "openbmb", "openlm-research", "qwen",
    "stabilityai", "tencent", "thebloke", "thudm", "tiiuae", "tinyllama", "togethercomputer", "unsloth", "upstage", "xai-org", "zai-org",
)  # fmt: skip
_ENDINGS = (
    "hf", "base", "pretrain", "instruct", "inst", "chat", "it", "sft", "dpo", "deduped", "unsloth", "bnb", "4bit", "8bit", "nf4", "gptq", "awq", "gguf",
    "mlx", "int4", "int8", "fp8", "nvfp4", "bf16", "fp16",
)  # fmt: skip


def _key(name: str) -> Key:
    return tuple(re.findall(r"[a-z]+|\d+", name.lower()))


@functools.cache
def _names() -> dict[Key, str]:
    """The catalog's name of each key; of names that share one the first."""
    rows = [(row["model"], row["model"]) for row in read_data("models.csv")]
    rows += [(row["alias"], row["model"]) for row in read_data("model_aliases.csv")]
    found: dict[Key, str] = {}
    for name, model in rows:
        found.setdefault(_key(name), model)
    return found


@functools.cache
def catalog_name(text: str) -> str | None:
    """The catalog's name of the model that ``text`` means, if it is one of the catalog's."""
    known, key = _names(), _key(text.rsplit("/", 1)[-1])
    starts = (key, *(key[len(owner) :] for owner in map(_key, _ORGANISATIONS) if key[: len(owner)] == owner))
    return next((known[short] for start in starts for short in _shortened(start) if short in known), None)


def near_names(text: str) -> list[str]:
    """Up to three names of the catalog that look like ``text``."""
    import difflib

    return difflib.get_close_matches(text.lower().rsplit("/", 1)[-1], sorted(set(_names().values())), n=3, cutoff=0.4)


def _shortened(key: Key) -> list[Key]:
    """The key, and what is left of it as one ending after the other is dropped; a size must stay."""
    found = [key]
    endings = [_key(ending) for ending in _ENDINGS]
    while ending := next((e for e in endings if found[-1][-len(e) :] == e), None):
        found.append(found[-1][: -len(ending)])
    return [short for short in found if short == key or any(part.isdigit() for part in short)]
