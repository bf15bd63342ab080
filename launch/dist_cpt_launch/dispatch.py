"""What the command line asks for, as a plan that is run, submitted or shown; what cannot be honoured is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dist_cpt.config.load import load_recipe
from dist_cpt.config.resolve import resolve_paths
from dist_cpt.errors import EXIT_DONE, ConfigError
from dist_cpt_launch.local import run_local
from dist_cpt_launch.plan import LaunchPlan, local_plan
from dist_cpt_launch.slurm import REQUEUE_BY, SlurmOptions, ranks_per_node, slurm_plan, submit

# fmt: off
SLURM_ONLY = (
    "min_nodes", "time", "partition", "account", "qos", "gres", "gpus_per_node", "cpus_per_task", "lead", "at_once",
    "sbatch", "srun", "max_restarts", "requeue_by",
)
# fmt: on


def launch_requested(recipes: list[Path], options: dict[str, Any]) -> int:
    """Run, submit or show what the options of `launch` or `resume` ask for; returns an exit code.

    Raises:
        ConfigError: a recipe that does not load, or an option that this way of launching cannot honour.
    """
    overrides = options["set_"] or []
    if options["on"] == "kubernetes":
        return _kubernetes(recipes, overrides, options)
    if options.get("cluster") is not None or options.get("kind") is not None:
        raise ConfigError("--cluster and --kind: only --on kubernetes can honour that")
    loaded = [(resolve_paths(load_recipe(recipe, overrides)), recipe) for recipe in recipes]
    on = options["on"]
    if on == "slurm":
        plan = _slurm_plan(loaded, overrides, options)
    elif on == "local":
        plan = _local_plan(loaded, overrides, options)
    else:
        raise ConfigError(f"launch --on {on}: expected local, slurm or kubernetes")
    if options["dry_run"]:
        print(plan.shown())
        return EXIT_DONE
    print(plan.run_folder, flush=True)
    if on == "slurm":
        return submit(plan)
    return run_local(plan)


def _local_plan(loaded: list[tuple[Any, Path]], overrides: list[str], options: dict[str, Any]) -> LaunchPlan:
    ignored = [name for name in (*SLURM_ONLY, "preflight") if options.get(name) is not None and options[name] != []]
    if ignored or len(loaded) > 1:
        what = f"--{ignored[0].replace('_', '-')}" if ignored else f"{len(loaded)} recipes"
        raise ConfigError(f"{what}: only --on slurm can honour that")
    procs = options["procs_per_node"] or 1
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, (os.cpu_count() or 1) // procs)
    (config, recipe), nodes = loaded[0], options["nodes"]
    # fmt: off
    return local_plan(
        config, recipe, overrides, procs_per_node=procs, threads_per_rank=threads, nodes=nodes, rdzv=options["rdzv"]
    )
    # fmt: on


def _slurm_plan(loaded: list[tuple[Any, Path]], overrides: list[str], options: dict[str, Any]) -> LaunchPlan:
    if options.get("at_once") is not None and len(loaded) == 1:
        raise ConfigError("--at-once: one recipe makes no array")
    if options["rdzv"] is not None:
        raise ConfigError("--rdzv: Slurm's ranks find each other; only --on local can honour that")
    if options["requeue_by"] not in (None, *REQUEUE_BY):
        raise ConfigError(f"--requeue-by {options['requeue_by']}: expected {', '.join(REQUEUE_BY)}")
    same = ("nodes", "min_nodes", "time", "partition", "account", "qos", "gres", "gpus_per_node")
    same += ("cpus_per_task", "max_restarts", "requeue_by", "preflight")
    asked = SlurmOptions(
        **{name: options[name] for name in same if options[name] is not None},
        procs_per_node=options["procs_per_node"] or ranks_per_node(options["gpus_per_node"], options["gres"]),
        lead_seconds=options["lead"],
        at_once=options.get("at_once"),
        more=tuple(options["sbatch"] or ()),
        srun=tuple(options["srun"] or ()),
    )
    return slurm_plan(loaded, overrides, asked, folder=Path.cwd())


def _kubernetes(recipes: list[Path], overrides: list[str], options: dict[str, Any]) -> int:
    from dist_cpt_launch.kubernetes import KINDS, apply, kubernetes_plan, load_settings

    if "cluster" not in options:
        raise ConfigError("resume --on kubernetes: launch does that", remedy="dist-cpt launch RECIPE --on kubernetes")
    if options["cluster"] is None:
        raise ConfigError("--on kubernetes needs --cluster FILE", remedy="docs/kubernetes.md has one to copy")
    ignored = [name for name in (*SLURM_ONLY, "rdzv") if options.get(name) is not None and options[name] != []]
    if ignored or len(recipes) > 1:
        what = f"--{ignored[0].replace('_', '-')}" if ignored else f"{len(recipes)} recipes"
        raise ConfigError(f"{what}: --on kubernetes cannot honour that")
    kind = options["kind"] or "trainjob"
    if kind not in KINDS:
        raise ConfigError(f"--kind {kind}: expected {' or '.join(KINDS)}")
    settings = load_settings(options["cluster"])
    if options["preflight"] is False:
        settings = settings.model_copy(update={"preflight": False})
    nodes, procs = options["nodes"], options["procs_per_node"] or 1
    plan = kubernetes_plan(recipes[0], overrides, settings, kind=kind, nodes=nodes, procs_per_node=procs)
    if options["dry_run"]:
        print(plan.shown(), end="")
        return EXIT_DONE
    return apply(plan)
