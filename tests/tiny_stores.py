"""Token stores of a few blocks, made without text or tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dist_cpt.data.packing import pack
from dist_cpt.data.prepared import Prepared, PreparedSource
from dist_cpt.data.store import StoreWriter, TokenStore

EOS, PAD, L = 0, 1, 16


def make_store(folder: Path, lengths: list[int], first_id: int) -> TokenStore:
    """Documents whose tokens name their place: ids rise by one through the store, EOS aside."""
    folder.mkdir(parents=True)
    ids = np.arange(first_id, first_id + sum(lengths), dtype=np.int32)
    ids[np.cumsum(lengths) - 1] = EOS
    writer = StoreWriter(folder, 60_000)
    writer.append(ids, np.array(lengths, dtype=np.int32))
    writer.finish("t", {"name": folder.name}, {}, [])
    return TokenStore.open(folder)


def prepared_of(sources: list[PreparedSource]) -> Prepared:
    return Prepared(sources, [], "t", 60_000, "i", L)


def num_blocks(source: PreparedSource) -> int:
    return pack(source.store.lengths, L, source.stride).num_blocks


def two_sources(folder: Path) -> Prepared:
    """Source a with long documents and 0.7 of the blocks, source b with short ones and the rest."""
    rng = np.random.default_rng(0)
    a = make_store(folder / "a", rng.integers(2, 40, 60).tolist(), 10)
    b = make_store(folder / "b", rng.integers(2, 9, 50).tolist(), 10_000)
    return prepared_of([PreparedSource("a", 0.7, "domain", a), PreparedSource("b", 0.3, "replay", b)])
