"""Block plans as files: the blocks of `pack`, made once, checked, and opened in constant memory whatever their size."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_cpt.data import block_plan as module
from dist_cpt.data.block_plan import PlanKey, block_plan, plan_folders
from dist_cpt.data.loader import BlockLoader
from dist_cpt.data.packing import PackingPlan, pack
from dist_cpt.data.prepared import Prepared, PreparedSource
from dist_cpt.data.store import StoreWriter, TokenStore, check_chunks
from dist_cpt.errors import DataError
from tests.errno_layer import ErrnoLayer

L = 16


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    folder = tmp_path / "store"
    folder.mkdir()
    lengths = np.random.default_rng(0).integers(1, 50, 300).astype(np.int32)
    writer = StoreWriter(folder, 60_000)
    writer.append(np.arange(lengths.sum(), dtype=np.int32), lengths)
    writer.finish("t", {"name": "s"}, {}, [])
    return TokenStore.open(folder)


class ReadOnly(ErrnoLayer):
    """No folder can be made below this one."""

    def reached(self, function: str, path: Any) -> None:
        if function == "mkdir" and self._path(path).startswith(self._folder):
            raise OSError(errno.EROFS, "Read-only file system", self._path(path))


def require_same(plan: PackingPlan, expected: PackingPlan) -> None:
    np.testing.assert_array_equal(plan.block_offsets, expected.block_offsets)
    np.testing.assert_array_equal(plan.pieces, expected.pieces)
    assert (plan.num_tokens, plan.overlap, plan.seq_len) == (expected.num_tokens, expected.overlap, expected.seq_len)


def test_the_file_has_the_blocks_of_pack_and_is_made_once(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    excluded = np.array([3, 77])
    keys = [PlanKey(L), PlanKey(L, 5), PlanKey(L, excluded=excluded), PlanKey(2 * L)]
    for key in keys:
        made = block_plan(store, key, tmp_path / "cache")
        require_same(made.plan, pack(store.lengths, key.seq_len, key.stride, key.excluded))
        check_chunks(made.chunks())
    assert len(plan_folders(store.folder)) == len(keys)
    monkeypatch.setattr(module, "pack", None)
    for key in keys:
        require_same(
            block_plan(store, key, tmp_path / "cache").plan, pack(store.lengths, key.seq_len, key.stride, key.excluded)
        )
    moved = TokenStore.open(store.folder.rename(tmp_path / "moved"))
    require_same(block_plan(moved, PlanKey(L), tmp_path / "cache").plan, pack(store.lengths, L))
    assert not (tmp_path / "cache").exists()


def test_batches_are_the_same_from_the_file_and_from_memory(store: TokenStore, tmp_path: Path) -> None:
    mapped = PreparedSource("s", 1.0, "domain", store, blocks=block_plan(store, PlanKey(L), tmp_path))
    loaders = [
        BlockLoader(Prepared([source], [], "t", 60_000, "i", L), L, 0, 1)
        for source in (mapped, PreparedSource("s", 1.0, "domain", store))
    ]
    one, two = (loader.batch(range(40)) for loader in loaders)
    assert one.input_ids.tolist() == two.input_ids.tolist()
    assert one.labels.tolist() == two.labels.tolist()


def test_a_store_that_cannot_be_written_to_has_its_plan_in_the_cache(
    store: TokenStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    with ReadOnly(store.folder).installed():
        made = block_plan(store, PlanKey(L), cache)
    assert made.folder == cache / PlanKey(L).folder_name(store)
    require_same(made.plan, pack(store.lengths, L))
    assert block_plan(store, PlanKey(L), cache).folder == made.folder
    assert not caplog.records
    with ReadOnly(tmp_path).installed():
        in_memory = block_plan(store, PlanKey(2 * L), cache)
    assert (in_memory.folder, in_memory.chunks()) == (None, [])
    require_same(in_memory.plan, pack(store.lengths, 2 * L))
    assert "in memory" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "bit", "manifest"])
def test_a_damaged_plan_is_made_again(store: TokenStore, tmp_path: Path, damage: str) -> None:
    folder = block_plan(store, PlanKey(L), tmp_path).folder
    assert folder is not None
    path = folder / ("manifest.json" if damage == "manifest" else "pieces.npy")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + (b"" if damage != "bit" else bytes([content[-1] ^ 1])))
    if damage == "bit":
        with pytest.raises(DataError, match=r"pieces\.npy: chunk 0"):
            check_chunks(block_plan(store, PlanKey(L), tmp_path).chunks())
    again = block_plan(store, PlanKey(L), tmp_path, verify=True)
    assert again.folder == folder
    check_chunks(again.chunks())
    require_same(again.plan, pack(store.lengths, L))
    assert [path.name for path in store.folder.glob("blocks-*")] == [folder.name]


def test_a_store_of_which_no_document_is_left_is_refused(store: TokenStore, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no document is left"):
        block_plan(store, PlanKey(L, excluded=np.arange(store.num_documents)), tmp_path)
    assert not list(store.folder.glob("blocks-*"))


def test_several_processes_may_make_one_plan(store: TokenStore, tmp_path: Path) -> None:
    abandoned, recent = (store.folder / f"{PlanKey(L).folder_name(store)}.tmp-1-{name}" for name in ("a", "b"))
    for folder in (abandoned, recent):
        folder.mkdir()
    os.utime(abandoned, (0, 0))
    with ThreadPoolExecutor(4) as pool:
        plans = list(pool.map(lambda _: block_plan(store, PlanKey(L), tmp_path), range(8)))
    for made in plans:
        require_same(made.plan, pack(store.lengths, L))
    assert sorted(store.folder.glob("blocks-*")) == [plans[0].folder, recent]


MAKE = """
import sys, threading, time
from pathlib import Path
import numpy as np
from dist_cpt.data.block_plan import PlanKey, block_plan
from dist_cpt.data.store import TokenStore

def anonymous_mib():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024

store = TokenStore.open(sys.argv[1])
before, highest, done = anonymous_mib(), [0.0], []

def watch():
    while not done:
        highest.append(anonymous_mib())
        time.sleep(0.01)

thread = threading.Thread(target=watch)
thread.start()
block_plan(store, PlanKey(4096), Path("/nonexistent"))
done.append(True)
thread.join()
print(max(highest) - before)
"""


@pytest.mark.matrix
def test_making_a_plan_takes_the_same_memory_for_ten_times_the_documents(tmp_path: Path) -> None:
    taken = []
    for number in (800_000, 8_000_000):
        folder = tmp_path / str(number)
        folder.mkdir()
        writer, rng = StoreWriter(folder, 10), np.random.default_rng(0)
        for _ in range(number // 100_000):
            lengths = rng.integers(1, 30, 100_000).astype(np.int32)
            writer.append(np.zeros(lengths.sum(), np.uint16), lengths)
        writer.finish("t", {}, {}, [])
        done = subprocess.run([sys.executable, "-c", MAKE, str(folder)], capture_output=True, text=True, check=True)
        taken.append(float(done.stdout))
    assert taken[1] < taken[0] + 64  # its 8 million pieces alone are 128 MiB


def test_a_trillion_tokens_open_in_constant_memory() -> None:
    benchmark = Path(__file__).parents[2] / "benchmarks/open_store.py"
    done = subprocess.run([sys.executable, str(benchmark)], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert (result["tokens"], result["documents"], result["blocks"]) == (10**12, 10**9, -(-(10**12) // 4096))
    assert result["last_block"] == [[10**9 - 1, 0, 7]]
    assert result["anonymous_kib"] < 32 * 1024
