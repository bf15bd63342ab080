"""A tokenizer from a corpus, and what any tokenizer makes of a corpus: tokens per word, bytes per token, losses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dist_cpt.config.schema import SourceConfig
from dist_cpt.data.sources import ReadCounts, find_files, read_documents
from dist_cpt.errors import ConfigError, DataError, WriteError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOS, PAD = "<|endoftext|>", "<|pad|>"
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class Fertility:
    """What a tokenizer makes of a corpus; words are what white space separates."""

    documents: int
    words: int
    num_bytes: int  # of the text in UTF-8
    tokens: int
    unknown: int  # tokens that stand for text the tokenizer does not know
    not_restored: int  # documents that decode(encode(x)) does not give back

    def as_json(self) -> dict[str, Any]:
        """With the ratios `tokens_per_word` and `bytes_per_token`."""
        ratios = {"tokens_per_word": self.tokens / self.words, "bytes_per_token": self.num_bytes / self.tokens}
        return self.__dict__ | {key: round(value, 4) for key, value in ratios.items()}


def corpus_texts(paths: Sequence[str], field: str = "text") -> Iterator[str]:
    """The documents of files, folders or patterns of jsonl, txt and md, in order, as a recipe's source reads them.

    Raises:
        DataError: nothing there, or a bad record.
    """
    for path in paths:
        source = SourceConfig(path=path, text=field)
        files = find_files(path, Path(path).stem).files
        for document in read_documents(source, files, "error", ReadCounts()):
            yield document.text


def train_tokenizer(
    texts: Iterable[str], out: Path, vocab_size: int, kind: Literal["bpe", "unigram"] = "bpe"
) -> Tokenizer:
    """Train a byte-level BPE or Unigram on `texts` and write it to the new folder `out`; 258 tokens are given.

    The given ones are the 256 bytes, `<|endoftext|>` and `<|pad|>`: any text has tokens and comes back exactly.

    Raises:
        ConfigError: too small a vocabulary, or `out` is in use.
        DataError: the corpus is empty.
        WriteError: `out` cannot be written.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    require_new(out)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet) + 2:
        raise ConfigError(f"--vocab-size {vocab_size}: {len(alphabet) + 2} tokens are given, use more")
    given: dict[str, Any] = {"vocab_size": vocab_size, "special_tokens": [EOS, PAD], "show_progress": False}
    given["initial_alphabet"] = alphabet
    tokenizer = Tokenizer(models.BPE() if kind == "bpe" else models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(**given) if kind == "bpe" else trainers.UnigramTrainer(**given)
    counted = _Counted(texts)
    tokenizer.train_from_iterator(counted, trainer)
    if counted.number == 0:
        raise DataError("the corpus holds no document", remedy="check the paths and --text")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD}
    with new_folder(out) as folder:
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return tokenizer


def fertility(tokenizer: Tokenizer, texts: Iterable[str], usage: np.ndarray | None = None) -> Fertility:
    """Run `tokenizer` over `texts`; counts each id into `usage` int64 [V] where that is given.

    Raises:
        DataError: there is no text.
    """
    unknown_id = unknown_token_id(tokenizer)
    sums = np.zeros(6, dtype=np.int64)
    for batch in in_batches(texts):
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        restored = tokenizer.decode_batch([encoding.ids for encoding in encodings], skip_special_tokens=False)
        for text, encoding, again in zip(batch, encodings, restored, strict=True):
            ids = np.array(encoding.ids, dtype=np.int64)
            lost = unknown_id is not None and int((ids == unknown_id).sum())
            sums += (1, len(text.split()), len(text.encode()), len(ids), lost, again != text)
            if usage is not None:
                np.add.at(usage, ids, 1)
    if sums[0] == 0:
        raise DataError("the corpus holds no document", remedy="check the paths and --text")
    return Fertility(*map(int, sums))


def require_new(out: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        ConfigError: it does.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists", remedy="give the name of a new folder")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which is renamed to `out` when whole and removed if that fails.

    Raises:
        WriteError: the file system refuses.
    """
    staging = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        yield staging
        os.replace(staging, out)
    except OSError as error:
        raise WriteError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class _Counted:
    """Passes texts on, for a trainer that takes an empty corpus without a word."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.number += 1
            yield text


def in_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """`texts` in lists of 1024, which is enough for all threads of a tokenizer."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch


def unknown_token_id(tokenizer: Tokenizer) -> int | None:
    """The token that stands for text which the model has no piece for; None without one."""
    model = json.loads(tokenizer.to_str())["model"]
    token = model.get("unk_token")
    return tokenizer.token_to_id(token) if token is not None else model.get("unk_id")
