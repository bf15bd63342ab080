"""The commands that look at a run and change nothing: status, report, verify, inspect."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Annotated

import typer

from dist_cpt.commands.arguments import LOOK, Json, require_run_folder, show
from dist_cpt.errors import CheckpointError, ConfigError, DataError
from dist_cpt.run_folder.names import CHECKPOINTS, MANIFEST

app = typer.Typer()
Checked = Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder or one checkpoint.")]


@app.command(rich_help_panel=LOOK)
def status(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="Default: the newest in runs/.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Again every 5 seconds until the run has ended.")] = False,
    json_: Json = False,
) -> None:
    """Show where a run is: step, speed, goodput, restarts, checkpoint, heartbeats."""
    from dist_cpt_launch.status import find_run, show_status
    from dist_cpt_launch.status_text import as_text

    show_status(find_run(run), lambda status: json.dumps(status.as_json()) if json_ else as_text(status), watch)


@app.command(rich_help_panel=LOOK)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN...]", help="A run folder; several are compared.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Default: RUN/report.html; of several comparison.html.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Serve the page on 127.0.0.1 until Ctrl-C.")] = False,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="With --watch; 0 is any free one.")] = 0,
) -> None:
    """Write the page of a run, finished or not, or of several runs a comparison."""
    from dist_cpt.report.compare import comparison_html
    from dist_cpt.report.report import report_html, write_page, write_report
    from dist_cpt.run_folder.contents import read_run

    folders = [require_run_folder(run) for run in runs]
    if port and not watch:
        raise ConfigError("--port belongs to --watch")
    if watch:
        from dist_cpt.report.watch import REFRESH_SECONDS, page_server

        if out is not None:
            raise ConfigError("--out and --watch exclude each other")

        def page() -> str:
            if len(folders) > 1:
                return comparison_html(folders, refresh_seconds=REFRESH_SECONDS)
            return report_html(read_run(folders[0]), refresh_seconds=REFRESH_SECONDS)

        server = page_server(folders, page, port)
        print(f"http://127.0.0.1:{server.server_port}/  (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt), server:
            server.serve_forever()
    elif len(folders) > 1:
        print(write_page(comparison_html(folders), out or Path("comparison.html")))
    else:
        print(write_report(folders[0], out))


@app.command(rich_help_panel=LOOK)
def verify(path: Checked) -> None:
    """Check every byte of a checkpoint, or of a run, its record and its token stores; exit code 74, for a store 65."""
    path = Path(os.path.abspath(path))  # `.` has no name
    if not path.is_dir():
        raise CheckpointError(f"nothing to verify: {path} is not a folder")
    is_run = (path / CHECKPOINTS).is_dir()
    if not is_run and not (path / MANIFEST).exists() and not path.name.startswith("step-"):
        raise CheckpointError(f"nothing to verify: {path} is neither a run folder nor a checkpoint")
    from dist_cpt.checkpoint.verify import verify_checkpoint, verify_run, verify_stores
    from dist_cpt.errors import printable

    checked = verify_run(path) if is_run else {path.name: verify_checkpoint(path)}
    record: list[str] = []
    stores: dict[str, list[str] | None] = {}
    if is_run:
        from dist_cpt.run_folder.audit import record_problems

        record, stores = record_problems(path), verify_stores(path)
    found = {**checked, **{f"token store {name}": problems for name, problems in stores.items()}}
    for name, problems in found.items():
        word = "not found here" if problems is None else f"DAMAGED: {'; '.join(problems)}" if problems else "valid"
        print(printable(f"{name}: {word}"))
    for problem in record:
        print(printable(f"record: {problem}"))
    if is_run and not record:
        print("record: valid")
    damaged = [name for name, problems in checked.items() if problems]
    if damaged:
        raise CheckpointError(f"{len(damaged)} of {len(checked)} checkpoints are damaged: {', '.join(damaged)}")
    if record:
        raise CheckpointError(f"the checkpoints of {path} are valid, but its record has {len(record)} problems")
    if damaged := [name for name, problems in stores.items() if problems]:
        remedy = "dist-cpt prepare sets a damaged store aside and makes it again"
        raise DataError(f"the token stores {', '.join(damaged)} are damaged", remedy=remedy)


@app.command(rich_help_panel=LOOK)
def inspect(
    path: Checked,
    json_: Json = False,
) -> None:
    """Show what is inside: step, groups, sizes, identities, lineage. Reads no tensor."""
    from dist_cpt.checkpoint.inspect import as_text, inspect_path
    from dist_cpt.errors import printable

    content = inspect_path(Path(os.path.abspath(path)))
    show(content, [as_text(content)], json_)
    if content.get("problem"):  # of one checkpoint; a run shows its newest valid one
        raise CheckpointError(printable(f"{path} is damaged: {content['problem']}"))
