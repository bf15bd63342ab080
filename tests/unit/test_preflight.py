"""Nodes that must not take part are named before anything heavy is loaded; a dead one too."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from dist_cpt_launch.node_checks import gpu_state, read_gpus
from dist_cpt_launch.preflight import Place, main, preflight, read_node_reports, this_place
from dist_cpt_launch.preflight_report import Limits, NodeReport, combine, report_text

from dist_cpt.errors import EXIT_CANNOT_WRITE, EXIT_CONFIG, EXIT_NODE, ConfigError
from dist_cpt.run_folder.json_files import write_object

FAST = Limits(write_mb_per_s=0.001, write_mib=1, timeout_seconds=0.5)


def node(name: str, **changes: Any) -> NodeReport:
    values = {"versions": {"torch": "2.13"}, "matmul_seconds": 0.01, "stage": "done", "finished": True}
    return NodeReport(name, name, **values | changes)


def failing(*reports: NodeReport, num_nodes: int | None = None, names: tuple[str, ...] = ()) -> dict[str, list[str]]:
    combined = combine({one.node: one for one in reports}, num_nodes or len(reports), Limits(), names)
    reasons = {name: one["reasons"] for name, one in combined["nodes"].items() if not one["ok"]}
    assert combined["ok"] == (not reasons and not combined["reasons"])
    return reasons | ({"": combined["reasons"]} if combined["reasons"] else {})


def only(failures: dict[str, list[str]], name: str) -> str:
    """The one reason of the one node (or of none, "") that failed."""
    assert list(failures) == [name]
    (reason,) = failures[name]
    return reason


def test_four_fit_nodes():
    assert failing(*(node(f"n{i}", pairs={"0": 10.0}) for i in range(4))) == {}


def test_the_odd_version_is_the_one_at_fault():
    odd = node("n3", versions={"torch": "2.12"})
    assert only(failing(node("n1"), node("n2"), odd), "n3").startswith("torch 2.12")
    assert only(failing(node("n1"), odd), "").startswith("torch ")  # of two, either could be wrong


def test_a_slow_node_is_named():
    slow = node("n2", matmul_seconds=0.05)
    assert list(failing(node("n1"), slow, node("n3"))) == ["n2"]
    # Nodes 1 and 2 share a bad pair; node 1 is fast with its other neighbour, so node 2 is the slow one.
    pairs = [{"1": 10.0}, {"0": 10.0, "2": 1.0}, {"1": 1.0, "3": 1.0}, {"2": 1.0, "4": 10.0}, {"3": 10.0}]
    reason = only(failing(*(node(f"n{i}", pairs=one) for i, one in enumerate(pairs))), "n2")
    assert re.search(r"network: 1 GB/s.* 10$", reason)
    assert failing(node("n0", pairs={"1": 1.0}), node("n1", pairs={"0": 1.0})) == {}  # of two, neither is the slow one


def test_a_silent_node_is_named_where_the_names_are_known():
    assert "120 s" in only(failing(node("n1"), num_nodes=2, names=("n1", "n2")), "n2")
    assert "1 of 2 nodes" in only(failing(node("n1"), num_nodes=2), "")


def test_a_node_that_vanishes_in_the_middle_is_named():
    gone = node("n2", stage="", finished=False)  # the processes of its link check may still run
    assert only(failing(node("n1"), gone), "n2")


def test_who_is_cut_off():
    lost = {"stage": "started", "cut_off": "n0:2000 is unreachable (no answer)"}
    first, fine = node("n0", stage="started"), node("n1", stage="started", index=1)
    assert only(failing(first, fine, node("n2", index=2, **lost)), "n2") == lost["cut_off"]
    both = [node("n1", index=1, **lost), node("n2", index=2, **lost)]
    assert lost["cut_off"] in only(failing(first, *both), "n0")


def test_a_first_node_that_nobody_resolves_is_no_nodes_fault(tmp_path):
    lost = {"unresolved": "cannot resolve n0", "stage": ""}
    first, fine = node("n0", stage=""), node("n1", index=1, stage="")
    both = [node("n1", index=1, **lost), node("n2", index=2, **lost)]
    assert only(failing(first, *both), "") == only(failing(first, both[0]), "") == lost["unresolved"]
    assert only(failing(node("n0", **lost), *both), "") == lost["unresolved"]
    assert only(failing(first, fine, both[1]), "n2") == lost["unresolved"]  # its own resolver


def test_nodes_that_cannot_resolve_the_first_one_do_not_wait_for_it(tmp_path):
    limits = Limits(write_mb_per_s=0.001, write_mib=1, timeout_seconds=60.0)
    other = tmp_path / "preflight/7/n2.json"
    other.parent.mkdir(parents=True)
    write_object(other, asdict(node("n2", index=1, stage="", unresolved="n1.invalid?")))
    report = preflight(tmp_path, "7", Place("n1", 0, 2, "n1.invalid"), limits=limits)
    assert (report["ok"], [entry["ok"] for entry in report["nodes"].values()]) == (False, [True, True])
    assert [reason for reason in report["reasons"] if "NodeAddr" in reason]
    assert not [reason for reason in report["reasons"] if "all-reduce" in reason]  # never tried


def test_an_all_reduce_that_never_ends_is_nobodys_in_particular():
    reason = only(failing(node("n1", stage="computed"), node("n2", stage="met")), "")
    assert re.search(r"all-reduce .*120 s .*n1: computed, n2: met", reason)


TABLE = """0, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 4, 0
1, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 40000, 0
2, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 4, 3
3, NVIDIA GeForce RTX 4090, 570.86.15, 24564, 1, [N/A]
4, [Unknown Error], [Unknown Error], [Unknown Error], [Unknown Error], [Unknown Error]
"""


def test_gpus_that_are_busy_or_broken():
    gpus, problems = read_gpus(TABLE, None)
    assert len(gpus) == 5
    assert [problem[:5] for problem in problems] == ["GPU 1", "GPU 2", "GPU 4"]
    assert "40000 of 81559 MiB" in problems[0]
    assert "3 uncorrected ECC errors" in problems[1]
    assert read_gpus(TABLE, "0,3") == ([gpus[0], gpus[3]], [])


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the driver'; exit 9", "nvidia-smi"),
        ("echo '0, H100, 570, 80000, 4, 0'", None),
    ],
)
def test_the_tool_itself(tmp_path, monkeypatch, script, problem):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus, problems = gpu_state()
    assert [found.split()[0] for found in problems] == ([problem] if problem else [])
    assert len(gpus) == (0 if problem else 1)


def test_one_node_alone(tmp_path, capsys):
    arguments = ["--run-folder", str(tmp_path), "--node", "n1", "--write-mib", "1", "--write-mb-per-s", "0.001"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("preflight: 1 nodes")
    written = json.loads((tmp_path / "preflight/alone.json").read_text())
    assert (written["ok"], written["nodes"]) == (True, {"n1": {"ok": True, "reasons": []}})
    report = written["reports"]["n1"]
    assert report["write_mb_per_s"] > 0
    assert abs(report["skew_seconds"]) < 5
    assert report["versions"]["torch"].startswith("2.")
    assert not list(tmp_path.rglob(".write-*"))


def test_a_slow_disk_and_missing_gpus(tmp_path, capsys):
    arguments = ["--run-folder", str(tmp_path), "--write-mib", "1", "--gpus", "8", "--node", "n1"]
    assert main([*arguments, "--write-mb-per-s", "1e9"]) == EXIT_NODE
    disk, gpus, error = capsys.readouterr().err.splitlines()
    assert re.match(r"preflight: node n1: .* MB/s", disk)
    assert re.match(r"preflight: node n1: 0 GPUs .*8", gpus)
    assert re.match(r"dist-cpt: n1: .*preflight/alone\.json", error)


def test_a_wrong_option_is_one_line(tmp_path, capsys):
    assert main(["--run-folder", str(tmp_path), "--bogus"]) == EXIT_CONFIG
    (line,) = capsys.readouterr().err.splitlines()
    assert "--bogus" in line


def test_a_clock_that_is_off(tmp_path, monkeypatch):
    now = time.time
    monkeypatch.setattr("dist_cpt_launch.node_checks.time.time", lambda: now() + 60)
    report = preflight(tmp_path, "a", Place("n1", 0, 1, "localhost"), limits=FAST, collective=False)
    (reason,) = report["nodes"]["n1"]["reasons"]
    assert "clock" in reason
    assert "+60.0 s" in reason


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "run").write_text("a file")
    assert main(["--run-folder", str(tmp_path / "run"), "--node", "n1"]) == EXIT_CANNOT_WRITE
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_others_do_not_wait_for_a_dead_node_and_a_late_one_hears_of_it(tmp_path):
    names = ("n1", "n2")
    report = preflight(tmp_path, "7", Place("n1", 0, 2, "localhost", names), limits=FAST)
    assert not report["nodes"]["n2"]["ok"]
    assert "0.5 s" in report["nodes"]["n2"]["reasons"][0]
    late = preflight(tmp_path, "7", Place("n2", 1, 2, "localhost", names), limits=FAST)
    assert late == report


def test_two_nodes_measure_what_is_between_them(tmp_path):
    command = [sys.executable, "-m", "dist_cpt_launch.preflight", "--run-folder", str(tmp_path), "--id=7", "--nodes=2"]
    command += ["--master=127.0.0.1", "--write-mib=1", "--write-mb-per-s=0.001", "--slow-factor=1000"]
    nodes = [
        subprocess.Popen(
            [*command, f"--node=n{index}", f"--node-index={index}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for index in range(2)
    ]
    output = [one.communicate(timeout=120)[0].decode() for one in nodes]
    assert [one.returncode for one in nodes] == [0, 0], output
    assert re.match(r"preflight: 2 nodes .* GB/s", output[0])
    reports = read_node_reports(tmp_path / "preflight/7")
    assert all(report.stage == "done" and report.matmul_seconds for report in reports.values())
    assert reports["n0"].pairs.keys() == {"1"}
    assert reports["n1"].all_reduce_gb_per_s is not None


def test_where_this_node_is():
    slurm = {"SLURMD_NODENAME": "n3", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "n[2-3]"}
    assert this_place(slurm) == Place("n3", 1, 2, "n2", ("n2", "n3"))
    assert this_place(slurm | {"MASTER_ADDR": "10.0.0.2"}).master == "10.0.0.2"
    assert this_place({}, node="a").num_nodes == 1
    with pytest.raises(ConfigError, match="--node-index"):
        this_place({}, num_nodes=2)
    with pytest.raises(ConfigError, match="--master"):
        this_place({}, num_nodes=2, index=1)
    with pytest.raises(ConfigError, match=r"\.\./\.\./etc"):
        this_place({}, node="../../etc")


def test_the_text_names_nodes(tmp_path: Path):
    report = combine({"n1": node("n1", problems=["broken"])}, 1, Limits())
    assert report_text(report) == "preflight: node n1: broken"
