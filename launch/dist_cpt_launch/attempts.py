"""What happened to a run under its scheduler, start by start, and what to do after the next ending. Pure decisions.

`launches.jsonl` in the run folder has a row when the ranks are started and one when they have ended.
`bad_nodes.json` counts how often a node was the first to fail; whoever trusts a node again removes it there.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from dist_cpt.errors import (
    EXIT_CANNOT_WRITE,
    EXIT_CHECKPOINT,
    EXIT_CONFIG,
    EXIT_DATA,
    EXIT_DONE,
    EXIT_NODE,
    EXIT_NUMERICS,
    EXIT_STOPPED,
)
from dist_cpt_launch.time_limit import read_jsonl

LAUNCHES = "launches.jsonl"
BAD_NODES = "bad_nodes.json"
EARLY_SECONDS = 90.0  # Slurm may send the signal before the limit up to 60 s too early
STRIKES = 2  # so often may a node be the first to fail before it is left out
# The same again would end the same way.
FINAL = (EXIT_CONFIG, EXIT_DATA, EXIT_NODE, EXIT_NUMERICS, EXIT_CANNOT_WRITE, EXIT_CHECKPOINT)

Action = Literal["done", "requeue", "restart", "leave", "give up"]


@dataclass(frozen=True)
class Ending:
    """How one start of the ranks ended."""

    code: int  # the run's own exit code
    limit: bool  # this job was told that its time is nearly over
    terminated: bool  # this job was told to end: cancelled, or about to be preempted
    state: str | None  # of the job, as squeue names it; None where squeue does not answer
    seconds_left: float | None  # None: unknown, and a stop signal then counts as that of the limit
    tries: int  # starts from the newest checkpoint, this one included; those that were preempted do not count
    resumable: bool  # there is a checkpoint
    newly_bad: bool = False  # a node has just reached its last strike

    def preempted(self, lead_seconds: float) -> bool:
        """Whether the run stopped for another job: it was told to, and the limit is not near."""
        early = self.seconds_left is not None and self.seconds_left > lead_seconds + EARLY_SECONDS
        return self.code == EXIT_STOPPED and (not self.limit or early)


@dataclass(frozen=True)
class Decision:
    """What the batch job does next, and why."""

    action: Action
    reason: str


def decide(end: Ending, *, max_restarts: int, lead_seconds: float) -> Decision:
    """After the ranks have ended: done, the same nodes again, the queue again, or nothing more."""
    if end.code == EXIT_DONE:
        return Decision("done", "the run is complete")
    if end.state not in (None, "RUNNING"):
        return Decision("leave", f"the job is {end.state}: cancelled, or requeued by Slurm itself")
    if end.state is None and end.terminated and not end.limit:
        return Decision("leave", "the job was told to end, and squeue does not say why: taken as cancelled")
    if end.preempted(lead_seconds):
        return Decision("requeue", "the ranks were told to stop and saved: preempted")
    # A rank that finds no GPU on its node has code 64 as well; with a checkpoint the recipe is known to be good.
    if end.code in FINAL and not (end.code == EXIT_CONFIG and end.resumable):
        return Decision("give up", f"exit code {end.code}: the same again would end the same way")
    if end.tries > max_restarts:
        return Decision("give up", f"{end.tries} starts from the same checkpoint, none made a newer one")
    if end.code == EXIT_STOPPED:
        return Decision("requeue", "the time limit is near, the run has saved")
    if end.limit:
        return Decision("requeue", f"the time limit came before the save was done (exit code {end.code})")
    if end.newly_bad:
        return Decision("requeue", f"exit code {end.code}, on other nodes")
    if end.seconds_left is not None and end.seconds_left < 2 * lead_seconds:
        return Decision("requeue", f"exit code {end.code}, and only {end.seconds_left:.0f} s are left")
    return Decision("restart", f"exit code {end.code}")


class Record:
    """launches.jsonl and bad_nodes.json of one run folder."""

    def __init__(self, run_folder: Path, job: str) -> None:
        self.run_folder = run_folder
        self.job = job  # of a chain of jobs: the first one

    def started(self, step: int, **fields: Any) -> None:
        """The ranks are about to start from the checkpoint of `step`, -1 for none."""
        self._append({"kind": "start", "job": self.job, "checkpoint_step": step, **fields})

    def ended(self, step: int, decision: Decision, **fields: Any) -> None:
        """The ranks have ended, the newest checkpoint is of `step`."""
        row = {"kind": "end", "job": self.job, "checkpoint_step": step}
        self._append({**row, "action": decision.action, "reason": decision.reason, **fields})

    def tries(self, step: int) -> int:
        """Starts of this job from the checkpoint of `step`; one that was preempted does not count."""
        count, open_start = 0, False
        for row in read_jsonl(self.run_folder / LAUNCHES):
            if row.get("job") != self.job:
                continue
            if row.get("kind") == "start":
                open_start = row.get("checkpoint_step") == step
                count = count + 1 if open_start else 0
            elif row.get("kind") == "end" and open_start and row.get("preempted"):
                count -= 1
        return count

    def cancelled(self, job: str) -> bool:
        """Whether the last row of a job says that it must not go on."""
        rows = self._of(job)
        return bool(rows) and rows[-1].get("kind") == "end" and not rows[-1].get("goes_on")

    def successor(self, job: str) -> str | None:
        """The next job of the chain, if an earlier start of this job has queued one."""
        return next((row["successor"] for row in reversed(self._of(job)) if row.get("successor")), None)

    def bad_nodes(self) -> set[str]:
        """Nodes that are left out from now on."""
        return {node for node, reasons in self._strikes().items() if len(reasons) >= STRIKES}

    def strike(self, node: str, reason: str, *, count: int = 1) -> bool:
        """Count a failure of a node; whether it has just become a bad one."""
        known = self._strikes()
        before = len(known.get(node, []))
        known.setdefault(node, []).extend([f"{_now()} job {self.job}: {reason}"] * count)
        path = self.run_folder / BAD_NODES
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        return before < STRIKES <= len(known[node])

    def _strikes(self) -> dict[str, list[str]]:
        try:
            content = json.loads((self.run_folder / BAD_NODES).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(content, dict):
            return {}
        return {str(node): list(reasons) for node, reasons in content.items() if isinstance(reasons, list)}

    def _of(self, job: str) -> list[dict[str, Any]]:
        return [row for row in read_jsonl(self.run_folder / LAUNCHES) if row.get("slurm_job") == job]

    def _append(self, row: dict[str, Any]) -> None:
        self.run_folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"time": _now(), **row}, ensure_ascii=False) + "\n"
        with (self.run_folder / LAUNCHES).open("a", encoding="utf-8") as file:
            file.write(line)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
