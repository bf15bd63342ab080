"""A full check of one token store and of the block plans in it: every chunk against its hash."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dist_cpt.data.block_plan import plan_folders, read_plan
from dist_cpt.data.documents import open_documents
from dist_cpt.data.store import Chunk, TokenStore
from dist_cpt.errors import DataError


@dataclass(frozen=True)
class StoreCheck:
    """How much was compared, and everything that differs."""

    num_chunks: int
    num_bytes: int
    problems: list[str]
    hashed: bool = True  # False: a pair without a manifest, of which only the structure can be checked


def check_store(path: Path) -> StoreCheck:
    """Compare every byte of a store with its hashes; of a pair without hashes, that its documents can be read.

    Raises:
        StorageError: the file system does not answer: neither valid nor damaged.
    """
    try:
        documents = open_documents(path)
    except DataError as error:
        return StoreCheck(0, 0, [error.message])
    if not isinstance(documents.source, TokenStore):
        return StoreCheck(0, 0, documents.source.problems(), hashed=False)
    problems: list[str] = []
    chunks = documents.source.chunks()
    for folder in plan_folders(path):
        try:
            chunks += read_plan(folder).chunks()
        except DataError as error:
            problems.append(error.message)
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter lock
        problems += [problem for problem in pool.map(_problem, chunks) if problem is not None]
    return StoreCheck(len(chunks), sum(chunk.num_bytes for chunk in chunks), problems)


def _problem(chunk: Chunk) -> str | None:
    try:
        chunk.check()
    except DataError as error:
        return error.message
    return None
