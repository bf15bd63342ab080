"""Slow reads of a restore or a preparation end nothing; reads that never end are a hang: in whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_cpt.checkpoint.verify import verify_run
from tests import tiny
from tests.run_ranks import SLOW_READS, run_ranks
from tests.whole_run import StopAfter, rows, train

LIMIT_SECONDS = 5.0  # without progress
FOR_EVER = 3600.0
SLOW_SECONDS = 0.7  # one read; those of the long corpus together take longer than the limit


def recipe(base: Path, corpus: Path, folder: Path) -> dict[str, Any]:
    hang = {"other_phase_seconds": LIMIT_SECONDS, "grace_seconds": 1.0}
    return tiny.recipe(base, corpus, folder, health={"hang": hang})


def long_corpus(folder: Path) -> Path:
    """A corpus that takes nine reads of 1 MiB."""
    corpus = tiny.write_corpus(folder)
    text = corpus.read_bytes()
    corpus.write_bytes(text * (6 * 2**20 // len(text)))
    return corpus


def attempt(values: dict[str, Any], *slow: Any) -> int:
    """The exit code of an attempt of one rank, with the reads that SlowReads(*slow) makes slow."""
    folder = Path(values["output_dir"])
    path = tiny.write_recipe(folder / "recipe.yaml", values)
    environment = {SLOW_READS: json.dumps([str(part) if isinstance(part, Path) else part for part in slow])}
    (code,) = run_ranks(path, 1, log=folder / "log", **environment if slow else {})
    return code


def ends_as_a_hang(values: dict[str, Any], phase: str, at: str, *slow: Any) -> None:
    """The attempt ends with 72, names the phase and shows the function that it stalled in."""
    folder = Path(values["output_dir"])
    assert attempt(values, *slow) == 72, (folder / "log").read_text()[-2000:]
    ended = json.loads((folder / "tiny/exit.json").read_text())
    assert (ended["code"], phase in ended["reason"]) == (72, True), ended
    assert at in (folder / "tiny/logs/hang-rank-0.txt").read_text()


def test_a_restore_that_stalls_ends_with_72_and_loses_nothing(made, tmp_path):
    values = recipe(*made, tmp_path)
    assert train(values, StopAfter(6)) == 75
    ends_as_a_hang(values, "restoring", "verify_together", tmp_path / "tiny/checkpoints", ".safetensors", 2, FOR_EVER)
    assert all(problems == [] for problems in verify_run(tmp_path / "tiny").values())
    assert attempt(values) == 0
    assert [row["step"] for row in rows(tmp_path / "tiny/metrics.jsonl")] == list(range(1, 13))


@pytest.mark.matrix
def test_a_restore_that_is_slow_is_no_hang(made, tmp_path):
    values = recipe(*made, tmp_path)
    assert train(values, StopAfter(6)) == 75
    layer = (tmp_path / "tiny/checkpoints", ".safetensors", 0, 0.2)
    assert attempt(values, *layer) == 0, (tmp_path / "log").read_text()[-2000:]
    assert json.loads((tmp_path / "tiny/certificate.json").read_text())["verdict"] == "pass"


@pytest.mark.matrix
def test_a_preparation_that_stalls_ends_with_72_and_is_made_later(made, tmp_path):
    values = recipe(made[0], long_corpus(tmp_path / "text"), tmp_path)
    ends_as_a_hang(values, "preparing", "prepare", tmp_path / "text", "corpus.jsonl", 3, FOR_EVER)
    assert attempt(values) == 0


@pytest.mark.matrix
def test_a_preparation_that_is_slow_is_no_hang(made, tmp_path):
    values = recipe(made[0], long_corpus(tmp_path / "text"), tmp_path)
    layer = (tmp_path / "text", "corpus.jsonl", 0, SLOW_SECONDS)
    assert attempt(values, *layer) == 0, (tmp_path / "log").read_text()[-2000:]
