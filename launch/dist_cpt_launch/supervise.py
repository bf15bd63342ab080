"""Inside a batch job: start the ranks with srun, forward the stop signal, and act on how they end.

`slurm/train.sbatch` becomes this process, since Slurm signals only the batch shell.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_cpt.checkpoint.finished import says_finished
from dist_cpt.config.load import load_recipe
from dist_cpt.config.resolve import resolve_paths, run_folder
from dist_cpt.errors import (
    EXIT_DONE,
    EXIT_INTERNAL,
    EXIT_NODE,
    EXIT_STOPPED,
    EXIT_SUPERSEDED,
    ConfigError,
    DistCptError,
    StorageError,
    WriteError,
)
from dist_cpt.run_folder.claim import record_killed
from dist_cpt.run_folder.exit_file import exit_code, stamp
from dist_cpt.run_folder.json_files import read_object
from dist_cpt.run_folder.names import PREFLIGHT
from dist_cpt.runtime.node_address import node_address
from dist_cpt_launch.attempts import STRIKES, Decision, Ending, LaunchRecord, decide
from dist_cpt_launch.batch_job import OVERTAKEN, Job
from dist_cpt_launch.command_line import run_command
from dist_cpt_launch.launch_plan import usable_nodes
from dist_cpt_launch.slurm import DEFAULT_MAX_RESTARTS, RequeueBy
from dist_cpt_launch.slurm_query import log, query
from dist_cpt_launch.srun_step import KILL_SECONDS, KILLED, Failure, Step
from dist_cpt_launch.time_limit import newest_step, save_before_limit

POLL_SECONDS = 0.25
ASK_AGAIN_SECONDS = 10.0  # a rank that was still loading when the signal came has missed it
FAILED_GRACE_SECONDS = 30.0  # for the other ranks of a failed one, before they are killed
LAST_SECONDS = 20.0  # before the limit: an unfinished save is abandoned and the job requeued; half of it to kill ranks
MAX_MOVES = 3  # requeues before a start, for a job that was given a bad node
MAX_STORAGE_REQUEUES = 20  # of a job whose run folder cannot be read
MEASURE_SECONDS = 60.0  # between two looks at the durations of steps and saves
REPORT_SECONDS = 30.0  # until a file that another node has written is visible here
NOT_REQUEUED = 1  # an exit code that no site requeues
_NOT_THE_NODE = r"Exited with exit code|Out Of Memory|Terminated"  # errors that Python saw are not the hardware's


@dataclass(frozen=True)
class SupervisorOptions:
    """Train inside a Slurm job: stop before the time limit, requeue, resume, restart after a crash."""

    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Several in a job array, one per task.")]
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="a.b=value", help="Override a recipe key.")
    ] = None
    procs_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks per node; default: --ntasks-per-node, else the GPUs.")
    ] = None
    max_restarts: Annotated[int, typer.Option(min=0, help="Without a newer checkpoint.")] = DEFAULT_MAX_RESTARTS
    save_before_limit: Annotated[
        float | None, typer.Option(min=1, help="Seconds before the time limit; default: measured in the run folder.")
    ] = None
    requeue_by: Annotated[RequeueBy, typer.Option(help="How the job gets back into the queue.")] = "requeue"
    submit: Annotated[str, typer.Option(help="chain: sbatch options of the next job, quoted as for a shell.")] = ""
    srun: Annotated[list[str] | None, typer.Option(metavar="OPTION", help="One more option for srun.")] = None
    preflight: Annotated[bool, typer.Option(help="Check the nodes first.")] = True
    script: Annotated[str, typer.Option(hidden=True)] = "train.sbatch"
    predecessor: Annotated[str | None, typer.Option(hidden=True)] = None  # job number
    chain_root: Annotated[str | None, typer.Option(hidden=True)] = None  # job number


@dataclass
class Signals:
    """Signals that this process has received."""

    near_limit: bool = False
    terminated: bool = False

    def install(self) -> Signals:
        """Record SIGUSR1 (the time limit or a preemption is near) and SIGTERM (the job ends)."""

        def near_limit(*_: object) -> None:
            self.near_limit = True

        def terminated(*_: object) -> None:
            self.terminated = True

        signal.signal(signal.SIGUSR1, near_limit)
        signal.signal(signal.SIGTERM, terminated)
        return self

    def any(self) -> bool:
        return self.near_limit or self.terminated


@dataclass(frozen=True)
class Outcome:
    """How one start ended: in the node checks, or with the ranks."""

    code: int
    failure: Failure | None = None
    unfit: Mapping[str, str] = field(default_factory=dict)  # reason by node that failed its checks


class Supervisor:
    """One batch job from its start to its end, or until it is back in the queue."""

    def __init__(self, options: SupervisorOptions, job: Job, signals: Signals, argv: Sequence[str] = ()) -> None:
        self.options, self.job, self.signals = options, job, signals
        self.argv = argv  # what the options were parsed from, for the next job of a chain
        self.recipe = str(Path(recipe_of_task(options.recipes, job.task)).absolute())
        self.config = resolve_paths(load_recipe(Path(self.recipe), options.overrides or ()))
        self.folder = run_folder(self.config)
        self.procs = options.procs_per_node or _tasks_per_node()
        usable_nodes(self.config, len(job.nodes), self.procs)
        self.record = LaunchRecord(self.folder, options.chain_root or job.id)
        self.successor: str | None = None
        self.save_before_limit, self.max_save_before_limit = 0.0, math.inf
        self.ends_at: float | None = None  # of the monotonic clock
        self.unkillable = False  # some process of the ranks survived its kill
        self.ended_by_slurm: bool | None = None  # after SIGTERM; None: not asked yet

    def run(self) -> int:
        """Start the ranks until the run is complete, cannot be repeated here, or needs the queue."""
        try:
            return self._run()
        except StorageError as error:  # the file server may be back by then
            log(str(error))
            again = self.options.requeue_by == "requeue" and self.job.restarts < MAX_STORAGE_REQUEUES
            if again and self.job.requeue(set()):
                return EXIT_STOPPED
            raise

    def _run(self) -> int:
        options, job = self.options, self.job
        if options.predecessor and self.record.cancelled(options.predecessor):
            log(f"job {options.predecessor}, which queued this one, has ended for good: nothing to do")
            return NOT_REQUEUED
        if says_finished(self.config):
            return EXIT_DONE
        bad = self.record.bad_nodes().intersection(job.nodes)
        if bad and options.requeue_by == "requeue" and job.restarts < MAX_MOVES and job.can_run_without(bad):
            log(f"this job was given {', '.join(sorted(bad))}, which failed before: requeueing for other nodes")
            if job.requeue(bad):
                return EXIT_STOPPED
        if options.requeue_by == "chain":  # a start before a requeue may have queued the successor already
            self.successor = self.record.successor(job.number) or self._submit_successor()
        try:
            while True:
                code, decision = self._start()
                log(f"{decision.action}: {decision.reason}")
                if decision.action != "restart":
                    return self._leave(code, decision)
        except StorageError:  # the successor may find the file server back
            raise
        except Exception:  # a full disk, for example: the successor would fail alike and queue one of its own
            if self.successor:
                query(["scancel", self.successor])
            raise

    def _start(self) -> tuple[int, Decision]:
        """One start of the ranks: (the run's exit code, what to do next)."""
        step = newest_step(self.folder)
        left = self.job.seconds_left()
        self.ends_at = None if left is None else time.monotonic() + left
        self.max_save_before_limit = math.inf if left is None else left / 2
        self._measure()
        nodes = self._nodes()
        self.record.started(
            step,
            slurm_job=self.job.number,
            restarts=self.job.restarts,
            nodes=nodes,
            ranks=len(nodes) * self.procs,
            lead_seconds=round(self.save_before_limit, 1),
            successor=self.successor,
        )
        outcome = self._preflight(nodes) if self.options.preflight else Outcome(0)
        if outcome.code == 0:
            outcome = Outcome(EXIT_STOPPED) if self.signals.any() else self._train(nodes)
        return outcome.code, self._decide(nodes, outcome)

    def _decide(self, nodes: Sequence[str], outcome: Outcome) -> Decision:
        step, state = newest_step(self.folder), self.job.state()
        newly_bad = self._strike(nodes, outcome, state)
        end = Ending(
            code=outcome.code,
            near_limit=self.signals.near_limit,
            terminated=self.signals.terminated,
            state=state,
            seconds_left=None if self.ends_at is None else self.ends_at - time.monotonic(),
            tries=self.record.tries(step),
            resumable=step >= 0,
            # Where the job cannot do without the node, it restarts in place.
            newly_bad=self.unkillable or (newly_bad and self.job.can_run_without(self.record.bad_nodes())),
        )
        decision = decide(end, max_restarts=self.options.max_restarts, save_before_limit=self.save_before_limit)
        if outcome.unfit:
            decision = replace(decision, reason=_unfit_reason(outcome))
        if state == OVERTAKEN:
            return replace(decision, continues=True)  # the record belongs to the later start
        details = self.job.details() if decision.action == "leave" else {}
        preempted = decision.action == "requeue" and end.preempted(self.save_before_limit)
        preempted |= details.get("PreemptTime", "None") != "None"
        if preempted or details.get("Reason") == "NodeDown":
            decision = replace(decision, continues=True)
        self.record.ended(
            step,
            decision,
            slurm_job=self.job.number,
            code=outcome.code,
            first_failure=outcome.failure,
            job_state=state,
            preempted=preempted,
        )
        return decision

    def _measure(self) -> None:
        """Update how long before the limit the ranks must stop; at most half of the time this start had."""
        measured = self.options.save_before_limit or save_before_limit(self.folder)
        self.save_before_limit = min(measured, self.max_save_before_limit)

    def _strike(self, nodes: Sequence[str], outcome: Outcome, state: str | None) -> bool:
        """Count failures of nodes; whether a node has just become bad."""
        if outcome.unfit:
            if len(outcome.unfit) == len(nodes) > 1:
                return False  # the cause is not in the nodes
            struck = [
                self.record.strike(node, f"preflight: {why}", count=STRIKES) for node, why in outcome.unfit.items()
            ]
            return any(struck)
        if outcome.failure is None or re.search(_NOT_THE_NODE, outcome.failure.reason):
            return False
        if state != "RUNNING" and (state is not None or self.signals.terminated):  # Slurm may have killed the rank
            return False
        return self.record.strike(*outcome.failure)

    # -- the ranks -----------------------------------------------------------------------------------------

    def _nodes(self) -> list[str]:
        """The nodes to use: without the bad ones, and as many as divide the batch."""
        bad = self.record.bad_nodes()
        good = [node for node in self.job.nodes if node not in bad] or self.job.nodes
        nodes = good[: usable_nodes(self.config, len(good), self.procs)]
        if len(nodes) < len(self.job.nodes):
            unused = [node for node in self.job.nodes if node not in nodes]
            log(f"not using {', '.join(unused)}: bad nodes, or {len(self.job.nodes)} nodes do not divide the batch")
        return nodes

    def _srun(self, nodes: Sequence[str], tasks_per_node: int, command: Sequence[str]) -> Step:
        argv = ["srun", f"--nodes={len(nodes)}", f"--ntasks={len(nodes) * tasks_per_node}"]
        argv += [f"--ntasks-per-node={tasks_per_node}", "--kill-on-bad-exit=0", "--wait=0"]
        if len(nodes) < len(self.job.nodes):
            argv.append(f"--nodelist={','.join(nodes)}")
        environment = dict(os.environ)
        cpus = environment.get("SLURM_CPUS_PER_TASK", "")
        if cpus.isdigit():
            environment.setdefault("SRUN_CPUS_PER_TASK", cpus)  # srun ignores sbatch's --cpus-per-task
        environment.setdefault("OMP_NUM_THREADS", cpus if cpus.isdigit() else "1")
        environment.setdefault("OMP_WAIT_POLICY", "passive")
        with contextlib.suppress(ConfigError):  # the nodes may resolve what this host does not, and say it if not
            if (address := node_address(nodes[0])) != nodes[0]:
                environment.setdefault("MASTER_ADDR", address)  # a container of the ranks may have no scontrol
        environment["PYTHONSAFEPATH"] = "1"  # `-m` would import a yaml.py of the current folder
        if self.options.predecessor:
            environment["DIST_CPT_PREDECESSOR"] = self.options.predecessor  # its orphans may still hold the run folder
        return Step([*argv, *(self.options.srun or ()), sys.executable, *command], environment)

    def _train(self, nodes: Sequence[str]) -> Outcome:
        """One srun over all ranks, from their start to their end."""
        before = stamp(self.folder)
        command = ["-m", "dist_cpt.cli", "train", self.recipe]
        for override in self.options.overrides or ():
            command += ["--set", override]
        step = self._srun(nodes, self.procs, command)
        asked_at, measured_at = -math.inf, time.monotonic()
        while (code := step.wait(POLL_SECONDS)) is None:
            now = time.monotonic()
            if now > measured_at + MEASURE_SECONDS:
                measured_at = now
                self._measure()
            if self.ends_at is not None and now > self.ends_at - self.save_before_limit:
                self.signals.near_limit = True
            if self._must_stop() and now > asked_at + ASK_AGAIN_SECONDS:
                log("asking all ranks to stop and save")
                asked_at = now
                step.ask_to_stop()
            out_of_time = self.signals.near_limit and self.ends_at is not None and now > self.ends_at - LAST_SECONDS
            if out_of_time or (step.first_failure and now > step.failed_at + FAILED_GRACE_SECONDS):
                log("out of time: killing all ranks" if out_of_time else "killing the ranks that outlived a failed one")
                failure = step.first_failure  # later ones are caused by the kill
                code = self._kill(step, LAST_SECONDS / 2 if out_of_time else KILL_SECONDS)
                break
        else:
            failure = step.first_failure
        code = exit_code(self.folder, before, code)
        if not self.unkillable and code not in (0, EXIT_SUPERSEDED):
            with contextlib.suppress(DistCptError):
                record_killed(self.folder, EXIT_INTERNAL, f"the ranks ended with {code} and recorded nothing")
        return Outcome(code, failure if code not in (0, EXIT_STOPPED) else None)

    def _kill(self, step: Step, seconds: float) -> int:
        code = step.kill(seconds)
        if code is None:
            log("a rank cannot be killed: its node needs attention")
            self.unkillable = True
        return step.first_exit_code(KILLED if code is None else code)

    def _must_stop(self) -> bool:
        """Whether the ranks have to be told to stop; Slurm itself signals them if it ends the job."""
        if self.signals.terminated and not self.signals.near_limit and self.ended_by_slurm is None:
            self.ended_by_slurm = self.job.state() != "RUNNING"
        return self.signals.near_limit or (self.signals.terminated and not self.ended_by_slurm)

    def _preflight(self, nodes: Sequence[str]) -> Outcome:
        """Check all nodes; code 0 if they are fit, or if the job was told to stop meanwhile."""
        # Counts earlier checks too, so that their files are not taken for those of this one.
        identifier = f"{self.job.id}-{self.job.restarts}-{len(list(self.folder.glob(f'{PREFLIGHT}/*')))}"
        command = ["-m", "dist_cpt_launch.preflight", "--run-folder", str(self.folder), "--id", identifier]
        gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
        command += ["--gpus", gpus] if gpus.isdigit() else []
        command += shlex.split(os.environ.get("DIST_CPT_PREFLIGHT", ""))  # the site's limits
        step = self._srun(nodes, 1, command)
        while (code := step.wait(POLL_SECONDS)) is None:
            if self.signals.any():
                step.kill()
                return Outcome(0)
        if code == 0 or self.signals.any():
            return Outcome(0)
        unfit = unfit_nodes(self._report(identifier, REPORT_SECONDS if code == EXIT_NODE else 0.0), nodes)
        if not unfit:
            log("the node checks ended without a report: no node is blamed")
            return Outcome(step.first_exit_code(code), step.first_failure)
        if len(unfit) == len(nodes) > 1:  # the cause is not in the nodes
            return Outcome(EXIT_NODE, None, unfit)
        return Outcome(EXIT_INTERNAL, Failure(*next(iter(unfit.items()))), unfit)

    def _report(self, identifier: str, seconds: float) -> dict[str, Any]:
        """The report of the node checks; empty if there is none after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(StorageError):
                if report := read_object(self.folder / PREFLIGHT / f"{identifier}.json"):
                    return report
            if time.monotonic() >= deadline:
                return {}
            time.sleep(0.5)

    # -- the queue -----------------------------------------------------------------------------------------

    def _leave(self, code: int, decision: Decision) -> int:
        """End this job with the run's exit code, or by way of the queue."""
        if self.successor and not decision.continues:
            query(["scancel", self.successor])
        if decision.action == "give up" and code == EXIT_STOPPED:
            return EXIT_INTERNAL  # RequeueExit would restart it forever
        if decision.action != "requeue":
            return code
        bad = self.record.bad_nodes()
        if self.successor:
            self.job.exclude(bad, self.successor)
            return NOT_REQUEUED  # starts the successor
        if self.options.requeue_by == "requeue" and self.job.requeue(bad):
            return EXIT_STOPPED
        if self.options.requeue_by != "chain":
            log(f"exit code {EXIT_STOPPED}: Slurm requeues it if RequeueExit={EXIT_STOPPED}, else submit the job again")
        return EXIT_STOPPED

    def _submit_successor(self) -> str | None:
        """Queue the next job of the chain, which starts if this one does not end with 0; its number."""
        argv = ["sbatch", "--parsable", *shlex.split(self.options.submit)]
        argv += [f"--dependency=afternotok:{self.job.id}", "--kill-on-invalid-dep=yes", "--no-requeue"]
        if self.job.task is not None:
            argv.append(f"--array={self.job.task}")
        own = ("--script=", "--predecessor=", "--chain-root=")
        arguments = [f"--predecessor={self.job.number}", f"--chain-root={self.record.job}"]
        arguments += [item for item in self.argv if not item.startswith(own)]
        argv += [self.options.script, f"--python={sys.executable}", *arguments]
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"
        }
        answer = query(argv, environment=environment)
        if answer is None:
            log("no successor could be queued: submit the job again when this one ends")
            return None
        successor = answer.split(";")[0]
        log(f"job {successor} is queued behind this one")
        return successor


