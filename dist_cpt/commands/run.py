"""The commands that start, resume and change a run: train, launch, resume, branch, extend."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from dist_cpt_launch.command_line import with_options
from dist_cpt_launch.launch_options import LaunchOptions, ResumeOptions

from dist_cpt.commands.arguments import RUN, Overrides, Recipe, Run, load, overrides_of, require_run_folder
from dist_cpt.errors import EXIT_DONE, CheckpointError, ConfigError
from dist_cpt.run_folder.names import MANIFEST, RECIPE

app = typer.Typer()
Accept = Annotated[
    str | None,
    typer.Option("--accept-changes", metavar="KEY,...", help="Settings that a resume may change (docs/recipe.md)."),
]
Profile = Annotated[
    str | None, typer.Option("--profile", metavar="A:B", help="Trace steps A to B, and say where their time went.")
]
On = Annotated[str, typer.Option("--on", help="local, slurm or kubernetes")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the command that would run, and stop.")]


@app.command(rich_help_panel=RUN)
def train(
    recipe: Recipe,
    set_: Overrides = None,
    accept: Accept = None,
    profile: Profile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plot the learning rates by group, and stop.")] = False,
) -> None:
    """Train as one process: alone, or as one rank under torchrun, srun, accelerate or deepspeed launch."""
    if dry_run:
        from dist_cpt.optim.rate_plot import rate_plot

        print(*rate_plot(load(recipe, overrides_of(set_, accept, profile))), sep="\n")
        return
    from dist_cpt.runtime.stop import StopRequest, stop_with_parent

    stop = StopRequest().install()  # before torch is loaded: a signal during imports already counts
    if "TORCHELASTIC_RUN_ID" in os.environ:
        stop_with_parent()
    config = load(recipe, overrides_of(set_, accept, profile))
    from dist_cpt.checkpoint.finished import says_finished
    from dist_cpt.config.places import require_places
    from dist_cpt.runtime.env import process_env

    if process_env().world_size == 1:  # several ranks ask rank 0
        if says_finished(config):
            raise typer.Exit(EXIT_DONE)
        require_places(config)
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # Packed batches and gathered units differ in size; read when torch is loaded.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    from dist_cpt.train.run import train as train_run

    code, folder = train_run(config, stop, even_if_finished=False)
    if folder is not None:  # rank 0, and the folder is this run's
        from dist_cpt.report.report import write_report

        write_report(folder)
    raise typer.Exit(code)


@app.command(rich_help_panel=RUN)
@with_options(LaunchOptions)
def launch(
    recipe: Annotated[list[Path], typer.Argument(metavar="RECIPE", help="A recipe; on slurm several make an array.")],
    options: LaunchOptions,
    on: On = "local",
    dry_run: DryRun = False,
    set_: Overrides = None,
    accept: Accept = None,
    profile: Profile = None,
) -> None:
    """Start all ranks of a run and return the run's exit code; on slurm, submit the job that does."""
    from dist_cpt_launch.dispatch import launch as launch_recipes

    raise typer.Exit(launch_recipes(recipe, overrides_of(set_, accept, profile), options, on=on, dry_run=dry_run))


@app.command(rich_help_panel=RUN)
@with_options(ResumeOptions)
def resume(
    run: Run,
    options: ResumeOptions,
    on: On = "local",
    dry_run: DryRun = False,
    set_: Overrides = None,
    accept: Accept = None,
    profile: Profile = None,
) -> None:
    """Continue a run from its newest valid checkpoint; engine, number of ranks and every path may change."""
    recipe = require_run_folder(run) / RECIPE
    from dist_cpt.run_folder.checkpoints import published
    from dist_cpt.storage import is_there

    if not any(is_there(path / MANIFEST) for path in published(run)):
        raise CheckpointError(
            f"{run} has no finished checkpoint to resume from",
            remedy=f"dist-cpt launch {recipe} starts it again",
        )
    if on == "kubernetes":
        raise ConfigError("resume does not take --on kubernetes", remedy="dist-cpt launch RECIPE --on kubernetes")
    from dist_cpt_launch.dispatch import launch as launch_recipes

    from dist_cpt.config.resolve import run_folder, settings_of_place

    overrides = overrides_of(set_, accept, profile)
    overrides = [*settings_of_place(load(recipe, None), run, overrides), *overrides]
    folder = run_folder(load(recipe, overrides))
    if not (folder.is_dir() and folder.samefile(run)):  # else it would start from nothing over there
        raise ConfigError(f"--set names {folder}, not {run}", remedy="leave out --set name and --set output_dir")
    options = LaunchOptions(**vars(options))
    raise typer.Exit(launch_recipes([recipe], overrides, options, on=on, dry_run=dry_run))


@app.command(rich_help_panel=RUN)
def branch(
    run: Run,
    at: Annotated[int, typer.Option("--at", min=0, metavar="STEP", help="The step of one of its checkpoints.")],
    name: Annotated[str, typer.Option("--name", help="The new run's name; its folder is beside the run's.")],
    set_: Overrides = None,
) -> None:
    """Make a new run that continues from a checkpoint of another, which may be training; a resume trains it."""
    from dist_cpt.train.branch import branch as make_branch
    from dist_cpt.train.branch import branch_lines

    print(*branch_lines(make_branch(require_run_folder(run), at, name, set_ or ())), sep="\n")


@app.command(rich_help_panel=RUN)
def extend(
    run: Run,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="The new total, counted as train.tokens.")],
) -> None:
    """Set a new, larger total of tokens for a run; a resume trains up to it."""
    from dist_cpt.train.extend import extend as extend_run

    print(*extend_run(require_run_folder(run), tokens).lines(), sep="\n")
