"""Inside a batch job: start the ranks with srun, pass the stop signal on, and decide what happens after they end.

`slurm/train.sbatch` becomes this process, so that Slurm's signal to the batch shell arrives here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from dist_cpt.config.load import load_recipe
from dist_cpt.config.resolve import resolve_paths, run_folder
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import EXIT_CANNOT_WRITE, EXIT_INTERNAL, EXIT_NODE, EXIT_STOPPED, ConfigError, DistCptError
from dist_cpt.run_folder.exit_file import exit_code, stamp
from dist_cpt_launch.attempts import STRIKES, Decision, Ending, Record, decide
from dist_cpt_launch.batch_job import OVERTAKEN, Job, said, say
from dist_cpt_launch.nodes import usable_nodes
from dist_cpt_launch.time_limit import lead_seconds, newest_step

AGAIN_SECONDS = 10.0  # a rank that was still loading when the signal came has lost it
FAILED_GRACE_SECONDS = 30.0  # for the other ranks of one that failed, before they are killed
LAST_SECONDS = 20.0  # so close to the limit an unfinished save is given up and the job requeued; half to kill it
MOVES = 3  # so often a job that was given a bad node asks for others before it starts
MEASURE_SECONDS = 60.0  # between two looks at how long steps and saves take
KILL_SECONDS = 120.0  # for srun to end ranks that are killed; a process that waits for a broken device never ends
VERDICT_SECONDS = 30.0  # until a file that a node has written is seen on this one
# Source: srun prints a line of this form when tasks end with anything but 0, as soon as it knows.
_TASK_ENDED = re.compile(r"srun: error: ([A-Za-z0-9._-]+): tasks? ([0-9,-]+): (.*)")
KILLED = 128 + signal.SIGKILL
NOT_REQUEUED = 1  # an exit code that no site requeues
# The end of a rank that was told to stop; the signal reaches some when Python has already let go of its handlers.
_STOPPED = (f"Exited with exit code {EXIT_STOPPED}", "User defined signal 1")
_NOT_THE_NODE = r"Exited with exit code|Out Of Memory|Terminated"  # an error that Python saw is not the hardware's


@dataclass
class Signals:
    """What this process was sent."""

    limit: bool = False
    terminated: bool = False

    def install(self) -> Signals:
        """SIGUSR1: the time limit is near, or preemption is; SIGTERM: the job ends."""

        def limit(*_: object) -> None:
            self.limit = True

        def terminated(*_: object) -> None:
            self.terminated = True

        signal.signal(signal.SIGUSR1, limit)
        signal.signal(signal.SIGTERM, terminated)
        return self


@dataclass
class Step:
    """One srun: its processes on all nodes, and which of them failed first."""

    argv: list[str]
    environment: dict[str, str]
    first_failure: tuple[str, str] | None = None  # node, what srun said
    failed_at: float = 0.0
    process: subprocess.Popen[bytes] = field(init=False)
    _reader: threading.Thread = field(init=False)

    def start(self) -> Step:
        say("starting: " + shlex.join(self.argv))
        try:
            self.process = subprocess.Popen(self.argv, env=self.environment, stderr=subprocess.PIPE)
        except FileNotFoundError:
            raise ConfigError(
                "there is no srun on the batch host", remedy="make Slurm's commands visible to the job"
            ) from None
        assert self.process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stderr,), daemon=True)
        self._reader.start()
        return self

    def wait(self, seconds: float) -> int | None:
        """Its exit code, the highest of all tasks; None while it runs."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(2.0)
        return code

    def code(self, of_srun: int) -> int:
        """The exit code of the first task that failed, as far as it is known; srun's own may be of those it killed."""
        first = re.search(r"exit code (\d+)", self.first_failure[1]) if self.first_failure else None
        return int(first[1]) if first else of_srun

    def ask_to_stop(self) -> None:
        """SIGUSR1 to every task on every node; srun passes it on."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)

    def kill(self, seconds: float = KILL_SECONDS) -> int | None:
        """SIGKILL to every task on every node: that is what srun makes of a SIGTERM. As `wait`; None: to no avail."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        code = self.wait(seconds)
        if code is None:
            self.process.kill()
            self.process.wait()
        return code

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                with contextlib.suppress(OSError):
                    sys.stderr.buffer.write(line)
                    sys.stderr.buffer.flush()
                match = _TASK_ENDED.match(line.decode(errors="replace"))
                if match and self.first_failure is None and not match[3].startswith(_STOPPED):
                    self.failed_at = time.monotonic()
                    self.first_failure = (match[1], f"task {match[2]}: {match[3].strip()}")


