"""Units of work: planned from the input alone, shared by claims, and no trace of workers or kills in the store."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_cpt.data import claims
from dist_cpt.data.claims import claim, is_held
from dist_cpt.data.containers import Part, read_container
from dist_cpt.data.prepare import Progress, prepare, prepare_in_part
from dist_cpt.data.unit_work import LENGTHS
from dist_cpt.data.units import lines_before, plan_units
from dist_cpt.errors import ConfigError, DataError, DistCptError, Stopped, WriteError
from tests.prepared_by_many import UNIT_BYTES, content, recipe, started, write_input


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_input(tmp_path_factory.mktemp("input"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, bytes]:
    """The stores as one process makes them of one unit per source."""
    prepare(recipe(folder, folder / "whole"))
    return content(folder / "whole")


def test_a_unit_that_cannot_be_opened_leaves_no_file_open(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unclosed file is a ResourceWarning, which fails a test."""
    own = Path.open

    def opened(path: Path, *args: str, **kwargs: str) -> object:
        if path.name == LENGTHS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return own(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(WriteError):
        prepare(recipe(folder, tmp_path))


def inputs(*paths: Path) -> list[dict[str, object]]:
    return [{"path": str(path), "bytes": path.stat().st_size} for path in paths]


@pytest.mark.parametrize("unit_bytes", [1, 7, 100, 1000])
def test_every_line_is_in_exactly_one_part(tmp_path: Path, unit_bytes: int) -> None:
    random.seed(unit_bytes)
    path = tmp_path / "a.jsonl"
    lines = [b"x" * random.choice((0, 1, 6, 7, 8, 300)) for _ in range(60)]
    for end in (b"", b"\n"):
        path.write_bytes(b"\n".join(lines) + end)
        units = plan_units([path], inputs(path), unit_bytes)
        read = [list(read_container(unit.parts[0])) for unit in units]
        expected = list(read_container(Part(path)))
        found = [record for part in read for record in part]
        assert [record and record.content for record in found] == [record and record.content for record in expected]
        starts = [sum(map(len, read[:number])) for number in range(len(read))]
        assert all(lines_before(u) == s for u, s, part in zip(units, starts, read, strict=True) if part)
        hashed = [chunk for unit in units for chunk in unit.chunks]
        assert sum(size for *_, size in hashed) == path.stat().st_size


def test_record_batches_of_an_arrow_file_are_units_and_rows_count_from_its_start(folder: Path, tmp_path: Path) -> None:
    import pyarrow as pa

    texts = [f"row {number}: ".encode() + b"\xff" * (number in (3, 41)) + b"some words " * 9 for number in range(60)]
    column = pa.array(texts, pa.binary()).view(pa.string())  # two rows have invalid UTF-8
    table, path = pa.table({"text": column}), tmp_path / "a.arrow"
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    units = plan_units([path], inputs(path), 2048)
    assert len(units) == 5
    assert [part for unit in units for part in range(unit.parts[0].start, unit.parts[0].end or 0)] == list(range(9))
    assert sum(size for unit in units for *_, size in unit.chunks) == path.stat().st_size
    stores = []
    for name, size in (("parts", 2048), ("whole", 2**20)):
        config = recipe(folder, tmp_path / name, sources=[{"path": str(path)}])
        (source,) = prepare(config, unit_bytes=size).sources
        assert source.store.manifest.counts["bad"] == {"invalid_utf8": 2}
        places = [
            json.loads(line)["where"] for line in (source.store.folder / "quarantine.jsonl").read_text().splitlines()
        ]
        assert places == [f"{path}:4", f"{path}:42"]
        stores.append(source.store.manifest.content_hash)
    assert stores[0] == stores[1]
    config = recipe(folder, tmp_path / "error", sources=[{"path": str(path)}], on_bad_record="error")
    with pytest.raises(DataError, match=r"a\.arrow:4: invalid UTF-8"):
        prepare(config, unit_bytes=2048)
    content_ = bytearray(path.read_bytes())
    first = content_.index(b"row 0")
    content_[first - 16 : first - 8] = b"\xff" * 8  # offsets of the first batch
    path.write_bytes(content_)
    config = recipe(folder, tmp_path / "damaged", sources=[{"path": str(path)}], bad_record_budget_fraction=0.9)
    (source,) = prepare(config, unit_bytes=2048).sources
    assert source.store.manifest.counts["bad"]["damaged_file"] == 1


def test_small_files_share_a_unit_and_files_that_cannot_be_cut_are_one(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.txt", "b.txt", "c.csv", "d.txt")]
    for path, size in zip(paths, (10, 20, 500, 30), strict=True):
        path.write_bytes(b"x" * size)
    units = plan_units(paths, inputs(*paths), 100)
    assert [[part.path.name for part in unit.parts] for unit in units] == [["a.txt", "b.txt"], ["c.csv"], ["d.txt"]]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_same_bytes_for_any_number_of_workers(
    folder: Path, whole: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    """Data, counts and places of bad records; only the hashes of the input are those of its units."""
    many = prepare(recipe(folder, tmp_path), workers=workers, unit_bytes=UNIT_BYTES)
    found = content(tmp_path)
    assert {name for name in found if ".units-" in name} == set()
    assert found.keys() == whole.keys()
    for name, expected in whole.items():
        if name.endswith("manifest.json"):
            one, other = json.loads(expected), json.loads(found[name])
            one.pop("inputs", None), other.pop("inputs", None)
            assert one == other
        else:
            assert found[name] == expected, name
    bad = many.sources[0].store.manifest.counts["bad"]
    assert bad == {"bad_json": 6}


def test_the_line_of_a_bad_record_counts_from_the_start_of_its_file(folder: Path, tmp_path: Path) -> None:
    config = recipe(folder, tmp_path, on_bad_record="error")
    with pytest.raises(DataError, match=r"lines\.jsonl:8: not valid JSON"):
        prepare(config, unit_bytes=UNIT_BYTES)
    lines = (folder / "lines.jsonl").read_text().splitlines()
    (tmp_path / "later.jsonl").write_text("".join(f"{line}\n" for line in lines if "broken" not in line) + "{broken\n")
    config = recipe(folder, tmp_path, on_bad_record="error", sources=[{"path": str(tmp_path / "later.jsonl")}])
    for workers in (1, 2):
        with pytest.raises(DataError, match=rf"later\.jsonl:{len(lines) - 5}: not valid JSON") as raised:
            prepare(config, unit_bytes=UNIT_BYTES, workers=workers)
        assert raised.value.remedy


def test_a_worker_that_is_killed_ends_with_one_line(folder: Path, tmp_path: Path) -> None:
    config = recipe(folder, tmp_path)

    def kill_a_worker() -> None:
        while True:
            for child in multiprocessing.active_children():
                if child.name.startswith("prepare-") and child.pid is not None:
                    os.kill(child.pid, signal.SIGKILL)
                    return
            time.sleep(0.01)

    threading.Thread(target=kill_a_worker, daemon=True).start()
    with pytest.raises(DistCptError, match="killed by SIGKILL") as raised:
        prepare(config, workers=2, unit_bytes=UNIT_BYTES)
    assert raised.value.exit_code == 70


# Claims.


def test_a_claim_is_of_one_living_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = claim(tmp_path, "a")
    assert held is not None
    assert claim(tmp_path, "a") is None
    held.beat(3, 4)
    assert claims.progress_of(tmp_path) == {"a": (3, 4)}
    with held:
        pass
    assert list(tmp_path.iterdir()) == []

    script = (
        "import sys; from pathlib import Path; from dist_cpt.data.claims import claim; claim(Path(sys.argv[1]), 'b')"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)  # ends without giving it back
    path = tmp_path / "b.claim"
    assert not is_held(path)
    monkeypatch.setattr(claims, "_host", lambda: "another")
    assert is_held(path)  # by its last beat
    old = time.time() - claims.STALE_SECONDS - 1
    os.utime(path, (old, old))
    assert not is_held(path)
    taken = claim(tmp_path, "b")
    assert taken is not None
    assert [file.name for file in tmp_path.iterdir()] == ["b.claim"]


def test_what_others_work_on_can_be_left_to_them(folder: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    config = recipe(folder, tmp_path)
    done = prepare_in_part(config)
    assert done is not None
    (first, *_) = done.sources
    text = (first.store.folder / "manifest.json").read_bytes()
    (first.store.folder / "manifest.json").unlink()
    first.store.folder.rename(tmp_path / "aside")
    units = tmp_path / f"{first.store.folder.name}.units-"
    folders: list[Path] = []

    def stop(_: object) -> None:
        folders.extend(tmp_path.glob(f"{units.name}*"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, stop)
    (left,) = set(folders)
    held = claim(left, "000000")
    assert held is not None
    assert prepare_in_part(config) is None  # this process lives, and has the unit
    with held:
        pass
    done = prepare_in_part(config)
    assert done is not None
    assert (done.sources[0].store.folder / "manifest.json").read_bytes() == text


def test_a_task_that_is_warned_of_its_limit_ends_with_what_it_finished(
    folder: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    config = recipe(folder, tmp_path)

    def warn_at(name: str) -> Callable[[Progress], None]:
        def warn(progress: Progress) -> None:
            if progress.source == name:
                os.kill(os.getpid(), signal.SIGUSR1)

        return warn

    for workers in (1, 2):
        with pytest.raises(ConfigError, match=r"before a unit was finished, .* -- allow more time"):
            prepare_in_part(config, warn_at("lines"), workers=workers)
    with pytest.raises(Stopped, match="finished units are kept") as stopped:
        prepare_in_part(config, warn_at("rows"))
    assert stopped.value.exit_code == 75
    assert [path for path in tmp_path.glob("**/*") if path.suffix == ".claim"] == []
    stores = {name: data for name, data in content(tmp_path).items() if name.startswith("lines-")}
    assert stores
    assert prepare_in_part(config) is not None
    assert content(tmp_path) == whole
    assert {name: whole[name] for name in stores} == stores


# Kills.


def kill_until_finished(folder: Path, cache: Path, kills: int, workers: int, beside: int, seed: int) -> int:
    """Kill what prepares, again and again at a random unit; the number of kills. No finished unit is made again."""
    chance, done, config = random.Random(seed), 0, recipe(folder, cache)
    inodes: dict[Path, int] = {}
    while done < kills:
        processes = [started(config, workers) for _ in range(1 + beside)]
        target = len(inodes) + chance.randrange(3)
        while all(process.is_alive() for process in processes):
            units = [path for path in cache.glob("*.units-*/*") if path.name.isdecimal()]
            for path in units:
                with contextlib.suppress(FileNotFoundError):
                    assert inodes.setdefault(path, path.stat().st_ino) == path.stat().st_ino
            if len(inodes) >= target:
                time.sleep(chance.random() * 0.02)
                break
            time.sleep(0.002)
        for process in processes:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.join()
            done += process.exitcode == -signal.SIGKILL
        if len(list(cache.glob("*/manifest.json"))) == 3:
            break
    prepare(config, unit_bytes=UNIT_BYTES)
    return done


def test_kills_leave_no_trace(folder: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    expected = recipe(folder, tmp_path / "calm")
    prepare(expected, unit_bytes=UNIT_BYTES)
    assert kill_until_finished(folder, tmp_path / "storm", kills=2, workers=1, beside=1, seed=0) > 0
    assert content(tmp_path / "storm") == content(tmp_path / "calm")


@pytest.mark.matrix
@pytest.mark.timeout(1800)
def test_a_hundred_kills_at_random_units_leave_no_trace(tmp_path: Path) -> None:
    write_input(tmp_path, num_records=2000)
    prepare(recipe(tmp_path, tmp_path / "calm"), unit_bytes=UNIT_BYTES)
    total, seed = 0, 0
    while total < 100:
        cache = tmp_path / f"storm-{seed}"
        total += kill_until_finished(tmp_path, cache, kills=40, workers=1 + (seed == 1), beside=seed % 2, seed=seed)
        assert content(cache) == content(tmp_path / "calm")
        seed += 1
