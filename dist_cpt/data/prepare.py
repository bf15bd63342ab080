"""Text files -> token stores on disk: made once, atomically, and again only when the text or the tokenizer changes.

From top to bottom: a recipe becomes a plan of stores; each store is read, encoded and written in one pass, its
manifest last; then all are opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dist_cpt.config.schema import HUB_PREFIX, DataConfig, RunConfig, SourceConfig, StageConfig
from dist_cpt.data.block_plan import BlockPlan, PlanKey, block_plan
from dist_cpt.data.chat import ConversationEncoder, chat_template
from dist_cpt.data.classes import ExampleEncoder
from dist_cpt.data.containers import files_of
from dist_cpt.data.encode import Encoded, Encoder, Source, TextEncoder
from dist_cpt.data.filters import describe_filter
from dist_cpt.data.hub import HubDataset, with_commits
from dist_cpt.data.mixture import UNLIMITED, Limit, mixture_of
from dist_cpt.data.prefetch import prefetch
from dist_cpt.data.quality import SourceQuality, examine, excluded_hash
from dist_cpt.data.sources import ReadCounts, Record, RecordTally, SourceFiles, check_budget, read_records, source_files
from dist_cpt.data.store import QUARANTINE, StoreWriter, TokenStore, read_store_manifest, sha256_of
from dist_cpt.data.token_ids import unpadded_copy
from dist_cpt.data.tokenizer import load_run_tokenizer, tokenizer_hash, vocabulary_size
from dist_cpt.errors import DataError, StorageError, WriteError, printable
from dist_cpt.run_folder.json_files import fsync_path
from dist_cpt.run_folder.names import MANIFEST
from dist_cpt.runtime.liveness import made_progress
from dist_cpt.storage import LOGGER, is_there, patiently

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OnProgress = Callable[[str, int], None]  # (source name, records tokenised so far)

BATCH_BYTES = 1 << 19  # of records per call of the tokenizer; bounds memory
BATCH_RECORDS = 8192
_MAX_THREADS = 16  # the tokenizer has its own threads; ours overlap reading and conversion with it


@dataclass(frozen=True)
class PreparedSource:
    """One training source or held-out set with its finished store."""

    name: str
    weight: float
    role: str  # domain | replay | retention
    store: TokenStore
    stride: int | None = None  # tokens between the starts of two windows; None: best-fit packing
    overlap_trains: bool = True  # whether a token is a target in every window, or only in the first that has it
    blocks: BlockPlan | None = None  # None: packed in memory by who reads it
    limit: Limit = UNLIMITED
    quality: SourceQuality | None = None  # of a training source: what was found in it

    @property
    def excluded(self) -> np.ndarray | None:
        """The documents that get no block, int64 in ascending order; None: all do."""
        return None if self.quality is None or not len(self.quality.excluded) else self.quality.excluded


@dataclass(frozen=True)
class Prepared:
    """All stores of a recipe; `identity` changes when any token that is read, or the tokenizer, does."""

    sources: list[PreparedSource]
    validation: list[PreparedSource]
    tokenizer_hash: str
    vocab_size: int
    identity: str
    seq_len: int  # of the recipe, for the report
    stages: tuple[StageConfig, ...] = ()
    share_of: Literal["blocks", "tokens"] = "blocks"

    @property
    def all_sources(self) -> list[PreparedSource]:
        """Training sources, then held-out sets."""
        return [*self.sources, *self.validation]

    def shared_ngrams(self, held_out: str) -> dict[str, float]:
        """By training source: the fraction of a held-out set's n-grams (`overlap.NGRAM` tokens) that the source has;
        empty where it was not measured."""
        found = [(source.name, source.quality) for source in self.sources if source.quality is not None]
        return {name: quality.shared_ngrams[held_out] for name, quality in found if held_out in quality.shared_ngrams}


@dataclass(frozen=True)
class _PlannedStore:
    """One source or held-out set, its input files, and the folder of its store."""

    source: Source
    name: str
    files: SourceFiles
    inputs: list[dict[str, Any]]  # path, bytes and mtime_ns of each file
    settings: str  # sha256 of what else makes its tokens
    folder: Path


@dataclass(frozen=True)
class _Plan:
    """The stores of a recipe, training sources first, and what encodes their records."""

    stores: list[_PlannedStore]
    tokenizer: PreTrainedTokenizerFast
    encoder: Encoder
    tokenizer_hash: str
    vocab_size: int


def prepare(config: RunConfig, on_progress: OnProgress | None = None, *, verify: bool = False) -> Prepared:
    """Tokenise every source and held-out set of a resolved recipe into data.cache_dir.

    A finished store of input with the same content is reused, after a check of all its bytes with `verify`; a new one
    gets its final name only when it is complete.

    Raises:
        DataError: missing or empty input, bad records beyond policy or budget, an unusable tokenizer or template.
        StorageError: the text or a store cannot be read.
        WriteError: the cache cannot be written.
    """
    config = with_commits(config)
    plan = _plan(config)
    for planned in plan.stores:
        patiently(planned.folder, partial(_require_store, planned, plan, config, on_progress, verify))
    return _open_stores(plan, config, verify)


def open_prepared(config: RunConfig) -> Prepared:
    """Open the stores that `prepare` made for this resolved recipe.

    Raises:
        DataError: a store is missing, damaged, or made from other text or another tokenizer.
    """
    config = with_commits(config)
    return _open_stores(_plan(config), config)


def _plan(config: RunConfig) -> _Plan:
    tokenizer = load_run_tokenizer(config)
    encoder = _encoder(config, tokenizer)
    sha256 = tokenizer_hash(tokenizer)
    stores = [
        _plan_store(source, config, encoder, sha256) for source in (*config.data.sources, *config.data.validation)
    ]
    return _Plan(stores, tokenizer, encoder, sha256, vocabulary_size(tokenizer))


def _encoder(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> Encoder:
    if config.task == "instruct":
        template = chat_template(tokenizer, config.data.chat_template)
        return ConversationEncoder(tokenizer, template, config.data.seq_len)
    if config.classify is not None:
        return ExampleEncoder(tokenizer, config.classify, config.data.seq_len)
    return TextEncoder(tokenizer)


def _plan_store(source: Source, config: RunConfig, encoder: Encoder, sha256: str) -> _PlannedStore:
    if config.data.cache_dir is None:
        raise ValueError("prepare takes a recipe after resolve_paths")
    name = source.name
    assert name is not None  # resolve_paths fills it in
    if source.store is not None:
        return _PlannedStore(source, name, SourceFiles([]), [], "", Path(source.store))
    files = source_files(source, name)
    inputs = _input_state(files)
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
    if encoder.label_kind is not None:
        key |= {"task": config.task}
    digest = _sha256(key | {"inputs": inputs})[:12]
    folder = Path(config.data.cache_dir) / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}-{digest}"
    return _PlannedStore(source, name, files, inputs, _sha256(key), folder)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _input_state(files: SourceFiles) -> list[dict[str, Any]]:
    states = [{"path": str(path), "bytes": 0, "mtime_ns": 0} for path in files.files if isinstance(path, HubDataset)]
    parts = [part for path in files.files for part in patiently(path, partial(files_of, path))]
    for file in parts:
        try:
            stat = patiently(file, file.stat, expected=True)
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror or error}") from error
        states.append({"path": str(file), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns})
    return states


def _require_store(
    planned: _PlannedStore, plan: _Plan, config: RunConfig, on_progress: OnProgress | None, verify: bool
) -> None:
    if planned.source.store is not None:
        TokenStore.open(planned.folder, verify)
        return
    try:
        if not _is_finished(planned, config, verify):
            moved = _link_store_of_same_input(planned)
            if not (moved and _is_finished(planned, config, verify)):
                _make_store(planned, plan, config, on_progress)
    except OSError as error:
        raise WriteError(
            f"cannot write the token store {planned.folder}: {error.strerror or error}",
            remedy="free space or set data.cache_dir",
        ) from error


def _input_sha256s(planned: _PlannedStore) -> list[str]:
    """sha256 of every input file, in reading order."""
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter lock
        return list(pool.map(_input_sha256, planned.inputs))


def _input_sha256(file: dict[str, Any]) -> str:
    if file["path"].startswith(HUB_PREFIX):
        return _sha256(file["path"])  # which has the commit
    return sha256_of(Path(file["path"]), 0, file["bytes"])


def _link_store_of_same_input(planned: _PlannedStore) -> bool:
    """Whether there is a store of the same bytes under another path or time; the planned one becomes a link to it."""
    sizes, sha256s = [file["bytes"] for file in planned.inputs], None
    for path in sorted(planned.folder.parent.glob(f"*/{MANIFEST}")):
        if path.parent.is_symlink() or re.search(r"\.(tmp|damaged)-", path.parent.name):
            continue
        try:
            manifest = read_store_manifest(path.parent)
        except (DataError, StorageError):  # of another recipe
            continue
        if manifest.settings != planned.settings or [file["bytes"] for file in manifest.inputs] != sizes:
            continue
        sha256s = sha256s or _input_sha256s(planned)
        if [file["sha256"] for file in manifest.inputs] == sha256s:
            planned.folder.unlink(missing_ok=True)  # a link to a store that is gone
            planned.folder.symlink_to(path.parent.name)
            fsync_path(planned.folder.parent)
            return True
    return False


def _is_finished(planned: _PlannedStore, config: RunConfig, verify: bool) -> bool:
    if not is_there(planned.folder):
        return False
    try:
        counts = TokenStore.open(planned.folder, verify).manifest.counts
    except DataError as error:  # all of it can be made again from the text
        store = planned.folder.resolve()
        aside = store.with_name(f"{store.name}.damaged-{secrets.token_hex(4)}")
        store.rename(aside)
        LOGGER.warning("%s; it was moved to %s and is prepared again", error.message, aside)
        return False
    read = ReadCounts(records=counts["records"], bad=counts["bad"], first_bad=counts["first_bad"])
    check_budget(planned.name, read, config.data.bad_record_budget_fraction)
    return True


def _make_store(planned: _PlannedStore, plan: _Plan, config: RunConfig, on_progress: OnProgress | None) -> None:
    planned.folder.parent.mkdir(parents=True, exist_ok=True)
    work = planned.folder.with_name(f"{planned.folder.name}.tmp-{os.getpid()}-{secrets.token_hex(3)}")
    work.mkdir()
    try:
        _write_store(work, planned, plan, config, on_progress)
        if planned.folder.is_symlink():  # to a store that is gone
            planned.folder.unlink()
        try:
            work.rename(planned.folder)
        except OSError:
            # Another process may have made the same store meanwhile; both have the same tokens.
            if not is_there(planned.folder / MANIFEST):
                raise
        fsync_path(planned.folder.parent)
    finally:  # also on Ctrl-C; after the rename there is nothing left to remove
        shutil.rmtree(work, ignore_errors=True)


def _write_store(
    work: Path, planned: _PlannedStore, plan: _Plan, config: RunConfig, on_progress: OnProgress | None
) -> None:
    policy = config.data.on_bad_record
    with ExitStack() as stack:
        writer = stack.enter_context(closing(StoreWriter(work, plan.vocab_size, plan.encoder.label_kind)))
        quarantine = None
        if policy == "quarantine":
            quarantine = stack.enter_context((work / QUARANTINE).open("w", encoding="ascii"))
        tally = RecordTally(policy, quarantine)
        records = read_records(planned.name, planned.files, plan.encoder.parser(planned.source), tally)
        threads = min(len(os.sched_getaffinity(0)), _MAX_THREADS) + 1

        def encode(batch: list[Record[Any]]) -> tuple[int, Encoded]:
            return len(batch), plan.encoder(batch)

        num_texts = 0
        batches = prefetch(encode, _batches(records), depth=threads, threads=threads)
        for num_records, encoded in stack.enter_context(closing(batches)):
            for record, bad in encoded.rejected:
                tally.reject(bad, record.origin)
            writer.append(encoded.ids, encoded.lengths, encoded.labels)
            num_texts += num_records - len(encoded.rejected)
            made_progress()
            if on_progress is not None:
                on_progress(planned.name, num_texts)
        check_budget(planned.name, tally.counts, config.data.bad_record_budget_fraction)
        sha256s = _input_sha256s(planned)
        _check_result(planned, tally.counts, writer.num_documents)
        source = {"name": planned.name, "path": planned.source.place, "text": planned.source.text}
        source |= {"on_bad_record": policy, "eos": plan.tokenizer.eos_token_id} | plan.encoder.describe(planned.source)
        # Texts and documents differ in number where a text has no token, or an EOS in its middle.
        counts = asdict(tally.counts) | {"ignored_files": planned.files.ignored_files, "texts": num_texts}
        inputs = [file | {"sha256": sha256} for file, sha256 in zip(planned.inputs, sha256s, strict=True)]
        tokenizer = unpadded_copy(plan.tokenizer.backend_tokenizer).to_str()
        writer.finish(plan.tokenizer_hash, source, counts, inputs, planned.settings, tokenizer)


def _batches(records: Iterator[Record[Any]]) -> Iterator[list[Record[Any]]]:
    batch: list[Record[Any]] = []
    num_bytes = 0
    for record in records:
        batch.append(record)
        num_bytes += record.origin.num_bytes
        if num_bytes >= BATCH_BYTES or len(batch) == BATCH_RECORDS:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _check_result(planned: _PlannedStore, counts: ReadCounts, num_documents: int) -> None:
    where = f"source {planned.name!r}: {planned.source.place}"
    if num_documents == 0:
        raise DataError(
            f"{where} has no document ({counts.records} records in {len(planned.inputs)} files, {counts.empty} empty, "
            f"{counts.num_bad} bad)",
            remedy="check the path and the fields that are read (data.sources[].text, .messages, classify)",
        )
    if _input_state(planned.files) != planned.inputs:
        raise DataError(f"{where} changed while it was read", remedy="prepare again")


def _open_stores(plan: _Plan, config: RunConfig, verify: bool = False) -> Prepared:
    data = config.data
    stride = (data.stride or data.seq_len) if data.packing == "windows" else None
    opened = []
    for planned in plan.stores:
        store = TokenStore.open(planned.folder)
        if (store.manifest.tokenizer_hash, store.manifest.vocab_size) != (plan.tokenizer_hash, plan.vocab_size):
            raise DataError(
                f"token store: {planned.folder} was made with another tokenizer",
                remedy="delete the store's folder and prepare again",
            )
        if planned.source.store is not None:
            _check_given_store(planned, store, plan.encoder, data.seq_len)
        weight, overlap_trains, limit = 1.0, False, UNLIMITED  # of a held-out set every token is evaluated once
        if (source := planned.source) and isinstance(source, SourceConfig):
            weight, overlap_trains = source.weight, data.overlap == "train"
            limit = Limit(source.max_tokens, source.max_epochs, source.on_exhausted)
        opened.append(PreparedSource(planned.name, weight, source.role, store, stride, overlap_trains, limit=limit))
    sources, validation = opened[: len(data.sources)], opened[len(data.sources) :]
    examined = _examine(sources, validation, config)
    sources = [replace(source, quality=quality) for source, quality in zip(sources, examined, strict=True)]
    sources, validation = ([_with_blocks(source, data, verify) for source in part] for part in (sources, validation))
    content: list[Any] = [plan.tokenizer_hash]
    content += [[[s.name, s.store.manifest.content_hash] for s in part] for part in (sources, validation)]
    if stride is not None:  # which tokens a block has
        content.append(["windows", stride, data.overlap])
    if (lists := excluded_hash(examined)) is not None:
        content.append(["excluded", lists])
    identity = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return Prepared(
        sources,
        validation,
        plan.tokenizer_hash,
        plan.vocab_size,
        identity,
        data.seq_len,
        stages=data.stages,
        share_of=data.share_of,
    )


def _with_blocks(source: PreparedSource, data: DataConfig, verify: bool) -> PreparedSource:
    assert data.cache_dir is not None  # as _plan_store
    key = PlanKey(data.seq_len, source.stride, source.excluded)
    return replace(source, blocks=block_plan(source.store, key, Path(data.cache_dir), verify=verify))


def _examine(
    sources: Sequence[PreparedSource], validation: Sequence[PreparedSource], config: RunConfig
) -> list[SourceQuality]:
    """What the stores of the sources have twice, or of held-out sets.

    Raises:
        DataError: no document of a source is left.
    """
    held_out = {source.name: source.store for source in validation}
    # The template gives every conversation the same words.
    overlap = bool(held_out) and config.task != "instruct"
    examined = examine(config.data, [source.store for source in sources], held_out, overlap=overlap)
    for source, quality in zip(sources, examined, strict=True):
        if len(quality.excluded) == source.store.num_documents:
            raise DataError(
                f"source {source.name!r}: all {source.store.num_documents} documents are excluded "
                f"({len(quality.duplicates)} duplicates, {len(quality.overlapping)} with text of a held-out set)",
                remedy="leave the source out, or change data.deduplicate or data.decontaminate",
            )
    return examined


def _check_given_store(planned: _PlannedStore, store: TokenStore, encoder: Encoder, seq_len: int) -> None:
    """Refuse a store, given in place of text, that this recipe would have made otherwise.

    Raises:
        DataError: its documents begin otherwise, or have other labels.
    """
    manifest, expected = store.manifest, encoder.describe(planned.source)
    problem = None
    if manifest.label_kind != encoder.label_kind:
        problem = f"its labels are {manifest.label_kind}, the task's {encoder.label_kind}"
    elif manifest.source.get("bos") != expected.get("bos"):
        problem = (
            f"its documents begin with token {manifest.source.get('bos')}, the recipe's with {expected.get('bos')}"
        )
    elif encoder.label_kind is not None and int(store.lengths.max()) > seq_len:
        problem = f"it has records of {int(store.lengths.max())} tokens, more than data.seq_len {seq_len}"
    if problem is not None:
        raise DataError(
            f"source {planned.name!r}: {planned.folder}: {problem}",
            remedy="give the text in path, or a store made for this recipe",
        )


def check_vocabulary(prepared: Prepared, model_vocab_size: int) -> None:
    """Refuse token ids without a row in the model's embedding.

    Raises:
        DataError: names the first such id, its document and its source.
    """
    for source in prepared.all_sources:
        first = source.store.find_token_at_least(model_vocab_size)
        if first is not None:
            document, token_id = first
            raise DataError(
                f"source {source.name!r}, document {document}: token id {token_id} is beyond the model's "
                f"vocabulary of {model_vocab_size}",
                remedy="use the model's own tokenizer (data.tokenizer)",
            )


def data_report(prepared: Prepared) -> dict[str, Any]:
    """JSON-able counts of the stores: per source documents, tokens, blocks, padding, bad records."""
    training = [_source_report(source) for source in prepared.sources]
    mixture = mixture_of(prepared, [(row["blocks"], row["block_tokens"]) for row in training])
    if len(mixture.segments) == 1:
        for row, share in zip(training, mixture.segments[0].shares.tolist(), strict=True):
            row["share"] = share
    return {
        "seq_len": prepared.seq_len,
        "vocab_size": prepared.vocab_size,
        "tokenizer_hash": prepared.tokenizer_hash,
        "identity": prepared.identity,
        "sources": training,
        "mixture": [{"from_block": part.start, "share": part.shares.tolist()} for part in mixture.segments],
        "validation": [
            _source_report(held_out) | {"in_training": prepared.shared_ngrams(held_out.name)}
            for held_out in prepared.validation
        ],
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """The counts of `data_report` for people, one line per source or held-out set."""
    lines = []
    for row in [*report["sources"], *report["validation"]]:
        share = f", {row['share']:.1%} of the blocks" if "share" in row else ""
        bad = f", {sum(row['bad'].values()):,} of {row['records']:,} records bad" if row["bad"] else ""
        bad += _quality_text(row)
        lines.append(
            f"{row['name']}: {row['documents']:,} documents, {row['tokens']:,} tokens in {row['blocks']:,} blocks of "
            f"{report['seq_len']:,} ({row['padding_fraction']:.1%} padding){share}{bad}; {row['folder']}"
        )
    names = [row["name"] for row in report["sources"]]
    for part in report["mixture"] if len(report["mixture"]) > 1 else ():
        shares = zip(names, part["share"], strict=True)
        read = ", ".join(f"{name} {share:.1%}" for name, share in shares if share)
        lines.append(f"from token {part['from_block'] * report['seq_len']:,} on: {read}")
    return [*lines, f"identity {report['identity']}"]


def _quality_text(row: dict[str, Any]) -> str:
    """What is known of a source's duplicates, and of a held-out set's text in the sources."""
    counts = {
        "duplicates": row.get("duplicates"),
        "with text of a held-out set": row.get("overlapping_documents"),
        "excluded": row.get("excluded_documents"),
    }
    found = [f", {count:,} {what}" for what, count in counts.items() if count]
    shared = row.get("in_training", {})
    return "".join(found) + "".join(f", {fraction:.2%} of it in {name}" for name, fraction in shared.items())


def preview(config: RunConfig, num_documents: int = 10) -> Iterator[str]:
    """What `prepare` would read, and the first documents with the tokens at their borders; writes nothing.

    Raises:
        DataError: missing input, an unusable tokenizer or template, or a bad record under `error`.
    """
    config = with_commits(config)
    plan = _plan(config)
    for planned in plan.stores:
        num_bytes = sum(file["bytes"] for file in planned.inputs)
        state = "prepared already" if is_there(planned.folder) else "to be prepared"
        yield f"{planned.name}: {len(planned.inputs):,} files, {num_bytes:,} bytes, {state}: {planned.source.place}"
    tokenizer: Any = load_run_tokenizer(config)
    sources = [planned for planned in plan.stores[: len(config.data.sources)] if planned.source.path is not None]
    for planned in sources:
        tally = RecordTally(config.data.on_bad_record)
        records = read_records(planned.name, planned.files, plan.encoder.parser(planned.source), tally)
        encoded = plan.encoder(list(islice(records, -(-num_documents // len(sources)))))
        for ids in np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1]):
            yield f"{planned.name}: {_ends(printable(tokenizer.decode(ids)))}"


def _ends(text: str, num_characters: int = 160) -> str:
    """A long text without its middle."""
    half = num_characters // 2
    return text if len(text) <= num_characters else f"{text[:half]} [...] {text[-half:]}"


def _source_report(source: PreparedSource) -> dict[str, Any]:
    assert source.blocks is not None  # of every source that prepare opened
    plan, manifest = source.blocks.plan, source.store.manifest
    return {
        "name": source.name,
        "role": source.role,
        "folder": str(source.store.folder),
        "files": len(manifest.inputs),
        "input_bytes": sum(file["bytes"] for file in manifest.inputs),
        "documents": source.store.num_documents,
        "tokens": source.store.num_tokens,
        "blocks": plan.num_blocks,
        "block_tokens": plan.num_tokens,
        "padding_fraction": plan.padding_fraction,
        **_quality_report(source.quality),
        **_label_report(source.store),
        **manifest.counts,
    }


def _quality_report(quality: SourceQuality | None) -> dict[str, Any]:
    if quality is None:
        return {}
    return {
        "duplicates": len(quality.duplicates),
        "overlapping_documents": len(quality.overlapping),
        "excluded_documents": len(quality.excluded),
    }


def _label_report(store: TokenStore) -> dict[str, Any]:
    if store.answers is not None:
        return {"answer_tokens": int(store.answers.sum(dtype=np.int64))}
    if store.classes is not None:
        return {"documents_by_class": np.bincount(store.classes).tolist()}
    return {}
