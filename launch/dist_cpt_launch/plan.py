"""What a launch will run, decided before anything runs: `--dry-run` prints exactly this."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_cpt.config.resolve import run_folder, step_shape
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import ConfigError


@dataclass(frozen=True)
class LaunchPlan:
    """One node's command line and the environment it adds."""

    argv: tuple[str, ...]
    environment: dict[str, str]
    run_folder: Path

    def shown(self) -> str:
        """The plan as one line that a shell would run."""
        pairs = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        return " ".join([*pairs, shlex.join(self.argv)])


def local_plan(
    config: RunConfig,
    recipe: Path,
    overrides: Sequence[str],
    *,
    procs_per_node: int,
    threads_per_rank: int,
    stop_timeout_seconds: int = 240,
) -> LaunchPlan:
    """All ranks on this host: one plain process, or torchrun for more.

    Raises:
        ConfigError: the recipe's batch does not divide over the ranks, or one engine cannot use them.
    """
    if procs_per_node < 1:
        raise ConfigError(f"--procs-per-node {procs_per_node}: at least 1 is needed")
    if config.engine.kind == "single" and procs_per_node > 1:
        raise ConfigError(
            f"engine.kind: single runs on one rank, not on {procs_per_node}",
            remedy="use engine.kind: fsdp, zero or auto, or --procs-per-node 1",
        )
    step_shape(config, procs_per_node)
    worker = ["-m", "dist_cpt.cli", "train", str(recipe.absolute())]
    for item in overrides:
        worker += ["--set", item]
    argv: list[str] = [sys.executable]
    if procs_per_node > 1:
        # fmt: off
        argv += [
            "-m", "dist_cpt.runtime.torchrun", "--standalone", "--nnodes=1",
            f"--nproc-per-node={procs_per_node}", "--max-restarts=0",
            f"--shutdown-timeout={stop_timeout_seconds}",
        ]
        # fmt: on
    # Threads that wait by spinning halve the speed of everybody on a busy host, and cost 5 % less on an idle one.
    environment = {"OMP_NUM_THREADS": str(threads_per_rank), "OMP_WAIT_POLICY": "passive"}
    return LaunchPlan(tuple(argv + worker), environment, run_folder(config))
