"""The options of `launch` and `resume`, as the command line parses them and as plans read them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

Sbatch = Annotated[str | None, typer.Option(help="slurm: as sbatch takes it.")]


@dataclass(frozen=True)
class ResumeOptions:
    """None leaves an option to its default, or to the cluster's."""

    nodes: Annotated[int, typer.Option(min=1, help="Hosts.")] = 1
    procs_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks on each host; default 1, on slurm one for each GPU asked for.")
    ] = None
    rdzv: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="local: where hosts meet that start the same command.")
    ] = None
    min_nodes: Annotated[int | None, typer.Option(min=1, help="slurm: start with so few, up to --nodes.")] = None
    time: Annotated[str | None, typer.Option(help="slurm: the limit of one job; the run may need several.")] = None
    partition: Sbatch = None
    account: Sbatch = None
    qos: Sbatch = None
    gres: Sbatch = None
    gpus_per_node: Sbatch = None
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="slurm: CPU cores per rank.")] = None
    save_before_limit: Annotated[
        int | None,
        typer.Option(min=1, help="slurm: seconds before the time limit at which to stop and save; default: measured."),
    ] = None
    max_restarts: Annotated[
        int | None,
        typer.Option(min=0, help="slurm: restarts without a newer checkpoint before it gives up; default 3."),
    ] = None
    requeue_by: Annotated[str | None, typer.Option(help="slurm: requeue (default), chain or exit (docs/slurm.md).")] = (
        None
    )
    preflight: Annotated[
        bool | None,
        typer.Option("--preflight/--no-preflight", help="slurm, kubernetes: check every node before the ranks start."),
    ] = None
    sbatch: Annotated[list[str] | None, typer.Option(metavar="OPTION", help="slurm: one more option of sbatch.")] = None
    srun: Annotated[list[str] | None, typer.Option(metavar="OPTION", help="slurm: one more option of srun.")] = None


@dataclass(frozen=True)
class LaunchOptions(ResumeOptions):
    """What only `launch` takes beside."""

    from_start: Annotated[
        bool | None, typer.Option("--from-start", help="Begin anew: an earlier run of this name is moved aside.")
    ] = None
    prepare: Annotated[
        bool | None, typer.Option("--prepare", help="slurm: prepare the recipe's data, and train nothing.")
    ] = None
    tasks: Annotated[int | None, typer.Option(min=1, help="slurm: of --prepare, the tasks that share the work.")] = None
    max_running: Annotated[
        int | None, typer.Option(min=1, help="slurm: of several recipes or tasks, how many run at a time.")
    ] = None
    cluster: Annotated[
        Path | None, typer.Option(metavar="FILE", help="kubernetes: image, volumes, secrets by name (YAML).")
    ] = None
    kind: Annotated[str | None, typer.Option(help="kubernetes: trainjob (default) or jobset.")] = None
