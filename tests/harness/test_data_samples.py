"""Files of samples, good and bad, and the text that becomes of them."""

from __future__ import annotations

import importlib.util
import json
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from estimator.errors import InputError
from harness.prompts import document
from harness.samples import find_source, read_documents


def texts(path: Path, prompt_format: str = "plain") -> list[str]:
    return list(read_documents(find_source(str(path)), prompt_format))


CHAT = "### Human: Why?\nBecause of what?### Assistant: So."
SAMPLES: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"text": "As it stands."}, dict.fromkeys(("chat", "alpaca", "plain"), "As it stands.")),
    (
        {"instruction": "Why?", "input": "Because of what?", "output": "So."},
        {"chat": CHAT, "plain": "Why?\nBecause of what?\n\nSo."},
    ),
    ({"prompt": "Why?", "completion": "So."}, {"chat": "### Human: Why?### Assistant: So.", "plain": "Why?\n\nSo."}),
    (
        {"question": "Why?", "answer": "So."},
        {
            "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\nWhy?\n\n### Response:\nSo."
        },
    ),
    (
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
        {"chat": "### Human: Why?### Assistant: So.", "plain": "Why?\n\nSo."},
    ),
]


@pytest.mark.parametrize(("sample", "expected"), SAMPLES)
def test_each_kind_of_sample_becomes_the_text_of_each_prompt_format(
    sample: dict[str, Any], expected: dict[str, str]
) -> None:
    for prompt_format, text in expected.items():
        assert document(sample, prompt_format) == text


def test_an_unknown_prompt_format_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="--prompt-format with one of chat, alpaca, plain"):
        document({"text": "x"}, "vicuna")


def test_jsonl_csv_and_parquet_with_the_same_samples_give_the_same_texts(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    samples = [{"question": f"What is {i}?", "answer": f"A number,\nand {'é' * i}."} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(sample) for sample in samples), encoding="utf-8")
    csv_lines = ["question,answer", *(f'"{s["question"]}","{s["answer"]}"' for s in samples)]
    (tmp_path / "a.csv").write_text("\n".join(csv_lines), encoding="utf-8-sig")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(samples), tmp_path / "a.parquet")
    expected = [f"{sample['question']}\n\n{sample['answer']}" for sample in samples]
    for suffix in ("jsonl", "csv", "parquet"):
        assert texts(tmp_path / f"a.{suffix}") == expected
    assert texts(tmp_path) == expected * 3


def test_parquet_holds_conversations(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", "chat") == ["### Human: Hi### Assistant: Hello"]


def test_empty_samples_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": " \\n"}\n{"text": "two"}\n')
    assert texts(tmp_path / "a.jsonl") == ["one", "two"]


BAD_FILES = [
    ("a.jsonl", b'{"text": "one"}\n{"text": "tw', "line 2 is not JSON: "),
    ("a.jsonl", b'{"text": "one"}\n["two"]\n', "line 2 is not a JSON object; write one object per line"),
    ("a.jsonl", b'{"text": "one"}\n{"text": "\xff\xfe"}\n', "line 2 is not UTF-8; convert the file to UTF-8"),
    ("a.jsonl", b'{"text": 5}\n', "line 1: text is not text but '5'"),
    ("a.jsonl", b'{"text": "one"}\n{"text": "half \\ud800"}\n', "line 2 holds half of a surrogate pair"),
    ("a.jsonl", b"[" * 100_000, "line 1 is not JSON: "),
    ("a.jsonl", b'{"body": "one"}\n', "line 1: no known columns among body; a sample has one of: text; messages; "),
    ("a.jsonl", b"{}\n", "line 1: no known columns among nothing"),
    ("a.jsonl", b'{"messages": "hello"}\n', "messages is not a list of {role, content}"),
    ("a.jsonl", b'{"messages": [{"role": "dog", "content": "wuff"}]}\n', "messages holds something else"),
    ("a.jsonl", b'{"instruction": "only half"}\n', "no known columns among instruction"),
    ("a.csv", b"question,answer\nq,a\nq,a,more\n", "line 3 has more fields than the header"),
    ("a.csv", b"title,body\na,b\n", "no known columns among title, body"),
    ("a.csv", b'text\n"open\n', "is not CSV: "),
    ("a.csv", b"text\nok\n\xff\xfe\n", "is not UTF-8"),
    ("a.parquet", b"PAR1 but not really", "is not Parquet: "),
    ("a.parquet", b"", "is not Parquet: "),
    ("a.txt", b"text", "is none of .jsonl, .csv, .parquet; convert it"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_a_bad_file_is_one_clear_line_that_names_it(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        texts(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    assert str(raised.value).startswith("data: ") and "\n" not in str(raised.value)


def test_a_file_without_samples_is_an_error_when_it_is_loaded(tmp_path: Path, cache: Path) -> None:
    from harness.data import load_tokens

    for name, content in (("a.jsonl", ""), ("b.csv", "text\n"), ("c.csv", ""), ("d.jsonl", "\n\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=f"data: {name} is empty; give a file with at least two samples"):
            load_tokens(str(tmp_path / name), model="nano", seq=8, pack=True, sequences=None, cache=cache)


def test_what_is_not_there_names_the_formats_and_a_hub_id(tmp_path: Path) -> None:
    for missing in (str(tmp_path / "no.jsonl"), "no-such-file", "dir/no.csv"):
        with pytest.raises(InputError, match=r"data: no file .* or a hub id such as timdettmers/openassistant-guanaco"):
            find_source(missing)


def test_a_directory_without_data_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("nothing")
    with pytest.raises(InputError, match=r"holds no \.jsonl, \.csv, \.parquet file"):
        find_source(str(tmp_path))


def test_a_hub_id_that_cannot_be_had_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("datasets") is None:
        pytest.skip("datasets is not installed")
    import datasets

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach 'someone/something' on the Hub\nTraceback and more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError) as raised:
        list(read_documents(find_source("someone/something"), "chat"))
    assert str(raised.value) == (
        "data: 'someone/something' is not to be had from the hub: "
        "Couldn't reach 'someone/something' on the Hub; give a file"
    )


def test_a_hub_data_set_is_read_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("datasets") is None:
        pytest.skip("datasets is not installed")
    import datasets

    table = datasets.Dataset.from_list([{"text": f"### Human: {i}### Assistant: {i + 1}"} for i in range(3)])
    asked: list[tuple[str, str]] = []

    def load(name: str, *, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = find_source("timdettmers/openassistant-guanaco")
    assert list(read_documents(source, "chat")) == [f"### Human: {i}### Assistant: {i + 1}" for i in range(3)]
    assert asked == [("timdettmers/openassistant-guanaco", "train")]


def test_without_a_network_the_hub_is_not_tried_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its libraries would retry five times, for 24 seconds."""
    if importlib.util.find_spec("datasets") is None:
        pytest.skip("datasets is not installed")
    import datasets
    import huggingface_hub

    for owner in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(owner, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(urllib.request, "getproxies", dict)

    def no_name(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    started = time.perf_counter()
    with pytest.raises(InputError, match="'vramcalc/not-in-any-cache' is not to be had from the hub") as raised:
        list(read_documents(find_source("vramcalc/not-in-any-cache"), "chat"))
    assert time.perf_counter() - started < 5
    assert "\n" not in str(raised.value)
