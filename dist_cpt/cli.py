"""The dist-cpt command: parse, load the recipe, call one function. Loads no torch before a command needs it."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from dist_cpt import __version__
from dist_cpt.errors import EXIT_DONE, EXIT_INTERNAL, EXIT_STOPPED, CheckpointError, ConfigError, DistCptError

INTERRUPTED = 130

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
Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder: <output_dir>/<name>.")]
Procs = Annotated[int, typer.Option("--procs-per-node", min=1, help="Ranks on this host.")]
Nodes = Annotated[int, typer.Option("--nodes", min=1, help="Hosts; more than one needs a scheduler or torchrun.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the command that would run, and stop.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for everything the demo makes.")] = Path("demo-run"),
) -> None:
    """The whole story on an embedded default: two ranks, a stop, a resume under another engine, a report."""
    from dist_cpt.demo import run_demo

    raise typer.Exit(run_demo(out))


@app.command()
def prepare(recipe: Recipe, set_: Overrides = None) -> None:
    """Raw text to token stores, with a data report."""
    config = _load(recipe, set_)
    from dist_cpt.data.prepare import data_report
    from dist_cpt.data.prepare import prepare as prepare_data

    def progress(name: str, documents: int) -> None:
        print(f"{name}: {documents} documents", file=sys.stderr)

    prepared = prepare_data(config, progress)
    print(json.dumps(data_report(prepared), indent=1))


@app.command()
def train(recipe: Recipe, set_: Overrides = None) -> None:
    """A worker: alone, or one rank under torchrun, srun, accelerate or deepspeed launch."""
    from dist_cpt.runtime.stop import StopRequest

    stop = StopRequest().install()  # before torch is loaded: a signal during imports already counts
    config = _load(recipe, set_)
    from dist_cpt.train.run import train as train_run

    code, folder = train_run(config, stop)
    if folder is not None:  # rank 0, and the folder is this run's
        from dist_cpt.report.report import write_report

        write_report(folder)
    raise typer.Exit(code)


@app.command()
def launch(
    recipe: Recipe,
    on: Annotated[str, typer.Option("--on", help="local")] = "local",
    nodes: Nodes = 1,
    procs_per_node: Procs = 1,
    dry_run: DryRun = False,
    set_: Overrides = None,
) -> None:
    """Start all ranks of a run and return the run's exit code."""
    if on != "local":
        raise ConfigError(
            f"launch --on {on}: only local is available in this version",
            remedy="under Slurm or Kubernetes start `dist-cpt train RECIPE` with srun or torchrun (README)",
        )
    config = _load(recipe, set_)
    raise typer.Exit(_launch(config, recipe, set_ or [], nodes, procs_per_node, dry_run))


@app.command()
def resume(
    run: Run, nodes: Nodes = 1, procs_per_node: Procs = 1, dry_run: DryRun = False, set_: Overrides = None
) -> None:
    """Continue a run from its newest valid checkpoint; engine and number of ranks may change."""
    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        raise ConfigError(f"{run} is not a run folder: no recipe.yaml in it")
    if not any(run.glob("checkpoints/step-*/manifest.json")):
        raise CheckpointError(
            f"{run} has no finished checkpoint to resume from",
            remedy=f"dist-cpt launch {recipe} starts it again",
        )
    config = _load(recipe, set_)
    raise typer.Exit(_launch(config, recipe, set_ or [], nodes, procs_per_node, dry_run))


@app.command()
def report(run: Run) -> None:
    """Write report.html for a run, finished or not."""
    from dist_cpt.report.report import write_report

    print(write_report(_run_folder(run)))


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder or one checkpoint.")],
) -> None:
    """Check every byte of a checkpoint, or of a whole run with its record; exit code 74 if it does not hold."""
    from dist_cpt.checkpoint.outline import printable
    from dist_cpt.checkpoint.verify import verify_checkpoint, verify_run

    path = Path(os.path.abspath(path))  # `.` has no name
    if not path.is_dir():
        raise CheckpointError(f"nothing to verify: {path} is not a folder")
    record: list[str] = []
    if (path / "checkpoints").is_dir():
        from dist_cpt.train.record import record_problems

        verdicts = verify_run(path)
        record = record_problems(path)
    else:
        verdicts = {path.name: verify_checkpoint(path)}
    for name, problems in verdicts.items():
        print(printable(f"{name}: {'holds' if not problems else 'DOES NOT HOLD: ' + '; '.join(problems)}"))
    for problem in record:
        print(printable(f"record: {problem}"))
    if (path / "checkpoints").is_dir() and not record:
        print("record: holds")
    broken = [name for name, problems in verdicts.items() if problems]
    if broken:
        raise CheckpointError(f"{len(broken)} of {len(verdicts)} checkpoints do not hold: {', '.join(broken)}")
    if record:
        raise CheckpointError(f"the checkpoints of {path} hold, its record does not ({len(record)} findings)")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder or one checkpoint.")],
    json_: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """What is inside: where the run stood, groups, sizes, identities, lineage. Reads no tensor."""
    from dist_cpt.checkpoint.inspect import inspect_path
    from dist_cpt.checkpoint.inspect_text import as_text
    from dist_cpt.checkpoint.outline import printable

    content = inspect_path(Path(os.path.abspath(path)))
    print(json.dumps(content, indent=1) if json_ else as_text(content))
    if content.get("problem"):  # of one checkpoint; a run shows the newest that holds
        raise CheckpointError(printable(f"{path} does not hold: {content['problem']}"))


