"""The dist-cpt command: parse, load the recipe, call one function. Loads no torch before a command needs it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from dist_cpt_launch.command_line import with_options
from dist_cpt_launch.launch_options import LaunchOptions, ResumeOptions

from dist_cpt import __version__
from dist_cpt.errors import (
    EXIT_DONE,
    EXIT_INTERNAL,
    EXIT_STOPPED,
    CheckpointError,
    ConfigError,
    DataError,
    DistCptError,
    NodeError,
    WriteError,
    say,
)
from dist_cpt.run_folder.names import ADAPTER_CONFIG, CHECKPOINTS, MANIFEST, MODEL_CONFIG, RECIPE, REPORT
from dist_cpt.storage import explained

INTERRUPTED = 130
READER_GONE = 128 + signal.SIGPIPE  # as of a program that the signal ends: dist-cpt ... | head -1
RUN, LOOK, AFTER, TOOLS = "Run", "Look at a run", "After training", "Tools"  # the groups of --help

app = typer.Typer(
    name="dist-cpt",
    help="Distributed continued pretraining: any run resumes anywhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=value", help="Override a recipe key; the value is YAML."),
]
Accept = Annotated[
    str | None,
    typer.Option("--accept-changes", metavar="KEY,...", help="Settings that a resume may change (docs/recipe.md)."),
]
Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder: <output_dir>/<name>.")]
On = Annotated[str, typer.Option("--on", help="local, slurm or kubernetes")]
DType = Annotated[str, typer.Option("--dtype", help="bf16, fp16 or fp32")]
Base = Annotated[str | None, typer.Option("--base", help="Where the base is now, if it moved.")]
Gpus = Annotated[int | None, typer.Option("--gpus", min=1, help="On each node; default 8, of cpu 1.")]
Gpu = Annotated[str, typer.Option("--gpu", help="h100, h200, b200, a100, l40s or cpu")]
Nodes = Annotated[int, typer.Option("--nodes", min=1, help="Hosts.")]
Network = Annotated[str, typer.Option("--network", help="Of one GPU to other nodes, such as 50GBps.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the command that would run, and stop.")]


@app.command(rich_help_panel=RUN)
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for everything the demo makes.")] = Path("demo-run"),
) -> None:
    """The whole story on an embedded example: two ranks, a stop, a resume under another engine, a report."""
    from dist_cpt.demo import run_demo

    raise typer.Exit(run_demo(out))


@app.command(rich_help_panel=RUN)
def prepare(
    recipe: Recipe,
    set_: Overrides = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes of this host that tokenise.")] = 1,
    in_part: Annotated[
        bool, typer.Option("--in-part", help="Leave what other processes work on to them, and end.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be read, with ten documents.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Turn raw text into token stores, and print a data report; any number of processes and hosts share the work."""
    config = _load(recipe, set_)
    from dist_cpt.data.data_report import data_report, preview, report_lines
    from dist_cpt.data.prepare import prepare as prepare_data
    from dist_cpt.data.prepare import prepare_in_part
    from dist_cpt.data.progress_line import shown_progress

    if dry_run:
        print(*preview(config), sep="\n")
        return
    with shown_progress(sys.stderr) as progress:
        if in_part:
            prepared = prepare_in_part(config, progress, workers=workers)
        else:
            prepared = prepare_data(config, progress, verify=True, workers=workers)
    if prepared is None:
        say("the rest is left to other processes, the last of which makes the store")
        return
    from dist_cpt.data.documents import open_documents
    from dist_cpt.data.store_facts import store_facts
    from dist_cpt.report.report import write_page
    from dist_cpt.report.store_page import store_page

    for folder in {source.store.folder.resolve() for source in prepared.all_sources}:
        with contextlib.suppress(WriteError):  # a store given may be on a read-only file system
            write_page(store_page(store_facts(open_documents(folder))), folder / REPORT)
    report = data_report(prepared)
    print(*([json.dumps(report, indent=1)] if json_ else report_lines(report)), sep="\n")


