"""Recipes as one call of sbatch on slurm/train.sbatch. Renders names of variables, never their values."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from dist_cpt.config.resolve import run_folder, step_shape
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import EXIT_DONE, ConfigError, WriteError
from dist_cpt.run_folder.names import LOGS
from dist_cpt.runtime.secret_values import require_no_secrets
from dist_cpt_launch.launch_options import LaunchOptions
from dist_cpt_launch.launch_plan import LaunchPlan, usable_nodes
from dist_cpt_launch.time_limit import save_before_limit, slurm_seconds

RequeueBy = Literal["requeue", "chain", "exit"]
DEFAULT_MAX_RESTARTS = 3
PREPARE_WARNING_SECONDS = 60  # what a task of --prepare needs to end is a second; Slurm signals up to a minute early
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.,:=/@+-]*"  # partitions, accounts, GPU types, gres


def slurm_plan(
    recipes: Sequence[tuple[RunConfig, Path]], overrides: Sequence[str], options: LaunchOptions, *, folder: Path
) -> LaunchPlan:
    """One job, or an array with one task per recipe, submitted from `folder`.

    Raises:
        ConfigError: the batch does not divide over the ranks, or Slurm cannot take an option.
    """
    ranks = options.procs_per_node or ranks_per_node(options.gpus_per_node, options.gres)
    _check(options, len(recipes))
    for config, _ in recipes:
        if options.min_nodes is None:
            step_shape(config, options.nodes * ranks)
        usable_nodes(config, options.nodes, ranks)
    single = len(recipes) == 1
    config = recipes[0][0]
    logs = run_folder(config) / LOGS if single else Path(config.output_dir)
    log = _log_pattern(logs) + ("/slurm.log" if single else f"/{config.name}-%A_%a.log")
    argv = ["--parsable", f"--job-name={config.name}", f"--chdir={_one_line(folder, 'the current folder')}"]
    argv += [f"--output={log}", "--open-mode=append", "--export=ALL"]
    argv += _resources(options, ranks, max(_save_before_limit(config, options) for config, _ in recipes))
    next_job = shlex.join(argv[1:])
    if not single:
        argv.append(f"--array=0-{len(recipes) - 1}" + (f"%{options.max_running}" if options.max_running else ""))
    arguments = [f"--python={sys.executable}", f"--procs-per-node={ranks}"]
    max_restarts = DEFAULT_MAX_RESTARTS if options.max_restarts is None else options.max_restarts
    arguments += [f"--max-restarts={max_restarts}", f"--requeue-by={options.requeue_by or 'requeue'}"]
    arguments += [f"--save-before-limit={options.save_before_limit}"] if options.save_before_limit else []
    arguments += [f"--submit={next_job}"] if options.requeue_by == "chain" else []
    arguments += ["--no-preflight"] if options.preflight is False else []
    arguments += [f"--srun={item}" for item in options.srun or []]
    arguments += [f"--set={item}" for item in overrides]
    arguments += [_one_line(path.absolute(), "the recipe's path") for _, path in recipes]
    call = ("sbatch", *argv, str(batch_script()), *arguments)
    require_no_secrets(call, "the call of sbatch")
    return LaunchPlan(call, {}, run_folder(config), logs)


def prepare_plan(
    recipe: tuple[RunConfig, Path], overrides: Sequence[str], options: LaunchOptions, *, folder: Path
) -> LaunchPlan:
    """An array of `options.tasks` tasks that prepare a recipe's data together, submitted from `folder`.

    Raises:
        ConfigError: Slurm cannot take an option.
    """
    config, path = recipe
    tasks = options.tasks or 1
    _check(options, tasks)
    assert config.data.cache_dir is not None  # resolve_paths fills it in
    logs = Path(config.data.cache_dir) / LOGS
    argv = ["--parsable", f"--job-name={config.name}-prepare", f"--chdir={_one_line(folder, 'the current folder')}"]
    argv += [f"--output={_log_pattern(logs)}/prepare-%A_%a.log", "--open-mode=append", "--export=ALL"]
    argv += _given(options, {"nodes": 1, "ntasks": 1})
    argv += [f"--signal=B:USR1@{_at_most_half(PREPARE_WARNING_SECONDS, options.time)}", "--requeue"]
    argv += options.sbatch or []
    argv.append(f"--array=0-{tasks - 1}" + (f"%{options.max_running}" if options.max_running else ""))
    arguments = [f"--python={sys.executable}", _one_line(path.absolute(), "the recipe's path")]
    arguments += [f"--set={item}" for item in overrides]
    call = ("sbatch", *argv, str(batch_script("prepare.sbatch")), *arguments)
    require_no_secrets(call, "the call of sbatch")
    return LaunchPlan(call, {}, Path(config.data.cache_dir), logs)


def ranks_per_node(gpus_per_node: str | None, gres: str | None) -> int:
    """One rank per requested GPU (`8`, `h100:8`, `gpu:8`, `gpu:h100:8,...`), else one."""
    requests = (gpus_per_node or "").split(",") + [item for item in (gres or "").split(",") if item.startswith("gpu")]
    counts = [int(item.rpartition(":")[2]) for item in requests if re.fullmatch(r"(.+:)?\d+", item)]
    return max(sum(counts), 1)


def submit(plan: LaunchPlan) -> int:
    """Hand the plan to sbatch and print the job's number; 0.

    Raises:
        ConfigError: sbatch is missing or refuses the job.
        WriteError: the log folder cannot be created.
    """
    assert plan.log_folder is not None
    try:
        plan.log_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{plan.log_folder} cannot be created: {error.strerror}") from error
    try:
        done = subprocess.run(plan.argv, capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError:
        raise ConfigError(
            "sbatch is not installed on this host", remedy="launch from a login node of the cluster, or use --dry-run"
        ) from None
    if done.returncode != 0:
        raise ConfigError(f"sbatch refused the job: {' '.join(done.stderr.split())}")
    sys.stderr.write(done.stderr)
    print(f"job {done.stdout.strip().split(';')[0]}, log in {plan.log_folder}")
    return EXIT_DONE


def batch_script(name: str = "train.sbatch") -> Path:
    """A script of slurm/, of an installation or of a checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "sbatch" / name
    return installed if installed.is_file() else here.parents[1] / "slurm" / name


