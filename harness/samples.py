"""Reads samples: the offline set, a local JSONL, CSV or Parquet file, a directory of such files, or a hub data set."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from estimator.errors import InputError, MissingError
from estimator.model.hub import settle_for_the_cache_without_a_network
from harness.prompts import document
from harness.stdlib_corpus import NAME as OFFLINE_NAME
from harness.stdlib_corpus import corpus_path, stdlib_samples

SUFFIXES = (".jsonl", ".csv", ".parquet")
SUGGESTED_HUB_ID = "timdettmers/openassistant-guanaco"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where samples come from."""

    name: str
    """As it is printed and recorded."""
    identity: str
    """Changes when the samples would: a path with its size and time of change, the version of the offline set, a hub id."""
    files: tuple[Path, ...] = ()
    hub_id: str | None = None


def find_source(data: str | None, *, cache: Path | None = None) -> Source:
    """What ``--data`` names, without reading it: ``None`` is the offline set. Raises InputError."""
    if data is None:
        return Source(name=OFFLINE_NAME, identity=corpus_path(cache).stem)
    path = Path(data).expanduser()
    try:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not files:
                raise InputError(f"data: {path} holds no {', '.join(SUFFIXES)} file; give one or a directory of them")
        elif path.exists():
            files = [path]
        elif _HUB_ID.fullmatch(data) and path.suffix.lower() not in SUFFIXES:
            return Source(name=data, identity=f"hub:{data}", hub_id=data)
        else:
            raise InputError(
                f"data: no file {data!r}; give a {', '.join(SUFFIXES)} file, a directory of them, "
                f"or a hub id such as {SUGGESTED_HUB_ID}"
            )
        for file in files:
            if file.suffix.lower() not in SUFFIXES:
                raise InputError(f"data: {file} is none of {', '.join(SUFFIXES)}; convert it to one of them")
        stats = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    except OSError as error:
        raise InputError(f"data: cannot read {path}: {error.strerror}") from None
    return Source(name=path.name, identity=json.dumps(stats), files=tuple(files))


def read_documents(source: Source, prompt_format: str, *, cache: Path | None = None) -> Iterator[str]:
    """The text of each sample in order, empty ones left out. Raises InputError naming the file and line."""
    for where, sample in _samples(source, cache):
        try:
            text = document(sample, prompt_format)
            text.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"data: {where} holds half of a surrogate pair, which is no character; write the whole one"
            ) from None
        except InputError as error:
            if str(error).startswith("prompt_format"):
                raise
            raise InputError(f"data: {where}: {error}") from None
        if text.strip():
            yield text


def _samples(source: Source, cache: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    if source.hub_id is not None:
        yield from _from_hub(source.hub_id)
    elif source.files:
        readers = {".jsonl": _from_jsonl, ".csv": _from_csv, ".parquet": _from_parquet}
        for file in source.files:
            try:
                yield from readers[file.suffix.lower()](file)
            except OSError as error:
                raise InputError(f"data: cannot read {file}: {error.strerror or error}") from None
    else:
        for index, sample in enumerate(stdlib_samples(cache)):
            yield f"{source.name} sample {index + 1}", dict(sample)


def _from_jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file} line {number}"
            try:
                sample = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                raise InputError(f"data: {where} is not UTF-8; convert the file to UTF-8") from None
            except (ValueError, RecursionError) as error:
                raise InputError(f"data: {where} is not JSON: {error}") from None
            if not isinstance(sample, dict):
                raise InputError(f"data: {where} is not a JSON object; write one object per line")
            yield where, sample


def _from_csv(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(sys.maxsize)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                where = f"{file} line {reader.line_num}"
                if None in row:
                    raise InputError(f"data: {where} has more fields than the header")
                yield where, {column: value for column, value in row.items() if value not in (None, "")}
        except UnicodeDecodeError:
            raise InputError(
                f"data: {file} is not UTF-8 after line {reader.line_num}; convert the file to UTF-8"
            ) from None
        except csv.Error as error:
            raise InputError(f"data: {file} line {reader.line_num} is not CSV: {error}") from None


def _from_parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingError("data: Parquet needs pyarrow; pip install 'vramcalc-toolkit[all]'") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            row = 0
            for batch in table.iter_batches():
                for sample in batch.to_pylist():
                    row += 1
                    yield f"{file} row {row}", sample
    except pyarrow.ArrowException as error:
        raise InputError(f"data: {file} is not Parquet: {_first_line(error)}") from None


def _from_hub(hub_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import datasets
    except ImportError:
        raise MissingError(
            f"data: {hub_id!r} looks like a hub id, which needs datasets; pip install 'vramcalc-toolkit[all]', or give a file"
        ) from None
    datasets.disable_progress_bars()
    settle_for_the_cache_without_a_network()
    try:
        table = datasets.load_dataset(hub_id, split="train")
    except Exception as error:  # the library raises its own, the hub's, the network's and Python's errors
        raise InputError(f"data: {hub_id!r} is not to be had from the hub: {_first_line(error)}; give a file") from None
    for index, sample in enumerate(table):
        yield f"{hub_id} row {index + 1}", dict(sample)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