@app.command(rich_help_panel=RUN)
def replay(
    recipe: Recipe,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Sampled tokens to make.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the source; one begun earlier is continued.")],
    seeds: Annotated[
        list[str] | None, typer.Option("--seeds", metavar="FILE", help="Texts whose first tokens begin the documents.")
    ] = None,
    seed_tokens: Annotated[int, typer.Option(min=1, help="How many of those tokens.")] = 16,
    temperature: Annotated[float, typer.Option(help="1 is the base's own distribution.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="1 is off")] = 1.0,
    max_document_tokens: Annotated[
        int | None, typer.Option(min=1, help="Default: what fits into one sequence.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Documents at a time.")] = 16,
    seed: Annotated[int | None, typer.Option(help="Default: the recipe's.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="The report as one JSON object.")] = False,
    set_: Overrides = None,
) -> None:
    """Sample text from the model that a recipe starts from, as a source for role: replay."""
    config = _load(recipe, set_)
    from dist_cpt.export.replay import ProgressLine, ReplayOptions, report_lines
    from dist_cpt.export.replay import replay as sample

    options = ReplayOptions(
        config.seed if seed is None else seed,
        temperature,
        top_p,
        max_document_tokens,
        tuple(seeds or ()),
        seed_tokens,
    )
    report = sample(config, tokens, out, options, batch, ProgressLine(tokens))
    print(*([json.dumps(report, indent=1)] if json_ else report_lines(report, out)), sep="\n")


@app.command(rich_help_panel=RUN)
def init(
    model: Annotated[str, typer.Option("--model", help="A model folder, or a hub id in the cache.")],
    data: Annotated[
        list[str], typer.Option("--data", help="Text: a file, a folder or a pattern; several are sources.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The new recipe.")] = Path(RECIPE),
    gpus: Gpus = None,
    gpu: Gpu = "h100",
    nodes: Nodes = 1,
    network: Network = "50GBps",
) -> None:
    """Write a commented recipe for a model and text: the fastest way that fits the machine."""
    from dist_cpt.plan.devices import machine_of
    from dist_cpt.plan.starter_recipe import starter_recipe, write_new

    write_new(out, starter_recipe(model, data, machine_of(gpu, nodes, gpus, network), out))
    print(f"{out}: dist-cpt plan {out} shows the other ways")


@app.command("import-config", rich_help_panel=RUN)
def import_config(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A YAML file of Axolotl or LLaMA-Factory.")],
    out: Annotated[Path, typer.Option("--out", help="The new recipe.")] = Path(RECIPE),
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Of the whole job: they multiply its batch size.")] = 1,
    name: Annotated[str | None, typer.Option("--name", help="Default: the file's.")] = None,
) -> None:
    """Write another program's configuration as a recipe, and name every key that it cannot say."""
    from dist_cpt.config.import_config import dropped_lines, recipe_text
    from dist_cpt.config.import_config import import_config as read
    from dist_cpt.plan.starter_recipe import write_new

    made = read(file, gpus, name)
    write_new(out, recipe_text(made, file))
    print(f"{out}: from a file of {made.program}", *(f"  assumed: {text}" for text in made.assumed), sep="\n")
    print(*(f"  not taken over: {line}" for line in dropped_lines(made)), sep="\n")


@app.command(rich_help_panel=RUN)
def plan(
    recipe: Recipe,
    gpus: Gpus = None,
    gpu: Gpu = "h100",
    nodes: Nodes = 1,
    network: Network = "50GBps",
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine's rates first, and plan with them from now on.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object, with every micro-batch.")] = False,
    set_: Overrides = None,
) -> None:
    """Predict memory and tokens/s of every way to run a recipe, fastest first. Needs no GPU and loads no torch."""
    from dataclasses import replace

    from dist_cpt.plan.calibrate import RATES, calibrated
    from dist_cpt.plan.devices import machine_of
    from dist_cpt.plan.plan import make_plan, model_config
    from dist_cpt.plan.plan_text import as_json, as_text

    config, machine = _load(recipe, set_), machine_of(gpu, nodes, gpus, network)
    if calibrate:
        from dist_cpt.plan.calibrate import calibrate as measure

        rates = measure()
        say(f"{rates['name']}: " + ", ".join(f"{name} {rates[name]:.3g}/s" for name in RATES))
    if gpu == "cpu" or calibrate:
        machine = replace(machine, device=calibrated(machine.device))
    planned = make_plan(config, model_config(config), machine)
    if json_:
        print(json.dumps(as_json(config, planned, str(recipe)), indent=1))
    else:
        print(*as_text(config, planned, str(recipe)), sep="\n")


@app.command(rich_help_panel=RUN)
def train(
    recipe: Recipe,
    set_: Overrides = None,
    accept: Accept = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plot the learning rates by group, and stop.")] = False,
) -> None:
    """Train as one process: alone, or as one rank under torchrun, srun, accelerate or deepspeed launch."""
    if dry_run:
        from dist_cpt.optim.rate_plot import rate_plot

        print(*rate_plot(_load(recipe, _overrides(set_, accept))), sep="\n")
        return
    from dist_cpt.runtime.stop import StopRequest, stop_with_parent

    stop = StopRequest().install()  # before torch is loaded: a signal during imports already counts
    if "TORCHELASTIC_RUN_ID" in os.environ:
        stop_with_parent()
    config = _load(recipe, _overrides(set_, accept))
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
) -> None:
    """Start all ranks of a run and return the run's exit code; on slurm, submit the job that does."""
    from dist_cpt_launch.dispatch import launch as launch_recipes

    raise typer.Exit(launch_recipes(recipe, _overrides(set_, accept), options, on=on, dry_run=dry_run))


@app.command(rich_help_panel=RUN)
@with_options(ResumeOptions)
def resume(
    run: Run,
    options: ResumeOptions,
    on: On = "local",
    dry_run: DryRun = False,
    set_: Overrides = None,
    accept: Accept = None,
) -> None:
    """Continue a run from its newest valid checkpoint; engine, number of ranks and every path may change."""
    recipe = _run_folder(run) / RECIPE
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

    overrides = _overrides(set_, accept)
    overrides = [*settings_of_place(_load(recipe, None), run, overrides), *overrides]
    folder = run_folder(_load(recipe, overrides))
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

    print(*branch_lines(make_branch(_run_folder(run), at, name, set_ or ())), sep="\n")


@app.command(rich_help_panel=RUN)
def extend(
    run: Run,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="The new total, counted as train.tokens.")],
) -> None:
    """Set a new, larger total of tokens for a run; a resume trains up to it."""
    from dist_cpt.train.extend import extend as extend_run

    print(*extend_run(_run_folder(run), tokens).lines(), sep="\n")


@app.command(rich_help_panel=LOOK)
def status(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="Default: the newest in runs/.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Again every 5 seconds until the run has ended.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
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

    folders = [_run_folder(run) for run in runs]
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
def verify(
    path: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder or one checkpoint.")],
) -> None:
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
    path: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder or one checkpoint.")],
    json_: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what is inside: step, groups, sizes, identities, lineage. Reads no tensor."""
    from dist_cpt.checkpoint.inspect import as_text, inspect_path
    from dist_cpt.errors import printable

    content = inspect_path(Path(os.path.abspath(path)))
    print(json.dumps(content, indent=1) if json_ else as_text(content))
    if content.get("problem"):  # of one checkpoint; a run shows its newest valid one
        raise CheckpointError(printable(f"{path} is damaged: {content['problem']}"))


@app.command(rich_help_panel=AFTER)
def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL|RUN|CHECKPOINT", help="Also an adapter, or a hub id.")],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Text: a file, a folder or a pattern. Default: the run's held-out sets."),
    ] = None,
    text: Annotated[str, typer.Option("--text", help="The field of --data's records with the document.")] = "text",
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", min=2, help="Of --data. Default: the run's, else at most 2048.")
    ] = None,
    against_base: Annotated[bool, typer.Option("--against-base", help="Also the loss under the base.")] = False,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="NAME,...", help="Tasks of lm-eval (extra eval).")
    ] = None,
    tasks_path: Annotated[Path | None, typer.Option("--tasks-path", help="A folder with tasks as YAML.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Documents of each task.")] = None,
    base: Base = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Measure loss, perplexity and bits per byte of any model, and benchmark tasks; a run's go into its record."""
    if tasks is None and (tasks_path is not None or limit is not None):
        raise ConfigError("--tasks-path and --limit belong to --tasks")
    from dist_cpt.export.evaluate import TextOptions, as_lines
    from dist_cpt.export.evaluate import evaluate as measure
    from dist_cpt.export.tasks import TaskOptions

    ours = (model / CHECKPOINTS).is_dir() or (model / MANIFEST).exists()
    folder = _checkpoint_folder(model) if ours else model
    wanted = TaskOptions(tuple(tasks.split(",")) if tasks else (), tasks_path, limit)
    rows = measure(folder, TextOptions(tuple(data or ()), text, seq_len), wanted, base=base, against_base=against_base)
    print(*([json.dumps({"model": str(folder), "results": rows}, indent=1)] if json_ else as_lines(rows)), sep="\n")


@app.command(rich_help_panel=AFTER)
def merge(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT|ADAPTER", help="A run folder, a checkpoint or a PEFT folder.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="New folder for the merged model.")] = None,
    dtype: DType = "bf16",
    base_only: Annotated[
        bool, typer.Option(help="Leave the run's own adapter out: the base that it belongs to.")
    ] = False,
    base: Base = None,
    scale: Annotated[
        float, typer.Option("--scale", min=0.0, help="Factor on the whole update; 1 is the trained model.")
    ] = 1.0,
    sweep: Annotated[
        str | None, typer.Option("--sweep", metavar="S,S,...", help="Print the held-out loss at each scale.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", metavar="A:B", help="Scale only the decoder layers A to B - 1.")
    ] = None,
    last: Annotated[
        int, typer.Option("--last", min=1, metavar="K", help="Mean of the updates of a run's K newest checkpoints.")
    ] = 1,
    add_residual: Annotated[
        tuple[str, str] | None,
        typer.Option("--add-residual", metavar="INSTRUCT BASE", help="Add instruct - base, tensor by tensor."),
    ] = None,
    residual_scale: Annotated[
        float | None, typer.Option("--residual-scale", help="Factor on that difference; default 1.")
    ] = None,
) -> None:
    """Merge base and adapter into one plain Hugging Face folder, checked against the trainer's logits."""
    layer_range = _layer_range(layers)
    if layer_range is not None and scale == 1.0 and sweep is None:
        raise ConfigError("--layers belongs to --scale or --sweep")
    if (last > 1 or layer_range is not None) and (base_only or add_residual is not None):
        raise ConfigError("--last and --layers go with --scale and --sweep, not with --base-only or --add-residual")
    if residual_scale is not None and add_residual is None:
        raise ConfigError("--residual-scale belongs to --add-residual INSTRUCT BASE")
    if out is None and (sweep is None or add_residual is not None or base_only):
        raise ConfigError("merge needs --out; only --sweep alone writes nothing")
    scales = _scales(sweep)
    checkpoint, *others = [_checkpoint_folder(path, adapters=True)] if last == 1 else _last_checkpoints(path, last)
    if scales:
        from dist_cpt.export.sweep import sweep as losses

        for factor, by_set in losses(checkpoint, scales, base=base, layers=layer_range, others=others):
            print(f"scale {factor:g}: " + ", ".join(f"{name} {loss:.6f}" for name, loss in by_set.items()), flush=True)
    if out is None:
        return
    if add_residual is not None:
        from dist_cpt.export.task_vector import TaskVector, merge_with_task_vector

        if base_only:
            raise ConfigError("--base-only and --add-residual exclude each other")
        vector = TaskVector(*add_residual, 1.0 if residual_scale is None else residual_scale)
        same = merge_with_task_vector(checkpoint, out, vector, dtype, base=base, scale=scale)
        print(f"{out}: with {vector.scale:g} x ({vector.instruct} - {vector.base})")
        if not same:
            print(f"note: {vector.base} is not the base that this run trained on, going by its sha256")
        return
    from dist_cpt.export.merge import merge as merge_model
    from dist_cpt.export.merge import quantisation_gap

    gap = None if base_only or scale != 1.0 or others else quantisation_gap(checkpoint, base=base)
    scaled = {"scale": scale, "layers": layer_range}
    difference = merge_model(checkpoint, out, dtype, base=base, base_only=base_only, others=others, **scaled)
    if others:
        print(f"the mean of {', '.join(one.name for one in (checkpoint, *others))}")
    print(f"{out}: largest logit difference in fp32 {difference:.2e}")
    if gap is not None:
        print(f"that is against the 16-bit base; against the quantised base that the trainer had: {gap:.2e}")


