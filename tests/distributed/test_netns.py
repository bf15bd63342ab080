"""Two hosts meet by name; a cut cable ends both sides with a named cause, and the run goes on later."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_cpt.health.heartbeats import read_heartbeats
from dist_cpt.run_folder.audit import record_problems
from tests import tiny
from tests.distributed.netns import Cable, RanksOnTwoHosts, lay_cable, unplug, why_not
from tests.whole_run import rows


@pytest.fixture
def cable(tmp_path, capsys) -> Iterator[Cable]:
    missing = why_not()
    if missing is not None:
        with capsys.disabled():
            print(f"\nNOT RUN: two hosts and a cut cable, {missing}")
        pytest.skip(missing)
    laid = lay_cable(tmp_path)
    yield laid
    unplug(laid)


@pytest.fixture
def made(tmp_path) -> tuple[Path, Path]:
    corpus = tiny.write_corpus(tmp_path / "corpus")
    tokenizer = tiny.write_tokenizer(tmp_path / "tokenizer", corpus)
    return tiny.write_base(tmp_path / "base", tokenizer), corpus


def test_a_cut_cable_ends_both_hosts_with_72_and_the_run_resumes_later(made, cable, tmp_path):
    hang = {"factor": 2.0, "min_seconds": 1.5, "grace_seconds": 1.0, "other_phase_seconds": 60.0}
    values = tiny.recipe(
        *made, tmp_path, engine={"kind": "fsdp", "shard": "full"}, health={"hang": hang}, checkpoint={"every_steps": 3}
    )
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", values)
    run, log = tmp_path / "tiny", tmp_path / "log"
    with RanksOnTwoHosts(cable, recipe, log=log, DIST_CPT_FAULT="step:slow") as running:
        _wait_for_step(running, run, 5, log)
        cable.cut()
        cut = time.monotonic()
        codes = running.finish(timeout_seconds=30.0, grace_seconds=15.0)
    assert codes == [72, 72], log.read_text()[-3000:]
    assert time.monotonic() - cut < 1.5 + 1.0 + 6.0  # limit, grace, and the ends of two processes
    ended = json.loads((run / "exit.json").read_text())
    assert ended["code"] == 72
    assert "the network is cut: rank 1 (host node-b" in ended["reason"]
    assert "cannot reach node-a:29555 (Network is unreachable)" in ended["reason"]
    assert b"gloo:all_reduce" in (run / "logs/flight-rank-0.json").read_bytes()  # what rank 0 did last
    cable.mend()
    with RanksOnTwoHosts(cable, recipe, log=log) as running:
        assert running.finish() == [0, 0], log.read_text()[-3000:]
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == list(range(1, 13))
    assert {beat.host for beat in read_heartbeats(run)} == {"node-a", "node-b"}
    assert record_problems(run) == []


@pytest.mark.matrix
@pytest.mark.parametrize("names", ["", "127.0.1.1 node-a node-b\n"], ids=["no names", "names of loopback"])
def test_two_hosts_whose_names_lead_nowhere_meet_at_an_address(made, cable, tmp_path, names):
    cable.hosts.write_text(f"127.0.0.1 localhost\n{names}")
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", tiny.recipe(*made, tmp_path, engine={"kind": "fsdp"}))
    log = tmp_path / "log"
    with RanksOnTwoHosts(cable, recipe, log=log, MASTER_ADDR="10.177.0.1") as running:
        assert running.finish(timeout_seconds=120.0) == [0, 0], log.read_text()[-3000:]
    assert {beat.host for beat in read_heartbeats(tmp_path / "tiny")} == {"node-a", "node-b"}


@pytest.mark.matrix
def test_the_preflight_names_the_node_that_is_cut_off(cable, tmp_path):
    cable.cut()
    command = [sys.executable, "-m", "dist_cpt_launch.preflight", "--run-folder", str(tmp_path / "run"), "--id=7"]
    command += ["--nodes=2", "--master=10.177.0.1", "--write-mib=1", "--write-mb-per-s=0.001", "--timeout=12"]
    nodes = [
        subprocess.Popen(
            ["ip", "netns", "exec", namespace, *command, f"--node=node-{'ab'[index]}", f"--node-index={index}"],
            stderr=subprocess.PIPE,
        )
        for index, namespace in enumerate(cable.namespaces)
    ]
    errors = [node.communicate(timeout=90)[1].decode() for node in nodes]
    assert [node.returncode for node in nodes] == [69, 69], errors
    report = json.loads((tmp_path / "run/preflight/7.json").read_text())
    assert report["nodes"]["node-a"] == {"ok": True, "reasons": []}
    (reason,) = report["nodes"]["node-b"]["reasons"]
    assert "10.177.0.1" in reason


def _wait_for_step(running: RanksOnTwoHosts, run: Path, step: int, log: Path) -> None:
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline and any(process.is_alive() for process in running.processes):
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_bytes().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step}: {log.read_text()[-3000:]}")
