"""A real Slurm on this one host: munge, slurmctld and four slurmd from Debian's packages, in a folder of its own.

The host's own Slurm is not touched. It runs as root, without systemd, cgroups or a database.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
CPUS = 4  # claimed per node, whatever the host has

CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
TaskProlog={folder}/prolog
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
GresTypes=gpu
JobRequeue=1
RequeueExit=75
ReturnToService=2
KillWait=15
MinJobAge=300
SlurmctldTimeout=30
SlurmdTimeout=10
MessageTimeout=10
NodeName={prefix}[1-4] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first_slurmd_port}-{last_slurmd_port}] \
CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 \
RealMemory=4000 Gres=gpu:fake:2 State=UNKNOWN
PartitionName=low Nodes={prefix}[1-4] Default=YES DefaultTime=60 PriorityTier=1 \
PreemptMode=REQUEUE GraceTime=30 State=UP
PartitionName=high Nodes={prefix}[1-4] DefaultTime=60 PriorityTier=10 PreemptMode=OFF State=UP
"""


class Cluster:
    """Started daemons; `environment` is what clients need. The nodes, PREFIX1 to PREFIX4, share one address."""

    def __init__(self, folder: Path, prefix: str = "n") -> None:
        self.folder, self.prefix = folder, prefix
        self.nodes = [f"{prefix}{number}" for number in range(1, 5)]
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.config = folder / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self.config), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}

    def start(self) -> None:
        """Bring all daemons up and wait until every node is idle.

        Raises:
            TimeoutError: some node did not come up; the message ends with the controller's log.
        """
        for name in ("state", "spool", "run", "log", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        ports = _free_ports(5)
        self.config.write_text(
            CONFIG.format(
                folder=self.folder,
                prefix=self.prefix,
                host=socket.gethostname(),
                port=ports[0],
                first_slurmd_port=ports[1],
                last_slurmd_port=ports[4],
                cpus=CPUS,
            )
        )
        for number in range(2):
            device = self.folder / "dev" / f"gpu{number}"
            if not device.exists():
                os.mknod(device, 0o20600, os.makedev(1, 3))  # a GPU that is /dev/null
        gres = f"AutoDetect=off\nNodeName={self.prefix}[1-4] Name=gpu Type=fake File={self.folder}/dev/gpu[0-1]\n"
        (self.folder / "gres.conf").write_text(gres)
        prolog = self.folder / "prolog"  # what it prints, `export A=B`, a task of that node has in its environment
        prolog.write_text(f"#!/bin/sh\ncat {self.folder}/task-of-$SLURMD_NODENAME 2> /dev/null; true\n")
        prolog.chmod(0o755)
        key = self.folder / "munge.key"
        self.run("mungekey", "--create", f"--keyfile={key}")
        # fmt: off
        self._daemon("munged", "munged", "--foreground", "--force", f"--key-file={key}",
                     f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/run/munged.pid",
                     f"--log-file={self.folder}/log/munged.log", f"--seed-file={self.folder}/munge.seed")
        # fmt: on
        _until(lambda: (self.folder / "munge.socket").exists(), 10, "munged opens its socket")
        self._daemon("slurmctld", "slurmctld", "-D", "-f", str(self.config), "-c", "-i")
        for name in self.nodes:
            self.start_node(name)
        try:
            self.wait_until_idle()
        except TimeoutError as error:
            log = (self.folder / "log/slurmctld.log").read_text()[-3000:]
            raise TimeoutError(f"{error}\n{log}") from None

    def wait_until_idle(self) -> None:
        """Until every node is up and has nothing to do.

        Raises:
            TimeoutError: some node has, for a minute.
        """
        try:
            _until(lambda: self.states() == dict.fromkeys(self.nodes, "idle"), 60, "all nodes are idle")
        except TimeoutError as error:
            raise TimeoutError(f"{error}; they are {self.states()}") from None

    def start_node(self, name: str) -> None:
        """One slurmd."""
        self._daemon(name, "slurmd", "-D", "-f", str(self.config), "-N", name)

    def kill_node(self, name: str) -> None:
        """slurmd dies at once, as with its host; the processes of its jobs keep running."""
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def states(self) -> dict[str, str]:
        """Node states as sinfo names them."""
        done = self.run("sinfo", "-h", "-N", "-o", "%N %t", check=False)
        return dict(line.split() for line in done.stdout.splitlines())

    def jobs(self) -> list[str]:
        """Jobs that have not ended."""
        return self.run("squeue", "-h", "-a", "-o", "%A").stdout.split()

    def job(self, job: str) -> dict[str, str]:
        """A job's fields by scontrol."""
        text = self.run("scontrol", "-o", "show", "job", job).stdout.splitlines()[0]
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait_for(self, job: str, states: tuple[str, ...], timeout_seconds: float) -> dict[str, str]:
        """Wait until the job is in one of the states.

        Raises:
            TimeoutError: it was not.
        """
        found: dict[str, str] = {}

        def there() -> bool:
            found.update(self.job(job))
            return found["JobState"] in states

        try:
            _until(there, timeout_seconds, f"job {job} is {states}")
        except TimeoutError as error:
            raise TimeoutError(f"{error}; it is {found}") from None
        return found

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """A client command."""
        return subprocess.run(
            command, env=os.environ | self.environment | environment, capture_output=True, text=True, check=check
        )

    def stop(self) -> None:
        """Cancel every job, end every daemon."""
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            for job in self.jobs():
                self.run("scancel", job, check=False)
            for name in self.nodes:
                if name not in self.daemons:
                    self.start_node(name)
            for job in self.jobs():
                self.run("scancel", "--signal=KILL", "--full", job, check=False)
            _until(lambda: not self.jobs(), 30, "all jobs have ended", optional=True)
        for name in [*self.nodes, "slurmctld", "munged"]:
            daemon = self.daemons.pop(name, None)
            if daemon is not None:
                daemon.terminate()
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                command,
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )


def missing() -> list[str]:
    """What this host lacks to start a cluster."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if os.geteuid() != 0:
        absent.append("root")
    return absent


def _until(condition, timeout_seconds: float, what: str, *, optional: bool = False) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            if optional:
                return
            raise TimeoutError(f"not within {timeout_seconds:g} s: {what}")
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    """Consecutive free ports."""
    for base in range(21000 + os.getpid() % 500 * 16, 64000, 16):
        ports = list(range(base, base + count))
        with contextlib.ExitStack() as stack:
            try:
                for port in ports:
                    probe = stack.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return ports
    raise OSError("no free ports")


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no daemon outlives a killed test run
