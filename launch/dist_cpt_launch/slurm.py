"""A recipe, or several, as one call of sbatch with slurm/train.sbatch. Renders names, never the value of a variable."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from dist_cpt.config.resolve import run_folder, step_shape
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import EXIT_DONE, ConfigError, WriteError
from dist_cpt_launch.batch_job import slurm_seconds
from dist_cpt_launch.nodes import usable_nodes
from dist_cpt_launch.plan import LaunchPlan
from dist_cpt_launch.secret_values import require_no_secrets
from dist_cpt_launch.time_limit import DEFAULT_LEAD_SECONDS, lead_seconds

RequeueBy = Literal["requeue", "chain", "exit"]
REQUEUE_BY = get_args(RequeueBy)
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.,:=/@+-]*"  # partitions, accounts, GPU types, gres
_TIME = r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+|\d+-\d+:\d\d|\d+-\d+:\d\d:\d\d"


@dataclass(frozen=True)
class SlurmOptions:
    """What to ask Slurm for; None leaves it to the site's defaults."""

    nodes: int = 1
    min_nodes: int | None = None  # start with as few as these, up to `nodes`
    procs_per_node: int = 1
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gres: str | None = None
    gpus_per_node: str | None = None
    cpus_per_task: int | None = None
    lead_seconds: int | None = None  # None: measured in the run folder
    max_restarts: int = 3
    requeue_by: RequeueBy = "requeue"
    at_once: int | None = None  # of an array
    preflight: bool = True
    more: tuple[str, ...] = ()  # further options of sbatch
    srun: tuple[str, ...] = ()  # further options of srun


def slurm_plan(
    recipes: Sequence[tuple[RunConfig, Path]], overrides: Sequence[str], options: SlurmOptions, *, folder: Path
) -> LaunchPlan:
    """One job, or an array with one task per recipe; submitted from `folder`, as relative paths mean.

    Raises:
        ConfigError: the batch does not divide over the ranks, or an option has no form that Slurm takes.
    """
    _check(options)
    for config, _ in recipes:
        if options.min_nodes is None:
            step_shape(config, options.nodes * options.procs_per_node)
        usable_nodes(config, options.nodes, options.procs_per_node)
    single = len(recipes) == 1
    config = recipes[0][0]
    log = run_folder(config) / "logs" / "slurm.log" if single else Path(config.output_dir) / f"{config.name}-%A_%a.log"
    argv = ["--parsable", f"--job-name={config.name}", f"--chdir={_plain(folder, 'the current folder')}"]
    argv += [f"--output={_pattern(log) if single else _pattern(log.parent) + '/' + log.name}", "--open-mode=append"]
    argv += ["--export=ALL", *_asked(options, lead=max(_lead(config, options) for config, _ in recipes))]
    submit = shlex.join(argv[1:])
    if not single:
        argv.append(f"--array=0-{len(recipes) - 1}" + (f"%{options.at_once}" if options.at_once else ""))
    arguments = [f"--python={sys.executable}", f"--procs-per-node={options.procs_per_node}"]
    arguments += [f"--max-restarts={options.max_restarts}", f"--requeue-by={options.requeue_by}"]
    arguments += [] if options.lead_seconds is None else [f"--lead={options.lead_seconds}"]
    arguments += [f"--submit={submit}"] if options.requeue_by == "chain" else []
    arguments += [] if options.preflight else ["--no-preflight"]
    arguments += [f"--srun={item}" for item in options.srun]
    arguments += [f"--set={item}" for item in overrides]
    arguments += [_plain(path.absolute(), "the recipe's path") for _, path in recipes]
    call = ("sbatch", *argv, str(batch_script()), *arguments)
    require_no_secrets(call, "the call of sbatch")
    return LaunchPlan(call, {}, run_folder(config), log.parent)


def ranks_per_node(gpus_per_node: str | None, gres: str | None) -> int:
    """One for each GPU that is asked for: `8`, `h100:8`, `gpu:8`, `gpu:h100:8,...`; without any, one."""
    kinds = (gpus_per_node or "").split(",") + [item for item in (gres or "").split(",") if item.startswith("gpu")]
    counts = [int(kind.rpartition(":")[2]) for kind in kinds if re.fullmatch(r"(.+:)?\d+", kind)]
    return max(sum(counts), 1)