class Supervisor:
    """One batch job from its start to its end, or to its place back in the queue."""

    def __init__(self, options: argparse.Namespace, job: Job, signals: Signals) -> None:
        self.options, self.job, self.signals = options, job, signals
        self.recipe = str(Path(pick(options.recipe, job.task)).absolute())
        self.config: RunConfig = resolve_paths(load_recipe(Path(self.recipe), options.set))
        self.folder = run_folder(self.config)
        self.procs = options.procs_per_node or _tasks_per_node()
        usable_nodes(self.config, len(job.nodes), self.procs)
        self.record = Record(self.folder, options.chain_root or job.id)
        self.successor: str | None = None
        self.lead, self.longest_lead = 0.0, math.inf
        self.stuck = False  # a process of the ranks cannot be ended
        self.ends_at: float | None = None
        self.ending: bool | None = None  # whether Slurm ends this job; None: nobody has asked yet

    def run(self) -> int:
        """Attempts until one is done, cannot be repeated here, or needs the queue."""
        if self.options.predecessor and self.record.cancelled(self.options.predecessor):
            say(f"job {self.options.predecessor}, after which this one was queued, has ended for good: nothing to do")
            return NOT_REQUEUED
        bad = self.record.bad_nodes().intersection(self.job.nodes)
        if bad and self.options.requeue_by == "requeue" and self.job.restarts < MOVES and self.job.can_do_without(bad):
            say(f"this job was given {', '.join(sorted(bad))}, which failed before: back into the queue for others")
            if self.job.requeue(bad):
                return EXIT_STOPPED
        if self.options.requeue_by == "chain":  # a start before a requeue has queued one already
            self.successor = self.record.successor(self.job.number) or self._submit_successor()
        try:
            while True:
                code, decision, goes_on = self._attempt()
                say(f"{decision.action}: {decision.reason}")
                if decision.action != "restart":
                    return self._close(code, decision, goes_on)
        except Exception:  # a full disk, say: the next job would end the same way, and queue one of its own
            if self.successor:
                said(["scancel", self.successor])
            raise

    def _attempt(self) -> tuple[int, Decision, bool]:
        """One start of the ranks, what to do after it, and whether another start follows."""
        step = newest_step(self.folder)
        left = self.job.seconds_left()
        self.ends_at = None if left is None else time.monotonic() + left
        self.longest_lead = math.inf if left is None else left / 2
        self._measure()
        nodes = self._nodes()
        # fmt: off
        self.record.started(
            step, slurm_job=self.job.number, restarts=self.job.restarts, nodes=nodes,
            ranks=len(nodes) * self.procs, lead_seconds=round(self.lead, 1), successor=self.successor,
        )
        # fmt: on
        code, failure, unfit = (0, None, {}) if self.options.no_preflight else self._preflight(nodes)
        if code == 0 and (self.signals.limit or self.signals.terminated):
            code = EXIT_STOPPED  # before the ranks had started
        elif code == 0:
            code, failure = self._ranks(nodes)
        after = newest_step(self.folder)
        state = self.job.state()
        newly_bad = self._strike(nodes, failure, unfit, state)
        end = Ending(
            code=code,
            limit=self.signals.limit,
            terminated=self.signals.terminated,
            state=state,
            seconds_left=None if self.ends_at is None else self.ends_at - time.monotonic(),
            tries=self.record.tries(after),
            resumable=after >= 0,
            # Else this job goes on without it.
            newly_bad=self.stuck or (newly_bad and self.job.can_do_without(self.record.bad_nodes())),
        )
        decision = decide(end, max_restarts=self.options.max_restarts, lead_seconds=self.lead)
        if unfit:
            named = "; ".join(f"{node}: {reason}" for node, reason in unfit.items())
            decision = Decision(decision.action, f"nodes that are not fit: {named}")
        if state == OVERTAKEN:
            return code, decision, True  # the record is the later start's by now
        shown = self.job.shown() if decision.action == "leave" else {}
        preempted = decision.action == "requeue" and end.preempted(self.lead)
        preempted |= shown.get("PreemptTime", "None") != "None"
        goes_on = decision.action in ("requeue", "restart") or preempted or shown.get("Reason") == "NodeDown"
        # fmt: off
        self.record.ended(
            after, decision, slurm_job=self.job.number, code=code, first_failure=failure, job_state=state,
            preempted=preempted, goes_on=goes_on,
        )
        # fmt: on
        return code, decision, goes_on

    def _measure(self) -> None:
        """How long before the limit the ranks are told; at most half of the time that this start had."""
        self.lead = min(self.options.lead or lead_seconds(self.folder), self.longest_lead)

    def _strike(
        self, nodes: Sequence[str], failure: tuple[str, str] | None, unfit: Mapping[str, str], state: str | None
    ) -> bool:
        """Count what speaks against a node; whether one has just become bad."""
        if unfit:
            if len(unfit) == len(nodes) > 1:
                return False  # it is not the nodes
            struck = [self.record.strike(node, f"preflight: {unfit[node]}", count=STRIKES) for node in unfit]
            return any(struck)
        if failure is None or re.search(_NOT_THE_NODE, failure[1]):
            return False
        if state != "RUNNING" and (state is not None or self.signals.terminated):  # Slurm may have killed it
            return False
        return self.record.strike(failure[0], failure[1])

    # -- the ranks -----------------------------------------------------------------------------------------

    def _nodes(self) -> list[str]:
        """The nodes to use: without bad ones, as many as divide the batch."""
        bad = self.record.bad_nodes()
        good = [node for node in self.job.nodes if node not in bad]
        try:
            count = usable_nodes(self.config, len(good), self.procs)
        except ConfigError:
            good, count = self.job.nodes, usable_nodes(self.config, len(self.job.nodes), self.procs)
        if count < len(self.job.nodes):
            left_out = [node for node in self.job.nodes if node not in good[:count]]
            say(f"leaving out {', '.join(left_out)}: a bad node, or {len(self.job.nodes)} do not divide the batch")
        return good[:count]

    def _step(self, nodes: Sequence[str], tasks_per_node: int, command: Sequence[str]) -> Step:
        # fmt: off
        argv = [
            "srun", f"--nodes={len(nodes)}", f"--ntasks={len(nodes) * tasks_per_node}",
            f"--ntasks-per-node={tasks_per_node}", "--kill-on-bad-exit=0", "--wait=0",
        ]
        # fmt: on
        if len(nodes) < len(self.job.nodes):
            argv.append(f"--nodelist={','.join(nodes)}")
        environment = dict(os.environ)
        cpus = environment.get("SLURM_CPUS_PER_TASK", "")
        if cpus.isdigit():
            environment.setdefault("SRUN_CPUS_PER_TASK", cpus)  # srun does not take it over from sbatch
        environment.setdefault("OMP_NUM_THREADS", cpus if cpus.isdigit() else "1")
        environment.setdefault("OMP_WAIT_POLICY", "passive")
        if self.options.predecessor:
            environment["DIST_CPT_PREDECESSOR"] = self.options.predecessor  # whose orphans may still hold the folder
        return Step([*argv, *self.options.srun, sys.executable, *command], environment).start()

    def _ranks(self, nodes: Sequence[str]) -> tuple[int, tuple[str, str] | None]:
        """(the run's exit code, the first failure) of one srun over all ranks."""
        before = stamp(self.folder)
        command = ["-m", "dist_cpt.cli", "train", self.recipe]
        for item in self.options.set:
            command += ["--set", item]
        step = self._step(nodes, self.procs, command)
        asked_at: float | None = None
        measured_at = time.monotonic()
        while (code := step.wait(0.25)) is None:
            now = time.monotonic()
            if now > measured_at + MEASURE_SECONDS:
                measured_at = now
                self._measure()
            if self.ends_at is not None and now > self.ends_at - self.lead:
                self.signals.limit = True
            if self._told() and (asked_at is None or now > asked_at + AGAIN_SECONDS):
                say("asking all ranks to stop and save" if asked_at is None else "asking all ranks once more")
                asked_at = now
                step.ask_to_stop()
            late = self.signals.limit and self.ends_at is not None and now > self.ends_at - LAST_SECONDS
            if late or (step.first_failure and now > step.failed_at + FAILED_GRACE_SECONDS):
                say("out of time: killing all ranks" if late else "killing the ranks that outlived a failed one")
                failure = step.first_failure  # the next ones are of this kill
                code = step.kill(LAST_SECONDS / 2 if late else KILL_SECONDS)
                if code is None:
                    say("some rank cannot be killed: its node needs a look")
                    self.stuck = True
                code = step.code(KILLED if code is None else code)
                break
        else:
            failure = step.first_failure
        code = exit_code(self.folder, before, code)
        return code, failure if code not in (0, EXIT_STOPPED) else None

    def _told(self) -> bool:
        """Whether the ranks have to be told to stop; those of a job that Slurm itself ends have heard it already."""
        if self.signals.terminated and not self.signals.limit and self.ending is None:
            self.ending = self.job.state() != "RUNNING"
        return self.signals.limit or (self.signals.terminated and not self.ending)

    def _preflight(self, nodes: Sequence[str]) -> tuple[int, tuple[str, str] | None, dict[str, str]]:
        """(0 or an exit code, the first failure, the nodes that are not fit to train with their reasons)."""
        # Also of checks without a verdict: what they have left must not be taken for these ones.
        identifier = f"{self.job.id}-{self.job.restarts}-{len(list(self.folder.glob('preflight/*')))}"
        command = ["-m", "dist_cpt_launch.preflight", "--run-folder", str(self.folder), "--id", identifier]
        gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
        command += ["--gpus", gpus] if gpus.isdigit() else []
        command += shlex.split(os.environ.get("DIST_CPT_PREFLIGHT", ""))  # this site's limits
        step = self._step(nodes, 1, command)
        while (code := step.wait(0.25)) is None:
            if self.signals.terminated or self.signals.limit:
                step.kill()
                return 0, None, {}
        if code == 0 or self.signals.terminated or self.signals.limit:
            return 0, None, {}
        unfit = unfit_nodes(self._verdict(identifier, VERDICT_SECONDS if code == EXIT_NODE else 0.0), nodes)
        if not unfit:
            say("the checks of the nodes did not come to a verdict: no node is blamed")
            return step.code(code), step.first_failure, {}
        everyone = len(unfit) == len(nodes) > 1
        return EXIT_NODE if everyone else EXIT_INTERNAL, next(iter(unfit.items())), unfit

    def _verdict(self, identifier: str, seconds: float) -> dict[str, Any]:
        """What the nodes have agreed on; empty if they have not."""
        until = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError, ValueError):
                return json.loads((self.folder / "preflight" / f"{identifier}.json").read_text(encoding="utf-8"))
            if time.monotonic() >= until:
                return {}
            time.sleep(0.5)

    # -- the queue -----------------------------------------------------------------------------------------

    def _close(self, code: int, decision: Decision, goes_on: bool) -> int:
        """Leave this job: with the run's code, or by way of the queue."""
        if self.successor and not goes_on:
            said(["scancel", self.successor])
        if decision.action == "give up" and code == EXIT_STOPPED:
            return EXIT_INTERNAL  # RequeueExit would start it again, for ever
        if decision.action != "requeue":
            return code
        bad = self.record.bad_nodes()
        if self.successor:
            self.job.exclude(bad, self.successor)
            return NOT_REQUEUED  # lets the successor start
        if self.options.requeue_by == "requeue" and self.job.requeue(bad):
            return EXIT_STOPPED
        if self.options.requeue_by != "chain":
            say(f"exit code {EXIT_STOPPED}: RequeueExit={EXIT_STOPPED} makes Slurm requeue it, else submit it again")
        return EXIT_STOPPED

    def _submit_successor(self) -> str | None:
        """Queue the next job of the chain behind this one; it starts if this one does not end with 0."""
        argv = ["sbatch", "--parsable", *shlex.split(self.options.submit or "")]
        argv += [f"--dependency=afternotok:{self.job.id}", "--kill-on-invalid-dep=yes", "--no-requeue"]
        if self.job.task is not None:
            argv.append(f"--array={self.job.task}")
        arguments = self.options.arguments
        for name in ("--predecessor", "--chain-root"):
            arguments = [item for item in arguments if not item.startswith(f"{name}=")]
        arguments = [f"--predecessor={self.job.number}", f"--chain-root={self.record.job}", *arguments]
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"
        }
        argv += [self.options.script, f"--python={sys.executable}", *arguments]
        answer = said(argv, environment=inherited)
        if answer is None:
            say("no successor could be queued: submit the job again when this one ends")
            return None
        successor = answer.split(";")[0]
        say(f"job {successor} is queued behind this one")
        return successor