@app.command(rich_help_panel=AFTER)
def export(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT|ADAPTER", help="A run folder, a checkpoint or a PEFT folder.")
    ],
    format_: Annotated[str, typer.Option("--format", help="peft, vllm or gguf (docs/export.md)")],
    out: Annotated[Path, typer.Option("--out", help="New folder; for gguf the new file.")],
    dtype: Annotated[str | None, typer.Option("--dtype", help="vllm, gguf: bf16 (default), fp16 or fp32")] = None,
    base: Base = None,
    llama_cpp: Annotated[
        Path | None, typer.Option("--llama-cpp", metavar="DIR", help="gguf: a checkout of llama.cpp.")
    ] = None,
) -> None:
    """Write a trained adapter as other programs read it, checked against the trainer's logits."""
    if format_ not in ("peft", "vllm", "gguf"):
        raise ConfigError(f"--format {format_}: use peft, vllm or gguf")
    if llama_cpp is not None and format_ != "gguf":
        raise ConfigError("--llama-cpp belongs to --format gguf")
    if dtype is not None and format_ == "peft":
        raise ConfigError("--dtype belongs to --format vllm or gguf: an adapter is kept in fp32")
    if not any((path / name).exists() for name in (MANIFEST, ADAPTER_CONFIG)):
        _run_folder(path)
    from dist_cpt.export import formats as layouts

    if format_ == "gguf":
        layouts.require_converter(llama_cpp)  # before a checkpoint is read
        layouts.export_gguf(_checkpoint_folder(path, adapters=True), out, llama_cpp, dtype or "bf16", base=base)
        print(out)
    elif format_ == "vllm":
        difference = layouts.export_vllm(_checkpoint_folder(path, adapters=True), out, dtype or "bf16", base=base)
        print(f"{out}: base/ and adapter/, largest logit difference in fp32 {difference:.2e}; see README.md there")
    else:
        difference = layouts.export_peft(_checkpoint_folder(path, adapters=True), out, base=base)
        print(f"{out}: largest logit difference in fp32 {difference:.2e}")


