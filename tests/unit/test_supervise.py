"""The decisions of a batch job, without Slurm: when it restarts, requeues, gives up, and when it is told to stop."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dist_cpt_launch import batch_job, supervise
from dist_cpt_launch.attempts import Decision, Ending, LaunchRecord, decide
from dist_cpt_launch.batch_job import Job
from dist_cpt_launch.launch_plan import usable_nodes
from dist_cpt_launch.srun_step import Failure, task_failure
from dist_cpt_launch.supervise import Supervisor, SupervisorOptions, main, recipe_of_task, unfit_nodes
from dist_cpt_launch.time_limit import (
    DEFAULT_SAVE_SECONDS,
    MARGIN_SECONDS,
    newest_step,
    save_before_limit,
    slurm_seconds,
)

from dist_cpt.config.load import build
from dist_cpt.errors import ConfigError, StorageError
from dist_cpt.run_folder.names import BAD_NODES, LAUNCHES
from dist_cpt.runtime.env import expand_hosts
from tests import tiny
from tests.errno_layer import ErrnoLayer

CRASHED = Ending(
    code=70, near_limit=False, terminated=False, state="RUNNING", seconds_left=9000.0, tries=1, resumable=True
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "action"),
    [
        ({"code": 0}, "done"),
        ({"code": 0, "state": "COMPLETING"}, "done"),
        ({}, "restart"),
        ({"code": 72}, "restart"),
        ({"code": 137}, "restart"),
        ({"code": 66}, "restart"),  # the file server may be back
        ({"code": 66, "resumable": False}, "restart"),
        ({"code": 66, "tries": 4}, "give up"),
        ({"tries": 3}, "restart"),
        ({"tries": 4}, "give up"),
        ({"newly_bad": True}, "requeue"),
        ({"newly_bad": True, "tries": 4}, "give up"),
        ({"seconds_left": 500.0}, "requeue"),  # too little is left to train
        ({"seconds_left": None}, "restart"),
        ({"code": 71}, "give up"),
        ({"code": 65}, "give up"),
        ({"code": 69}, "give up"),  # all nodes unfit: it is not the nodes
        ({"code": 64, "resumable": False}, "give up"),
        ({"code": 64}, "restart"),  # a node without its GPUs: the recipe itself has worked before
        ({"code": 72, "resumable": False}, "restart"),  # the ranks could not meet
        ({"code": 75, "near_limit": True, "seconds_left": 290.0}, "requeue"),
        ({"code": 75, "near_limit": True, "seconds_left": 290.0, "tries": 4}, "give up"),  # never a newer checkpoint
        ({"code": 137, "near_limit": True, "seconds_left": 10.0}, "requeue"),  # out of time while it saved
        ({"code": 75, "tries": 9}, "requeue"),  # preempted: no failure of its own
        ({"code": 75, "near_limit": True, "tries": 9}, "requeue"),  # preempted by SIGUSR1, far from the limit
        ({"code": 75, "near_limit": True, "tries": 9, "seconds_left": math.inf}, "requeue"),  # there is no limit
        ({"code": 75, "near_limit": True, "tries": 4, "seconds_left": None}, "give up"),  # nobody can say: capped
        ({"code": 75, "state": "COMPLETING", "terminated": True}, "leave"),  # cancelled
        ({"code": 137, "state": "OVERTAKEN"}, "leave"),
        ({"code": 75, "state": None, "terminated": True}, "leave"),
        ({"code": 75, "state": None, "near_limit": True, "seconds_left": 290.0}, "requeue"),
    ],
)
def test_what_happens_after_an_ending(changes, action):
    decision = decide(replace(CRASHED, **changes), max_restarts=3, save_before_limit=300)
    assert decision.action == action
    assert decision.reason


def test_tries_count_starts_of_this_job_from_the_same_checkpoint(tmp_path):
    record, other = LaunchRecord(tmp_path, "7"), LaunchRecord(tmp_path, "8")
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
    record = LaunchRecord(tmp_path, "7")
    assert not record.strike("n2", "task 1: Killed")
    assert record.bad_nodes() == set()
    assert record.strike("n2", "task 3: Killed")
    assert not record.strike("n2", "task 3: Killed")  # known already
    assert record.strike("n4", "preflight: slow", count=2)
    assert LaunchRecord(tmp_path, "8").bad_nodes() == {"n2", "n4"}
    (tmp_path / BAD_NODES).unlink()
    assert record.bad_nodes() == set()


def test_a_damaged_record_does_not_stop_a_job(tmp_path):
    (tmp_path / LAUNCHES).write_bytes(b'{"kind": "start", "job": "7", "checkpoint_step": -1}\n\xff\x00{')
    (tmp_path / BAD_NODES).write_text("[1")
    assert LaunchRecord(tmp_path, "7").tries(-1) == 1
    assert LaunchRecord(tmp_path, "7").bad_nodes() == set()


def test_time_to_save_is_a_step_an_evaluation_and_two_saves(tmp_path):
    assert save_before_limit(tmp_path) == DEFAULT_SAVE_SECONDS
    steps = [{"step": i, "step_seconds": 3.0 + (i == 5), "tokens_per_second": 1000.0} for i in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    assert save_before_limit(tmp_path) == DEFAULT_SAVE_SECONDS + 4  # no save yet, and a step may be long
    events = [{"kind": "start"}, {"kind": "checkpoint", "seconds": 50.0}, {"kind": "checkpoint", "seconds": 60.5}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
    assert save_before_limit(tmp_path) == MARGIN_SECONDS + 4 + 121
    (tmp_path / "evaluations.jsonl").write_text('{"name": "a", "num_tokens": 20000}\n' * 2)
    assert save_before_limit(tmp_path) == MARGIN_SECONDS + 4 + 121 + 20


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
    assert slurm_seconds("60") == 3600  # minutes
    assert slurm_seconds("1-12") == 1.5 * 86400
    assert task_failure("srun: error: n2: tasks 2-3: Exited with exit code 70\n").node == "n2"
    assert task_failure("srun: error: n2: task 3: Killed") == Failure("n2", "task 3: Killed")
    assert task_failure("srun: error: n2: tasks 2-3: Exited with exit code 75\n") is None  # stopped and saved


def test_as_many_nodes_are_used_as_divide_the_batch(tmp_path):
    config = build(tiny.recipe(tmp_path / "b", tmp_path / "c", tmp_path / "r", engine="fsdp"), "x")  # 8 blocks, 2 each
    assert [usable_nodes(config, nodes, 1) for nodes in (1, 2, 3, 4, 7)] == [1, 2, 2, 4, 4]
    with pytest.raises(ConfigError, match=r"batch\.global_tokens.* 3 ranks"):
        usable_nodes(config, 2, 3)


def test_a_job_knows_itself_and_its_recipe():
    environ = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_RESTART_COUNT": "3"}
    job = Job.from_environment(environ)
    assert (job.id, job.task, job.nodes, job.restarts) == ("12", None, ["n1", "n2"], 3)
    task = Job.from_environment(environ | {"SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "1"})
    assert (task.id, task.number, task.task) == ("10_1", "12", 1)
    assert recipe_of_task(["a"], None) == "a"
    assert recipe_of_task(["a", "b"], 1) == "b"
    for recipes, number in ((["a", "b"], None), (["a"], 1)):
        with pytest.raises(ConfigError):
            recipe_of_task(recipes, number)


def test_outside_of_a_job_the_error_names_sbatch(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert main([str(Path(tmp_path) / "r.yaml")]) == 64
    assert "sbatch" in capsys.readouterr().err


def test_the_next_job_of_a_chain_takes_the_folder_over_and_a_stranger_does_not(tmp_path, monkeypatch):
    from dist_cpt.config.resolve import resolve_paths
    from dist_cpt.run_folder.claim import claim

    config = resolve_paths(build(tiny.recipe(tmp_path / "b", tmp_path / "c", tmp_path / "r"), "x"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    orphan = claim(tmp_path / "run", config, "id")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    with pytest.raises(ConfigError, match="run"):
        claim(tmp_path / "run", config, "id")
    monkeypatch.setenv("DIST_CPT_PREDECESSOR", "7")
    successor = claim(tmp_path / "run", config, "id")
    assert successor.is_current()
    assert not orphan.is_current()
    orphan.close()
    successor.close()


def test_a_jobset_that_starts_again_takes_the_folder_over(tmp_path, monkeypatch):
    from dist_cpt.config.resolve import resolve_paths
    from dist_cpt.run_folder.claim import claim

    config = resolve_paths(build(tiny.recipe(tmp_path / "b", tmp_path / "c", tmp_path / "r"), "x"))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("DIST_CPT_JOB", "legal")
    orphan = claim(tmp_path / "run", config, "id")  # its host is lost, the file server still holds its lock
    again = claim(tmp_path / "run", config, "id")
    assert again.is_current()
    assert not orphan.is_current()
    orphan.close()
    again.close()


def test_a_problem_of_all_nodes_together_blames_no_single_one():
    fit, unfit = {"ok": True, "reasons": []}, {"ok": False, "reasons": ["disk full", "clock off"]}
    report = {"ok": False, "reasons": [], "nodes": {"n1": fit, "n2": unfit, "n9": unfit}}
    assert unfit_nodes(report, ["n1", "n2"]) == {"n2": "disk full; clock off"}
    report = {"ok": False, "reasons": ["the all-reduce never ended"], "nodes": {"n1": fit, "n2": fit}}
    assert unfit_nodes(report, ["n1", "n2"]) == dict.fromkeys(("n1", "n2"), "the all-reduce never ended")


class Fake:
    """A batch job whose Slurm is a folder of shell scripts; `calls` is what they were asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.run = folder, folder / "runs/tiny"
        self.recipe = tiny.write_recipe(
            folder / "recipe.yaml", tiny.recipe(folder / "b", folder / "c", folder / "runs", engine="fsdp")
        )
        (folder / "bin").mkdir()
        self.script("squeue", 'case "$*" in *State*) echo "RUNNING ${SLURM_RESTART_COUNT:-0}";; *) echo 1:00:00;; esac')
        self.script("sinfo", "printf 'n1 idle\\nn2 idle\\nn3 idle\\n'")
        self.script("scontrol", "echo JobId=7 ExcNodeList='(null)' ReqNodeList='(null)' PreemptTime=None")
        self.script("sbatch", "echo 8")
        self.script("scancel", "true")
        for name in [name for name in os.environ if name.startswith("SLURM_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
        monkeypatch.setattr(batch_job, "KILL_WAIT_SECONDS", 0.0)
        self.signals = supervise.Signals()

    def script(self, tool: str, content: str) -> None:
        """What a tool does from now on."""
        path = self.folder / "bin" / tool
        path.write_text(f'#!/bin/sh\necho "{tool} $*" >> {self.folder}/calls\n{content}\n')
        path.chmod(0o755)

    def ends(self, *codes: int) -> None:
        """srun's ranks end with these codes, and write exit.json as rank 0 does."""
        (self.folder / "codes").write_text("\n".join(map(str, codes)) + "\n")
        self.script(
            "srun",
            f"cd {self.folder}; code=$(head -n1 codes); sed -i 1d codes; mkdir -p {self.run}\n"
            f'cd {self.run}; echo "{{\\"code\\": $code}}" > exit.$$; mv exit.$$ exit.json; exit $code',
        )

    def supervisor(self, **options: Any) -> Supervisor:
        values = {"recipes": [str(self.recipe)], "preflight": False} | options
        return Supervisor(SupervisorOptions(**values), Job.from_environment(), self.signals)

    def supervise(self, **options: Any) -> int:
        return self.supervisor(**options).run()

    def calls(self, tool: str) -> list[str]:
        return [line for line in (self.folder / "calls").read_text().splitlines() if line.startswith(tool + " ")]

    def rows(self, kind: str) -> list[dict]:
        found = [json.loads(line) for line in (self.run / LAUNCHES).read_text().splitlines()]
        return [row for row in found if row["kind"] == kind]


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Iterator[Fake]:
    before = signal.getsignal(signal.SIGTERM)
    yield Fake(tmp_path, monkeypatch)
    signal.signal(signal.SIGTERM, before)  # a batch script that was requeued ignores it, and so would its children here


def test_a_crash_is_followed_by_another_start_and_the_end_by_the_end(fake):
    fake.ends(70, 0)
    assert fake.supervise() == 0
    assert [row["action"] for row in fake.rows("end")] == ["restart", "done"]


@pytest.mark.parametrize("requeue_by", ["requeue", "chain"])
def test_a_run_folder_that_cannot_be_read_is_left_to_the_next_start(fake, monkeypatch, requeue_by):
    fake.ends(70, 0)
    assert fake.supervise() == 0
    monkeypatch.setenv("DIST_CPT_STORAGE_SECONDS", "0.1")
    with ErrnoLayer(fake.run, errno.ESTALE, at=0, for_ever=True).installed():
        if requeue_by == "requeue":
            assert fake.supervise() == 75
            assert "scontrol requeue 7" in fake.calls("scontrol")
        else:
            with pytest.raises(StorageError, match="ESTALE"):
                fake.supervise(requeue_by="chain")
    assert not (fake.folder / "calls").read_text().count("scancel")


def test_ranks_that_the_supervisor_kills_strike_no_node(fake, monkeypatch):
    monkeypatch.setattr(supervise, "LAST_SECONDS", 3600.0)  # the limit is here
    ready = fake.folder / "ready"
    fake.script(
        "srun",
        "trap '' USR1; trap 'echo \"srun: error: n2: task 1: Killed\" >&2; exit 137' TERM\n"
        f"touch {ready}\nwhile :; do sleep 0.1; done",
    )

    def the_limit_comes() -> None:
        while not ready.exists():
            time.sleep(0.05)
        fake.signals.near_limit = True

    threading.Thread(target=the_limit_comes, daemon=True).start()
    assert fake.supervise() == 75
    (ended,) = fake.rows("end")
    assert (ended["action"], ended["code"], ended["first_failure"]) == ("requeue", 137, None)
    assert not (fake.run / BAD_NODES).exists()


def test_giving_up_is_never_a_code_that_a_site_requeues(fake):
    fake.signals.near_limit = True
    fake.ends()
    fake.run.mkdir(parents=True)
    (fake.run / LAUNCHES).write_text('{"kind": "start", "job": "7", "checkpoint_step": -1}\n' * 3)
    fake.script("squeue", 'case "$*" in *State*) echo "RUNNING 0";; *) echo 1:00;; esac')  # the limit is near
    assert fake.supervise(requeue_by="exit") == 70
    assert fake.rows("end")[-1]["action"] == "give up"


@pytest.mark.parametrize("taken", ["Reason=None PreemptTime=2026-11-21T10:00:00", "Reason=NodeDown PreemptTime=None"])
def test_a_successor_starts_after_preemption_or_a_lost_node(fake, monkeypatch, taken):
    fake.ends(137)
    fake.script("squeue", 'case "$*" in *State*) echo "COMPLETING 0";; *) echo 1:00:00;; esac')
    fake.script("scontrol", f"echo JobId=7 {taken}")
    assert fake.supervise(requeue_by="chain") == 137
    assert fake.calls("scancel") == []
    fake.script("squeue", 'case "$*" in *State*) echo "RUNNING 0";; *) echo 1:00:00;; esac')
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    fake.ends(0)
    assert fake.supervise(requeue_by="chain", predecessor="7", chain_root="7") == 0
    assert len(fake.calls("srun")) == 2


def test_a_successor_ends_with_a_job_that_is_cancelled(fake, monkeypatch):
    fake.ends(75)
    fake.script("squeue", 'case "$*" in *State*) echo "COMPLETING 0";; *) echo 1:00:00;; esac')
    fake.script("scontrol", "echo JobId=7 Reason=None PreemptTime=None")
    assert fake.supervise(requeue_by="chain") == 75
    assert fake.calls("scancel") == ["scancel 8"]
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert fake.supervise(requeue_by="chain", predecessor="7", chain_root="7") == 1  # RequeueExit takes 75
    assert len(fake.calls("srun")) == 1


def test_a_job_of_a_chain_that_starts_again_queues_no_second_successor(fake, monkeypatch):
    fake.ends(137, 0)
    fake.script("squeue", 'case "$*" in *State*) echo "COMPLETING ${SLURM_RESTART_COUNT:-0}";; *) echo 1:00:00;; esac')
    fake.script("scontrol", "echo JobId=7 PreemptTime=2026-11-21T10:00:00")
    fake.supervise(requeue_by="chain")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # its script has the line #SBATCH --requeue
    assert fake.supervise(requeue_by="chain") == 0
    assert len(fake.calls("sbatch")) == 1
    assert fake.calls("scancel") == ["scancel 8"]


def test_a_full_disk_does_not_start_an_endless_chain(fake):
    fake.ends(0)
    fake.run.mkdir(parents=True)
    (fake.run / LAUNCHES).mkdir()
    with pytest.raises(OSError, match="directory"):
        fake.supervise(requeue_by="chain")
    assert fake.calls("scancel") == ["scancel 8"]


def test_checks_that_do_not_run_blame_no_node(fake, monkeypatch):
    fake.script("srun", "echo 'srun: unrecognized option --bogus' >&2; exit 1")
    assert fake.supervise(max_restarts=1, preflight=True) == 1
    assert [row["action"] for row in fake.rows("end")] == ["restart", "give up"]
    assert not (fake.run / BAD_NODES).exists()


def test_a_requeue_that_fails_leaves_the_job_able_to_receive_signals(fake):
    fake.script("scontrol", "exit 1")
    fake.signals.install()
    try:
        heard = signal.getsignal(signal.SIGTERM)
        assert not Job.from_environment().requeue(set())
        assert signal.getsignal(signal.SIGTERM) is heard
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_no_srun_is_one_line_that_says_so(fake, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(fake.folder / "bin"))
    assert main([str(fake.recipe), "--no-preflight"]) == 64
    assert "srun" in capsys.readouterr().err.splitlines()[-1]


def test_a_rank_that_no_kill_ends_does_not_keep_the_job_until_its_limit(fake, monkeypatch):
    monkeypatch.setattr(supervise, "FAILED_GRACE_SECONDS", 0.0)
    monkeypatch.setattr(supervise, "KILL_SECONDS", 0.5)
    fake.script("srun", "trap '' TERM; echo 'srun: error: n2: task 1: Bus error' >&2; while :; do sleep 0.1; done")
    fake.supervise(max_restarts=3)
    assert fake.rows("end")[0]["action"] == "requeue"  # not here again: what it holds is not free
    assert fake.rows("end")[0]["first_failure"] == ["n2", "task 1: Bus error"]


def test_the_time_to_save_grows_with_what_is_measured(fake, monkeypatch):
    monkeypatch.setattr(supervise, "MEASURE_SECONDS", 0.2)
    fake.run.mkdir(parents=True)
    fake.script(
        "srun",
        f'cd {fake.run}; echo \'{{"step": 1, "step_seconds": 10.0}}\' > metrics.jsonl\n'
        'echo \'{"kind": "checkpoint", "seconds": 600.0}\' > events.jsonl; sleep 1',
    )
    supervisor = fake.supervisor()
    supervisor.run()
    assert fake.rows("start")[0]["lead_seconds"] == DEFAULT_SAVE_SECONDS
    assert supervisor.save_before_limit == MARGIN_SECONDS + 10 + 2 * 600  # of the hour that is left, half at most


def test_the_time_to_save_of_a_long_run_is_read_from_its_end(tmp_path):
    """From the end of metrics.jsonl alone: its first row, of a slow step, does not count."""
    first, others = b'{"step": 1, "step_seconds": 99.0}\n', b'{"step": 2, "step_seconds": 2.0, "lr": 0.1}\n' * 400_000
    (tmp_path / "metrics.jsonl").write_bytes(first + others)
    assert save_before_limit(tmp_path) == DEFAULT_SAVE_SECONDS + 2


def test_a_node_that_the_job_asked_for_by_name_is_not_excluded(fake):
    fake.ends(75)
    fake.signals.near_limit = True
    fake.script("scontrol", "echo JobId=7 ExcNodeList='(null)' ReqNodeList=n1")
    fake.run.mkdir(parents=True)
    (fake.run / BAD_NODES).write_text('{"n1": ["a", "b"]}')
    fake.supervise()
    assert not [call for call in fake.calls("scontrol") if "ExcNodeList" in call]
