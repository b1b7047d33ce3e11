"""From ``--data`` to sequences of exact length, with a part held out; token ids are cached, so that a run starts at once."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from estimator.building.model import is_pretrained
from estimator.errors import InputError
from estimator.model.catalog import resolve_model
from harness.cache import cache_directory, make_directory_once
from harness.samples import Source, find_source, read_documents
from harness.tokenizer import text_tokenizer, tokenizer_identity

if TYPE_CHECKING:
    import numpy as np
    from torch.utils.data import Dataset

    Array = np.ndarray[Any, Any]

_FORMAT = 1
_HELD_OUT = 0.05
"""Share of the tokens that only evaluation sees."""
_ENCODED_AT_ONCE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenData:
    """Data ready to train on. Items of both sets are dicts of int64 tensors of exactly ``seq`` elements."""

    name: str
    """The offline set's name, a file's name, or a hub id."""
    train: Dataset[Any]
    """``input_ids`` and ``labels``; where sequences are padded also ``attention_mask``, and labels -100 on the padding."""
    evaluation: Dataset[Any]
    """The same, of documents that ``train`` holds no copy of."""
    tokens: int
    """Tokens in ``train`` before it repeats, padding left out."""
    samples: int
    """Sequences in ``train`` before it repeats."""
    fingerprint: str
    """Hash of all token ids: two runs with the same one read the same data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokens:
    """All documents of one source, tokenized."""

    ids: Array
    """Documents one after the other, each with its end token: (tokens,) of unsigned integers."""
    offsets: Array
    """(documents + 1,): document i is ``ids[offsets[i]:offsets[i + 1]]``."""
    hashes: Array
    """(documents,): copies of a document have the same one."""
    pad: int
    fingerprint: str


def load_tokens(
    data: str | None,
    *,
    model: str,
    seq: int,
    pack: bool,
    sequences: int | None,
    cache: Path | None = None,
    prompt_format: str = "chat",
    seed: int = 0,
) -> TokenData:
    """Tokens of ``data`` for ``model``: ``None`` is the offline instruction set (see ``harness.stdlib_corpus``).

    Documents are split by the hash of their ids into training and evaluation (5% of the tokens, at least one sequence),
    shuffled by ``seed``, then packed (joined, cut to ``seq``, the rest dropped) or each cut or padded to ``seq``. ``train``
    has at least ``sequences`` items, repeating in another order where the data is short; ``None`` is one pass. Data of less
    than one sequence is repeated within it. Raises InputError and MissingError.
    """
    import numpy as np

    source = find_source(data, cache=cache)
    tokens = _cached_tokens(source, model, prompt_format, cache)
    _check_vocabulary(tokens, model)
    held_out = _held_out(tokens, seq, source)
    chosen = np.zeros(len(tokens.hashes), dtype=bool)
    chosen[held_out] = True
    training = np.random.default_rng(seed).permutation(np.flatnonzero(~chosen))
    cut = _packed if pack else _padded
    ids, lengths = cut(tokens, training, seq)
    evaluation_ids, evaluation_lengths = cut(tokens, np.flatnonzero(chosen), seq)
    from harness.token_dataset import TokenDataset  # loads torch: what is wrong with the data is said before

    return TokenData(
        name=source.name,
        train=TokenDataset(ids, lengths, length=max(len(ids), sequences or 0), seed=seed),
        evaluation=TokenDataset(evaluation_ids, evaluation_lengths, length=len(evaluation_ids), seed=seed),
        tokens=ids.size if lengths is None else int(lengths.sum()),
        samples=len(ids),
        fingerprint=tokens.fingerprint,
    )


def _held_out(tokens: _Tokens, seq: int, source: Source) -> Array:
    """The documents with the lowest hashes, copies together: the same ones whatever the order of the file."""
    import numpy as np

    order = np.argsort(tokens.hashes, kind="stable")
    ends = np.cumsum(np.diff(tokens.offsets)[order])
    wanted = min(max(_HELD_OUT * ends[-1], seq), ends[-1] / 2)
    count = int(np.searchsorted(ends, wanted)) + 1
    hashes = tokens.hashes[order]
    count = int(np.searchsorted(hashes, hashes[count - 1], side="right"))
    if count == len(order):
        # The last document alone is half of everything: hold out the ones before it.
        count = int(np.searchsorted(hashes, hashes[-1], side="left"))
    if count == 0:
        raise InputError(f"data: {source.name} holds one distinct document; give two or more (one is held out)")
    return order[:count]


