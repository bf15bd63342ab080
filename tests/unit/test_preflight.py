"""Nodes that must not take part are named before anything heavy is loaded; a dead one too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from dist_cpt_launch.preflight import (
    Place,
    gpu_state,
    main,
    preflight,
    read_gpus,
    read_reports,
    this_place,
)
from dist_cpt_launch.preflight_report import Limits, NodeReport, judge, verdict_text

from dist_cpt.errors import EXIT_CANNOT_WRITE, EXIT_NODE, ConfigError

FAST = Limits(write_mb_per_s=0.001, write_mib=1, timeout_seconds=0.5)


def node(name: str, **changes: Any) -> NodeReport:
    values = {"versions": {"torch": "2.13"}, "matmul_seconds": 0.01, "stage": "done", "finished": True}
    return NodeReport(name, name, **values | changes)


def failing(*reports: NodeReport, num_nodes: int | None = None, names: tuple[str, ...] = ()) -> dict[str, list[str]]:
    verdict = judge({one.node: one for one in reports}, num_nodes or len(reports), Limits(), names)
    found = {name: one["reasons"] for name, one in verdict["nodes"].items() if not one["ok"]}
    assert verdict["ok"] == (not found and not verdict["reasons"])
    return found | ({"": verdict["reasons"]} if verdict["reasons"] else {})


def test_four_fit_nodes():
    assert failing(*(node(f"n{i}", pairs={"0": 10.0}) for i in range(4))) == {}


def test_the_odd_version_is_the_one_at_fault():
    odd = node("n3", versions={"torch": "2.12"})
    assert failing(node("n1"), node("n2"), odd) == {"n3": ["torch 2.12, the others have 2.13"]}
    assert failing(node("n1"), odd) == {"": ["torch differs: n1 2.13, n3 2.12"]}  # of two nobody can say who is wrong


def test_a_slow_node_is_named():
    slow = node("n2", matmul_seconds=0.05)
    assert list(failing(node("n1"), slow, node("n3"))) == ["n2"]
    # Nodes 1 and 2 share a bad pair; node 1 is fast with its other neighbour, so node 2 is the slow one.
    pairs = [{"1": 10.0}, {"0": 10.0, "2": 1.0}, {"1": 1.0, "3": 1.0}, {"2": 1.0, "4": 10.0}, {"3": 10.0}]
    found = failing(*(node(f"n{i}", pairs=one) for i, one in enumerate(pairs)))
    assert found == {"n2": ["slow network: 1 GB/s with its best neighbour, the median node has 10"]}
    assert failing(node("n0", pairs={"1": 1.0}), node("n1", pairs={"0": 1.0})) == {}  # of two, neither is the slow one


def test_a_silent_node_is_named_where_the_names_are_known():
    assert failing(node("n1"), num_nodes=2, names=("n1", "n2")) == {"n2": ["did not report within 120 s"]}
    assert failing(node("n1"), num_nodes=2) == {"": ["1 of 2 nodes did not report"]}


def test_a_node_that_vanishes_in_the_middle_is_named():
    gone = node("n2", stage="", finished=False)  # its processes for the link check may have lived on
    assert failing(node("n1"), gone) == {"n2": ["did not come to the end of the checks"]}


def test_who_is_cut_off():
    lost = {"stage": "started", "cut_off": "n0:2000 cannot be reached (no answer)"}
    first, fine = node("n0", stage="started"), node("n1", stage="started", index=1)
    assert failing(first, fine, node("n2", index=2, **lost)) == {"n2": ["n0:2000 cannot be reached (no answer)"]}
    both = [node("n1", index=1, **lost), node("n2", index=2, **lost)]
    assert failing(first, *both) == {"n0": ["no other node reaches it: n0:2000 cannot be reached (no answer)"]}


def test_an_all_reduce_that_never_ends_is_nobodys_in_particular():
    found = failing(node("n1", stage="computed"), node("n2", stage="met"))
    assert found == {"": ["the all-reduce did not end within 120 s (last stage of n1: computed, n2: met)"]}


TABLE = """0, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 4, 0
1, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 40000, 0
2, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 4, 3
3, NVIDIA GeForce RTX 4090, 570.86.15, 24564, 1, [N/A]
4, [Unknown Error], [Unknown Error], [Unknown Error], [Unknown Error], [Unknown Error]
"""


def test_gpus_that_are_busy_or_broken():
    gpus, problems = read_gpus(TABLE, None)
    assert len(gpus) == 5
    assert [problem.split(":")[0].split(" is")[0] for problem in problems] == ["GPU 1", "GPU 2", "GPU 4"]
    assert problems[:2] == [
        "GPU 1: 40000 of 81559 MiB are in use by another process",
        "GPU 2: 3 uncorrected ECC errors",
    ]
    assert read_gpus(TABLE, "0,3") == ([gpus[0], gpus[3]], [])


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the driver'; exit 9", "nvidia-smi fails"),
        ("echo '0, H100, 570, 80000, 4, 0'", None),
    ],
)
def test_the_tool_itself(tmp_path, monkeypatch, script, said):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus, problems = gpu_state()
    assert [problem.split(":")[0] for problem in problems] == ([said] if said else [])
    assert len(gpus) == (0 if said else 1)


def test_one_node_alone(tmp_path, capsys):
    arguments = ["--run-folder", str(tmp_path), "--node", "n1", "--write-mib", "1", "--write-mb-per-s", "0.001"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "preflight: 1 nodes are fit\n"
    verdict = json.loads((tmp_path / "preflight/alone.json").read_text())
    assert (verdict["ok"], verdict["nodes"]) == (True, {"n1": {"ok": True, "reasons": []}})
    report = verdict["reports"]["n1"]
    assert report["write_mb_per_s"] > 0
    assert abs(report["skew_seconds"]) < 5
    assert report["versions"]["torch"].startswith("2.")
    assert not list(tmp_path.rglob(".write-*"))


def test_a_slow_disk_and_missing_gpus(tmp_path, capsys):
    arguments = ["--run-folder", str(tmp_path), "--write-mib", "1", "--gpus", "8", "--node", "n1"]
    assert main([*arguments, "--write-mb-per-s", "1e9"]) == EXIT_NODE
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("preflight: node n1: writes ")
    assert said[1] == "preflight: node n1: 0 GPUs visible, 8 expected"
    assert said[2].startswith("dist-cpt: n1: the nodes of this job are not all fit")


def test_a_clock_that_is_off(tmp_path, monkeypatch):
    now = time.time
    monkeypatch.setattr("dist_cpt_launch.preflight.time.time", lambda: now() + 60)
    verdict = preflight(tmp_path, "a", Place("n1", 0, 1, "localhost"), limits=FAST, collective=False)
    assert verdict["nodes"]["n1"]["reasons"][0].startswith("its clock is +60.0 s off")


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "run").write_text("a file")
    assert main(["--run-folder", str(tmp_path / "run"), "--node", "n1"]) == EXIT_CANNOT_WRITE
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_others_do_not_wait_for_a_dead_node_and_a_late_one_hears_of_it(tmp_path):
    names = ("n1", "n2")
    verdict = preflight(tmp_path, "7", Place("n1", 0, 2, "localhost", names), limits=FAST)
    assert verdict["nodes"]["n2"] == {"ok": False, "reasons": ["did not report within 0.5 s"]}
    late = preflight(tmp_path, "7", Place("n2", 1, 2, "localhost", names), limits=FAST)
    assert late == verdict


def test_two_nodes_measure_what_is_between_them(tmp_path):
    command = [sys.executable, "-m", "dist_cpt_launch.preflight", "--run-folder", str(tmp_path), "--id=7", "--nodes=2"]
    command += ["--master=127.0.0.1", "--write-mib=1", "--write-mb-per-s=0.001", "--slow-factor=1000"]
    nodes = [
        subprocess.Popen(
            [*command, f"--node=n{index}", f"--node-index={index}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for index in range(2)
    ]
    said = [one.communicate(timeout=120)[0].decode() for one in nodes]
    assert [one.returncode for one in nodes] == [0, 0], said
    assert said[0].startswith("preflight: 2 nodes are fit, all-reduce ")
    reports = read_reports(tmp_path / "preflight/7")
    assert all(report.stage == "done" and report.matmul_seconds for report in reports.values())
    assert reports["n0"].pairs.keys() == {"1"}
    assert reports["n1"].all_reduce_gb_per_s is not None


def test_where_this_node_is():
    slurm = {"SLURMD_NODENAME": "n3", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "n[2-3]"}
    assert this_place(slurm) == Place("n3", 1, 2, "n2", ("n2", "n3"))
    assert this_place(slurm | {"MASTER_ADDR": "10.0.0.2"}).master == "10.0.0.2"
    assert this_place({}, node="a").num_nodes == 1
    with pytest.raises(ConfigError, match="which one this is"):
        this_place({}, nodes=2)
    with pytest.raises(ConfigError, match="where they meet"):
        this_place({}, nodes=2, index=1)
    with pytest.raises(ConfigError, match="letters"):
        this_place({}, node="../../etc")


def test_the_text_names_nodes(tmp_path: Path):
    verdict = judge({"n1": node("n1", problems=["broken"])}, 1, Limits())
    assert verdict_text(verdict) == "preflight: node n1: broken"
