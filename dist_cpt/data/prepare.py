"""Text files -> token stores on disk: made once, atomically, and again only when the text or the tokenizer changes.

From top to bottom: a recipe becomes a plan of stores; the units of those that are missing are tokenised, by any number
of processes, and put together, the manifest last; then all are opened.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dist_cpt.config.schema import MAX_RECORD_BYTES, DataConfig, RunConfig, SourceConfig, StageConfig
from dist_cpt.data.assemble import append_units, hashed_inputs, join_counts
from dist_cpt.data.block_plan import BlockPlan, PlanKey, block_plan
from dist_cpt.data.chat import ConversationEncoder, chat_template
from dist_cpt.data.claims import Claim, claim, is_held
from dist_cpt.data.classes import ExampleEncoder
from dist_cpt.data.containers import files_of
from dist_cpt.data.encode import Encoder, Source, TextEncoder
from dist_cpt.data.filters import describe_filter
from dist_cpt.data.hub import HubDataset, with_commits
from dist_cpt.data.mixture import UNLIMITED, Limit, mixture_of
from dist_cpt.data.quality import SourceQuality, examine, excluded_hash
from dist_cpt.data.sources import (
    NoFiles,
    ReadCounts,
    RecordTally,
    SourceFiles,
    check_budget,
    read_records,
    source_files,
)
from dist_cpt.data.store import QUARANTINE, StoreManifest, StoreWriter, TokenStore, read_store_manifest
from dist_cpt.data.token_ids import unpadded_copy
from dist_cpt.data.tokenizer import load_run_tokenizer, tokenizer_hash, vocabulary_size
from dist_cpt.data.unit_work import SourceWork, take_units
from dist_cpt.data.units import UNIT_BYTES, has_content, plan_digest, plan_units
from dist_cpt.data.workers import POLL_SECONDS, cores, take_with_workers
from dist_cpt.errors import DataError, StorageError, WriteError, printable
from dist_cpt.run_folder.json_files import fsync_path
from dist_cpt.run_folder.names import MANIFEST
from dist_cpt.storage import LOGGER, is_there, patiently

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNITS = ".units-"  # what the folder of a store's units has after the store's name
_ASSEMBLY = "assembly"
_WAIT_SECONDS = 0.5
_MAX_THREADS = 16  # the tokenizer has its own threads; ours overlap reading and conversion with it
_ABANDONED_SECONDS = 7 * 86400  # after which what nobody works on is removed


@dataclass(frozen=True)
class Progress:
    """How far the stores that are being made are, over all processes that make them."""

    source: str  # the first that is not finished
    num_bytes: int  # of the input, tokenised
    total_bytes: int
    num_tokens: int


OnProgress = Callable[[Progress], object]


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
    folder: Path
    files: SourceFiles = field(default_factory=lambda: SourceFiles([]))
    inputs: list[dict[str, Any]] = field(default_factory=list)  # path, bytes and mtime_ns of each file
    settings: str = ""  # sha256 of what else makes its tokens
    gone: DataError | None = None  # why there is no text: only its finished store is left


_Missing = tuple[_PlannedStore, SourceWork]  # a store to be made, and how


@dataclass(frozen=True)
class _Plan:
    """The stores of a recipe, training sources first, and what encodes their records."""

    stores: list[_PlannedStore]
    tokenizer: PreTrainedTokenizerFast
    encoder: Encoder
    tokenizer_hash: str
    vocab_size: int


def prepare(
    config: RunConfig,
    on_progress: OnProgress | None = None,
    *,
    verify: bool = False,
    workers: int = 1,
    unit_bytes: int = UNIT_BYTES,
) -> Prepared:
    """Tokenise every source and held-out set of a resolved recipe into data.cache_dir.

    A finished store of input with the same content is reused, after a check of all its bytes with `verify`; a new one
    gets its final name only when it is complete. Processes that prepare the same share its units, of about
    `unit_bytes`, and wait for each other.

    Raises:
        DataError: missing or empty input, bad records beyond policy or budget, an unusable tokenizer or template.
        StorageError: the text or a store cannot be read.
        WriteError: the cache cannot be written.
    """
    config = with_commits(config)
    plan, todo = _missing_stores(config, verify, unit_bytes)
    _make_stores(todo, plan, config, _Report(todo, on_progress), workers, wait=True)
    return _open_stores(plan, config, verify)


def prepare_in_part(config: RunConfig, on_progress: OnProgress | None = None, *, workers: int = 1) -> Prepared | None:
    """As `prepare`, but what other processes work on is left to them: None, unless all stores are finished.

    Raises:
        DistCptError: as `prepare`.
    """
    config = with_commits(config)
    plan, todo = _missing_stores(config, False, UNIT_BYTES)
    if not _make_stores(todo, plan, config, _Report(todo, on_progress), workers, wait=False):
        return None
    return _open_stores(plan, config)


def _missing_stores(config: RunConfig, verify: bool, unit_bytes: int) -> tuple[_Plan, list[_Missing]]:
    plan = _plan(config)
    missing: dict[Path, _Missing] = {}
    for planned in plan.stores:
        if not patiently(planned.folder, partial(_is_there, planned, config, verify)):
            missing.setdefault(planned.folder, (planned, _work_on(planned, plan, config, unit_bytes)))
    return plan, list(missing.values())


def open_prepared(config: RunConfig, folders: Sequence[str] | None = None) -> Prepared:
    """Open the stores that `prepare` made for this resolved recipe, in `folders` if this host has them.

    Raises:
        DataError: a store is missing, damaged, or made from other text or another tokenizer.
    """
    config = with_commits(config)
    return _open_stores(_plan(config, folders), config)


def _plan(config: RunConfig, folders: Sequence[str] | None = None) -> _Plan:
    tokenizer = load_run_tokenizer(config)
    encoder = _encoder(config, tokenizer)
    sha256 = tokenizer_hash(tokenizer)
    sources: list[Source] = [*config.data.sources, *config.data.validation]
    if folders is not None and all(is_there(Path(folder) / MANIFEST) for folder in folders):
        stores = [
            _PlannedStore(source, _name(source), Path(folder)) for source, folder in zip(sources, folders, strict=True)
        ]
    else:
        stores = [_plan_store(source, config, encoder, sha256) for source in sources]
    return _Plan(stores, tokenizer, encoder, sha256, vocabulary_size(tokenizer))


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


def _plan_store(source: Source, config: RunConfig, encoder: Encoder, sha256: str) -> _PlannedStore:
    if config.data.cache_dir is None:
        raise ValueError("prepare takes a recipe after resolve_paths")
    name, cache = _name(source), Path(config.data.cache_dir)
    if source.store is not None:
        return _PlannedStore(source, name, Path(source.store))
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
        return _PlannedStore(source, name, _only_store(cache, name, settings, error), settings=settings, gone=error)
    inputs = _input_state(files)
    digest = _sha256(key | {"inputs": inputs})[:12]
    return _PlannedStore(source, name, cache / f"{_file_name(name)}-{digest}", files, inputs, settings)


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


def _is_there(planned: _PlannedStore, config: RunConfig, verify: bool) -> bool:
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


def _use_without_text(planned: _PlannedStore, config: RunConfig, verify: bool) -> None:
    assert planned.gone is not None
    try:
        _check_counts(planned, TokenStore.open(planned.folder, verify), config)
    except DataError as error:
        raise DataError(f"{planned.gone.message}, and its store cannot be used: {error.message}") from error
    LOGGER.warning("%s; its finished store is used: %s", planned.gone.message, planned.folder)


def _link_store_of_same_input(planned: _PlannedStore) -> bool:
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


def _is_finished(planned: _PlannedStore, config: RunConfig, verify: bool) -> bool:
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


def _check_counts(planned: _PlannedStore, store: TokenStore, config: RunConfig) -> None:
    counts = store.manifest.counts
    read = ReadCounts(records=counts["records"], bad=counts["bad"], first_bad=counts["first_bad"])
    check_budget(planned.name, read, config.data.bad_record_budget_fraction)


def _work_on(planned: _PlannedStore, plan: _Plan, config: RunConfig, unit_bytes: int) -> SourceWork:
    units = plan_units(planned.files.files, planned.inputs, unit_bytes)
    long = [unit for unit in units if unit.num_bytes > 4 * unit_bytes]
    if long:
        LOGGER.info(
            "source %r: %d of its %d units are large, such as %s, of which no part can be read alone",
            planned.name,
            len(long),
            len(units),
            long[0].parts[0].path,
        )
    return SourceWork(
        planned.name,
        planned.source,
        planned.files,
        units,
        plan.encoder,
        plan.vocab_size,
        config.data.on_bad_record,
        planned.folder.with_name(f"{planned.folder.name}{UNITS}{plan_digest(units)}"),
        planned.folder,
    )


class _Report:
    """Calls `on_progress` about once a second, and at the first batch of every source."""

    def __init__(self, todo: Sequence[_Missing], on_progress: OnProgress | None) -> None:
        self._works, self._on_progress = [work for _, work in todo], on_progress
        self._total = sum(unit.num_bytes for work in self._works for unit in work.units)
        self._last: tuple[str, float] = ("", 0.0)
        self._made: dict[str, tuple[int, int]] = {}  # of sources whose store is finished

    def finished(self, work: SourceWork) -> None:
        """A source's units are all there, and soon gone."""
        self._made[work.name] = work.progress()

    def __call__(self) -> None:
        unfinished = [work.name for work in self._works if work.name not in self._made]
        name, now = (unfinished or [""])[0], time.monotonic()
        if self._on_progress is None or (name == self._last[0] and now - self._last[1] < POLL_SECONDS):
            return
        self._last = name, now
        done = [self._made.get(work.name) or work.progress() for work in self._works]
        num_bytes, num_tokens = (sum(column) for column in zip(*done, strict=True))
        self._on_progress(Progress(name, num_bytes, self._total, num_tokens))


