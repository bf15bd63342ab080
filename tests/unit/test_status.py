"""What a run folder tells, whole, torn, half-written or empty."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dist_cpt_launch.slurm_query import queue_state
from dist_cpt_launch.status import find_run, read_status
from dist_cpt_launch.status_text import as_text

from dist_cpt.errors import ConfigError
from dist_cpt.health.heartbeats import Heartbeat, write_heartbeat
from tests.checkpoint_state import save_step
from tests.errno_layer import ErrnoLayer

BEGUN = 1_700_000_000.0


def row(step: int, **changes: Any) -> dict[str, Any]:
    return (
        {"step": step, "loss": 4.0, "tokens": 100 * step, "num_tokens": 100, "skipped": False}
        | {
            "step_seconds": 2.0,
            "attempt": 1,
        }
        | changes
    )


def event(kind: str, after: float, **fields: Any) -> dict[str, Any]:
    from datetime import UTC, datetime

    time = datetime.fromtimestamp(BEGUN + after, UTC).isoformat(timespec="milliseconds")
    return {"time": time, "kind": kind} | fields


def write(folder: Path, name: str, *objects: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(value, separators=(",", ":")) + "\n" for value in objects]
    (folder / name).write_text("".join(lines))


@pytest.fixture
def run(tmp_path) -> Path:
    """Attempt 1 of a run at step 10 of 100: attempt 0 was killed at step 6, and step 5 and 6 were done twice."""
    folder = tmp_path / "runs" / "llama"
    ends = [{"attempt": 0, "code": 72, "reason": "rank 3 froze", "step": 6}]
    started = {"attempts": 2, "first_started": BEGUN, "started": BEGUN + 50, "job": None, "ends": ends}
    write(folder, "run.json", started)
    start = {"name": "llama", "num_steps": 100}
    write(
        folder,
        "events.jsonl",
        event("start", 5, attempt=0, **start),
        event("checkpoint", 20, step=4, stall_seconds=1.5, seconds=3.0),
        event("resume", 60, attempt=1, **start),
        event("message", 61, text="straggler: rank 1 (host n2) works 2 s a step by itself"),
    )
    write(folder, "metrics.jsonl", *(row(step) for step in range(1, 10)), row(10, skipped=True))
    write(folder, "metrics.rewound.jsonl", row(5), row(6))
    return folder


def beat(folder: Path, rank: int, age: float, **fields: Any) -> None:
    (folder / "logs").mkdir(exist_ok=True)
    values = {"host": "n1", "pid": 1, "started": None, "attempt": 1, "step": 10, "phase": "training", "at": ""}
    write_heartbeat(folder, Heartbeat(rank, time=0.0, seconds_in_phase=1.0, **values | fields))
    os.utime(folder / "logs" / f"heartbeats-from-rank-{rank}.jsonl", (BEGUN + 100 - age,) * 2)


def test_a_running_run(run):
    beat(run, 0, 3.0)
    beat(run, 1, 4.0, host="n2")
    status = read_status(run, now=BEGUN + 100)
    assert (status.state, status.attempt) == ("running", 1)
    assert (status.step, status.num_steps, status.tokens_per_second, status.eta_seconds) == (10, 100, 50.0, 180.0)
    good = status.goodput
    assert good is not None
    # Nine applied steps, two of them done twice, in the 100 s since the first start.
    assert (good.productive, good.redone, good.saving, good.wall, good.fraction) == (18.0, 4.0, 1.5, 100.0, 0.18)
    assert [(one.attempt, one.code, one.reason) for one in status.restarts] == [(0, 72, "rank 3 froze")]
    assert [(rank.rank, rank.host, rank.age_seconds) for rank in status.ranks] == [(0, "n1", 3.0), (1, "n2", 4.0)]
    assert status.straggler == "straggler: rank 1 (host n2) works 2 s a step by itself"
    text = as_text(status)
    assert "goodput      18.0%" in text
    assert re.search(r"attempt 0: .*72.*, rank 3 froze", text)
    assert "straggler    rank 1 (host n2)" in text
    assert json.loads(json.dumps(status.as_json()))["goodput"]["fraction"] == 0.18


def test_silence_and_endings(run):
    beat(run, 0, 300.0)
    silent = read_status(run, now=BEGUN + 100)
    assert silent.state == "silent"
    assert "5 min" in silent.summary
    assert silent.goodput is not None
    assert silent.goodput.wall == 61.0  # to the last sign, not to now
    beat(run, 1, 1.0)
    partly = read_status(run, now=BEGUN + 100)
    assert partly.state == "running"
    assert "1 ranks" in partly.summary
    write(run, "exit.json", {"code": 75, "reason": "SIGTERM: stopped and saved at step 10", "step": 10})
    ended = read_status(run, now=BEGUN + 100)
    assert (ended.state, ended.exit_code) == ("ended", 75)
    assert "75" in ended.summary
    assert ended.summary.endswith("SIGTERM: stopped and saved at step 10")


def test_a_run_whose_batch_job_continues_has_not_ended(run):
    write(run, "exit.json", {"code": 75, "reason": "SIGUSR1: stopped and saved at step 10", "step": 10})
    row = {"slurm_job": "7", "reason": "the time limit is near"}
    for last, state in (
        ({"kind": "end", "action": "requeue", "goes_on": True}, "waiting"),
        ({"kind": "start"}, "waiting"),  # its ranks have not come to the folder yet
        ({"kind": "end", "action": "leave", "goes_on": False}, "ended"),
    ):
        write(run, "launches.jsonl", row | last)
        assert read_status(run).state == state
    write(run, "launches.jsonl", row | {"kind": "end", "action": "requeue", "goes_on": True})
    os.utime(run / "launches.jsonl", (BEGUN, BEGUN))  # and then a start without a batch job, which has ended
    assert read_status(run).state == "ended"


def test_the_newest_checkpoint_is_checked(run):
    assert read_status(run).checkpoint is None
    save_step(run, 4)
    path = save_step(run, 8).path
    (run / "checkpoints" / "step-00000009.attempt-1-ab.tmp").mkdir()
    write(run, "certificate.json", {"verdict": "pass", "failed": None, "step": 4, "attempt": 1})
    status = read_status(run)
    assert (status.checkpoint, status.checkpoint_check.split(" (")[0]) == ("step-00000008", "complete")
    assert status.certificate == "pass at step 4, attempt 1"
    victim = next(path.glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1])
    assert read_status(run).checkpoint_check.startswith(f"INVALID: {victim.name} ")
    (path / "manifest.json").write_text("{")
    assert read_status(run).checkpoint_check.startswith("INVALID: manifest.json ")
    (path / "manifest.json").unlink()
    assert read_status(run).checkpoint_check.startswith("INVALID: manifest.json ")


def test_torn_and_missing_files_are_one_line_each(run):
    for name in ("metrics.jsonl", "events.jsonl"):
        with (run / name).open("ab") as file:
            file.write(b'{"step": 11, "step_sec')  # being written
    assert read_status(run).problems == []
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\n\xff\n" + json.dumps(row(11)).encode() + b"\n")
    (run / "run.json").write_text('{"attempts"')
    (run / "exit.json").write_text("[]")
    status = read_status(run)
    assert [problem.split(":")[0] for problem in status.problems] == ["run.json", "exit.json", "metrics.jsonl"]
    assert "2" in status.problems[2]
    assert status.step == 11
    for path in run.iterdir():
        path.unlink()
    empty = read_status(run)
    assert (empty.state, empty.problems) == ("not started", [])
    assert "run.json" in as_text(empty)


def test_a_file_server_that_is_gone_is_a_line_too(run, monkeypatch):
    path = save_step(run, 10).path
    monkeypatch.setenv("DIST_CPT_STORAGE_SECONDS", "0.1")
    with ErrnoLayer(path, errno.ESTALE, at=0, for_ever=True).installed():
        status = read_status(run)
    assert (status.checkpoint, status.checkpoint_check) == (None, "cannot be read")
    (problem,) = status.problems
    assert all(named in problem for named in (str(path), "ESTALE"))


def test_hostile_content_is_printed_inert(run):
    write(run, "exit.json", {"code": 71, "reason": "bad\x1b[2J\nnews"})
    assert "\x1b" not in as_text(read_status(run))
    assert as_text(read_status(run)).splitlines()[1].endswith("bad\\x1b[2J\\nnews")


def test_the_newest_run_is_found(run, tmp_path):
    older = tmp_path / "runs" / "older"
    write(older, "run.json", {"attempts": 1})
    os.utime(older / "run.json", (BEGUN, BEGUN))
    assert find_run(None, tmp_path / "runs") == run
    with pytest.raises(ConfigError, match="nowhere"):
        find_run(None, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="nowhere"):
        find_run(tmp_path / "nowhere")


def test_many_rows_of_two_sources_are_summed(run):
    line = json.dumps(row(7, tokens_by_source={"domain": 900, "replay": 100}), separators=(",", ":")).encode() + b"\n"
    (run / "metrics.jsonl").write_bytes(line * 200_000)
    status = read_status(run)
    assert status.goodput is not None
    assert status.goodput.productive == 400_000.0


SLURM = {
    "squeue": 'echo "$@" >> "$LOG"; case "$STATE" in gone) echo "Invalid job id specified" >&2; exit 1;; '
    'down) echo "Unable to contact slurm controller" >&2; exit 1;; slow) sleep 9;; *) echo "$STATE";; esac',
    "sacct": "echo 'TIMEOUT|0:0'",
}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("PENDING|Priority|2026-11-22T10:00:00|", "job 7: PENDING (Priority), expected start 2026-11-22T10:00:00"),
        ("PENDING|Dependency|N/A|", "job 7: PENDING (Dependency)"),
        ("RUNNING|None|2026-11-21T10:00:00|n[1-2]", "job 7: RUNNING on n[1-2]"),
        ("gone", "job 7: TIMEOUT 0:0, no longer queued"),
        ("down", "job 7: squeue does not answer"),
        ("slow", "job 7: squeue does not answer"),
    ],
)
def test_the_queue(tmp_path, monkeypatch, state, said):
    for name, script in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "asked"))
    monkeypatch.setenv("STATE", state)
    assert queue_state("7", timeout_seconds=0.5) == said
    assert (tmp_path / "asked").read_text().startswith("--noheader --jobs 7 ")


def test_no_queue(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert queue_state(None) == "no batch job"
    assert queue_state("7") == "job 7: no squeue on this host"
    assert queue_state("7; rm -rf /") == "job '7; rm -rf /': not a Slurm job number"


COMMAND = """
import sys
from dist_cpt.cli import main
sys.argv = ["dist-cpt", "status", sys.argv[1], "--json"]
try:
    main()
finally:
    print("torch" in sys.modules, "transformers" in sys.modules, "numpy" in sys.modules, file=sys.stderr)
"""


def test_the_command_needs_no_torch(run):
    done = subprocess.run([sys.executable, "-c", COMMAND, run], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 10
    assert done.stderr.strip() == "False False False"
