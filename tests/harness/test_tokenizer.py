"""The offline tokenizer, and which tokenizer a model is read with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.errors import InputError
from harness.data import load_tokens
from harness.prompts import document
from harness.stdlib_corpus import stdlib_samples
from harness.tokenizer import (
    BOS,
    EOS,
    PAD,
    VOCABULARY,
    offline_tokenizer,
    own_tokenizer,
    text_tokenizer,
    tokenizer_identity,
    train_tokenizer,
)


@given(st.text(max_size=200))
def test_any_text_survives_being_tokenized(cache: Path, text: str) -> None:
    tokenizer = offline_tokenizer(cache)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_vocabulary_has_exactly_the_size_of_the_built_in_models(cache: Path) -> None:
    from estimator.model.catalog import built_in_names, resolve_model

    assert offline_tokenizer(cache).get_vocab_size() == VOCABULARY
    assert {resolve_model(name).vocab for name in built_in_names()} == {VOCABULARY}


def test_every_catalog_model_has_room_for_its_ids() -> None:
    from estimator.model.catalog import model_names, resolve_model

    assert min(resolve_model(name).vocab for name in model_names()) >= VOCABULARY


def test_the_special_tokens_are_the_first_ids(cache: Path) -> None:
    tokenizer = offline_tokenizer(cache)
    assert [tokenizer.token_to_id(token) for token in (BOS, EOS, PAD)] == [0, 1, 2]


def test_documents_end_with_the_end_token(cache: Path) -> None:
    tokenizer = text_tokenizer("nano", cache=cache)
    for ids in tokenizer.encode(["one", "and two", ""]):
        assert ids[-1] == tokenizer.eos == 1
        assert ids.count(1) == 1


def test_training_it_again_in_another_process_gives_the_same_file(cache: Path) -> None:
    texts = [document(sample, "chat") for sample in stdlib_samples(cache)][:1500]
    script = (
        "import sys, json; from harness.tokenizer import train_tokenizer\n"
        "sys.stdout.write(train_tokenizer(json.load(sys.stdin)).to_str())"
    )
    other = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "3", "RAYON_NUM_THREADS": "5"},
    )
    assert other.stdout == train_tokenizer(texts).to_str()


def test_a_damaged_cached_tokenizer_is_made_anew(second_cache: Path) -> None:
    whole = offline_tokenizer(second_cache).to_str()
    (path,) = second_cache.glob("tokenizer-*.json")
    path.write_text(path.read_text()[:1000])
    assert offline_tokenizer(second_cache).to_str() == whole


@pytest.fixture
def pretrained(tmp_path: Path, cache: Path) -> Path:
    """A directory as `from_pretrained` reads it, with a tokenizer of its own (the offline one)."""
    directory = tmp_path / "pretrained"
    directory.mkdir()
    text_tokenizer("nano", cache=cache).encoder.save(directory)
    config = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def set_vocabulary(directory: Path, size: int) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": size}))


def remove_tokenizer(directory: Path) -> None:
    for file in directory.glob("*token*"):
        file.unlink()


def test_a_directory_with_a_tokenizer_is_read_with_it(pretrained: Path, cache: Path) -> None:
    assert own_tokenizer(str(pretrained)) and not own_tokenizer("nano") and not own_tokenizer("llama-3.1-8b")
    texts = ["The quick brown fox", "def f(x): return x"]
    own, offline = text_tokenizer(str(pretrained), cache=cache), text_tokenizer("nano", cache=cache)
    assert own.encode(texts) == offline.encode(texts)
    assert (own.eos, own.pad) == (offline.eos, offline.pad)
    assert own.identity != offline.identity


def test_a_changed_tokenizer_has_another_identity(pretrained: Path) -> None:
    before = tokenizer_identity(str(pretrained))
    (pretrained / "tokenizer.json").write_text((pretrained / "tokenizer.json").read_text() + "\n")
    assert tokenizer_identity(str(pretrained)) != before


def test_a_bare_config_is_read_with_the_offline_tokenizer(pretrained: Path) -> None:
    remove_tokenizer(pretrained)
    assert not own_tokenizer(str(pretrained))
    assert not own_tokenizer(str(pretrained / "config.json"))


def test_a_small_vocabulary_without_a_tokenizer_is_an_error(pretrained: Path) -> None:
    remove_tokenizer(pretrained)
    set_vocabulary(pretrained, 1000)
    with pytest.raises(InputError, match=r"has a vocabulary of 1000 and no tokenizer; put its tokenizer\.json beside"):
        own_tokenizer(str(pretrained))


def test_weights_without_a_tokenizer_are_an_error(pretrained: Path) -> None:
    remove_tokenizer(pretrained)
    set_vocabulary(pretrained, 32_000)
    (pretrained / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="has weights but no tokenizer to read data with"):
        own_tokenizer(str(pretrained))


def test_a_tokenizer_of_another_model_is_an_error(pretrained: Path, cache: Path, tmp_path: Path) -> None:
    set_vocabulary(pretrained, 300)
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "documentation of the function"}\n{"text": "another documentation"}\n')
    with pytest.raises(InputError, match=r"makes the id \d+, its vocabulary ends at 299"):
        load_tokens(str(data), model=str(pretrained), seq=8, pack=True, sequences=None, cache=cache)


def test_a_damaged_tokenizer_is_one_clear_line(pretrained: Path, cache: Path) -> None:
    (pretrained / "tokenizer.json").write_text('{"broken": ')
    (pretrained / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match="model: cannot load the tokenizer of ") as raised:
        text_tokenizer(str(pretrained), cache=cache)
    assert "\n" not in str(raised.value)
