"""What a launch will run, decided before anything runs: `--dry-run` prints exactly this."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_cpt.config.resolve import run_folder, step_shape
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import ConfigError
from dist_cpt_launch.time_limit import lead_seconds

STOP_SECONDS = 240  # at least so long may ranks that were told to stop take, before torchrun kills them


@dataclass(frozen=True)
class LaunchPlan:
    """One command line and the environment it adds: of a host's ranks, or of sbatch."""

    argv: tuple[str, ...]
    environment: dict[str, str]
    run_folder: Path
    log_folder: Path | None = None  # to be made first, where the scheduler does not make it

    def shown(self) -> str:
        """The plan as one line that a shell would run."""
        pairs = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        first = [] if self.log_folder is None else ["mkdir -p", shlex.quote(str(self.log_folder)), "&&"]
        return " ".join([*first, *pairs, shlex.join(self.argv)])


def local_plan(
    config: RunConfig,
    recipe: Path,
    overrides: Sequence[str],
    *,
    procs_per_node: int,
    threads_per_rank: int,
    nodes: int = 1,
    rdzv: str | None = None,
) -> LaunchPlan:
    """All ranks of this host: one plain process, or torchrun for more.

    With `rdzv`, HOST:PORT on the first host, the same command on each of `nodes` hosts is one run.

    Raises:
        ConfigError: the recipe's batch does not divide over the ranks, or one engine cannot use them.
    """
    ranks = nodes * procs_per_node
    if ranks < 1:
        raise ConfigError(f"--nodes {nodes}, --procs-per-node {procs_per_node}: at least 1 is needed")
    if config.engine.kind == "single" and ranks > 1:
        raise ConfigError(
            f"engine.kind: single runs on one rank, not on {ranks}",
            remedy="use engine.kind: fsdp, zero or auto, or --procs-per-node 1",
        )
    step_shape(config, ranks)
    if nodes > 1 and rdzv is None:
        raise ConfigError(
            f"--nodes {nodes}: this command starts the ranks of this host only",
            remedy="add --rdzv HOST:PORT of the first host and start it on every host, or use --on slurm",
        )
    if rdzv is not None and not re.fullmatch(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}", rdzv):
        raise ConfigError(f"--rdzv {rdzv!r}: expected HOST:PORT")
    worker = ["-m", "dist_cpt.cli", "train", str(recipe.absolute())]
    for item in overrides:
        worker += ["--set", item]
    argv: list[str] = [sys.executable]
    if ranks > 1:
        meet = ["--standalone", "--nnodes=1"]
        if rdzv is not None:
            meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint={rdzv}", f"--rdzv-id={config.name}", f"--nnodes={nodes}"]
        # fmt: off
        argv += [
            "-m", "dist_cpt.runtime.torchrun", *meet, f"--nproc-per-node={procs_per_node}", "--max-restarts=0",
            f"--shutdown-timeout={max(STOP_SECONDS, lead_seconds(run_folder(config)))}",
        ]
        # fmt: on
    # Threads that wait by spinning halve the speed of everybody on a busy host, and cost 5 % less on an idle one.
    environment = {"OMP_NUM_THREADS": str(threads_per_rank), "OMP_WAIT_POLICY": "passive"}
    return LaunchPlan(tuple(argv + worker), environment, run_folder(config))