def _resources(options: LaunchOptions, ranks: int, signal_seconds: int) -> list[str]:
    """sbatch's options for nodes, time, signal and requeueing."""
    requested = {
        "nodes": str(options.nodes) if options.min_nodes is None else f"{options.min_nodes}-{options.nodes}",
        # With a range of nodes and one task per node, sbatch derives the task count from the smallest number of nodes.
        "ntasks-per-node": None if options.min_nodes and ranks == 1 else ranks,
    }
    argv = [*_given(options, requested), f"--signal=B:USR1@{signal_seconds}"]
    return [*argv, "--no-requeue" if options.requeue_by == "chain" else "--requeue", *(options.sbatch or [])]


def _given(options: LaunchOptions, first: dict[str, str | int | None]) -> list[str]:
    """sbatch's options for what a task gets and how long, after those of `first`."""
    names = ("cpus_per_task", "gpus_per_node", "gres", "time", "partition", "account", "qos")
    requested = first | {name.replace("_", "-"): getattr(options, name) for name in names}
    return [f"--{key}={value}" for key, value in requested.items() if value is not None]


def _save_before_limit(config: RunConfig, options: LaunchOptions) -> int:
    """Seconds before the limit at which Slurm signals; at most half of the time limit, if that is known."""
    return _at_most_half(options.save_before_limit or save_before_limit(run_folder(config)), options.time)


def _at_most_half(seconds: int, time: str | None) -> int:
    """`seconds`, or half of the time limit if that is known and less."""
    limit = slurm_seconds(time or "")
    return max(1, min(seconds, int(limit / 2))) if limit else seconds


def _check(options: LaunchOptions, num_tasks: int) -> None:
    for name in ("partition", "account", "qos", "gres", "gpus_per_node"):
        value = getattr(options, name)
        if value is not None and not re.fullmatch(_NAME, value):
            raise ConfigError(f"--{name.replace('_', '-')} {value!r} is not a valid Slurm name")
    if options.time is not None and slurm_seconds(options.time) is None:
        raise ConfigError(f"--time {options.time!r}: expected minutes, hours:minutes:seconds or days-hours")
    if options.min_nodes is not None and not 1 <= options.min_nodes <= options.nodes:
        raise ConfigError(f"--min-nodes {options.min_nodes} is not between 1 and --nodes {options.nodes}")
    if options.max_running is not None and num_tasks == 1:
        raise ConfigError("--max-running needs several recipes, or --prepare and --tasks: one task is not an array")
    if options.requeue_by not in (None, *get_args(RequeueBy)):
        raise ConfigError(f"--requeue-by {options.requeue_by}: expected {', '.join(get_args(RequeueBy))}")
    for item in (*(options.sbatch or []), *(options.srun or [])):
        if not item.startswith("-"):
            raise ConfigError(f"{item!r} is not an option of sbatch or srun", remedy="write it as --name=value")
        if re.match(r"--export=.*=", item):
            raise ConfigError(
                "--export with a value would show the value to everyone who lists the job",
                remedy="export the variable in this shell; jobs get the whole environment",
            )
        _one_line(item, "an option")


def _one_line(text: object, what: str) -> str:
    """The text, which must fit on one line of Slurm's."""
    if re.search(r"[\x00-\x1f\x7f]", str(text)):
        raise ConfigError(f"{what} {str(text)!r} contains a control character, which Slurm cannot pass on")
    return str(text)


def _log_pattern(folder: Path) -> str:
    """A folder as part of sbatch's file name pattern, with nothing in it to expand. Source: sbatch(1)."""
    text = _one_line(folder, "the log's path")
    if "\\" in text:
        raise ConfigError(f"the log's path {text!r} contains a backslash, which Slurm removes from file names")
    return text.replace("%", "%%")
