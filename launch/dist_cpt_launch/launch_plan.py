"""What to launch: the command that the options become. `--dry-run` prints the plan."""

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
from dist_cpt_launch.launch_options import ResumeOptions
from dist_cpt_launch.time_limit import save_before_limit

MIN_SHUTDOWN_SECONDS = 240  # that torchrun waits for ranks that are saving before it kills them


@dataclass(frozen=True)
class LaunchPlan:
    """A command line, torchrun's or sbatch's, and the environment variables it adds."""

    argv: tuple[str, ...]
    environment: dict[str, str]
    run_folder: Path
    log_folder: Path | None = None  # created before the command runs

    def shell_line(self) -> str:
        """The plan as one line for a shell."""
        pairs = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        first = [] if self.log_folder is None else ["mkdir -p", shlex.quote(str(self.log_folder)), "&&"]
        return " ".join([*first, *pairs, shlex.join(self.argv)])


def local_plan(
    config: RunConfig, recipe: Path, overrides: Sequence[str], options: ResumeOptions, *, threads_per_rank: int
) -> LaunchPlan:
    """All ranks of this host: a plain process for one rank, else torchrun.

    With `options.rdzv`, the HOST:PORT of the first host, the same command on each host joins one run.

    Raises:
        ConfigError: the recipe cannot use that many ranks, or --rdzv is missing or malformed.
    """
    nodes, procs_per_node, rdzv = options.nodes, options.procs_per_node or 1, options.rdzv
    ranks = nodes * procs_per_node
    _require_single_rank(config, ranks)
    step_shape(config, ranks)
    if nodes > 1 and rdzv is None:
        raise ConfigError(
            f"--nodes {nodes}: this command starts only the ranks of this host",
            remedy="add --rdzv HOST:PORT of the first host and run it on every host, or use --on slurm",
        )
    if rdzv is not None and not re.fullmatch(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}", rdzv):
        raise ConfigError(f"--rdzv {rdzv!r}: expected HOST:PORT")
    argv = [sys.executable]
    if ranks > 1:
        meeting = ["--standalone", "--nnodes=1"]
        if rdzv is not None:
            meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={rdzv}", f"--rdzv-id={config.name}"]
            meeting.append(f"--nnodes={nodes}")
        shutdown = max(MIN_SHUTDOWN_SECONDS, save_before_limit(run_folder(config)))
        argv += ["-m", "dist_cpt.runtime.torchrun", *meeting, f"--nproc-per-node={procs_per_node}"]
        argv += ["--max-restarts=0", f"--shutdown-timeout={shutdown}"]
    argv += ["-m", "dist_cpt.cli", "train", str(recipe.absolute())]
    for override in overrides:
        argv += ["--set", override]
    # Waiting threads that spin halve everyone's speed on a busy host; sleeping costs 5 % on an idle one.
    environment = {"OMP_NUM_THREADS": str(threads_per_rank), "OMP_WAIT_POLICY": "passive"}
    environment["PYTHONSAFEPATH"] = "1"  # `-m` would import a yaml.py of the current folder
    return LaunchPlan(tuple(argv), environment, run_folder(config))


def usable_nodes(config: RunConfig, nodes: int, procs_per_node: int) -> int:
    """The largest number of nodes, at most `nodes`, whose ranks divide the recipe's global batch.

    Raises:
        ConfigError: not even one node does.
    """
    _require_single_rank(config, procs_per_node)
    for count in range(1 if config.engine.kind == "single" else nodes, 1, -1):
        try:
            step_shape(config, count * procs_per_node)
        except ConfigError:
            continue
        return count
    step_shape(config, procs_per_node)
    return 1


def _require_single_rank(config: RunConfig, ranks: int) -> None:
    if config.engine.kind == "single" and ranks > 1:
        raise ConfigError(
            f"engine.kind: single runs on one rank, not on {ranks}",
            remedy="use engine.kind: fsdp, zero or auto, or --procs-per-node 1",
        )
