"""Text -> token ids with exactly one EOS per document, by any Hugging Face fast tokenizer."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from dist_cpt.adapters.vocabulary import NewVocabulary


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer of a folder or hub id; no remote code runs.

    Raises:
        DataError: it cannot be loaded, is not a fast tokenizer, or has no EOS token.
    """
    from transformers import AutoTokenizer  # seconds to import, so only where a tokenizer is needed

    if path.startswith("/") and not Path(path).is_dir():
        raise DataError(f"tokenizer: {path} is not a folder", remedy="set data.tokenizer or model.path")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception on a broken tokenizer.json
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(
            f"tokenizer: cannot load {path}: {reason}",
            remedy="data.tokenizer must be a folder with tokenizer.json or a reachable hub id",
        ) from error
    if not tokenizer.is_fast:
        raise DataError(
            f"tokenizer: {path} is a {type(tokenizer).__name__}, not a fast tokenizer",
            remedy="convert it so that the folder holds tokenizer.json",
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"tokenizer: {path} has no EOS token, which ends every document",
            remedy="set eos_token in its tokenizer_config.json",
        )
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of what turns text into ids: the serialised tokenizer and its EOS id, padding state aside."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content.pop("truncation", None)  # these two change with the last call, not with the tokenizer
    content.pop("padding", None)
    content["eos_token_id"] = tokenizer.eos_token_id
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """The highest id the tokenizer can emit, plus one; more than its length where ids have gaps."""
    return max(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def load_new_vocabulary(config: RunConfig) -> NewVocabulary | None:
    """What `embeddings.new_tokens` adds to the tokenizer in `model.path`; None if the recipe adds nothing.

    Raises:
        DataError: one of the two cannot be loaded, the one does not extend the other, or `init: focus` has no file
            of these two.
    """
    where, path = config.embeddings.new_tokens, config.model.path
    if where is None or path is None:
        return None
    from dist_cpt.adapters.vocabulary import new_vocabulary  # loads torch
    from dist_cpt.data.focus import read_focus

    try:
        base = load_tokenizer(path, config.model.revision)
    except DataError as error:
        raise DataError(
            f"embeddings.new_tokens: {error.message}", remedy="the base's own tokenizer must lie in model.path"
        ) from error
    try:
        extended = load_tokenizer(where)
    except DataError as error:
        raise DataError(
            f"embeddings.new_tokens: {error.message}", remedy="make it with: dist-cpt tokenizer extend"
        ) from error
    sha256 = tokenizer_hash(extended)
    found = new_vocabulary(base, extended, sha256, where)
    if config.embeddings.init != "focus":
        return found
    mixtures, file_sha256 = read_focus(where, found.first_row, found.size, (tokenizer_hash(base), sha256))
    return replace(found, mixtures=mixtures, mixtures_sha256=file_sha256)


class DocumentEncoder:
    """Texts -> token ids, every document ended by exactly one EOS. Safe to call from several threads.

    The tokenizer's own special tokens are not added. An EOS spelled out in a text ends a document there:
    one at the end of a text is not doubled, one in the middle makes two documents of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        from tokenizers import Tokenizer

        # A copy: the caller's tokenizer keeps its padding and truncation, and no one changes ours.
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        eos_id = tokenizer.eos_token_id
        assert isinstance(eos_id, int)  # load_tokenizer refuses a tokenizer without one
        self._eos_id = eos_id

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return ids int32 [T] of all documents in a row, and their lengths int32 [num_documents]."""
        flat: list[int] = []
        # _fast leaves out character offsets, which take as long as the rest.
        for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False):
            flat.extend(encoding.ids)
            flat.append(self._eos_id)
        ids = np.array(flat, dtype=np.int32)
        is_eos = ids == self._eos_id
        doubled = is_eos.copy()
        doubled[1:] &= is_eos[:-1]
        if doubled.any():  # an EOS right after a border: a text's own EOS, or a text without any token
            ids, is_eos = ids[~doubled], is_eos[~doubled]
        ends = np.flatnonzero(is_eos)
        return ids, np.diff(ends, prepend=-1).astype(np.int32)
