"""Which tokenizer a model reads its data with: the offline one, or the model's own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from estimator.building.model import is_pretrained
from estimator.errors import InputError, MissingError
from estimator.model.catalog import resolve_model
from harness.cache import cache_directory
from harness.prompts import document
from harness.stdlib_corpus import corpus_path, stdlib_samples
from profiler.files import write_whole

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

VOCABULARY = 8192
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
_FORMAT = 1
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTokenizer:
    """Turns documents into token ids, and says which ids end and pad them."""

    identity: str
    """Changes when the ids of a text would."""
    eos: int | None
    pad: int
    largest: int
    """No id is above this."""
    encoder: Encoder

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, each ended by ``eos`` where there is one."""
        end = [] if self.eos is None else [self.eos]
        return [ids if ids[-1:] == end else [*ids, *end] for ids in self.encoder.encode(texts)]


class Encoder(Protocol):
    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def save(self, directory: Path) -> None:
        """Writes what ``AutoTokenizer.from_pretrained(directory)`` reads."""


def text_tokenizer(model: str, *, cache: Path | None = None) -> TextTokenizer:
    """The tokenizer for ``model``: its own where ``model`` is a directory or a hub id that has one, else the offline one.

    Raises InputError where a model with weights has no tokenizer, or a vocabulary too small for the offline one.
    """
    if own_tokenizer(model):
        return _pretrained(model)
    return _offline(cache)


def own_tokenizer(model: str) -> bool:
    """Whether ``model`` comes with a tokenizer of its own; settled without loading anything. Raises InputError."""
    if not is_pretrained(model):
        return False
    path = Path(model).expanduser()
    if not path.exists():
        return True
    if path.is_dir() and any((path / name).is_file() for name in _TOKENIZER_FILES):
        return True
    vocabulary = resolve_model(model).vocab
    if vocabulary < VOCABULARY:
        raise InputError(
            f"model: {model} has a vocabulary of {vocabulary} and no tokenizer; put its tokenizer.json beside the config"
        )
    has_weights = path.is_dir() and any(path.glob("*.safetensors"))
    if has_weights and vocabulary != VOCABULARY:
        raise InputError(
            f"model: {model} has weights but no tokenizer to read data with; put its tokenizer.json beside them"
        )
    return False


def tokenizer_identity(model: str, *, cache: Path | None = None) -> str:
    """What ``text_tokenizer(model).identity`` is, without loading it: cached tokens are found by this."""
    if not own_tokenizer(model):
        return f"offline-{VOCABULARY}-{_FORMAT}-{corpus_path(cache).stem}"
    path = Path(model).expanduser()
    if not path.exists():
        return f"hub-{model}"
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (path / name).is_file():
            digest.update((path / name).read_bytes())
    return f"directory-{digest.hexdigest()[:16]}"


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE with 8,192 entries. The same texts in the same order give the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def offline_tokenizer(cache: Path | None = None) -> Tokenizer:
    """The offline tokenizer, trained on the standard library's documentation the first time and cached."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MissingError("data: tokenizing needs tokenizers; pip install 'vramcalc-toolkit[all]'") from None
    path = cache_directory(cache) / f"tokenizer-{VOCABULARY}-{_FORMAT}-{corpus_path(cache).stem}.json"
    if path.is_file():
        try:
            return Tokenizer.from_file(str(path))
        except Exception:  # the library raises bare Exception; a broken cache is made anew
            path.unlink(missing_ok=True)
    tokenizer = train_tokenizer(document(sample, "chat") for sample in stdlib_samples(cache))
    write_whole(path, (tokenizer.to_str(pretty=False)).encode())
    return tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfflineEncoder:
    tokenizer: Tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(list(texts))]

    def save(self, directory: Path) -> None:
        from transformers import PreTrainedTokenizerFast

        fast = PreTrainedTokenizerFast(tokenizer_object=self.tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)
        fast.save_pretrained(directory)


def _offline(cache: Path | None) -> TextTokenizer:
    tokenizer = offline_tokenizer(cache)
    eos, pad = tokenizer.token_to_id(EOS), tokenizer.token_to_id(PAD)
    assert eos is not None and pad is not None
    return TextTokenizer(
        identity=f"offline-{VOCABULARY}-{_FORMAT}-{corpus_path(cache).stem}",
        eos=eos,
        pad=pad,
        largest=tokenizer.get_vocab_size() - 1,
        encoder=_OfflineEncoder(tokenizer=tokenizer),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _PretrainedEncoder:
    tokenizer: PreTrainedTokenizerBase

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        # Cut to a sequence later: the tokenizer's own limit would only print a warning.
        encoded = self.tokenizer(list(texts), add_special_tokens=True, truncation=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def save(self, directory: Path) -> None:
        self.tokenizer.save_pretrained(directory)


def _pretrained(model: str) -> TextTokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingError(
            "model: a model's own tokenizer needs transformers; pip install 'vramcalc-toolkit[all]'"
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(Path(model).expanduser()), trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise whatever the broken file provokes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"model: cannot load the tokenizer of {model!r}: {reason}") from None
    eos = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    return TextTokenizer(
        identity=tokenizer_identity(model),
        eos=eos,
        pad=pad if pad is not None else eos if eos is not None else 0,
        largest=max(tokenizer.get_vocab().values()),
        encoder=_PretrainedEncoder(tokenizer=tokenizer),
    )