def unfit_nodes(verdict: Mapping[str, Any], nodes: Sequence[str]) -> dict[str, str]:
    """Those of `nodes` that a preflight's verdict calls unfit, each with the reason.

    What is wrong with all of them together, as a collective that never ended, makes all of them unfit: no single one
    may be struck for it.
    """
    found = {str(node): entry["reasons"] for node, entry in verdict.get("nodes", {}).items() if not entry["ok"]}
    unfit = {node: "; ".join(reasons) for node, reasons in found.items() if node in nodes}
    return unfit or (dict.fromkeys(nodes, "; ".join(verdict["reasons"])) if verdict.get("reasons") else {})


def pick(recipes: Sequence[str], task: int | None) -> str:
    """The recipe of this job: the only one, or the one of this task of an array.

    Raises:
        ConfigError: the array has more tasks than recipes, or there are several recipes and no array.
    """
    if len(recipes) == 1 and task is None:
        return recipes[0]
    if task is None:
        raise ConfigError(f"{len(recipes)} recipes in one job", remedy=f"sbatch --array=0-{len(recipes) - 1}")
    if not 0 <= task < len(recipes):
        raise ConfigError(f"task {task} of the array has no recipe: there are {len(recipes)}")
    return recipes[task]


def main(argv: Sequence[str]) -> int:
    """Entry point of train.sbatch."""
    signals = Signals().install()
    try:
        return Supervisor(_options(argv), Job.from_environment(), signals).run()
    except DistCptError as error:
        print(f"dist-cpt: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except OSError as error:
        print(f"dist-cpt: the run folder cannot be written: {error}", file=sys.stderr, flush=True)
        return EXIT_CANNOT_WRITE


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train.sbatch", description="Train inside a Slurm job, whatever happens.")
    parser.add_argument("recipe", nargs="+", help="a recipe; several in a job array, one per task")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", help="override a recipe key")
    parser.add_argument("--procs-per-node", type=int, help="ranks per node; default: --ntasks-per-node, else the GPUs")
    parser.add_argument("--max-restarts", type=int, default=3, help="restarts without a newer checkpoint")
    parser.add_argument("--lead", type=float, help="seconds before the limit; default: measured in the run folder")
    parser.add_argument("--requeue-by", choices=("requeue", "chain", "exit"), default="requeue")
    parser.add_argument("--submit", help="chain: sbatch options of the next job, quoted as for a shell")
    parser.add_argument("--srun", action="append", default=[], metavar="OPTION", help="one more option for srun")
    parser.add_argument("--no-preflight", action="store_true", help="do not check the nodes first")
    parser.add_argument("--script", default="train.sbatch", help=argparse.SUPPRESS)
    parser.add_argument("--predecessor", help=argparse.SUPPRESS)
    parser.add_argument("--chain-root", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(argv)
    for name in ("procs_per_node", "lead"):
        if getattr(options, name) is not None and not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    options.arguments = [item for item in argv if not item.startswith("--script=")]
    return options


def _tasks_per_node() -> int:
    for name in ("SLURM_NTASKS_PER_NODE", "SLURM_GPUS_ON_NODE"):
        if os.environ.get(name, "").isdigit():
            return max(1, int(os.environ[name]))
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
