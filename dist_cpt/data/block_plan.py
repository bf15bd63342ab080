"""A packing plan as files: made once beside its store, hashed, and memory-mapped by every rank.

The folder's name contains a hash of all that decides the plan: another store, block length, stride or choice of
documents has another plan. It appears under that name when it is complete. A store that cannot be written to has its
plans in the cache folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dist_cpt.data.packing import PIECE, PackingPlan, pack
from dist_cpt.data.store import (
    Chunk,
    TokenStore,
    check_chunks,
    check_file,
    chunks_of,
    damaged,
    flush_hashed,
    place_of,
    write_hashed,
)
from dist_cpt.errors import DataError, WriteError
from dist_cpt.run_folder.json_files import fsync_path
from dist_cpt.run_folder.names import MANIFEST
from dist_cpt.storage import LOGGER, is_there, os_error, patiently, read_bytes

FORMAT_VERSION = 1
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_ABANDONED_SECONDS = 24 * 3600
_OFFSETS, _PIECES = "offsets", "pieces"  # the arrays that `pack` asks for


@dataclass(frozen=True)
class BlockPlan:
    """A plan and its files; none where no folder could be written to and the plan is in memory."""

    plan: PackingPlan
    folder: Path | None = None
    files: dict[str, dict[str, Any]] | None = None  # as in a store's manifest

    def chunks(self) -> list[Chunk]:
        """Every byte of the files in parts, with their hashes."""
        return [] if self.folder is None or self.files is None else chunks_of(self.folder, self.files)

    @property
    def place(self) -> list[list[int]]:
        """Equal for processes that see the same files."""
        return [] if self.folder is None or self.files is None else place_of(self.folder, self.files)


@dataclass(frozen=True)
class PlanKey:
    """What decides the blocks of a store."""

    seq_len: int
    stride: int | None = None
    excluded: np.ndarray | None = None  # documents that are in no block, int64 in ascending order

    def of(self, store: TokenStore) -> dict[str, Any]:
        """The key with the store's content, JSON-able."""
        key: dict[str, Any] = {"format_version": FORMAT_VERSION, "content": store.manifest.content_hash}
        key |= {"seq_len": self.seq_len, "stride": self.stride or self.seq_len}
        if self.excluded is not None and len(self.excluded):
            key["excluded"] = hashlib.sha256(np.asarray(self.excluded, "<i8").tobytes()).hexdigest()
        return key

    def folder_name(self, store: TokenStore) -> str:
        """The name of the plan's folder, the same wherever it is."""
        digest = hashlib.sha256(json.dumps(self.of(store), sort_keys=True).encode()).hexdigest()
        return f"blocks-{self.seq_len}-{digest[:12]}"


def block_plan(store: TokenStore, key: PlanKey, cache_dir: Path, *, verify: bool = False) -> BlockPlan:
    """The plan of a store's blocks, opened from its files, which are made if there are none; `verify` hashes them.

    Raises:
        DataError: the store's lengths do not sum to its tokens, or no document is left.
        StorageError: the file system does not answer.
        WriteError: there is no room for the plan.
    """
    places = [parent / key.folder_name(store) for parent in (store.folder.resolve(), cache_dir)]
    for folder in places:
        if is_there(folder / MANIFEST):
            try:
                return read_plan(folder, verify)
            except DataError as error:  # made again from the store
                LOGGER.warning("%s; the plan is made again", error.message)
    for folder in places:
        try:
            patiently(folder, partial(_make, folder, store, key))
        except WriteError as error:
            cause = os_error(error)
            if cause is None or cause.errno not in _READ_ONLY:
                raise
        else:
            return read_plan(folder)
    LOGGER.warning(
        "the block plan of %s is kept in memory: neither it nor %s can be written to", store.folder, cache_dir
    )
    return BlockPlan(_checked(pack(store.lengths, key.seq_len, key.stride, key.excluded), store, key))


def plan_folders(folder: Path) -> list[Path]:
    """The finished plans in a store's folder."""
    return sorted(path.parent for path in folder.glob(f"blocks-*/{MANIFEST}") if "." not in path.parent.name)


