"""Raw text -> token stores on disk: once, atomically, and again only when text or tokenizer change."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from dist_cpt.config.schema import RunConfig, SourceConfig, ValidationConfig
from dist_cpt.data.chat import ConversationEncoder, chat_template
from dist_cpt.data.classes import ExampleEncoder
from dist_cpt.data.labelled import Labelled, LabelledEncoder
from dist_cpt.data.mixture import Mixture
from dist_cpt.data.packing import pack
from dist_cpt.data.sources import (
    Document,
    ReadCounts,
    Record,
    check_budget,
    find_files,
    read_documents,
    read_records,
    take_bad,
)
from dist_cpt.data.store import FORMAT_VERSION, MANIFEST, QUARANTINE, StoreWriter, TokenStore, sync_folder
from dist_cpt.data.tokenizer import DocumentEncoder, load_tokenizer, tokenizer_hash, vocabulary_size
from dist_cpt.errors import DataError, WriteError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Item = TypeVar("Item")
Done = TypeVar("Done")
OnProgress = Callable[[str, int], None]  # (source name, documents tokenised so far)

_BATCH_CHARACTERS = 1 << 19  # per call of the tokenizer; bounds memory
_BATCH_DOCUMENTS = 8192
_MAX_THREADS = 16  # the tokenizer has its own threads; ours overlap reading and conversion with it


@dataclass(frozen=True)
class PreparedSource:
    """One training source or held-out set with its finished store."""

    name: str
    weight: float
    role: str  # domain | replay | retention
    store: TokenStore
    stride: int | None = None  # packing windows: as DataConfig.stride, never None there
    overlap_trains: bool = True  # else every token is a target once, in the first window that has it


@dataclass(frozen=True)
class Prepared:
    """All stores of a recipe; `identity` changes when any token of them or the tokenizer does."""

    sources: list[PreparedSource]
    validation: list[PreparedSource]
    tokenizer_hash: str
    vocab_size: int
    identity: str
    seq_len: int  # of the recipe, for the report


@dataclass(frozen=True)
class _Job:
    """One store to make or find."""

    source: SourceConfig | ValidationConfig
    name: str
    files: list[Path]
    inputs: list[dict[str, Any]]
    ignored_files: int
    folder: Path


def prepare(config: RunConfig, on_progress: OnProgress | None = None) -> Prepared:
    """Tokenise every source and held-out set of a resolved recipe into data.cache_dir, or find it there.

    A finished, unchanged store is reused; a new one appears under its final name only when complete.

    Raises:
        DataError: missing or empty input, bad records beyond policy or budget, an unusable tokenizer.
        WriteError: the cache cannot be written.
    """
    tokenizer, hash_ = _tokenizer(config)
    labelled = labelled_encoder(config, tokenizer)
    encoder = DocumentEncoder(tokenizer) if labelled is None else labelled
    vocab_size = vocabulary_size(tokenizer)
    jobs = _jobs(config, hash_, labelled)
    for job in jobs:
        try:
            if _reusable(job, config):
                continue
            _make_store(job, config, encoder, hash_, vocab_size, on_progress)
        except OSError as error:
            raise WriteError(
                f"cannot write the token store {job.folder}: {error.strerror or error}",
                remedy="free space or set data.cache_dir",
            ) from error
    return _open_all(config, jobs, hash_, vocab_size)


def open_prepared(config: RunConfig) -> Prepared:
    """Open what `prepare` made for this resolved recipe, without making anything.

    Raises:
        DataError: a store is absent, damaged, or made from other text or another tokenizer.
    """
    tokenizer, hash_ = _tokenizer(config)
    jobs = _jobs(config, hash_, labelled_encoder(config, tokenizer))
    return _open_all(config, jobs, hash_, vocabulary_size(tokenizer))


def labelled_encoder(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> LabelledEncoder | None:
    """What makes ids and labels of the recipe's records; None for task cpt, whose text is its own label.

    Raises:
        DataError: no chat template for task instruct.
    """
    if config.task == "instruct":
        template = chat_template(tokenizer, config.data.chat_template)
        return ConversationEncoder(tokenizer, template, config.data.seq_len)
    if config.classify is not None:
        return ExampleEncoder(tokenizer, config.classify, config.data.seq_len)
    return None


def check_vocabulary(prepared: Prepared, model_vocab_size: int) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        DataError: naming the first such id, its document and its source.
    """
    for source in [*prepared.sources, *prepared.validation]:
        hit = source.store.find_token_at_least(model_vocab_size)
        if hit is not None:
            document, token_id = hit
            raise DataError(
                f"source {source.name!r}, document {document}: token id {token_id} is beyond the model's "
                f"vocabulary of {model_vocab_size}",
                remedy="use the model's own tokenizer (data.tokenizer)",
            )


