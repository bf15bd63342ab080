"""What is done with a trained model: evaluate, merge, export, generate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dist_cpt.commands.arguments import AFTER, Json, require_run_folder, show
from dist_cpt.errors import CheckpointError, ConfigError
from dist_cpt.run_folder.names import ADAPTER_CONFIG, CHECKPOINTS, MANIFEST, MODEL_CONFIG, RECIPE

app = typer.Typer()
Trained = Annotated[
    Path, typer.Argument(metavar="RUN|CHECKPOINT|ADAPTER", help="A run folder, a checkpoint or a PEFT folder.")
]
DType = Annotated[str, typer.Option("--dtype", help="bf16, fp16 or fp32")]
Base = Annotated[str | None, typer.Option("--base", help="Where the base is now, if it moved.")]


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
    needle: Annotated[
        str | None,
        typer.Option("--needle", metavar="TOKENS,...", help="Find a sentence in texts of these lengths."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Documents of each task; texts of each length and depth.")
    ] = None,
    base: Base = None,
    json_: Json = False,
) -> None:
    """Measure loss, perplexity, bits per byte, tasks and use of context of any model; a run's go into its record."""
    if tasks is None and tasks_path is not None:
        raise ConfigError("--tasks-path belongs to --tasks")
    if tasks is None and needle is None and limit is not None:
        raise ConfigError("--limit belongs to --tasks or --needle")
    from dist_cpt.export.evaluate import TextOptions, as_lines
    from dist_cpt.export.evaluate import evaluate as measure
    from dist_cpt.export.needle import NeedleOptions
    from dist_cpt.model.tasks import TaskOptions

    ours = (model / CHECKPOINTS).is_dir() or (model / MANIFEST).exists()
    folder = _checkpoint_folder(model) if ours else model
    wanted = TaskOptions(tuple(tasks.split(",")) if tasks else (), tasks_path, limit)
    lengths = NeedleOptions(_lengths(needle), limit or NeedleOptions.samples)
    texts = TextOptions(tuple(data or ()), text, seq_len)
    rows = measure(folder, texts, wanted, lengths, base=base, against_base=against_base)
    show({"model": str(folder), "results": rows}, as_lines(rows), json_)


@app.command(rich_help_panel=AFTER)
def merge(
    path: Trained,
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
    best: Annotated[
        bool, typer.Option("--best", help="The checkpoint that a run keeps as its best, by evaluate.best.")
    ] = False,
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
    if best and last > 1:
        raise ConfigError("--best and --last exclude each other: one is a single checkpoint")
    if base_only and add_residual is not None:
        raise ConfigError("--base-only and --add-residual exclude each other")
    if residual_scale is not None and add_residual is None:
        raise ConfigError("--residual-scale belongs to --add-residual INSTRUCT BASE")
    if out is None and (sweep is None or add_residual is not None or base_only):
        raise ConfigError("merge needs --out; only --sweep alone writes nothing")
    scales = _scales(sweep)
    if best:
        path = _best_checkpoint(path)
        print(f"the best checkpoint is {path.name}", file=sys.stderr)
    checkpoint, *others = [_checkpoint_folder(path, adapters=True)] if last == 1 else _last_checkpoints(path, last)
    if scales:
        from dist_cpt.export.sweep import sweep as losses

        for factor, by_set in losses(checkpoint, scales, base=base, layers=layer_range, others=others):
            print(f"scale {factor:g}: " + ", ".join(f"{name} {loss:.6f}" for name, loss in by_set.items()), flush=True)
    if out is None:
        return
    if add_residual is not None:
        from dist_cpt.export.task_vector import TaskVector, merge_with_task_vector

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
    path: Trained,
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
        require_run_folder(path)
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


def _scales(given: str | None) -> list[float]:
    """The numbers of --sweep."""
    try:
        scales = [float(part) for part in given.split(",")] if given is not None else []
    except ValueError:
        raise ConfigError(f"--sweep {given}: give numbers with commas between them, such as 0.5,0.75,1") from None
    if any(not 0.0 <= scale < float("inf") for scale in scales):
        raise ConfigError(f"--sweep {given}: a scale is 0 or more")
    return scales


def _lengths(given: str | None) -> tuple[int, ...]:
    """The lengths of --needle."""
    parts = given.split(",") if given is not None else []
    if not all(part.isdigit() for part in parts):
        raise ConfigError(f"--needle {given}: give lengths in tokens with commas between them, such as 8192,131072")
    return tuple(map(int, parts))


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

    valid = [path for path in published(require_run_folder(run)) if not model_problems(path)]
    if len(valid) < count:
        raise ConfigError(
            f"--last {count}: {run} has {len(valid)} valid checkpoints", remedy="train with a larger checkpoint.keep"
        )
    return valid[:count]


def _best_checkpoint(run: Path) -> Path:
    """The checkpoint of a run's best evaluation."""
    from dist_cpt.config.load import load_recipe
    from dist_cpt.run_folder.checkpoints import checkpoints_folder, step_name
    from dist_cpt.run_folder.evaluations import keeps_best, recorded_best

    config = load_recipe(require_run_folder(run) / RECIPE).evaluate
    if not keeps_best(config):
        raise ConfigError(f"--best: {run} keeps no best checkpoint", remedy="train with evaluate.best")
    step = recorded_best(run, config)
    if step is None:
        raise ConfigError(f"--best: {run} has no evaluation after step 0", remedy="train on, or leave --best out")
    checkpoint = checkpoints_folder(run) / step_name(step)
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"--best: the best evaluation of {run} is that of step {step}, which has no checkpoint",
            remedy="checkpoints from before evaluate.best was set may be gone; give one of those that are there",
        )
    return checkpoint


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
    run = require_run_folder(path)
    from dist_cpt.checkpoint.load import newest_valid

    newest, skipped = newest_valid(run)
    for name, reason in skipped:
        print(f"skipped {name}: {reason}", file=sys.stderr)
    if newest is None:
        raise CheckpointError(f"{path} has no valid checkpoint")
    return newest
