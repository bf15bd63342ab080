"""The stores that a recipe needs: which text and settings make each, where it is, and whether it is finished."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_cpt.config.schema import MAX_RECORD_BYTES, RunConfig
from dist_cpt.data.chat import ConversationEncoder, chat_template
from dist_cpt.data.classes import ExampleEncoder
from dist_cpt.data.containers import files_of
from dist_cpt.data.encode import Encoder, Source, TextEncoder
from dist_cpt.data.filters import describe_filter
from dist_cpt.data.hub import HubDataset
from dist_cpt.data.sources import NoFiles, ReadCounts, SourceFiles, check_budget, source_files
from dist_cpt.data.store import StoreManifest, TokenStore, read_store_manifest
from dist_cpt.data.tokenizer import load_run_tokenizer, tokenizer_hash, vocabulary_size
from dist_cpt.data.units import has_content
from dist_cpt.errors import DataError, StorageError
from dist_cpt.run_folder.json_files import fsync_path
from dist_cpt.run_folder.names import MANIFEST
from dist_cpt.storage import LOGGER, is_there, patiently

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class PlannedStore:
    """One source or held-out set, its input files, and the folder of its store."""

    source: Source
    name: str
    folder: Path
    files: SourceFiles = field(default_factory=lambda: SourceFiles([]))
    inputs: list[dict[str, Any]] = field(default_factory=list)  # path, bytes and mtime_ns of each file
    settings: str = ""  # sha256 of what else makes its tokens
    gone: DataError | None = None  # why there is no text: only its finished store is left


@dataclass(frozen=True)
class StorePlan:
    """The stores of a recipe, training sources first, and what encodes their records."""

    stores: list[PlannedStore]
    tokenizer: PreTrainedTokenizerFast
    encoder: Encoder
    tokenizer_hash: str
    vocab_size: int
    streamed: list[PlannedStore] = field(default_factory=list)  # training sources of which no store is made


def plan_stores(config: RunConfig, folders: Sequence[str] | None = None) -> StorePlan:
    """The stores of a resolved recipe, each where it is or will be; in `folders`, in order, if this host has them.

    Raises:
        DataError: missing text without a finished store, or an unusable tokenizer or template.
    """
    tokenizer = load_run_tokenizer(config)
    encoder = _encoder(config, tokenizer)
    sha256 = tokenizer_hash(tokenizer)
    streamed: list[Source] = [*config.data.sources] if config.data.streaming else []
    sources: list[Source] = [*([] if streamed else config.data.sources), *config.data.validation]
    if folders is not None and all(is_there(Path(folder) / MANIFEST) for folder in folders):
        stores = [
            PlannedStore(source, _name(source), Path(folder)) for source, folder in zip(sources, folders, strict=True)
        ]
    else:
        stores = [_plan_store(source, config, encoder, sha256) for source in sources]
    read = [_plan_store(source, config, encoder, sha256) for source in streamed]
    return StorePlan(stores, tokenizer, encoder, sha256, vocabulary_size(tokenizer), read)


def _name(source: Source) -> str:
    assert source.name is not None  # resolve_paths fills it in
    return source.name


def _encoder(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> Encoder:
    if config.task == "instruct":
        template = chat_template(tokenizer, config.data.chat_template)
        return ConversationEncoder(tokenizer, template, config.data.seq_len)
    if config.classify is not None:
        return ExampleEncoder(tokenizer, config.classify, config.data.seq_len)
    return TextEncoder(tokenizer)


def _plan_store(source: Source, config: RunConfig, encoder: Encoder, sha256: str) -> PlannedStore:
    if config.data.cache_dir is None:
        raise ValueError("prepare takes a recipe after resolve_paths")
    name, cache = _name(source), Path(config.data.cache_dir)
    if source.store is not None:
        return PlannedStore(source, name, Path(source.store))
    key: dict[str, Any] = {
        "format_version": 1,  # of the tokens, which format 2 writes as format 1 did
        "tokenizer_hash": sha256,
        "text": source.text,
        "on_bad_record": config.data.on_bad_record,
    }
    key |= {name: value for name in ("split", "ignore") if (value := getattr(source, name))}
    key |= encoder.describe(source)
    if source.filter is not None:
        key |= describe_filter(source.filter)
    if config.data.max_record_bytes != MAX_RECORD_BYTES:
        key |= {"max_record_bytes": config.data.max_record_bytes}
    if encoder.label_kind is not None:
        key |= {"task": config.task}
    settings = _sha256(key)
    try:
        files = replace(source_files(source, name), max_record_bytes=config.data.max_record_bytes)
    except NoFiles as error:
        return PlannedStore(source, name, _only_store(cache, name, settings, error), settings=settings, gone=error)
    inputs = input_state(files)
    digest = _sha256(key | {"inputs": inputs})[:12]
    return PlannedStore(source, name, cache / f"{_file_name(name)}-{digest}", files, inputs, settings)


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)


def _only_store(cache: Path, name: str, settings: str, gone: NoFiles) -> Path:
    """The finished store of a source whose text is not there any more: the one of its name and settings.

    Raises:
        NoFiles: there is none.
        DataError: there are several.
    """
    found = {}
    for path, manifest in _manifests(cache):
        if manifest.source.get("name") == name and manifest.settings == settings:
            found[path.resolve()] = path
    if not found:
        raise gone
    if len(found) > 1:
        raise DataError(
            f"{gone.message}, and {len(found)} finished stores were made from what was there: "
            f"{', '.join(sorted(path.name for path in found))}",
            remedy="name one of them as the source's store, in place of path",
        )
    return next(iter(found.values()))


def _manifests(cache: Path) -> Iterator[tuple[Path, StoreManifest]]:
    """The readable stores of a cache, of other recipes too, without those that are set aside."""
    for path in sorted(cache.glob(f"*/{MANIFEST}")):
        if path.parent.is_symlink() or re.search(r"\.(tmp|damaged)-", path.parent.name):
            continue
        try:
            yield path.parent, read_store_manifest(path.parent)
        except (DataError, StorageError):
            continue


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def input_state(files: SourceFiles) -> list[dict[str, Any]]:
    """Path, size and time of every file of a source, in reading order."""
    states = [{"path": str(path), "bytes": 0, "mtime_ns": 0} for path in files.files if isinstance(path, HubDataset)]
    parts = [part for path in files.files for part in patiently(path, partial(files_of, path))]
    for file in parts:
        try:
            stat = patiently(file, file.stat, expected=True)
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror or error}") from error
        states.append({"path": str(file), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns})
    return states


def is_ready(planned: PlannedStore, config: RunConfig, verify: bool) -> bool:
    """Whether the store is finished, here or under another name."""
    if planned.source.store is not None:
        TokenStore.open(planned.folder, verify)
        return True
    if planned.gone is not None:
        _use_without_text(planned, config, verify)
        return True
    if _is_finished(planned, config, verify):
        return True
    return _link_store_of_same_input(planned) and _is_finished(planned, config, verify)


def _use_without_text(planned: PlannedStore, config: RunConfig, verify: bool) -> None:
    assert planned.gone is not None
    try:
        _check_counts(planned, TokenStore.open(planned.folder, verify), config)
    except DataError as error:
        raise DataError(f"{planned.gone.message}, and its store cannot be used: {error.message}") from error
    LOGGER.warning("%s; its finished store is used: %s", planned.gone.message, planned.folder)


def _link_store_of_same_input(planned: PlannedStore) -> bool:
    """Whether there is a store of the same bytes under another path or time; the planned one becomes a link to it."""
    sizes = [file["bytes"] for file in planned.inputs]
    for folder, manifest in _manifests(planned.folder.parent):
        if manifest.settings != planned.settings or [file["bytes"] for file in manifest.inputs] != sizes:
            continue
        with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter lock
            same = all(pool.map(has_content, planned.inputs, manifest.inputs))
        if same:
            planned.folder.unlink(missing_ok=True)  # a link to a store that is gone
            planned.folder.symlink_to(folder.name)
            fsync_path(planned.folder.parent)
            return True
    return False


def _is_finished(planned: PlannedStore, config: RunConfig, verify: bool) -> bool:
    if not is_there(planned.folder):
        return False
    try:
        store = TokenStore.open(planned.folder, verify)
    except DataError as error:  # all of it can be made again from the text
        damaged = planned.folder.resolve()
        aside = damaged.with_name(f"{damaged.name}.damaged-{secrets.token_hex(4)}")
        damaged.rename(aside)
        LOGGER.warning("%s; it was moved to %s and is prepared again", error.message, aside)
        return False
    _check_counts(planned, store, config)
    return True


def _check_counts(planned: PlannedStore, store: TokenStore, config: RunConfig) -> None:
    counts = store.manifest.counts
    read = ReadCounts(records=counts["records"], bad=counts["bad"], first_bad=counts["first_bad"])
    check_budget(planned.name, read, config.data.bad_record_budget_fraction)
