"""Runs on a real Slurm: whatever the scheduler does to them, they end with every block trained on once."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from dist_cpt.errors import EXIT_CONFIG, EXIT_NODE
from tests.slurm.case import case, processes

pytestmark = [pytest.mark.slurm, pytest.mark.matrix]
FOUR_NODES = ["--partition=high", "--exclusive", "--output=/dev/null", "--parsable"]


def test_two_nodes_with_two_ranks_each_run_to_the_end(cluster, made, tmp_path):
    one = case(cluster, made, tmp_path, steps=10).launch("--procs-per-node=2", "--time=5")
    assert one.finish()["Restarts"] == "0"
    one.complete()
    (start,) = one.launches("start")
    assert len(start["nodes"]) == 2
    assert one.attempts()[0]["world_size"] == 4


def test_the_signal_before_the_limit_saves_and_requeues(cluster, made, tmp_path):
    one = case(cluster, made, tmp_path, steps=180)
    one.launch(
        "--time=1", "--save-before-limit=20", DIST_CPT_FAULT="step:attempt0:slow"
    )  # 40 s are too few, on any host
    one.finish(timeout_seconds=230)
    one.complete()
    ended = one.launches("end")
    assert [row["action"] for row in ended[:-1]] == ["requeue"] * (len(ended) - 1) != []
    assert ended[0]["code"] == 75
    assert int(cluster.job(one.job)["Restarts"]) == len(ended) - 1


def test_a_preempted_run_saves_makes_room_and_finishes(cluster, made, tmp_path):
    one = case(cluster, made, tmp_path, steps=40).launch("--sbatch=--exclusive")
    one.wait_for_step(3)
    urgent = cluster.run("sbatch", *FOUR_NODES, "--nodes=4", "--wrap=sleep 2").stdout.strip()
    cluster.wait_for(urgent, ("COMPLETED",), 60)
    one.finish()
    one.complete()
    first, _ = one.launches("end")
    assert (first["code"], first["action"], first["preempted"]) == (75, "requeue", True)
    assert one.attempts()[1]["first_step"] == first["checkpoint_step"] > 0


@pytest.mark.parametrize("lost", ["head", "other"])
def test_a_lost_node_requeues_and_its_orphans_are_fenced(cluster, made, tmp_path, lost):
    one = case(cluster, made, tmp_path, steps=40)
    rank = 0 if lost == "head" else 1
    one.launch(DIST_CPT_FAULT=f"step:rank{rank}:step7:attempt0:freeze")  # it cannot even notice
    one.wait_for_step(6)
    (start,) = one.launches("start")
    gone = start["nodes"][rank]
    time.sleep(1)
    frozen = [pid for pid in processes(str(one.recipe)) if _state(pid) == "T"]
    assert len(frozen) == 1
    try:
        cluster.kill_node(gone)
        one.wait_for_log(r"(?s)(starting: srun.*){2}", 150)
        one.wait_for_step(12)
        assert _state(frozen[0]) == "T"
        os.kill(frozen[0], signal.SIGCONT)  # the orphan of attempt 0 wakes up while attempt 1 trains
        one.finish()
    finally:
        for pid in frozen:
            if _state(pid) is not None:
                os.kill(pid, signal.SIGKILL)
        cluster.start_node(gone)
        cluster.wait_until_idle()
    one.complete()
    assert cluster.job(one.job)["Restarts"] == "1"
    assert gone not in one.launches("start")[1]["nodes"]
    assert [row["attempt"] for row in one.attempts()] == [0, 1]
    assert json.loads((one.run / "exit.json").read_text())["code"] == 0


def test_a_chain_continues_after_a_lost_node(cluster, made, tmp_path):
    one = case(cluster, made, tmp_path, steps=40)
    one.launch("--requeue-by=chain", DIST_CPT_FAULT="step:rank1:step7:attempt0:freeze")
    one.wait_for_step(6)
    gone = one.launches("start")[0]["nodes"][1]
    cluster.kill_node(gone)
    try:
        one.finish("NODE_FAIL", 60)
        one.job = str(int(one.job) + 1)
        one.finish()
    finally:
        cluster.start_node(gone)  # which ends the processes left there
        cluster.wait_until_idle()
    one.complete()
    assert len(one.attempts()) == 2


def test_a_killed_rank_is_restarted_and_its_node_left_out_the_second_time(cluster, made, tmp_path):
    one = case(cluster, made, tmp_path, steps=20)
    one.launch(DIST_CPT_FAULT="step:rank1:step7:attempt0:kill,step:rank1:step7:attempt1:kill")
    one.finish()
    one.complete()
    assert [row["action"] for row in one.launches("end")] == ["restart", "requeue", "done"]
    first, second, third = (row["nodes"] for row in one.launches("start"))
    assert first == second
    assert first[1] not in third
    assert len(json.loads((one.run / "bad_nodes.json").read_text())[first[1]]) == 2
    assert cluster.job(one.job)["ExcNodeList"] == first[1]


def test_the_nodes_are_checked_first_and_an_unfit_one_is_left_out(cluster, made, tmp_path):
    other = tmp_path / "other/peft-0.1.dist-info"  # what one node has installed
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1\n")
    differs = cluster.folder / "task-of-n2"
    path = os.pathsep.join([str(other.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    differs.write_text(f"export PYTHONPATH={path}\n")
    try:
        one = case(cluster, made, tmp_path, steps=8).launch(
            "--nodes=4",
            "--preflight",
            DIST_CPT_PREFLIGHT="--slow-factor 1000",  # four nodes of two cores
        )
        one.finish()
    finally:
        differs.unlink()
    one.complete()
    first, second = one.launches("start")
    assert first["nodes"] == ["n1", "n2", "n3", "n4"]
    assert second["nodes"] == ["n1", "n3"]  # of the other three, two divide the batch
    assert [row["action"] for row in one.launches("end")] == ["restart", "done"]
    reasons = json.loads((one.run / "bad_nodes.json").read_text())
    assert list(reasons) == ["n2"]
    assert "peft" in reasons["n2"][0]


def test_nodes_whose_names_resolve_nowhere_meet_at_slurms_address(nameless, made, tmp_path):
    one = case(nameless, made, tmp_path, steps=8)
    one.launch("--preflight", DIST_CPT_PREFLIGHT="--slow-factor 1000")
    assert one.finish()["Restarts"] == "0"
    one.complete()
    assert not (one.run / "bad_nodes.json").exists()
    assert one.launches("start")[0]["nodes"] == ["nowhere-1", "nowhere-2"]
    by_hand = nameless.run(  # without the batch job, which tells its ranks an address
        *("srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", sys.executable, "-m", "dist_cpt.cli"),
        *("train", str(one.recipe), "--set", "name=by-hand"),
        check=False,
    )
    assert by_hand.returncode == 0, by_hand.stderr


@pytest.mark.parametrize("checks", ["--preflight", "--no-preflight"])
def test_names_that_nobody_resolves_blame_no_node_and_end_the_job(nameless, made, tmp_path, checks):
    one = case(nameless, made, tmp_path, steps=8).launch(checks, MASTER_ADDR="nowhere-0")
    ended = one.finish("FAILED")
    assert (ended["Restarts"], ended["ExitCode"]) == ("0", f"{EXIT_NODE if checks == '--preflight' else EXIT_CONFIG}:0")
    (end,) = one.launches("end")
    assert (end["action"], end["first_failure"] is None) == ("give up", checks == "--preflight")
    assert not (one.run / "bad_nodes.json").exists()
    for word in ("nowhere-0", "NodeAddr", "MASTER_ADDR"):
        assert word in one.log()


def test_restarts_without_progress_are_capped(cluster, made, tmp_path):
    one = case(cluster, made, tmp_path, steps=20).launch("--max-restarts=1", DIST_CPT_FAULT="step:rank0:step3:kill")
    ended = one.finish("FAILED")
    assert ended["Restarts"] == "0"
    assert [row["action"] for row in one.launches("end")] == ["restart", "give up"]
    assert one.log().count(" starting: srun ") == 2
    first = one.launches("start")[0]["nodes"][0]
    ended = one.launch().finish()  # by hand, after the cause is fixed; the node now has two strikes
    one.complete()
    assert ended["ExcNodeList"] == first
    assert first not in one.launches("start")[-1]["nodes"]


def test_a_wrong_recipe_is_not_tried_twice(cluster, made, tmp_path):
    one = case(cluster, made, tmp_path, steps=20, model={"path": str(tmp_path / "absent"), "weights": "bf16"})
    assert one.launch().finish("FAILED")["ExitCode"] == "64:0"
    assert [row["action"] for row in one.launches("end")] == ["give up"]


@pytest.mark.parametrize("requeue_by", ["requeue", "chain"])
def test_scancel_means_stop_for_good(cluster, made, tmp_path, requeue_by):
    one = case(cluster, made, tmp_path, steps=60).launch(f"--requeue-by={requeue_by}")
    one.wait_for_step(5)
    cluster.run("scancel", one.job)
    assert one.finish("CANCELLED")["Restarts"] == "0"
    cluster.wait_until_idle()
    time.sleep(8)  # longer than a requeued job would wait
    assert cluster.job(one.job)["JobState"] == "CANCELLED"
    assert cluster.jobs() == []
    step = one.step()
    assert json.loads((one.run / "exit.json").read_text())["code"] == 75  # saved all the same
    one.launch().finish()
    one.complete()
    assert one.attempts()[1]["first_step"] == step


def test_two_recipes_are_an_array(cluster, made, tmp_path):
    runs = [case(cluster, made, tmp_path, steps=8, name=name) for name in ("first", "second")]
    runs[0].launch(str(runs[1].recipe), "--time=5")
    for task, one in enumerate(runs):
        one.job, array = f"{runs[0].job}_{task}" if task else runs[0].job + "_0", runs[0].job.split("_")[0]
        one.finish()
        one.complete(log=tmp_path / f"runs/first-{array}_{task}.log")


def test_a_run_on_four_nodes_resumes_on_two(cluster, made, tmp_path):
    cluster.wait_until_idle()
    one = case(cluster, made, tmp_path, steps=60).launch("--nodes=4", "--min-nodes=2", "--sbatch=--exclusive")
    one.wait_for_step(3)
    urgent = cluster.run("sbatch", *FOUR_NODES, "--nodes=2", "--wrap=sleep 600").stdout.strip()
    try:
        one.finish()
    finally:
        cluster.run("scancel", urgent)
    one.complete()
    assert [row["world_size"] for row in one.attempts()] == [4, 2]


@pytest.mark.parametrize("requeue_by", ["chain", "exit"])
def test_without_scontrol_requeue_the_run_still_resumes(cluster, made, tmp_path, requeue_by):
    one = case(cluster, made, tmp_path, steps=40).launch(f"--requeue-by={requeue_by}")
    one.wait_for_step(5)
    cluster.run("scancel", "--batch", "--signal=USR1", one.job)  # as before the limit
    if requeue_by == "chain":
        assert one.finish("FAILED")["ExitCode"] == "1:0"  # that is what lets the next one start
        one.job = str(int(one.job) + 1)
    one.finish()
    one.complete()
    assert len(one.attempts()) == 2
    cluster.wait_until_idle()
    assert cluster.jobs() == []


def _state(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None