def _packed(tokens: _Tokens, documents: Array, seq: int) -> tuple[Array, None]:
    import numpy as np

    stream = np.concatenate([tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]] for i in documents])
    if len(stream) < seq:
        stream = np.resize(stream, seq)
    count = len(stream) // seq
    return stream[: count * seq].reshape(count, seq), None


def _padded(tokens: _Tokens, documents: Array, seq: int) -> tuple[Array, Array]:
    import numpy as np

    ids = np.full((len(documents), seq), tokens.pad, dtype=tokens.ids.dtype)
    lengths = np.minimum(np.diff(tokens.offsets)[documents], seq)
    for row, (document, length) in enumerate(zip(documents, lengths, strict=True)):
        start = tokens.offsets[document]
        ids[row, :length] = tokens.ids[start : start + length]
    return ids, lengths


def _check_vocabulary(tokens: _Tokens, model: str) -> None:
    if not is_pretrained(model):
        return  # the offline tokenizer's ids are below every vocabulary of the catalog
    vocabulary = resolve_model(model).vocab
    if (largest := int(tokens.ids.max())) >= vocabulary:
        raise InputError(
            f"model: its tokenizer makes the id {largest}, its vocabulary ends at {vocabulary - 1}; "
            f"the tokenizer in {model} is another model's"
        )


def _cached_tokens(source: Source, model: str, prompt_format: str, cache: Path | None) -> _Tokens:
    key = json.dumps([_FORMAT, source.identity, tokenizer_identity(model, cache=cache), prompt_format])
    path = cache_directory(cache) / f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
    if (tokens := _read(path)) is None:
        shutil.rmtree(path, ignore_errors=True)
        made = _tokenize(source, model, prompt_format, cache)
        make_directory_once(path, lambda directory: _write(made, directory))
        tokens = made
    return tokens


def _tokenize(source: Source, model: str, prompt_format: str, cache: Path | None) -> _Tokens:
    import numpy as np

    tokenizer = text_tokenizer(model, cache=cache)
    # The narrowest type that holds every id: the cache of a large data set is read at each start.
    dtype = np.uint16 if max(tokenizer.largest, tokenizer.pad) < 2**16 else np.uint32
    documents: list[Array] = []
    waiting: list[str] = []

    def encode() -> None:
        documents.extend(np.array(ids, dtype=dtype) for ids in tokenizer.encode(waiting))
        waiting.clear()

    for text in read_documents(source, prompt_format, cache=cache):
        waiting.append(text)
        if len(waiting) == _ENCODED_AT_ONCE:
            encode()
    encode()
    documents = [document for document in documents if len(document)]
    if not documents:
        raise InputError(f"data: {source.name} is empty; give a file with at least two samples")
    ids = np.concatenate(documents)
    offsets = np.concatenate([[0], np.cumsum([len(document) for document in documents])]).astype(np.int64)
    digests = [hashlib.sha256(document.tobytes()).digest()[:8] for document in documents]
    return _Tokens(
        ids=ids,
        offsets=offsets,
        hashes=np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64),
        pad=tokenizer.pad,
        fingerprint=hashlib.sha256(ids.tobytes() + offsets.tobytes()).hexdigest()[:16],
    )


def _write(tokens: _Tokens, directory: Path) -> None:
    import numpy as np

    for name in ("ids", "offsets", "hashes"):
        np.save(directory / f"{name}.npy", getattr(tokens, name), allow_pickle=False)
    (directory / "meta.json").write_text(json.dumps({"pad": tokens.pad, "fingerprint": tokens.fingerprint}))


def _read(directory: Path) -> _Tokens | None:
    import numpy as np

    try:
        arrays = {name: np.load(directory / f"{name}.npy", allow_pickle=False) for name in ("ids", "offsets", "hashes")}
        meta = json.loads((directory / "meta.json").read_text())
        tokens = _Tokens(**arrays, pad=meta["pad"], fingerprint=meta["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    whole = len(tokens.offsets) == len(tokens.hashes) + 1 and tokens.offsets[-1] == len(tokens.ids)
    return tokens if whole else None
