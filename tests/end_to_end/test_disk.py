"""A disk that is too small, fills up, or refuses for a while."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_cpt.checkpoint.verify import verify_run
from tests import tiny
from tests.whole_run import rows, train


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`disk(size)` mounts a tmpfs of that size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: str) -> Path:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False).returncode:
            pytest.skip("mounting a tmpfs needs root; injected errors of the same kind are tested without it")
        return folder

    yield mount
    subprocess.run(["umount", "--lazy", str(folder)], check=False)  # a thread of a test that failed may write


def recipe(made: tuple[Path, Path], disk: Path, cache: Path, **checkpoint: object) -> dict:
    values = tiny.recipe(*made, disk, checkpoint={"every_steps": 4, **checkpoint})
    values["data"] = values["data"] | {"cache_dir": str(cache)}
    return values


def test_a_disk_that_is_too_small_is_refused_before_the_first_step(made, disk, tmp_path, capfd):
    folder = disk("1600k")
    assert train(recipe(made, folder, tmp_path / "cache")) == 73
    assert "4 more checkpoints" in capfd.readouterr().err
    assert not (folder / "tiny/metrics.jsonl").exists()
    assert list((folder / "tiny/checkpoints").iterdir()) == []
    assert json.loads((folder / "tiny/exit.json").read_text())["code"] == 73


def refusals(log: Path) -> int:
    """The saves that were refused, a tensor or the rows before it, and are tried again later."""
    return sum("training continues, next try in" in line for line in log.read_text().splitlines())


def fill_at(run: Path, step: int, until: Callable[[], bool]) -> threading.Thread:
    """Fill the disk of a run once it has done `step`, and free it again when `until()` is true."""
    ballast = run.parent / "ballast"

    def work() -> None:
        while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_text().count("\n") < step:
            time.sleep(0.002)
        subprocess.run(["dd", "if=/dev/zero", f"of={ballast}", "bs=4k"], stderr=subprocess.DEVNULL, check=False)
        while not until():
            time.sleep(0.01)
        ballast.unlink()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("asynchronous", [False, True], ids=["now", "beside"])
def test_a_disk_that_fills_up_ends_with_73_and_keeps_the_last_checkpoint(made, disk, tmp_path, asynchronous):
    run = disk("8m") / "tiny"
    values = recipe(made, run.parent, tmp_path / "cache", retry_minutes=0, asynchronous=asynchronous)
    values["train"] = {"tokens": 4000 * 8 * tiny.SEQ_LEN}
    ended = threading.Event()
    filler = fill_at(run, 6, ended.is_set)
    assert train(values) == 73
    ended.set()
    filler.join()
    problems = verify_run(run)
    assert problems
    assert not any(problems.values())
    assert not list((run / "checkpoints").glob("*.tmp"))


@pytest.mark.matrix
@pytest.mark.parametrize("asynchronous", [False, True], ids=["now", "beside"])
def test_a_disk_that_is_freed_again_costs_no_step(made, disk, tmp_path, asynchronous, monkeypatch):
    monkeypatch.setattr("dist_cpt.train.saver.FIRST_RETRY_SECONDS", 0.05)
    run = disk("8m") / "tiny"
    values = recipe(made, run.parent, tmp_path / "cache", asynchronous=asynchronous)
    values["train"] = {"tokens": 120 * 8 * tiny.SEQ_LEN}
    log = run / "logs/rank-0.log"
    filler = fill_at(run, 6, lambda: refusals(log) >= 2)
    assert train(values) == 0
    filler.join()
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == list(range(1, 121))
    assert not any(verify_run(run).values())


@pytest.mark.parametrize("error", ["enospc", "edquot", "eio", "erofs"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["now", "beside"])
def test_a_refusal_of_any_kind_is_tried_again(made, tmp_path, monkeypatch, error, asynchronous):
    """Two refusals at step 4, then it succeeds; the first error surfaces within a step."""
    monkeypatch.setattr("dist_cpt.train.saver.FIRST_RETRY_SECONDS", 0.0)
    monkeypatch.setenv("DIST_CPT_FAULT", f"save.tensor:{error},save.tensor:{error}")
    assert train(recipe(made, tmp_path, tmp_path / "cache", asynchronous=asynchronous)) == 0
    run = tmp_path / "tiny"
    assert refusals(run / "logs/rank-0.log") == 2
    assert not any(verify_run(run).values())
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == list(range(1, 13))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["now", "beside"])
def test_a_disk_that_never_takes_the_last_checkpoint_ends_with_73(made, tmp_path, monkeypatch, asynchronous):
    monkeypatch.setattr("dist_cpt.train.saver.FINAL_RETRY_SECONDS", 0.0)
    monkeypatch.setenv("DIST_CPT_FAULT", ",".join(["save.written:step12:eio"] * 9))
    assert train(recipe(made, tmp_path, tmp_path / "cache", asynchronous=asynchronous)) == 73
    run = tmp_path / "tiny"
    assert sorted(verify_run(run)) == ["step-00000004", "step-00000008"]
    assert json.loads((run / "exit.json").read_text())["code"] == 73
