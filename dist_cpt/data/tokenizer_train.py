"""Train a tokenizer on a corpus, and measure one: tokens per word, bytes per token, what it does not restore."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dist_cpt.data.sources import RecordTally, find_files, read_records, text_parser
from dist_cpt.data.token_ids import batch_ids
from dist_cpt.errors import ConfigError, DataError
from dist_cpt.run_folder.staging import new_output, require_new

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOS, PAD = "<|endoftext|>", "<|pad|>"
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class Fertility:
    """Counts of a tokenizer over a corpus; words are separated by white space."""

    documents: int
    words: int
    num_bytes: int  # of the text in UTF-8
    tokens: int
    unknown: int  # tokens that are the unknown token
    not_restored: int  # documents with decode(encode(x)) != x

    def as_json(self) -> dict[str, Any]:
        """With the ratios `tokens_per_word` and `bytes_per_token`."""
        ratios = {"tokens_per_word": self.tokens / self.words, "bytes_per_token": self.num_bytes / self.tokens}
        return self.__dict__ | {key: round(value, 4) for key, value in ratios.items()}


def corpus_texts(paths: Sequence[str], field: str = "text") -> Iterator[str]:
    """The documents of files, folders or glob patterns, in order, read as a recipe's sources are.

    Raises:
        DataError: no such file, or a bad record.
    """
    for path in paths:
        name = Path(path).name
        for record in read_records(name, find_files(path, name), text_parser(field), RecordTally()):
            yield str(record.value)  # in memory, for no folder is given


def train_tokenizer(
    texts: Iterable[str], out: Path, vocab_size: int, kind: Literal["bpe", "unigram"] = "bpe"
) -> Tokenizer:
    """Train a byte-level BPE or Unigram on `texts` and write it to the new folder `out`.

    256 bytes, `<|endoftext|>` and `<|pad|>` are always in the vocabulary: any text is encoded and restored exactly.

    Raises:
        ConfigError: the vocabulary is too small, or `out` is not empty.
        DataError: the corpus is empty.
        WriteError: `out` cannot be written.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    require_new(out)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet) + 2:
        raise ConfigError(f"--vocab-size {vocab_size}: {len(alphabet) + 2} tokens are fixed, use more")
    options: dict[str, Any] = {"vocab_size": vocab_size, "special_tokens": [EOS, PAD], "show_progress": False}
    options["initial_alphabet"] = alphabet
    tokenizer = Tokenizer(models.BPE() if kind == "bpe" else models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(**options) if kind == "bpe" else trainers.UnigramTrainer(**options)
    tokenizer.train_from_iterator(_not_empty(texts), trainer)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD}
    with new_output(out) as folder:
        folder.mkdir()
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return tokenizer


def fertility(tokenizer: Tokenizer, texts: Iterable[str], usage: np.ndarray | None = None) -> Fertility:
    """Run `tokenizer` over `texts`, and count each id in `usage` int64 [V] if given.

    Raises:
        DataError: there is no text.
    """
    unknown_id = unknown_token_id(tokenizer)
    sums = np.zeros(6, dtype=np.int64)
    for batch in in_batches(_not_empty(texts)):
        tokenised = batch_ids(tokenizer, batch)
        restored = tokenizer.decode_batch(tokenised, skip_special_tokens=False)
        for text, document, decoded in zip(batch, tokenised, restored, strict=True):
            ids = np.array(document, dtype=np.int64)
            unknown = unknown_id is not None and int((ids == unknown_id).sum())
            sums += (1, len(text.split()), len(text.encode()), len(ids), unknown, decoded != text)
            if usage is not None:
                np.add.at(usage, ids, 1)
    return Fertility(*map(int, sums))


def _not_empty(texts: Iterable[str]) -> Iterator[str]:
    """Pass `texts` on; the trainers accept an empty corpus silently."""
    empty = True
    for text in texts:
        empty = False
        yield text
    if empty:
        raise DataError("the corpus has no document", remedy="check the paths and --text")


def in_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """`texts` in lists of 1024, enough to keep all threads of a tokenizer busy."""
    remaining = iter(texts)
    return iter(lambda: list(islice(remaining, _BATCH_DOCUMENTS)), [])


def unknown_token_id(tokenizer: Tokenizer) -> int | None:
    """The id of the unknown token; None if the model has none."""
    model = json.loads(tokenizer.to_str())["model"]
    token = model.get("unk_token")
    return tokenizer.token_to_id(token) if token is not None else model.get("unk_id")