def read_plan(folder: Path, verify: bool = False) -> BlockPlan:
    """Open a finished plan; `verify` also hashes every byte.

    Raises:
        DataError: it is damaged.
        StorageError: the file system does not answer.
    """
    try:
        manifest = json.loads(read_bytes(folder / MANIFEST, expected=True))
        key, files, num_tokens = manifest["key"], manifest["files"], int(manifest["num_tokens"])
        seq_len, stride = int(key["seq_len"]), int(key["stride"])
        sizes = {name: files[f"{name}.npy"] for name in (_OFFSETS, _PIECES)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(folder / MANIFEST, f"invalid ({error})") from None
    for name, entry in sizes.items():
        check_file(folder / f"{name}.npy", entry)
    try:
        offsets, pieces = (_mapped(folder / f"{name}.npy") for name in (_OFFSETS, _PIECES))
    except ValueError as error:  # of numpy, on a broken header
        raise damaged(folder, f"an array cannot be read ({error})") from None
    if offsets.dtype != np.dtype("<i8") or pieces.dtype != PIECE or int(offsets[-1]) != len(pieces):
        raise damaged(folder / f"{_OFFSETS}.npy", f"does not belong to the {len(pieces)} pieces beside it")
    opened = BlockPlan(PackingPlan(seq_len, offsets, pieces, num_tokens, overlap=seq_len - stride), folder, files)
    if verify:
        check_chunks(opened.chunks())
    return opened


def _mapped(path: Path) -> np.ndarray:
    mapped = patiently(path, lambda: np.load(path, mmap_mode="r"), expected=True)
    if isinstance(mapped.base, mmap.mmap):
        # Blocks are read in the order of a permutation: reading around is in vain.
        mapped.base.madvise(mmap.MADV_RANDOM)
    return np.asarray(mapped)


def _remove_abandoned(folder: Path) -> None:
    """Remove what processes that were killed had begun of this plan."""
    for work in folder.parent.glob(f"{folder.name}.tmp-*"):
        with contextlib.suppress(OSError):  # its maker has just published it
            if time.time() - max(path.stat().st_mtime for path in (work, *work.iterdir())) > _ABANDONED_SECONDS:
                shutil.rmtree(work, ignore_errors=True)


def _make(folder: Path, store: TokenStore, key: PlanKey) -> None:
    work = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-{secrets.token_hex(3)}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        work.mkdir()
        plan = _checked(
            pack(store.lengths, key.seq_len, key.stride, key.excluded, partial(_new_array, work)), store, key
        )
        for array in (plan.block_offsets, plan.pieces):
            array.flush()  # type: ignore[attr-defined]
        files = {f"{name}.npy": flush_hashed(work / f"{name}.npy") for name in (_OFFSETS, _PIECES)}
        manifest = {"key": key.of(store), "num_tokens": plan.num_tokens, "files": files}
        write_hashed(work / MANIFEST, json.dumps(manifest, indent=1).encode())
        fsync_path(work)
        _publish(work, folder)
    except OSError as error:
        raise WriteError(
            f"cannot write the block plan {folder}: {error.strerror or error}", remedy="free space there"
        ) from error
    finally:  # also on Ctrl-C; after the rename there is nothing left to remove
        shutil.rmtree(work, ignore_errors=True)


def _publish(work: Path, folder: Path) -> None:
    try:
        work.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        try:  # another process has made the same plan meanwhile
            read_plan(folder, verify=True)
        except DataError:  # or left a damaged one; processes that have mapped it keep their mapping
            folder.rename(folder.with_name(f"{work.name}-damaged"))
            work.rename(folder)
            shutil.rmtree(folder.with_name(f"{work.name}-damaged"), ignore_errors=True)
    fsync_path(folder.parent)


def _new_array(work: Path, name: str, length: int, dtype: np.dtype) -> np.ndarray:
    path = work / f"{name}.npy"
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(length,))
    with path.open("r+b") as file:  # a full disk is an error here, and would be a signal later
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _checked(plan: PackingPlan, store: TokenStore, key: PlanKey) -> PackingPlan:
    if not plan.num_blocks:
        raise DataError(f"token store: {store.folder}: no document is left", remedy="exclude fewer documents")
    plain = key.stride in (None, key.seq_len) and (key.excluded is None or not len(key.excluded))
    if plain and plan.num_tokens != store.num_tokens:
        raise damaged(store.folder, f"its documents have {plan.num_tokens} tokens, {store.num_tokens} in the manifest")
    return plan
