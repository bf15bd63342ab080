"""Where `launch` and `resume` go: this host, Slurm or Kubernetes. Options the target cannot honour are refused."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dist_cpt.checkpoint.finished import says_finished
from dist_cpt.config.load import load_recipe
from dist_cpt.config.places import require_places
from dist_cpt.config.resolve import resolve_paths, run_folder
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import EXIT_DONE, ConfigError, say
from dist_cpt.health.rivals import living
from dist_cpt_launch.launch_options import LaunchOptions
from dist_cpt_launch.launch_plan import local_plan

SLURM_ONLY = (
    *("min_nodes", "time", "partition", "account", "qos", "gres", "gpus_per_node", "cpus_per_task"),
    *("save_before_limit", "max_restarts", "requeue_by", "max_running", "sbatch", "srun", "prepare", "tasks"),
)
TRAIN_ONLY = (
    *("procs_per_node", "rdzv", "min_nodes", "gres", "gpus_per_node", "save_before_limit", "max_restarts"),
    *("requeue_by", "preflight", "srun", "from_start"),
)
KUBERNETES_ONLY = ("cluster", "kind")


def launch(
    recipes: Sequence[Path], overrides: Sequence[str], options: LaunchOptions, *, on: str, dry_run: bool = False
) -> int:
    """Run, submit or (with `dry_run`) print the plan for `on`; returns an exit code.

    Raises:
        ConfigError: a recipe is invalid, or `on` cannot honour an option.
    """
    if on == "kubernetes":
        return _on_kubernetes(recipes, overrides, options, dry_run)
    if on not in ("local", "slurm"):
        raise ConfigError(f"--on {on}: expected local, slurm or kubernetes")
    _refuse(options, KUBERNETES_ONLY, "only --on kubernetes can honour that")
    loaded = [(resolve_paths(load_recipe(recipe, overrides)), recipe) for recipe in recipes]
    if on == "slurm" and options.prepare:
        return _prepare_on_slurm(loaded, overrides, options, dry_run)
    if on == "slurm":
        from dist_cpt_launch.slurm import slurm_plan, submit

        _refuse(options, ("tasks",), "that belongs to --prepare")
        _refuse(options, ("rdzv",), "the ranks of a Slurm job find each other; only --on local can honour that")
        plan, start = slurm_plan(loaded, overrides, options, folder=Path.cwd()), submit
    else:
        from dist_cpt_launch.local import run_local

        _refuse(options, (*SLURM_ONLY, "preflight"), "only --on slurm can honour that", recipes)
        ranks = options.procs_per_node or 1
        threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, (os.cpu_count() or 1) // ranks)
        plan, start = local_plan(*loaded[0], overrides, options, threads_per_rank=threads), run_local
    if dry_run:
        print(plan.shell_line())
        return EXIT_DONE
    if options.from_start:
        for config, _ in loaded:
            _move_aside(run_folder(config))
    say(str(plan.run_folder), sys.stdout)
    if all(says_finished(config) for config, _ in loaded):
        return EXIT_DONE
    if on == "local":  # a login node need not have what the compute nodes have
        require_places(loaded[0][0])
    return start(plan)


def _prepare_on_slurm(
    loaded: Sequence[tuple[RunConfig, Path]], overrides: Sequence[str], options: LaunchOptions, dry_run: bool
) -> int:
    from dist_cpt_launch.slurm import prepare_plan, submit

    _refuse(options, TRAIN_ONLY, "--prepare cannot honour that", [path for _, path in loaded])
    if options.nodes > 1:
        raise ConfigError(f"--nodes {options.nodes}: --prepare has tasks", remedy=f"use --tasks {options.nodes}")
    plan = prepare_plan(loaded[0], overrides, options, folder=Path.cwd())
    if dry_run:
        print(plan.shell_line())
        return EXIT_DONE
    return submit(plan)


def _move_aside(folder: Path) -> None:
    """Rename the folder of an earlier run, so that the next one finds nothing to resume.

    Raises:
        ConfigError: a rank of it is alive, or the folder cannot be renamed.
    """
    if not folder.exists():
        return
    if alive := living(folder):
        raise ConfigError(
            f"--from-start: rank {alive.rank} on {alive.host} still trains in {folder}", remedy="stop it first"
        )
    aside = folder.with_name(f"{folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        folder.rename(aside)
    except OSError as error:
        raise ConfigError(f"--from-start: {folder} cannot be renamed: {error.strerror}") from error
    say(f"moved the earlier run to {aside}")


def _on_kubernetes(recipes: Sequence[Path], overrides: Sequence[str], options: LaunchOptions, dry_run: bool) -> int:
    from dist_cpt_launch.kubernetes import KINDS, apply, kubernetes_plan
    from dist_cpt_launch.kubernetes_settings import load_settings

    if options.cluster is None:
        raise ConfigError("--on kubernetes needs --cluster FILE", remedy="docs/kubernetes.md has an example")
    _refuse(options, (*SLURM_ONLY, "rdzv", "from_start"), "--on kubernetes cannot honour that", recipes)
    kind = options.kind or "trainjob"
    if kind not in KINDS:
        raise ConfigError(f"--kind {kind}: expected {' or '.join(KINDS)}")
    settings = load_settings(options.cluster)
    if options.preflight is False:
        settings = settings.model_copy(update={"preflight": False})
    nodes, procs = options.nodes, options.procs_per_node or 1
    plan = kubernetes_plan(recipes[0], overrides, settings, kind=kind, nodes=nodes, procs_per_node=procs)
    if dry_run:
        print(plan.manifest(), end="")
        return EXIT_DONE
    return apply(plan)


def _refuse(options: LaunchOptions, names: Sequence[str], why: str, recipes: Sequence[Path] = ()) -> None:
    for name in names:
        if getattr(options, name) not in (None, []):
            raise ConfigError(f"--{name.replace('_', '-')}: {why}")
    if len(recipes) > 1:
        raise ConfigError(f"{len(recipes)} recipes: {why}")
