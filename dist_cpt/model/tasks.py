"""Benchmark tasks through lm-eval, which only this module imports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_cpt.errors import ConfigError, MissingExtraError


@dataclass(frozen=True)
class TaskOptions:
    """Tasks of lm-eval by name, and how many documents of each are read."""

    names: tuple[str, ...] = ()
    folder: Path | None = None  # with further tasks as YAML files
    limit: int | None = None  # None: all


def task_scores(model: Any, tokenizer_folder: Path, tasks: TaskOptions) -> dict[str, dict[str, float]]:
    """By task, subtasks of groups included: the numbers of lm-eval under its own names, such as `acc,none`.

    Raises:
        ConfigError: no such task, or its data cannot be loaded.
        MissingExtraError: lm-eval is not installed.
    """
    try:
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError("--tasks", "eval") from error
    from transformers import AutoTokenizer

    manager = TaskManager(include_path=None if tasks.folder is None else str(tasks.folder))
    unknown = [name for name in tasks.names if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(
            f"--tasks: lm-eval has no task {unknown[0]!r}",
            remedy="`lm_eval ls tasks` lists them; --tasks-path names a folder with others",
        )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wrapped = HFLM(pretrained=model.to(device), tokenizer=tokenizer, batch_size=1)
    try:
        results = simple_evaluate(
            model=wrapped,
            tasks=list(tasks.names),
            task_manager=manager,
            limit=tasks.limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    except (OSError, ValueError, KeyError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"--tasks {','.join(tasks.names)}: {reason}") from error
    return {
        task: {key: float(value) for key, value in scores.items() if isinstance(value, int | float)}
        for task, scores in results["results"].items()
    }