@app.command()
def merge(
    path: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder or one checkpoint.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the merged model.")],
    dtype: Annotated[str, typer.Option("--dtype", help="bf16 or fp32")] = "bf16",
) -> None:
    """Base and adapter as one plain Hugging Face folder, checked against the trainer's logits."""
    from dist_cpt.model.export import merge as merge_model
    from dist_cpt.model.export import nf4_gap

    checkpoint = _checkpoint_folder(path)
    gap = nf4_gap(checkpoint)
    difference = merge_model(checkpoint, out, dtype)
    print(f"{out}: largest logit difference in fp32 {difference:.2e}")
    if gap is not None:
        print(f"trained over an nf4 base, merged into the unquantised one: off the trainer's logits by up to {gap:.2e}")


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT|MODEL")],
    prompt: Annotated[str, typer.Option("--prompt")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 is off")] = 0,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Continue a prompt with a run, a checkpoint or any model folder."""
    from dist_cpt.model.generate import generate as generate_text

    ours = (model / "checkpoints").is_dir() or (model / "manifest.json").exists()
    folder = _checkpoint_folder(model) if ours else model
    print(generate_text(folder, prompt, max_new_tokens, temperature, top_k, seed))


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: every user error is one line and its documented exit code."""
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer's own word for Ctrl-C
            code = _interrupted()
    except (typer.Abort, KeyboardInterrupt):
        code = _interrupted()
    except DistCptError as error:
        print(f"dist-cpt: {error}", file=sys.stderr)
        code = error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_DONE
    except Exception as error:  # the last resort: say what it is, with the traceback, since it is our defect
        usage = getattr(error, "format_message", None)  # click's own usage errors
        if usage is not None:
            print(f"dist-cpt: {usage()}", file=sys.stderr)
            code = ConfigError.exit_code
        else:
            traceback.print_exc()
            print("dist-cpt: internal error; this is a defect of dist-cpt", file=sys.stderr)
            code = EXIT_INTERNAL
    sys.exit(code if isinstance(code, int) else EXIT_DONE)


def _interrupted() -> int:
    print("dist-cpt: interrupted; what was finished is kept", file=sys.stderr)
    return EXIT_STOPPED


def _load(recipe: Path, overrides: list[str] | None):
    from dist_cpt.config.load import load_recipe
    from dist_cpt.config.resolve import resolve_paths

    return resolve_paths(load_recipe(recipe, overrides or []))


def _launch(config, recipe: Path, overrides: list[str], nodes: int, procs_per_node: int, dry_run: bool) -> int:
    if nodes != 1:
        raise ConfigError(
            f"--nodes {nodes}: this command starts ranks on this host only",
            remedy="start torchrun or srun on every host with `dist-cpt train RECIPE` (README)",
        )
    from dist_cpt_launch.local import run_local
    from dist_cpt_launch.plan import local_plan

    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, (os.cpu_count() or 1) // procs_per_node)
    plan = local_plan(config, recipe, overrides, procs_per_node=procs_per_node, threads_per_rank=threads)
    if dry_run:
        print(plan.shown())
        return EXIT_DONE
    print(plan.run_folder, flush=True)
    return run_local(plan)


def _run_folder(path: Path) -> Path:
    if not (path / "recipe.yaml").is_file():
        raise ConfigError(f"{path} is not a run folder: no recipe.yaml in it")
    return path


def _checkpoint_folder(path: Path) -> Path:
    """A checkpoint itself if what makes up its model holds, or the newest valid one of a run."""
    if (path / "manifest.json").exists():
        from dist_cpt.checkpoint.verify import model_problems

        problems = model_problems(path)
        if problems:
            raise CheckpointError(f"{path} does not hold: {problems[0]}", remedy="dist-cpt verify names everything")
        return path
    from dist_cpt.checkpoint.restore import newest_valid

    found, skipped = newest_valid(_run_folder(path))
    for name, reason in skipped:
        print(f"skipped {name}: {reason}", file=sys.stderr)
    if found is None:
        raise CheckpointError(f"{path} has no valid checkpoint")
    return found


if __name__ == "__main__":
    main()
