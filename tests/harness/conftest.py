"""What the harness's tests share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Small models gain nothing from threads, and lose much where another process wants the cores as well."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory in which the offline set, its tokenizer and its tokens are made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def second_cache(tmp_path: Path, cache: Path) -> Path:
    """Another cache directory, which has the offline set and its tokenizer but no tokens."""
    from harness.tokenizer import offline_tokenizer

    offline_tokenizer(cache)
    directory = tmp_path / "second-cache"
    directory.mkdir()
    for file in (*cache.glob("*.jsonl"), *cache.glob("*.json")):
        shutil.copy(file, directory)
    return directory