@app.command(rich_help_panel=AFTER)
def generate(
    model: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT|MODEL")],
    prompt: Annotated[str, typer.Option("--prompt")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 is off")] = 0,
    seed: Annotated[int, typer.Option()] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="1 is off")] = 1.0,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message; print the answer.")] = False,
) -> None:
    """Continue a prompt with a run, a checkpoint or any model folder."""
    ours = (model / CHECKPOINTS).is_dir() or (model / MANIFEST).exists()
    if not ours and not (model / MODEL_CONFIG).is_file():
        why = f"it has no {MODEL_CONFIG}" if model.is_dir() else "there is no such folder"
        raise ConfigError(f"{model} is not a model: {why}", remedy="give a run, a checkpoint or a model folder")
    from dist_cpt.export.generate import generate as generate_text

    folder = _checkpoint_folder(model) if ours else model
    print(generate_text(folder, prompt, max_new_tokens, temperature, top_k, seed, top_p, chat))


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
    json_: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what this machine has for a run, and how to repair what it lacks; exit code 69 if no run can work here."""
    from dist_cpt_launch.doctor import show

    if not show(folder, as_json_=json_):
        raise NodeError("something that every run needs is broken")


data_app = typer.Typer(help="Look at, check, merge and decode token stores.", no_args_is_help=True)
app.add_typer(data_app, name="data", rich_help_panel=TOOLS)
Store = Annotated[Path, typer.Argument(metavar="STORE", help="A token store, or the .idx of a Megatron-LM pair.")]
OfStore = Annotated[
    str | None, typer.Option("--tokenizer", help="Folder or hub id, where the store has no tokenizer.json.")
]


@data_app.command("inspect")
def data_inspect(
    store: Store,
    tokenizer: OfStore = None,
    page: Annotated[Path | None, typer.Option("--report", metavar="FILE", help="Also write an HTML page.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what is inside: counts, lengths, tokenizer, origin, hashes, and documents with visible borders."""
    from dist_cpt.data.documents import open_documents
    from dist_cpt.data.store_facts import facts_text, store_facts

    facts = store_facts(open_documents(store), tokenizer)
    print(json.dumps(facts, indent=1) if json_ else facts_text(facts))
    if page is not None:
        from dist_cpt.report.report import write_page
        from dist_cpt.report.store_page import store_page

        write_page(store_page(facts), page)


