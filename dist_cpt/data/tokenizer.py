"""Any Hugging Face fast tokenizer: load it, hash it, run it, and compare it with the one it extends."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import DataError, StorageError
from dist_cpt.storage import patiently

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from dist_cpt.adapters.vocabulary import NewVocabulary


_FILES = ("*.json", "*.txt", "*.jinja", "tokenizer.model")


def tokenizer_commit(path: str) -> str | None:
    """The commit that a hub id stands for now, with or without a revision (ORG/NAME@REVISION); None for a folder.

    Raises:
        DataError: the hub has no such repository or revision, or does not answer, and nothing is cached.
    """
    if _is_folder(path):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from dist_cpt.runtime.progress_bars import PieceBar

    repository, _, revision = path.partition("@")
    try:
        snapshot = snapshot_download(
            repository, revision=revision or None, allow_patterns=[*_FILES], tqdm_class=PieceBar
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"tokenizer: {path} is not a folder and cannot be downloaded from the hub: {' '.join(str(error).split())}",
            remedy="give a local folder, or check the name and the network",
        ) from error
    return Path(snapshot).name


def at_commit(path: str, commit: str | None) -> str:
    """ORG/NAME@COMMIT for a hub id; a folder as it is."""
    return path if commit is None or _is_folder(path) else f"{path.partition('@')[0]}@{commit}"


def _is_folder(path: str) -> bool:
    return path.startswith("/") or Path(path).is_dir()


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer of a folder or hub id, ORG/NAME or ORG/NAME@REVISION; no remote code runs.

    Raises:
        DataError: it cannot be loaded, is not a fast tokenizer, or has no EOS token.
    """
    from transformers import AutoTokenizer  # seconds to import, so only where a tokenizer is needed

    if path.startswith("/") and not Path(path).is_dir():
        raise DataError(f"tokenizer: {path} is not a folder", remedy="set data.tokenizer or model.path")
    place = path
    if "@" in path and not _is_folder(path):
        place, _, revision = path.partition("@")
    try:
        tokenizer = patiently(
            path, lambda: AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
        )
    except StorageError:
        raise
    except Exception as error:  # tokenizers raises bare Exception on a broken tokenizer.json
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(
            f"tokenizer: cannot load {path}: {reason}",
            remedy="data.tokenizer must be a folder with tokenizer.json or a reachable hub id",
        ) from error
    if not tokenizer.is_fast:
        raise DataError(
            f"tokenizer: {path} is a {type(tokenizer).__name__}, not a fast tokenizer",
            remedy="convert it to a tokenizer.json",
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"tokenizer: {path} has no EOS token, which ends every document",
            remedy="set eos_token in its tokenizer_config.json",
        )
    return tokenizer


def load_run_tokenizer(config: RunConfig) -> PreTrainedTokenizerFast:
    """The tokenizer that a resolved recipe reads its text with, and that its checkpoints hold.

    `data.bos` is written into it, so that training, generation and serving agree.

    Raises:
        DataError: as `load_tokenizer`, or `data.bos: always` without a BOS token.
    """
    path = config.data.tokenizer or config.model.path
    assert path is not None  # the schema requires one of them
    # model.revision is a revision of the model's repository only.
    tokenizer = load_tokenizer(path, config.model.revision if path == config.model.path else None)
    if config.data.bos != "auto":
        _set_bos(tokenizer, path, wanted=config.data.bos == "always")
    return tokenizer


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer begins a text with its BOS token."""
    ids = tokenizer.backend_tokenizer.encode("a").ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def padding_id(tokenizer: Any) -> int:
    """The id that fills a sequence: the padding token's, else that of EOS."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _set_bos(tokenizer: PreTrainedTokenizerFast, path: str, *, wanted: bool) -> None:
    """Let the tokenizer begin a text with BOS, or not; what it adds at the end is no part of a document and goes."""
    from tokenizers import processors

    if wanted and tokenizer.bos_token_id is None:
        raise DataError(
            f"data.bos: always, but the tokenizer {path} has no BOS token",
            remedy="set bos_token in its tokenizer_config.json, or use data.bos: auto",
        )
    if adds_bos(tokenizer) == wanted:
        return
    token = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A" if wanted else "$A",
        pair=f"{token} $A $B" if wanted else "$A $B",
        special_tokens=[(token, tokenizer.bos_token_id)] if wanted else [],
    )
    if "add_bos_token" in tokenizer.init_kwargs:  # which would win when the tokenizer is loaded again
        tokenizer.init_kwargs["add_bos_token"] = wanted


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of the serialised tokenizer and its EOS id, without its padding and truncation state."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content.pop("truncation", None)  # these two depend on the last call
    content.pop("padding", None)
    content["eos_token_id"] = tokenizer.eos_token_id
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """The highest id the tokenizer can emit, plus one; more than `len(tokenizer)` where ids have gaps."""
    return max(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def load_new_vocabulary(config: RunConfig) -> NewVocabulary | None:
    """The tokens that `embeddings.new_tokens` adds to the tokenizer in `model.path`; None if the recipe adds none.

    Raises:
        DataError: a tokenizer cannot be loaded, one does not extend the other, or `init: focus` has no file made
            from these two.
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
            f"embeddings.new_tokens: {error.message}", remedy="put the base's own tokenizer into model.path"
        ) from error
    try:
        extended = load_tokenizer(where)
    except DataError as error:
        raise DataError(
            f"embeddings.new_tokens: {error.message}", remedy="make it with: dist-cpt tokenizer extend"
        ) from error
    sha256 = tokenizer_hash(extended)
    vocabulary = new_vocabulary(base, extended, sha256, where)
    if config.embeddings.init != "focus":
        return vocabulary
    sha256s = (tokenizer_hash(base), sha256)
    mixtures, file_sha256 = read_focus(where, vocabulary.first_row, vocabulary.size, sha256s)
    return replace(vocabulary, mixtures=mixtures, mixtures_sha256=file_sha256)