def unfit_nodes(report: Mapping[str, Any], nodes: Sequence[str]) -> dict[str, str]:
    """Those of `nodes` that a preflight report calls unfit, with the reasons.

    A problem of all nodes together, such as a collective that never ended, makes all of them unfit.
    """
    failed = {node: "; ".join(entry["reasons"]) for node, entry in report.get("nodes", {}).items() if not entry["ok"]}
    unfit = {node: reasons for node, reasons in failed.items() if node in nodes}
    return unfit or (dict.fromkeys(nodes, "; ".join(report["reasons"])) if report.get("reasons") else {})


def _unfit_reason(outcome: Outcome) -> str:
    reasons = set(outcome.unfit.values())
    if outcome.failure is None and len(reasons) == 1:
        return f"no node is blamed: {reasons.pop()}"
    return "unfit nodes: " + "; ".join(f"{node}: {reason}" for node, reason in outcome.unfit.items())


def recipe_of_task(recipes: Sequence[str], task: int | None) -> str:
    """The only recipe, or the one of this task of an array.

    Raises:
        ConfigError: the array has more tasks than recipes, or there are several recipes and no array.
    """
    if task is None:
        if len(recipes) > 1:
            raise ConfigError(f"{len(recipes)} recipes in one job", remedy=f"sbatch --array=0-{len(recipes) - 1}")
        return recipes[0]
    if not 0 <= task < len(recipes):
        raise ConfigError(f"task {task} of the array has no recipe: {len(recipes)} recipes were given")
    return recipes[task]


def main(argv: Sequence[str]) -> int:
    """Entry point of train.sbatch."""
    signals = Signals().install()

    def run(options: SupervisorOptions) -> int:
        try:
            return Supervisor(options, Job.from_environment(), signals, argv).run()
        except OSError as error:
            raise WriteError(f"the run folder cannot be written: {error}") from error

    return run_command(SupervisorOptions, run, argv, "train.sbatch")


def _tasks_per_node() -> int:
    for name in ("SLURM_NTASKS_PER_NODE", "SLURM_GPUS_ON_NODE"):
        if os.environ.get(name, "").isdigit():
            return max(1, int(os.environ[name]))
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