@data_app.command("verify")
def data_verify(store: Store, json_: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False) -> None:
    """Compare every chunk of a store and of its block plans with its hash; exit code 65 if one differs."""
    from dataclasses import asdict

    from dist_cpt.data.store_check import check_store
    from dist_cpt.errors import printable

    check = check_store(store)
    if json_:
        print(json.dumps({"store": str(store), **asdict(check)}, indent=1))
    if check.problems:
        if not json_:
            print(*map(printable, check.problems), sep="\n")
        more = f" (and {len(check.problems) - 1} more)" if len(check.problems) > 1 else ""
        remedy = "copy it again, or dist-cpt prepare makes it again from the text"
        raise DataError(f"{printable(check.problems[0])}{more}", remedy=remedy)
    if not json_:
        found = (
            f"{check.num_chunks:,} chunks, {check.num_bytes:,} bytes" if check.hashed else "no hashes to compare with"
        )
        print(f"{store}: valid ({found})")


@data_app.command("merge")
def data_merge(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE STORE...", help="Two or more token stores.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the merged store.")],
    json_: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Write the documents of several stores into one, with where each part came from."""
    from dist_cpt.data.merge_stores import merge_stores

    merged = merge_stores(stores, out)
    counts = {"documents": merged.num_documents, "tokens": merged.num_tokens}
    shown = {"store": str(out), **counts, "content_hash": merged.manifest.content_hash}
    print(
        json.dumps(shown, indent=1)
        if json_
        else f"{out}: {merged.num_documents:,} documents, {merged.num_tokens:,} tokens"
    )


@data_app.command("decode")
def data_decode(
    store: Store,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.jsonl", help="New file; default: stdout.")] = None,
    documents: Annotated[str, typer.Option(metavar="A:B", help="Documents A to B - 1, as a slice in Python.")] = ":",
    tokenizer: OfStore = None,
) -> None:
    """Turn the tokens back into text: one JSON object with `text` per line."""
    from dist_cpt.data.documents import decode_rows, open_documents, write_rows

    rows = decode_rows(open_documents(store), documents, tokenizer)
    if out is not None:
        print(f"{out}: {write_rows(rows, out):,} documents")
        return
    for row in rows:
        sys.stdout.write(row)


@app.command("model-check", rich_help_panel=TOOLS)
def model_check(
    path: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a hub id in the cache.")],
    build: Annotated[
        bool, typer.Option("--build", help="Also build it without weights, as transformers does.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what of a model trains, is fused, quantised, sharded or refused (exit 64), from its config.json."""
    from dist_cpt.plan.model_check import as_text, check_model
    from dist_cpt.plan.shapes import find_config, is_known

    config = find_config(path)
    check = check_model(config) if is_known(config) or not build else None
    built = None
    if build:
        from dist_cpt.model.build_check import check_build

        built = check_build(path)
    if json_:
        print(json.dumps((check.as_json() if check else {}) | ({"built": vars(built)} if built else {}), indent=1))
    else:
        print(*(as_text(check) if check else ()), *(built.as_text() if built else ()), sep="\n")
    if check is not None and check.refused:
        raise ConfigError(f"{path} cannot be trained: {check.refused[0]}")


tokenizer_app = typer.Typer(help="Train, extend and measure tokenizers.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer", rich_help_panel=TOOLS)
CORPUS_HELP = "Files, folders or patterns, of any format that data.sources reads."
Corpus = Annotated[list[str], typer.Argument(metavar="CORPUS...", help=CORPUS_HELP)]
TextField = Annotated[str, typer.Option("--text", help="The jsonl field that holds the document.")]
NewFolder = Annotated[Path, typer.Option("--out", help="New folder for the tokenizer.")]


@tokenizer_app.command("train")
def tokenizer_train(
    corpus: Corpus,
    out: NewFolder,
    vocab_size: Annotated[int, typer.Option("--vocab-size", min=1)],
    kind: Annotated[str, typer.Option("--kind", help="bpe or unigram")] = "bpe",
    text: TextField = "text",
) -> None:
    """Train a byte-level tokenizer on a corpus, and print how it encodes that corpus."""
    if kind not in ("bpe", "unigram"):
        raise ConfigError(f"--kind {kind}: use bpe or unigram")
    from dist_cpt.data.tokenizer_train import corpus_texts, fertility, train_tokenizer

    trained = train_tokenizer(corpus_texts(corpus, text), out, vocab_size, kind)
    measured = {"vocab_size": trained.get_vocab_size()} | fertility(trained, corpus_texts(corpus, text)).as_json()
    print(json.dumps(measured, indent=1))


@tokenizer_app.command("extend")
def tokenizer_extend(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or hub id of the base's tokenizer.")],
    out: NewFolder,
    corpus: Annotated[list[str] | None, typer.Argument(metavar="[CORPUS...]", help=CORPUS_HELP)] = None,
    add: Annotated[
        int | None, typer.Option("--add", min=1, help="Learn at most this many tokens from the corpus.")
    ] = None,
    words: Annotated[
        Path | None, typer.Option("--words", help="File with one word per line; each becomes one token.")
    ] = None,
    min_frequency: Annotated[
        int, typer.Option("--min-frequency", min=1, help="Occurrences that a new token needs in the corpus.")
    ] = 2,
    focus: Annotated[bool, typer.Option("--focus", help="Also write what embeddings.init: focus reads.")] = False,
    text: TextField = "text",
) -> None:
    """Add tokens to a base's tokenizer, learned from a corpus or given as words; prints fertility before and after."""
    if (add is None) == (words is None) or (corpus is None and words is None):
        raise ConfigError("give --add N with a corpus to learn from, or --words FILE with or without one to measure")
    if focus and not corpus:
        raise ConfigError("--focus needs a corpus, from which it learns which tokens are used alike")
    from dist_cpt.data.tokenizer_extend import extend_tokenizer, read_words
    from dist_cpt.data.tokenizer_train import corpus_texts

    given = [] if words is None else read_words(words)
    done = extend_tokenizer(
        base,
        out,
        (lambda: corpus_texts(corpus, text)) if corpus else lambda: given,
        num_new=add,
        words=given,
        min_frequency=min_frequency,
        focus=focus,
    )
    print(json.dumps(done.as_json(), indent=1))


@tokenizer_app.command("report")
def tokenizer_report(
    tokenizer: Annotated[str, typer.Argument(metavar="TOKENIZER", help="Folder or hub id.")],
    corpus: Corpus,
    text: TextField = "text",
) -> None:
    """Measure a tokenizer on a corpus: tokens per word, bytes per token, texts that do not round-trip."""
    from dist_cpt.data.tokenizer import load_tokenizer
    from dist_cpt.data.tokenizer_train import corpus_texts, fertility

    measured = fertility(load_tokenizer(tokenizer).backend_tokenizer, corpus_texts(corpus, text))
    print(json.dumps(measured.as_json(), indent=1))


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: every user error is one line and its documented exit code."""
    _open_standard_streams()
    stdout = os.dup(1)  # rich puts /dev/null in its place when its reader is gone
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # what typer returns after Ctrl-C
            code = _interrupted()
    except (typer.Abort, KeyboardInterrupt):
        code = _interrupted()
    except DistCptError as error:
        say(f"dist-cpt: {error}")
        code = error.exit_code
    except SystemExit as ended:  # typer's own 1 for a broken pipe, or a library's
        code = ended.code
        if isinstance(ended.__context__, BrokenPipeError) and _reader_is_gone(stdout):
            code = READER_GONE
    except Exception as error:  # a defect of ours: print the traceback too
        known = explained(error)
        usage = getattr(error, "format_message", None)  # click's own usage errors
        if usage is not None:
            message = usage()  # none: no command was given, and the help has been printed
            if message:
                print(f"dist-cpt: {message}", file=sys.stderr)
            code = ConfigError.exit_code if message else EXIT_DONE
        elif isinstance(known, DistCptError):
            say(f"dist-cpt: {known}")
            code = known.exit_code
        else:
            traceback.print_exc()
            print("dist-cpt: internal error; this is a defect of dist-cpt", file=sys.stderr)
            code = EXIT_INTERNAL
    _flush_output()
    sys.exit(code if isinstance(code, int) else EXIT_DONE)


def _flush_output() -> None:
    """Flush while a failure can still be ignored: at exit, Python would turn it into code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_standard_streams() -> None:
    """Give what was closed before the start /dev/null: else a file of the run gets its number, and what is printed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def _reader_is_gone(stdout: int) -> bool:
    """Whether nobody reads stdout any more, as after `| head`; else a broken pipe was another one, a defect."""
    poll = select.poll()
    poll.register(stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _interrupted() -> int:
    print("dist-cpt: interrupted; finished work is kept", file=sys.stderr)
    return EXIT_STOPPED


def _load(recipe: Path, overrides: list[str] | None):
    from dist_cpt.config.load import load_recipe
    from dist_cpt.config.resolve import resolve_paths

    return resolve_paths(load_recipe(recipe, overrides or []))


def _overrides(set_: list[str] | None, accept: str | None) -> list[str]:
    """`--set` and `--accept-changes` as overrides of the recipe."""
    return [*(set_ or []), *([] if accept is None else [f"accept_changes={json.dumps(accept.split(','))}"])]


def _run_folder(path: Path) -> Path:
    if not (path / RECIPE).is_file():
        why = f"no {RECIPE} in it" if path.is_dir() else "there is no such folder"
        raise ConfigError(f"{path} is not a run folder: {why}", remedy="give <output_dir>/<name>")
    return path


def _scales(given: str | None) -> list[float]:
    """The numbers of --sweep."""
    try:
        scales = [float(part) for part in given.split(",")] if given is not None else []
    except ValueError:
        raise ConfigError(f"--sweep {given}: give numbers with commas between them, such as 0.5,0.75,1") from None
    if any(not 0.0 <= scale < float("inf") for scale in scales):
        raise ConfigError(f"--sweep {given}: a scale is 0 or more")
    return scales


def _layer_range(given: str | None) -> range | None:
    """The layers of --layers A:B."""
    if given is None:
        return None
    first, colon, stop = given.partition(":")
    if not (colon and first.isdigit() and stop.isdigit()):
        raise ConfigError(f"--layers {given}: give A:B, such as 0:8 for the first eight")
    return range(int(first), int(stop))


def _last_checkpoints(run: Path, count: int) -> list[Path]:
    """The newest valid checkpoints of a run, newest first."""
    from dist_cpt.checkpoint.verify import model_problems
    from dist_cpt.run_folder.checkpoints import published

    valid = [path for path in published(_run_folder(run)) if not model_problems(path)]
    if len(valid) < count:
        raise ConfigError(
            f"--last {count}: {run} has {len(valid)} valid checkpoints", remedy="train with a larger checkpoint.keep"
        )
    return valid[:count]


def _checkpoint_folder(path: Path, *, adapters: bool = False) -> Path:
    """A PEFT folder or a checkpoint whose model files are valid, as given; of a run its newest valid checkpoint."""
    if adapters and (path / ADAPTER_CONFIG).is_file() and not (path / MANIFEST).exists():
        return path
    if (path / MANIFEST).exists():
        from dist_cpt.checkpoint.verify import model_problems

        problems = model_problems(path)
        if problems:
            raise CheckpointError(f"{path} is damaged: {problems[0]}", remedy="dist-cpt verify lists everything")
        return path
    run = _run_folder(path)
    from dist_cpt.checkpoint.load import newest_valid

    newest, skipped = newest_valid(run)
    for name, reason in skipped:
        print(f"skipped {name}: {reason}", file=sys.stderr)
    if newest is None:
        raise CheckpointError(f"{path} has no valid checkpoint")
    return newest


if __name__ == "__main__":
    main()
