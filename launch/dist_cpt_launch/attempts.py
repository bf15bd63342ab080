"""The starts of a run under its scheduler, and what to do after each ending.

`launches.jsonl` in the run folder has a row for every start of the ranks and for every end. `bad_nodes.json` counts
how often a node was the first to fail; remove a node's entry to trust it again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from dist_cpt.errors import EXIT_CONFIG, EXIT_DONE, EXIT_STOPPED, EXIT_SUPERSEDED, FINAL_CODES
from dist_cpt.run_folder.json_files import read_object, rows_or_problem, write_object
from dist_cpt.run_folder.names import BAD_NODES, LAUNCHES

EARLY_SECONDS = 90.0  # Slurm may send the signal before the limit up to 60 s early
STRIKES = 2  # first failures after which a node is excluded

Action = Literal["done", "requeue", "restart", "leave", "give up"]


@dataclass(frozen=True)
class Ending:
    """How one start of the ranks ended."""

    code: int  # the run's own exit code
    near_limit: bool  # the job was signalled that its time is nearly over
    terminated: bool  # the job got SIGTERM: cancelled, or about to be preempted
    state: str | None  # the job's, by squeue; None if squeue does not answer
    seconds_left: float | None  # None: unknown, and a stop signal then counts as that of the limit
    tries: int  # starts from the newest checkpoint, this one included, preempted ones excluded
    resumable: bool  # a checkpoint exists
    newly_bad: bool = False  # a node has just reached its last strike

    def preempted(self, save_before_limit: float) -> bool:
        """Whether the run stopped for another job: it was told to stop, far from the limit."""
        early = self.seconds_left is not None and self.seconds_left > save_before_limit + EARLY_SECONDS
        return self.code == EXIT_STOPPED and (not self.near_limit or early)


@dataclass(frozen=True)
class Decision:
    """What the batch job does next, and why."""

    action: Action
    reason: str
    continues: bool = False  # another start of the ranks follows


def decide(end: Ending, *, max_restarts: int, save_before_limit: float) -> Decision:
    """The next action after an ending: finish, restart on the same nodes, requeue, or give up."""
    if end.code == EXIT_DONE:
        return Decision("done", "the run is complete")
    if end.code == EXIT_SUPERSEDED:
        return Decision("leave", "another attempt holds the run folder and trains on")
    if end.state not in (None, "RUNNING"):
        return Decision("leave", f"the job is {end.state}: cancelled, or requeued by Slurm itself")
    if end.state is None and end.terminated and not end.near_limit:
        return Decision("leave", "the job got SIGTERM and squeue does not answer: treated as cancelled")
    if end.preempted(save_before_limit):
        return Decision("requeue", "preempted: the ranks stopped and saved", continues=True)
    # A rank without a GPU on its node exits with 64 too; after a checkpoint the recipe is known to be valid.
    if end.code in FINAL_CODES and not (end.code == EXIT_CONFIG and end.resumable):
        return Decision("give up", f"exit code {end.code} is final: another start would end the same way")
    if end.tries > max_restarts:
        return Decision("give up", f"{end.tries} starts from the same checkpoint, none reached a newer one")
    if end.code == EXIT_STOPPED:
        return Decision("requeue", "the time limit is near, the run has saved", continues=True)
    if end.near_limit:
        return Decision("requeue", f"the time limit came before the save was complete ({end.code})", continues=True)
    if end.newly_bad:
        return Decision("requeue", f"exit code {end.code}: continuing on other nodes", continues=True)
    if end.seconds_left is not None and end.seconds_left < 2 * save_before_limit:
        reason = f"exit code {end.code}, and only {end.seconds_left:.0f} s are left"
        return Decision("requeue", reason, continues=True)
    return Decision("restart", f"exit code {end.code}", continues=True)


class LaunchRecord:
    """launches.jsonl and bad_nodes.json of one run folder."""

    def __init__(self, run_folder: Path, job: str) -> None:
        self.run_folder = run_folder
        self.job = job  # the first job of a chain

    def started(self, step: int, **fields: Any) -> None:
        """Record that the ranks are about to start from the checkpoint of `step`, -1 for none."""
        self._append({"kind": "start", "job": self.job, "checkpoint_step": step, **fields})

    def ended(self, step: int, decision: Decision, **fields: Any) -> None:
        """Record that the ranks have ended; the newest checkpoint is that of `step`."""
        row = {"kind": "end", "job": self.job, "checkpoint_step": step}
        row |= {"action": decision.action, "reason": decision.reason, "goes_on": decision.continues}
        self._append(row | fields)

    def tries(self, step: int) -> int:
        """Starts of this job from the checkpoint of `step`, without those that were preempted."""
        count, from_step = 0, False
        for row in self._rows():
            if row.get("job") != self.job:
                continue
            if row.get("kind") == "start":
                from_step = row.get("checkpoint_step") == step
                count = count + 1 if from_step else 0
            elif row.get("kind") == "end" and from_step and row.get("preempted"):
                count -= 1
        return count

    def cancelled(self, job: str) -> bool:
        """Whether a job's last row is an end after which nothing follows."""
        rows = self._rows_of(job)
        return bool(rows) and rows[-1].get("kind") == "end" and not rows[-1].get("goes_on")

    def successor(self, job: str) -> str | None:
        """The next job of the chain, if an earlier start of this job has queued one."""
        return next((row["successor"] for row in reversed(self._rows_of(job)) if row.get("successor")), None)

    def bad_nodes(self) -> set[str]:
        """Nodes that are excluded from now on."""
        return {node for node, reasons in self._strikes().items() if len(reasons) >= STRIKES}

    def strike(self, node: str, reason: str, *, count: int = 1) -> bool:
        """Count a failure of a node; whether it has just become a bad one."""
        strikes = self._strikes()
        before = strikes.get(node, [])
        strikes[node] = [*before, *[f"{_now()} job {self.job}: {reason}"] * count]
        write_object(self.run_folder / BAD_NODES, strikes)
        return len(before) < STRIKES <= len(strikes[node])

    def _strikes(self) -> dict[str, list[str]]:
        content = read_object(self.run_folder / BAD_NODES)
        return {node: reasons for node, reasons in content.items() if isinstance(reasons, list)}

    def _rows(self) -> list[dict[str, Any]]:
        return rows_or_problem(self.run_folder / LAUNCHES, [])

    def _rows_of(self, job: str) -> list[dict[str, Any]]:
        return [row for row in self._rows() if row.get("slurm_job") == job]

    def _append(self, row: dict[str, Any]) -> None:
        self.run_folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"time": _now(), **row}, ensure_ascii=False) + "\n"
        with (self.run_folder / LAUNCHES).open("a", encoding="utf-8") as file:
            file.write(line)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