def _make_stores(
    todo: Sequence[_Missing], plan: _Plan, config: RunConfig, report: _Report, workers: int, *, wait: bool
) -> bool:
    """Make stores together with all who do; without `wait`, False if some are left to others."""

    def make() -> bool:
        try:
            return _work_together(todo, plan, config, report, workers, wait)
        except OSError as error:
            raise WriteError(
                f"cannot write the token store {error.filename or config.data.cache_dir}: {error.strerror or error}",
                remedy="free space or set data.cache_dir",
            ) from error

    return patiently(config.data.cache_dir, make)  # again, it continues with the units that are missing


def _work_together(
    todo: Sequence[_Missing], plan: _Plan, config: RunConfig, report: _Report, workers: int, wait: bool
) -> bool:
    def assemble_finished() -> None:
        for planned, work in todo:
            if not is_there(work.store) and work.is_finished():
                _assemble(planned, work, plan, config, report)
        report()

    for folder in {planned.folder.parent for planned, _ in todo}:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
    if workers > 1 and todo:
        take_with_workers([work for _, work in todo], workers, assemble_finished)
    threads = min(cores(), _MAX_THREADS) + 1
    for planned, work in todo:
        while not is_there(work.store):
            with suppress(FileNotFoundError):  # of units that another process has just put together
                if take_units(work, threads, report) and _assemble(planned, work, plan, config, report):
                    break
            if is_there(work.store):
                break
            if not wait:
                return False
            report()
            time.sleep(_WAIT_SECONDS)
        shutil.rmtree(work.folder, ignore_errors=True)
    return True


