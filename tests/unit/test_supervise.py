"""The decisions of a batch job, without Slurm: when it restarts, requeues, gives up, and when it is told to stop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from dist_cpt_launch.attempts import LAUNCHES, Decision, Ending, Record, decide
from dist_cpt_launch.lead import DEFAULT_LEAD_SECONDS, MARGIN_SECONDS, lead_seconds, newest_step
from dist_cpt_launch.nodes import expand_hosts, usable_nodes
from dist_cpt_launch.supervise import _TASK_ENDED, Job, main, pick, slurm_seconds, unfit_nodes

from dist_cpt.config.load import build
from dist_cpt.errors import ConfigError
from tests import tiny

CRASHED = Ending(
    code=70, limit=False, terminated=False, state="RUNNING", seconds_left=9000.0, tries=1, resumable=True
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "action"),
    [
        ({"code": 0}, "done"),
        ({"code": 0, "state": "COMPLETING"}, "done"),
        ({}, "restart"),
        ({"code": 72}, "restart"),
        ({"code": 137}, "restart"),
        ({"tries": 3}, "restart"),
        ({"tries": 4}, "give up"),
        ({"newly_bad": True}, "requeue"),
        ({"newly_bad": True, "tries": 4}, "give up"),
        ({"seconds_left": 500.0}, "requeue"),  # less than the lead is left to train
        ({"seconds_left": None}, "restart"),
        ({"code": 71}, "give up"),
        ({"code": 65}, "give up"),
        ({"code": 69}, "give up"),  # all nodes unfit: it is not the nodes
        ({"code": 64, "resumable": False}, "give up"),
        ({"code": 64}, "restart"),  # the ranks could not meet: the recipe itself has worked before
        ({"code": 75, "limit": True, "seconds_left": 290.0}, "requeue"),
        ({"code": 75, "limit": True, "seconds_left": 290.0, "tries": 4}, "give up"),  # never a newer checkpoint
        ({"code": 137, "limit": True, "seconds_left": 10.0}, "requeue"),  # out of time while it saved
        ({"code": 75, "tries": 9}, "requeue"),  # preempted: no failure of its own
        ({"code": 75, "limit": True, "tries": 9}, "requeue"),  # preempted by SIGUSR1, far from the limit
        ({"code": 75, "state": "COMPLETING", "terminated": True}, "leave"),  # cancelled
        ({"code": 137, "state": "OVERTAKEN"}, "leave"),
        ({"code": 75, "state": None, "terminated": True}, "leave"),
        ({"code": 75, "state": None, "limit": True, "seconds_left": 290.0}, "requeue"),
    ],
)
def test_what_happens_after_an_ending(changes, action):
    decision = decide(replace(CRASHED, **changes), max_restarts=3, lead_seconds=300)
    assert decision.action == action
    assert decision.reason


def test_tries_count_starts_of_this_job_from_the_same_checkpoint(tmp_path):
    record, other = Record(tmp_path, "7"), Record(tmp_path, "8")
    assert record.tries(-1) == 0
    record.started(-1)
    record.ended(-1, Decision("restart", "x"), preempted=False)
    record.started(-1)  # its end was lost with the node
    assert record.tries(-1) == 2
    assert other.tries(-1) == 0
    record.started(-1)
    record.ended(-1, Decision("requeue", "x"), preempted=True)
    assert record.tries(-1) == 2
    record.started(-1)
    record.ended(40, Decision("requeue", "x"), preempted=False)
    assert record.tries(40) == 0
    record.started(40)
    assert record.tries(40) == 1


def test_a_node_is_bad_at_its_second_strike_and_can_be_forgiven(tmp_path):
    record = Record(tmp_path, "7")
    assert not record.strike("n2", "task 1: Killed")
    assert record.bad_nodes() == set()
    assert record.strike("n2", "task 3: Killed")
    assert not record.strike("n2", "task 3: Killed")  # known already
    assert record.strike("n4", "preflight: slow", count=2)
    assert Record(tmp_path, "8").bad_nodes() == {"n2", "n4"}
    (tmp_path / "bad_nodes.json").unlink()
    assert record.bad_nodes() == set()


def test_a_damaged_record_does_not_stop_a_job(tmp_path):
    (tmp_path / LAUNCHES).write_bytes(b'{"kind": "start", "job": "7", "checkpoint_step": -1}\n\xff\x00{')
    (tmp_path / "bad_nodes.json").write_text("[1")
    assert Record(tmp_path, "7").tries(-1) == 1
    assert Record(tmp_path, "7").bad_nodes() == set()


def test_the_lead_is_a_step_an_evaluation_and_two_saves(tmp_path):
    assert lead_seconds(tmp_path) == DEFAULT_LEAD_SECONDS
    steps = [{"step": i, "step_seconds": 3.0 + (i == 5), "tokens_per_second": 1000.0} for i in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    assert lead_seconds(tmp_path) == DEFAULT_LEAD_SECONDS
    events = [{"kind": "start"}, {"kind": "checkpoint", "seconds": 50.0}, {"kind": "checkpoint", "seconds": 60.5}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
    assert lead_seconds(tmp_path) == MARGIN_SECONDS + 4 + 121
    (tmp_path / "evaluations.jsonl").write_text('{"name": "a", "num_tokens": 20000}\n' * 2)
    assert lead_seconds(tmp_path) == MARGIN_SECONDS + 4 + 121 + 20


def test_only_published_checkpoints_are_progress(tmp_path):
    assert newest_step(tmp_path) == -1
    for name in ("step-00000004", "step-00000012", "step-00000016.attempt-0-x.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").touch()
    (tmp_path / "checkpoints/step-00000020").mkdir()
    assert newest_step(tmp_path) == 12


def test_slurms_notations():
    assert expand_hosts("gpu[003-005,9],login1") == ["gpu003", "gpu004", "gpu005", "gpu9", "login1"]
    assert expand_hosts("r[1-2]n[08-09]") == ["r1n08", "r1n09", "r2n08", "r2n09"]
    for wrong in ("", "a;b", "n[1-", "$(id)"):
        with pytest.raises(ConfigError):
            expand_hosts(wrong)
    assert slurm_seconds("1-02:03:04") == 93784
    assert slurm_seconds("4:54") == 294
    assert slurm_seconds("UNLIMITED") is None
    assert _TASK_ENDED.match("srun: error: n2: tasks 2-3: Exited with exit code 75\n").groups()[0] == "n2"
    assert _TASK_ENDED.match("srun: error: n2: task 3: Killed").groups()[1:] == ("3", "Killed")


def test_as_many_nodes_are_used_as_divide_the_batch(tmp_path):
    config = build(tiny.recipe(tmp_path / "b", tmp_path / "c", tmp_path / "r", engine="fsdp"), "x")  # 8 blocks, 2 each
    assert [usable_nodes(config, nodes, 1) for nodes in (1, 2, 3, 4, 7)] == [1, 2, 2, 4, 4]
    with pytest.raises(ConfigError, match="does not divide by 3 ranks"):
        usable_nodes(config, 2, 3)


def test_a_job_knows_itself_and_its_recipe():
    environ = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_RESTART_COUNT": "3"}
    job = Job.from_environment(environ)
    assert (job.id, job.task, job.nodes, job.restarts) == ("12", None, ["n1", "n2"], 3)
    task = Job.from_environment(environ | {"SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "1"})
    assert (task.id, task.number, task.task) == ("10_1", "12", 1)
    assert pick(["a"], None) == "a"
    assert pick(["a", "b"], 1) == "b"
    for recipes, number in ((["a", "b"], None), (["a"], 1)):
        with pytest.raises(ConfigError):
            pick(recipes, number)


def test_outside_a_job_the_supervisor_says_how_to_start_it(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert main([str(Path(tmp_path) / "r.yaml")]) == 64
    assert "sbatch" in capsys.readouterr().err


def test_the_next_job_of_a_chain_takes_the_folder_over_and_a_stranger_does_not(tmp_path, monkeypatch):
    from dist_cpt.config.resolve import resolve_paths
    from dist_cpt.train.folder import claim

    config = resolve_paths(build(tiny.recipe(tmp_path / "b", tmp_path / "c", tmp_path / "r"), "x"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    orphan = claim(tmp_path / "run", config, "id")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    with pytest.raises(ConfigError, match="another process trains"):
        claim(tmp_path / "run", config, "id")
    monkeypatch.setenv("DIST_CPT_PREDECESSOR", "7")
    successor = claim(tmp_path / "run", config, "id")
    assert successor.held()
    assert not orphan.held()
    orphan.close()
    successor.close()


def test_what_is_wrong_with_all_nodes_together_is_no_single_one_s_fault():
    fit, unfit = {"ok": True, "reasons": []}, {"ok": False, "reasons": ["disk full", "clock off"]}
    verdict = {"ok": False, "reasons": [], "nodes": {"n1": fit, "n2": unfit, "n9": unfit}}
    assert unfit_nodes(verdict, ["n1", "n2"]) == {"n2": "disk full; clock off"}
    verdict = {"ok": False, "reasons": ["the all-reduce never ended"], "nodes": {"n1": fit, "n2": fit}}
    assert unfit_nodes(verdict, ["n1", "n2"]) == dict.fromkeys(("n1", "n2"), "the all-reduce never ended")
