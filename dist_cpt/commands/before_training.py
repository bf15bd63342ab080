"""The commands that come before a run: demo, prepare, replay, init, import-config, plan."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from dist_cpt.commands.arguments import RUN, Json, Overrides, Recipe, load, show
from dist_cpt.errors import WriteError, say
from dist_cpt.run_folder.names import RECIPE, REPORT

app = typer.Typer()
Gpus = Annotated[int | None, typer.Option("--gpus", min=1, help="On each node; default 8, of cpu 1.")]
Gpu = Annotated[str, typer.Option("--gpu", help="h100, h200, b200, a100, l40s or cpu")]
Nodes = Annotated[int, typer.Option("--nodes", min=1, help="Hosts.")]
Network = Annotated[str, typer.Option("--network", help="Of one GPU to other nodes, such as 50GBps.")]


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
    json_: Json = False,
) -> None:
    """Turn raw text into token stores, and print a data report; any number of processes and hosts share the work."""
    config = load(recipe, set_)
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
    show(report, report_lines(report), json_)


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
    config = load(recipe, set_)
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
    show(report, report_lines(report, out), json_)


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

    config, machine = load(recipe, set_), machine_of(gpu, nodes, gpus, network)
    if calibrate:
        from dist_cpt.plan.calibrate import calibrate as measure

        rates = measure()
        say(f"{rates['name']}: " + ", ".join(f"{name} {rates[name]:.3g}/s" for name in RATES))
    if gpu == "cpu" or calibrate:
        machine = replace(machine, device=calibrated(machine.device))
    planned = make_plan(config, model_config(config), machine)
    show(as_json(config, planned, str(recipe)), as_text(config, planned, str(recipe)), json_)