def _assemble(planned: _PlannedStore, work: SourceWork, plan: _Plan, config: RunConfig, report: _Report) -> bool:
    """Finished units become the store; False if another process is at it."""
    held = claim(work.folder, _ASSEMBLY)
    if held is None:
        return False
    making = work.folder / f"store.{held.token}"
    with held:
        if is_there(work.store):
            return True
        making.mkdir()
        try:
            _write_store(making, planned, work, plan, config, held)
            if planned.folder.is_symlink():  # to a store that is gone
                planned.folder.unlink()
            report.finished(work)
            making.rename(planned.folder)
            fsync_path(planned.folder.parent)
        except OSError:  # whoever took this claim for abandoned has made the same
            if not is_there(planned.folder / MANIFEST):
                raise
        finally:  # also on Ctrl-C; after the rename there is nothing left to remove
            shutil.rmtree(making, ignore_errors=True)
    shutil.rmtree(work.folder, ignore_errors=True)
    return True


def _write_store(
    making: Path, planned: _PlannedStore, work: SourceWork, plan: _Plan, config: RunConfig, held: Claim
) -> None:
    policy = config.data.on_bad_record
    counts = join_counts(work, making / QUARANTINE if policy == "quarantine" else None)
    check_budget(planned.name, counts, config.data.bad_record_budget_fraction)
    finished = work.finished().values()
    _check_result(planned, counts, sum(unit["documents"] for unit in finished))
    with closing(StoreWriter(making, plan.vocab_size, plan.encoder.label_kind)) as writer:
        append_units(work, writer, lambda: held.beat(0, 0))
        source = {"name": planned.name, "path": planned.source.place, "text": planned.source.text}
        source |= {"on_bad_record": policy, "eos": plan.tokenizer.eos_token_id} | plan.encoder.describe(planned.source)
        # Texts and documents differ in number where a text has no token, or an EOS in its middle.
        num_texts = sum(unit["texts"] for unit in finished)
        shown = asdict(counts) | {"ignored_files": planned.files.ignored_files, "texts": num_texts}
        inputs = hashed_inputs(work, planned.inputs)
        tokenizer = unpadded_copy(plan.tokenizer.backend_tokenizer).to_str()
        writer.finish(plan.tokenizer_hash, source, shown, inputs, planned.settings, tokenizer)


