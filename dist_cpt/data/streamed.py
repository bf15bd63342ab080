"""Sources that are read from their text while training: their files, and checks that these have not changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dist_cpt.config.schema import HUB_PREFIX, RunConfig, SourceConfig
from dist_cpt.data.containers import files_of, suffix_of
from dist_cpt.data.mixture import UNLIMITED, Limit
from dist_cpt.data.store import sha256_of
from dist_cpt.data.store_plan import PlannedStore, StorePlan
from dist_cpt.data.unit_work import SourceUnits
from dist_cpt.data.units import UNIT_BYTES, Unit, plan_units
from dist_cpt.data.windows import window_tokens
from dist_cpt.errors import DataError
from dist_cpt.storage import LOGGER, patiently

FORMAT_VERSION = 1  # of the order: another one is another stream of the same text
END_BYTES = 1 << 16  # at either end of a file, hashed to tell it from another of the same size
_CONTENT = ("bytes", "ends")


@dataclass(frozen=True)
class StreamedSource:
    """One training source whose shards, units of about 64 MB, are read while training."""

    name: str
    weight: float
    role: str  # domain | replay
    text: SourceUnits
    inputs: tuple[dict[str, Any], ...]  # path, bytes, mtime_ns and sha256 of the ends of every file, in reading order
    identity: str  # changes when sizes, ends or order of the files, or the settings, do
    seq_len: int
    window_tokens: int
    bad_record_budget_fraction: float
    spool: Path  # for texts too long for memory
    limit: Limit = UNLIMITED


def open_streamed(
    plan: StorePlan, config: RunConfig, unit_bytes: int | None = None, window: int | None = None
) -> list[StreamedSource]:
    """The streamed sources of a recipe, in shards of about `unit_bytes` and windows of `window` tokens.

    Raises:
        DataError: there is no text.
        StorageError: a file cannot be read.
    """
    sizes = (unit_bytes or UNIT_BYTES, window or window_tokens(config.data.seq_len))
    return [_open(planned, plan, config, *sizes) for planned in plan.streamed]


def _open(planned: PlannedStore, plan: StorePlan, config: RunConfig, unit_bytes: int, window: int) -> StreamedSource:
    source, data = planned.source, config.data
    assert isinstance(source, SourceConfig)
    assert data.cache_dir is not None  # resolve_paths fills it in
    if planned.gone is not None:
        raise planned.gone
    with ThreadPoolExecutor(max_workers=16) as pool:  # the file system's time, not ours
        ends = list(pool.map(_ends, planned.inputs))
    inputs = tuple(row | {"ends": sha256} for row, sha256 in zip(planned.inputs, ends, strict=True))
    content = [[suffix_of(row["path"]), *(row[key] for key in _CONTENT)] for row in inputs]
    key = [FORMAT_VERSION, planned.settings, data.seq_len, unit_bytes, window, content]
    text = SourceUnits(
        planned.name,
        source,
        planned.files,
        plan_units(planned.files.files, planned.inputs, unit_bytes),
        plan.encoder,
        plan.vocab_size,
        data.on_bad_record,
    )
    spool = Path(data.cache_dir)
    spool.mkdir(parents=True, exist_ok=True)
    return StreamedSource(
        planned.name,
        source.weight,
        source.role,
        text,
        inputs,
        hashlib.sha256(json.dumps(key).encode()).hexdigest(),
        data.seq_len,
        window,
        data.bad_record_budget_fraction,
        spool,
    )


def _ends(row: Mapping[str, Any]) -> str:
    """sha256 of the first and last END_BYTES of a file; of a data set on the hub that of its name, with the commit."""
    if row["path"].startswith(HUB_PREFIX):
        return hashlib.sha256(row["path"].encode()).hexdigest()
    path, size = Path(row["path"]), int(row["bytes"])
    parts = [sha256_of(path, 0, END_BYTES), sha256_of(path, max(size - END_BYTES, 0), END_BYTES)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def require_same_files(name: str, recorded: Sequence[Mapping[str, Any]], inputs: Sequence[Mapping[str, Any]]) -> None:
    """Refuse files with other content than `recorded` at a run's beginning, as far as their sizes and ends show it.

    Raises:
        DataError: names the first file.
    """
    if len(recorded) != len(inputs):
        before, now = ({Path(row["path"]).name for row in rows} for rows in (recorded, inputs))
        listed = [f"{path} is new" for path in sorted(now - before)[:3]]
        listed += [f"{path} is gone" for path in sorted(before - now)[:3]]
        raise DataError(
            f"source {name!r} has {len(inputs)} files, the run began with {len(recorded)} ({', '.join(listed)})",
            remedy="restore the files, or start a new run",
        )
    touched = []
    for old, new in zip(recorded, inputs, strict=True):
        if any(old[key] != new[key] for key in _CONTENT):
            what = f"{old['bytes']:,} bytes then, {new['bytes']:,} now"
            if old["bytes"] == new["bytes"]:
                what = f"its first or last {END_BYTES >> 10} KiB differ"
            raise DataError(
                f"source {name!r}: {new['path']} has changed since the run began: {what}",
                remedy="restore the file, or start a new run",
            )
        if old["path"] == new["path"] and old["mtime_ns"] != new["mtime_ns"]:
            touched.append(new["path"])
    if touched:
        LOGGER.warning(
            "source %s: %d files were written since the run began, such as %s; their sizes, first and last %d KiB are "
            "the same, the rest is not compared",
            *(name, len(touched), touched[0], END_BYTES >> 10),
        )


def require_unchanged(source: StreamedSource, unit: Unit) -> None:
    """Refuse a shard with a file that is not the one that was there when this process started.

    Raises:
        DataError: names the file.
    """
    known = {row["path"]: (row["bytes"], row["mtime_ns"]) for row in source.inputs}
    for file in [file for part in unit.parts for file in patiently(part.path, partial(files_of, part.path))]:
        try:
            stat = patiently(file, partial(os.stat, file), expected=True)
            now = (stat.st_size, stat.st_mtime_ns)
        except FileNotFoundError:
            now = None
        if now != known[str(file)]:
            raise DataError(
                f"source {source.name!r}: {file} {'is gone' if now is None else 'has changed'} while the run reads it",
                remedy="restore it and resume, or start a new run",
            )