def data_report(prepared: Prepared) -> dict[str, Any]:
    """What the stores hold, as plain values: per source documents, tokens, blocks, padding, bad records."""
    shares = Mixture([source.weight for source in prepared.sources])
    training = [_source_report(source, prepared.seq_len) for source in prepared.sources]
    for row, count in zip(training, shares.counts.tolist(), strict=True):
        row["share"] = count / shares.cycle
    return {
        "seq_len": prepared.seq_len,
        "vocab_size": prepared.vocab_size,
        "tokenizer_hash": prepared.tokenizer_hash,
        "identity": prepared.identity,
        "sources": training,
        "validation": [_source_report(source, prepared.seq_len) for source in prepared.validation],
    }


def _source_report(source: PreparedSource, seq_len: int) -> dict[str, Any]:
    plan = pack(source.store.lengths, seq_len, source.stride)
    manifest = source.store.manifest
    return {
        "name": source.name,
        "role": source.role,
        "folder": str(source.store.folder),
        "files": len(manifest.inputs),
        "input_bytes": sum(file["bytes"] for file in manifest.inputs),
        "documents": source.store.num_documents,
        "tokens": source.store.num_tokens,
        "blocks": plan.num_blocks,
        "padding_fraction": plan.padding_fraction,
        **_label_report(source.store),
        **manifest.counts,
    }


def _label_report(store: TokenStore) -> dict[str, Any]:
    if store.answers is not None:
        return {"answer_tokens": int(store.answers.sum(dtype=np.int64))}
    if store.classes is not None:
        return {"documents_by_class": np.bincount(store.classes).tolist()}
    return {}


def _tokenizer(config: RunConfig) -> tuple[PreTrainedTokenizerFast, str]:
    path = config.data.tokenizer or config.model.path
    assert path is not None  # the schema asks for one of them
    # A revision names a state of the model's repository, not of another one.
    tokenizer = load_tokenizer(path, config.model.revision if path == config.model.path else None)
    return tokenizer, tokenizer_hash(tokenizer)


def _jobs(config: RunConfig, hash_: str, labelled: LabelledEncoder | None) -> list[_Job]:
    if config.data.cache_dir is None:
        raise ValueError("prepare takes a recipe after resolve_paths")
    jobs = []
    for source in [*config.data.sources, *config.data.validation]:
        name = source.name or Path(source.path).stem
        found = find_files(source.path, name)
        inputs = [_input(file) for file in found.files]
        recipe = {
            "format_version": FORMAT_VERSION,
            "tokenizer_hash": hash_,
            "text": source.text,
            "on_bad_record": config.data.on_bad_record,
            "inputs": inputs,
        }
        if labelled is not None:
            recipe |= {"task": config.task, "fields": labelled.fields(source), "labels": labelled.identity}
        key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
        folder = Path(config.data.cache_dir) / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}-{key}"
        jobs.append(_Job(source, name, found.files, inputs, found.ignored_files, folder))
    return jobs


def _input(file: Path) -> dict[str, Any]:
    try:
        state = file.stat()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error
    return {"path": str(file), "bytes": state.st_size, "mtime_ns": state.st_mtime_ns}


def _reusable(job: _Job, config: RunConfig) -> bool:
    if not job.folder.exists():
        return False
    try:
        counts = TokenStore.open(job.folder).manifest.counts
    except DataError:
        shutil.rmtree(job.folder)  # damaged, and all of it can be made again from the text
        return False
    kept = ReadCounts(records=counts["records"], bad=counts["bad"], first_bad=counts["first_bad"])
    check_budget(job.name, kept, config.data.bad_record_budget_fraction)
    return True


def _make_store(
    job: _Job,
    config: RunConfig,
    encoder: DocumentEncoder | LabelledEncoder,
    hash_: str,
    vocab_size: int,
    on_progress: OnProgress | None,
) -> None:
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    work = job.folder.with_name(f"{job.folder.name}.tmp-{os.getpid()}-{secrets.token_hex(3)}")
    work.mkdir()
    try:
        _fill(work, job, config, encoder, hash_, vocab_size, on_progress)
        try:
            work.rename(job.folder)
        except OSError:
            # Another process made the same store meanwhile; both hold the same tokens.
            if not (job.folder / MANIFEST).exists():
                raise
        sync_folder(job.folder.parent)
    finally:  # also on Ctrl-C; after the rename there is nothing left to remove
        shutil.rmtree(work, ignore_errors=True)


