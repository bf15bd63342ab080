"""What a machine and a model are fit for: preflight, doctor, model-check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dist_cpt.commands.arguments import TOOLS, Json, show
from dist_cpt.errors import ConfigError, NodeError

app = typer.Typer()


@app.command(
    rich_help_panel=TOOLS,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
)
def preflight(context: typer.Context) -> None:
    """Check this node before training: versions, disk, clock, GPUs, all-reduce."""
    from dist_cpt_launch.preflight import main as check

    raise typer.Exit(check(context.args))


@app.command(rich_help_panel=TOOLS)
def doctor(
    folder: Annotated[
        Path, typer.Option("--folder", metavar="DIR", help="Whose file system to try: an output_dir.")
    ] = Path(),
    json_: Json = False,
) -> None:
    """Say what this machine has for a run, and how to repair what it lacks; exit code 69 if no run can work here."""
    from dist_cpt_launch.doctor import show

    if not show(folder, as_json_=json_):
        raise NodeError("something that every run needs is broken")


@app.command("model-check", rich_help_panel=TOOLS)
def model_check(
    path: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a hub id in the cache.")],
    build: Annotated[
        bool, typer.Option("--build", help="Also build it without weights, as transformers does.")
    ] = False,
    json_: Json = False,
) -> None:
    """Show which parts of a model train, are fused, quantised, sharded or refused (exit 64), from its config.json."""
    from dist_cpt.plan.model_check import as_text, check_model
    from dist_cpt.plan.shapes import find_config, is_known

    config = find_config(path)
    check = check_model(config) if is_known(config) or not build else None
    built = None
    if build:
        from dist_cpt.model.build_check import check_build

        built = check_build(path)
    found = (check.as_json() if check else {}) | ({"built": vars(built)} if built else {})
    show(found, [*(as_text(check) if check else ()), *(built.as_text() if built else ())], json_)
    if check is not None and check.refused:
        raise ConfigError(f"{path} cannot be trained: {check.refused[0]}")