def _remove_abandoned(cache: Path) -> None:
    """Remove what processes that are gone were making and nobody can continue."""
    for folder in cache.glob(f"*{UNITS}*"):
        with suppress(OSError):
            is_old = time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS
            if is_old and not any(is_held(path) for path in folder.glob("*.claim")):
                shutil.rmtree(folder, ignore_errors=True)
    for folder in cache.glob("*.tmp-*"):  # of versions without units, which wrote a store in one piece
        with suppress(OSError):
            age = time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if age > _ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


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
    return Prepared(
        sources,
        validation,
        plan.tokenizer_hash,
        plan.vocab_size,
        _identity(plan.tokenizer_hash, sources, validation, data),
        data.seq_len,
        stages=data.stages,
        share_of=data.share_of,
    )


def of_earlier_recipe(prepared: Prepared, data: DataConfig) -> Prepared:
    """The data as a recipe had it to whose sources and held-out sets others were added, and whose weights differed."""
    weights = [source.weight for source in data.sources]
    sources = [replace(source, weight=weight) for source, weight in zip(prepared.sources, weights, strict=False)]
    validation = prepared.validation[: len(data.validation)]
    identity = _identity(prepared.tokenizer_hash, sources, validation, data)
    return replace(prepared, sources=sources, validation=validation, identity=identity, stages=data.stages)


def _identity(
    tokenizer_sha256: str, sources: Sequence[PreparedSource], validation: Sequence[PreparedSource], data: DataConfig
) -> str:
    content: list[Any] = [tokenizer_sha256]
    content += [[[s.name, s.store.manifest.content_hash] for s in part] for part in (sources, validation)]
    if data.packing == "windows":  # which tokens a block has
        content.append(["windows", data.stride or data.seq_len, data.overlap])
    if (lists := excluded_hash([s.quality for s in sources if s.quality is not None])) is not None:
        content.append(["excluded", lists])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


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
        bad += f", {row['filtered']:,} not kept by its filter" if row.get("filtered") else ""
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
        state = "its text is gone, its store is there" if planned.gone is not None else state
        on_hub = [str(path) for path in planned.files.files if isinstance(path, HubDataset)]
        size = "streamed" if on_hub else f"{len(planned.inputs):,} files, {num_bytes:,} bytes"
        yield f"{planned.name}: {size}, {state}: {(on_hub or [planned.source.place])[0]}"
    tokenizer: Any = load_run_tokenizer(config)
    sources = [planned for planned in plan.stores[: len(config.data.sources)] if planned.inputs]
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