def _fill(
    work: Path,
    job: _Job,
    config: RunConfig,
    encoder: DocumentEncoder | LabelledEncoder,
    hash_: str,
    vocab_size: int,
    on_progress: OnProgress | None,
) -> None:
    policy = config.data.on_bad_record
    counts = ReadCounts()
    with ExitStack() as stack:
        plain = isinstance(encoder, DocumentEncoder)
        writer = StoreWriter(work, vocab_size, None if plain else encoder.label_kind)
        stack.callback(writer.close)
        quarantine = None
        if policy == "quarantine":
            quarantine = stack.enter_context((work / QUARANTINE).open("w", encoding="ascii"))
        if plain:
            documents = read_documents(job.source, job.files, policy, counts, quarantine)
            encoded = stack.enter_context(closing(_encode(_batches(documents), encoder)))
        else:
            records = read_records(job.source, job.files, policy, counts, encoder.parser(job.source), quarantine)
            encoded = stack.enter_context(closing(_encode(_record_batches(records), encoder)))
        num_texts = 0
        for texts_of_batch, done in encoded:
            if isinstance(done, Labelled):
                for record, why in done.bad:
                    take_bad(why, record.where, record.raw, policy, counts, quarantine)
                writer.append(done.ids, done.lengths, done.labels)
                texts_of_batch -= len(done.bad)
            else:
                writer.append(*done)
            num_texts += texts_of_batch
            if on_progress is not None:
                on_progress(job.name, num_texts)
        check_budget(job.name, counts, config.data.bad_record_budget_fraction)
        _check_result(job, counts, writer.num_documents)
        source = {"name": job.name, "path": job.source.path, "text": job.source.text, "on_bad_record": policy}
        if not plain:
            source |= {"fields": encoder.fields(job.source), "labels": encoder.identity}
        # A text without any token, or with an EOS in its middle, makes texts and documents differ in number.
        extra = {"ignored_files": job.ignored_files, "texts": num_texts}
        writer.finish(hash_, source, asdict(counts) | extra, job.inputs)


def _check_result(job: _Job, counts: ReadCounts, num_documents: int) -> None:
    if num_documents == 0:
        raise DataError(
            f"source {job.name!r}: {job.source.path} holds no document ({counts.records} records in "
            f"{len(job.files)} files, {counts.empty} empty, {counts.num_bad} bad)",
            remedy="check the path and the fields that are read (data.sources[].text, .messages, classify)",
        )
    if [_input(file) for file in job.files] != job.inputs:
        raise DataError(f"source {job.name!r}: {job.source.path} changed while it was read", remedy="prepare again")


def _batches(documents: Iterator[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document.text)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _record_batches(records: Iterator[Record[Any]]) -> Iterator[list[Record[Any]]]:
    batch: list[Record[Any]] = []
    num_bytes = 0
    for record in records:
        batch.append(record)
        num_bytes += len(record.raw)
        if num_bytes >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _encode(
    batches: Iterator[list[Item]], encoder: Callable[[list[Item]], Done]
) -> Generator[tuple[int, Done], None, None]:
    """Yield (number of items, what `encoder` makes of them) in the order of the batches, a few at work at a time."""
    num_threads = min(len(os.sched_getaffinity(0)), _MAX_THREADS) + 1
    pending: deque[tuple[int, Future[Done]]] = deque()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenize")
    try:
        for batch in batches:
            pending.append((len(batch), pool.submit(encoder, batch)))
            if len(pending) > num_threads:
                num_items, future = pending.popleft()
                yield num_items, future.result()
        while pending:
            num_items, future = pending.popleft()
            yield num_items, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _open_all(config: RunConfig, jobs: list[_Job], hash_: str, vocab_size: int) -> Prepared:
    stride = (config.data.stride or config.data.seq_len) if config.data.packing == "windows" else None
    opened = []
    for job in jobs:
        store = TokenStore.open(job.folder)
        if store.manifest.tokenizer_hash != hash_ or store.manifest.vocab_size != vocab_size:
            raise DataError(
                f"token store: {job.folder} was made with another tokenizer",
                remedy="delete the store's folder and prepare again",
            )
        weight, repeats = 1.0, False  # a held-out token is judged once
        if isinstance(job.source, SourceConfig):
            weight, repeats = job.source.weight, config.data.overlap == "train"
        opened.append(PreparedSource(job.name, weight, job.source.role, store, stride, repeats))
    split = len(config.data.sources)
    content = [
        hash_,
        [[s.name, s.store.manifest.content_hash] for s in opened[:split]],
        [[s.name, s.store.manifest.content_hash] for s in opened[split:]],
    ]
    if stride is not None:  # which tokens a block holds
        content.append(["windows", stride, config.data.overlap])
    identity = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return Prepared(opened[:split], opened[split:], hash_, vocab_size, identity, config.data.seq_len)
