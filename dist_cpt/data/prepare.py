"""Text -> token stores on disk: made once, atomically, and again only when the text or the tokenizer changes.

The units of the stores that are missing are tokenised, by any number of processes, and put together, the manifest last;
then all are opened.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from dist_cpt.config.schema import RunConfig
from dist_cpt.data.assemble import append_units, hashed_inputs, join_counts
from dist_cpt.data.claims import Claim, claim, is_held
from dist_cpt.data.hub import with_commits
from dist_cpt.data.prepared import Prepared, open_stores
from dist_cpt.data.sources import ReadCounts, check_budget
from dist_cpt.data.store import QUARANTINE, StoreWriter
from dist_cpt.data.store_plan import PlannedStore, StorePlan, input_state, is_ready, plan_stores
from dist_cpt.data.token_ids import unpadded_copy
from dist_cpt.data.unit_work import SourceWork, take_units
from dist_cpt.data.units import UNIT_BYTES, plan_digest, plan_units
from dist_cpt.data.workers import POLL_SECONDS, cores, take_with_workers
from dist_cpt.errors import ConfigError, DataError, Stopped, WriteError
from dist_cpt.run_folder.json_files import fsync_path
from dist_cpt.run_folder.names import MANIFEST
from dist_cpt.runtime.stop import stopped_by_usr1
from dist_cpt.storage import LOGGER, is_there, patiently

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
_Missing = tuple[PlannedStore, SourceWork]  # a store to be made, and how


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
    return open_stores(plan, config, verify)


def prepare_in_part(config: RunConfig, on_progress: OnProgress | None = None, *, workers: int = 1) -> Prepared | None:
    """As `prepare`, but what other processes work on is left to them: None, unless all stores are finished.

    Raises:
        DistCptError: as `prepare`.
        Stopped: by SIGUSR1, after at least one unit was finished: started again, it continues with the others.
        ConfigError: by SIGUSR1 before any was: started again, it would do the same.
    """
    config = with_commits(config)
    plan, todo = _missing_stores(config, False, UNIT_BYTES)
    before = _num_finished(todo)
    try:
        with stopped_by_usr1("stopped while data was prepared; finished units are kept"):
            if not _make_stores(todo, plan, config, _Report(todo, on_progress), workers, wait=False):
                return None
    except Stopped:
        if _num_finished(todo) == before:
            raise ConfigError(
                "SIGUSR1: stopped before a unit was finished, and another start would not get further",
                remedy="allow more time (--time), or give the text in more files",
            ) from None
        raise
    return open_stores(plan, config)


def _num_finished(todo: Sequence[_Missing]) -> int:
    """The units that are there, by whomever; those of a store that is finished and the store itself count too."""
    return sum(len(work.units) + 1 if is_there(work.store) else len(work.finished()) for _, work in todo)


def _missing_stores(config: RunConfig, verify: bool, unit_bytes: int) -> tuple[StorePlan, list[_Missing]]:
    plan = plan_stores(config)
    missing: dict[Path, _Missing] = {}
    for planned in plan.stores:
        if not patiently(planned.folder, partial(is_ready, planned, config, verify)):
            missing.setdefault(planned.folder, (planned, _work_on(planned, plan, config, unit_bytes)))
        elif planned.source.store is None:
            _remove_units(planned)
    return plan, list(missing.values())


def _remove_units(planned: PlannedStore) -> None:
    """Remove what a process left behind that was killed just after it published its store."""
    with suppress(OSError):
        for folder in planned.folder.parent.glob(f"{planned.folder.name}{UNITS}*"):
            shutil.rmtree(folder, ignore_errors=True)


def _work_on(planned: PlannedStore, plan: StorePlan, config: RunConfig, unit_bytes: int) -> SourceWork:
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
    todo: Sequence[_Missing], plan: StorePlan, config: RunConfig, report: _Report, workers: int, *, wait: bool
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
    todo: Sequence[_Missing], plan: StorePlan, config: RunConfig, report: _Report, workers: int, wait: bool
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


def _assemble(planned: PlannedStore, work: SourceWork, plan: StorePlan, config: RunConfig, report: _Report) -> bool:
    """Finished units become the store; False if another process is assembling them."""
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
        except OSError:  # another process took this claim for abandoned and made the same
            if not is_there(planned.folder / MANIFEST):
                raise
        finally:  # also on Ctrl-C; after the rename there is nothing left to remove
            shutil.rmtree(making, ignore_errors=True)
    shutil.rmtree(work.folder, ignore_errors=True)
    return True


def _write_store(
    making: Path, planned: PlannedStore, work: SourceWork, plan: StorePlan, config: RunConfig, held: Claim
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
    """Remove unfinished work of processes that have ended, which no other can continue."""
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


def _check_result(planned: PlannedStore, counts: ReadCounts, num_documents: int) -> None:
    where = f"source {planned.name!r}: {planned.source.place}"
    if num_documents == 0:
        raise DataError(
            f"{where} has no document ({counts.records} records in {len(planned.inputs)} files, {counts.empty} empty, "
            f"{counts.num_bad} bad)",
            remedy="check the path and the fields that are read (data.sources[].text, .messages, classify)",
        )
    if input_state(planned.files) != planned.inputs:
        raise DataError(f"{where} changed while it was read", remedy="prepare again")