def submit(plan: LaunchPlan) -> int:
    """Hand the plan to sbatch; print the job's number. Returns an exit code.

    Raises:
        ConfigError: there is no sbatch here, or Slurm refuses the job.
        WriteError: the folder of the log cannot be made.
    """
    assert plan.log_folder is not None
    try:
        plan.log_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{plan.log_folder} cannot be made: {error.strerror}") from error
    try:
        done = subprocess.run(plan.argv, capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError:
        raise ConfigError(
            "there is no sbatch on this host", remedy="launch from a login node of the cluster, or look with --dry-run"
        ) from None
    if done.returncode != 0:
        raise ConfigError(f"sbatch refuses the job: {' '.join(done.stderr.split())}")
    sys.stderr.write(done.stderr)
    print(f"job {done.stdout.strip().split(';')[0]}, log in {plan.log_folder}")
    return EXIT_DONE


def batch_script() -> Path:
    """slurm/train.sbatch, of an installation or of a checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "sbatch" / "train.sbatch"
    return installed if installed.is_file() else here.parents[1] / "slurm" / "train.sbatch"


def _asked(options: SlurmOptions, *, lead: int) -> list[str]:
    """The options of sbatch for what is asked of Slurm."""
    nodes = str(options.nodes) if options.min_nodes is None else f"{options.min_nodes}-{options.nodes}"
    given = {
        "nodes": nodes,
        # With a range of nodes, sbatch makes of one task per node as many tasks as the smallest number of nodes.
        "ntasks-per-node": None if options.min_nodes and options.procs_per_node == 1 else options.procs_per_node,
        "cpus-per-task": options.cpus_per_task,
        "gpus-per-node": options.gpus_per_node,
        "gres": options.gres,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "signal": f"B:USR1@{lead}",
    }
    argv = [f"--{key}={value}" for key, value in given.items() if value is not None]
    argv.append("--no-requeue" if options.requeue_by == "chain" else "--requeue")
    return [*argv, *options.more]


def _lead(config: RunConfig, options: SlurmOptions) -> int:
    """Seconds before the limit at which Slurm signals; at most half of the time, where that is known."""
    lead = options.lead_seconds or lead_seconds(run_folder(config)) or DEFAULT_LEAD_SECONDS
    limit = _minutes_form(options.time)
    return max(1, min(lead, int(limit / 2))) if limit else lead


def _minutes_form(text: str | None) -> float | None:
    """Seconds of a time limit in any of sbatch's forms. Source: sbatch(1), --time."""
    if text is None:
        return None
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if dash:
        hours, minutes, seconds = (int(part) for part in [*parts, "0", "0"][:3])
        return 86400.0 * int(days) + 3600 * hours + 60 * minutes + seconds
    return 60.0 * int(parts[0]) if len(parts) == 1 else slurm_seconds(rest)


def _check(options: SlurmOptions) -> None:
    for name in ("partition", "account", "qos", "gres", "gpus_per_node"):
        value = getattr(options, name)
        if value is not None and not re.fullmatch(_NAME, value):
            raise ConfigError(f"--{name.replace('_', '-')} {value!r} is no name that Slurm knows")
    if options.time is not None and not re.fullmatch(_TIME, options.time):
        raise ConfigError(f"--time {options.time!r}: expected minutes, hours:minutes:seconds or days-hours")
    if options.min_nodes is not None and not 1 <= options.min_nodes <= options.nodes:
        raise ConfigError(f"--min-nodes {options.min_nodes} is not between 1 and --nodes {options.nodes}")
    for item in (*options.more, *options.srun):
        if not re.match(r"-", item):
            raise ConfigError(f"{item!r} is no option of sbatch or srun", remedy="write it as --name=value")
        if re.match(r"--export=.*=", item):
            raise ConfigError(
                "--export with a value would show it to everybody who lists the job",
                remedy="export the variable in this shell; jobs get the whole environment",
            )
        _plain(item, "an option")


def _plain(text: object, what: str) -> str:
    """The text, if Slurm can carry it on one line."""
    if re.search(r"[\x00-\x1f\x7f]", str(text)):
        raise ConfigError(f"{what} {str(text)!r} holds a control character, which Slurm does not carry")
    return str(text)


def _pattern(path: Path) -> str:
    """A path as one of sbatch's file name patterns, none of which it shall expand. Source: sbatch(1)."""
    text = _plain(path, "the log's path")
    if "\\" in text:
        raise ConfigError(f"the log's path {text!r} holds a backslash, which Slurm takes for itself")
    return text.replace("%", "%%")
