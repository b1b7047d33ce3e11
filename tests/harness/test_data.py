"""Data from a file, a directory or the offline set, as sequences of exact length."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.errors import InputError
from harness.data import TokenData, load_tokens


@pytest.fixture
def story(tmp_path: Path) -> Path:
    """Forty samples, each of other words."""
    path = tmp_path / "story.jsonl"
    lines = [{"text": f"Chapter {i}: " + " ".join(f"word{i}x{j}" for j in range(5 + i % 7))} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def load(data: Path | None, cache: Path, **options: object) -> TokenData:
    given = {"model": "nano", "seq": 32, "pack": True, "sequences": None} | options
    return load_tokens(str(data) if data else None, cache=cache, **given)  # type: ignore[arg-type]


def rows(dataset: torch.utils.data.Dataset[dict[str, torch.Tensor]]) -> list[tuple[int, ...]]:
    return [tuple(dataset[i]["input_ids"].tolist()) for i in range(len(dataset))]  # type: ignore[arg-type]


def test_the_offline_set_has_thousands_of_samples_of_the_exact_length(cache: Path) -> None:
    data = load(None, cache, seq=128)
    assert data.name == "python-stdlib"
    assert data.samples == len(data.train) > 2000  # type: ignore[arg-type]
    assert data.tokens == data.samples * 128
    for dataset in (data.train, data.evaluation):
        assert {tuple(item["input_ids"].shape) for item in (dataset[0], dataset[1])} == {(128,)}
        assert dataset[0]["input_ids"].dtype == torch.int64
        assert torch.equal(dataset[0]["input_ids"], dataset[0]["labels"])
        assert "attention_mask" not in dataset[0]


def test_ids_of_the_offline_tokenizer_are_below_its_vocabulary(cache: Path) -> None:
    data = load(None, cache, seq=2048)
    largest = max(max(row) for row in rows(data.train))
    assert largest < 8192


def test_cached_tokens_are_there_in_a_third_of_a_second(cache: Path) -> None:
    load(None, cache)
    started = time.perf_counter()
    load(None, cache)
    assert time.perf_counter() - started < 0.3


def test_loading_twice_gives_the_same_sequences_in_the_same_order(cache: Path, second_cache: Path, story: Path) -> None:
    first, again, elsewhere = load(story, cache), load(story, cache), load(story, second_cache)
    assert rows(first.train) == rows(again.train) == rows(elsewhere.train)
    assert first.fingerprint == again.fingerprint == elsewhere.fingerprint


def test_another_seed_gives_another_order_of_the_same_documents(cache: Path, story: Path) -> None:
    one, two = load(story, cache, pack=False, seed=1), load(story, cache, pack=False, seed=2)
    assert rows(one.train) != rows(two.train)
    assert sorted(rows(one.train)) == sorted(rows(two.train))
    assert rows(one.evaluation) == rows(two.evaluation)


def test_padding_is_masked_and_has_no_label(cache: Path, story: Path) -> None:
    data = load(story, cache, seq=256, pack=False)
    item = data.train[0]
    held = int(item["attention_mask"].sum())
    assert 0 < held < 256
    assert item["attention_mask"].tolist() == [1] * held + [0] * (256 - held)
    assert item["labels"][:held].tolist() == item["input_ids"][:held].tolist()
    assert set(item["labels"][held:].tolist()) == {-100}
    lengths = [int(data.train[i]["attention_mask"].sum()) for i in range(data.samples)]
    assert data.tokens == sum(lengths)


def test_a_document_longer_than_the_sequence_is_cut(cache: Path, story: Path) -> None:
    data = load(story, cache, seq=4, pack=False)
    assert data.train[0]["attention_mask"].tolist() == [1, 1, 1, 1]
    assert data.tokens == data.samples * 4


@pytest.mark.parametrize("pack", [True, False])
def test_short_data_repeats_every_sequence_in_another_order(cache: Path, story: Path, pack: bool) -> None:
    once = load(story, cache, pack=pack)
    count = once.samples
    thrice = load(story, cache, pack=pack, sequences=3 * count)
    assert (thrice.samples, len(thrice.train)) == (count, 3 * count)  # type: ignore[arg-type]
    passes = [rows(thrice.train)[i * count : (i + 1) * count] for i in range(3)]
    assert passes[0] == rows(once.train)
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2])
    assert passes[1] != passes[0] and passes[2] != passes[1]


def test_no_document_is_both_trained_on_and_held_out(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "copies.jsonl"
    lines = [json.dumps({"text": f"the text of sample {i % 50}, told once more"}) for i in range(200)]
    path.write_text("\n".join(lines))
    data = load(path, cache, seq=64, pack=False)
    held_out = set(rows(data.evaluation))
    assert held_out and held_out.isdisjoint(rows(data.train))
    assert len(data.train) + len(data.evaluation) == 200  # type: ignore[arg-type]


def test_the_order_of_the_file_does_not_decide_what_is_held_out(cache: Path, tmp_path: Path, story: Path) -> None:
    turned = tmp_path / "turned.jsonl"
    turned.write_text("\n".join(reversed(story.read_text().splitlines())))
    one, two = load(story, cache, pack=False), load(turned, cache, pack=False)
    assert set(rows(one.evaluation)) == set(rows(two.evaluation))


def test_data_shorter_than_one_sequence_still_fills_one(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.jsonl"
    path.write_text('{"text": "one short text"}\n{"text": "and another one"}\n')
    data = load(path, cache, seq=512)
    assert (data.samples, len(data.train), len(data.evaluation)) == (1, 1, 1)  # type: ignore[arg-type]
    assert len(data.train[0]["input_ids"]) == 512


def test_packed_sequences_are_the_documents_one_after_the_other(cache: Path, story: Path) -> None:
    packed, padded = load(story, cache, seq=256), load(story, cache, seq=256, pack=False)
    joined = [token for row in rows(packed.train) for token in row]
    documents = [padded.train[i] for i in range(padded.samples)]
    stream = [token for item in documents for token in item["input_ids"][item["attention_mask"] == 1].tolist()]
    assert len(stream) - 256 < len(joined) <= len(stream)
    assert joined == stream[: len(joined)]


@settings(max_examples=30, deadline=None)
@given(seq=st.integers(1, 300), sequences=st.integers(1, 500), pack=st.booleans())
def test_every_item_has_the_exact_length(cache: Path, seq: int, sequences: int, pack: bool) -> None:
    data = load(None, cache, seq=seq, sequences=sequences, pack=pack)
    assert len(data.train) >= sequences  # type: ignore[arg-type]
    for item in (data.train[0], data.train[len(data.train) - 1], data.evaluation[0]):  # type: ignore[arg-type]
        assert {tensor.shape for tensor in item.values()} == {(seq,)}


def test_an_index_beyond_the_end_is_an_index_error(cache: Path, story: Path) -> None:
    data = load(story, cache)
    with pytest.raises(IndexError):
        data.train[len(data.train)]  # type: ignore[arg-type]


def test_a_damaged_cache_is_made_anew(cache: Path, story: Path) -> None:
    before = load(story, cache)
    arrays = [path for path in cache.glob("tokens-*/ids.npy") if path.stat().st_size < 20_000]
    assert arrays
    for path in arrays:
        path.write_bytes(path.read_bytes()[:100])
    assert rows(load(story, cache).train) == rows(before.train)


def test_a_changed_file_is_read_again(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "changing.jsonl"
    path.write_text('{"text": "the first text"}\n{"text": "a second text"}\n')
    before = load(path, cache)
    path.write_text('{"text": "the first text"}\n{"text": "a third text altogether"}\n')
    assert load(path, cache).fingerprint != before.fingerprint


def test_one_document_cannot_be_split(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text('{"text": "the same"}\n{"text": "the same"}\n')
    with pytest.raises(InputError, match=r"one\.jsonl holds one distinct document; give two or more"):
        load(path, cache)


def test_a_cache_that_cannot_be_written_is_one_clear_line(tmp_path: Path, story: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache: cannot write to .* set XDG_CACHE_HOME"):
        load(story, tmp_path / "file")


def test_the_cache_lies_under_xdg_cache_home(
    second_cache: Path, tmp_path: Path, story: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "xdg" / "vramcalc"
    home.parent.mkdir()
    second_cache.rename(home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_tokens(str(story), model="nano", seq=16, pack=True, sequences=None)
    assert len(list(home.glob("tokens-*"))) == 1
    assert not list(home.glob(".tokens-*"))
