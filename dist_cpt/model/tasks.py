"""Benchmark tasks through lm-eval, which only this module imports.

A model folder is handed to lm-eval whole. A run has its model in pieces on many ranks: of multiple-choice tasks it
takes the token ids of every question and answer, computes how likely each answer is, and lm-eval counts the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_cpt.errors import ConfigError, MissingExtraError, brief

Answer = tuple[list[int], list[int]]  # token ids of a question, and of one answer to it
Scores = dict[str, dict[str, float]]  # by task: the numbers of lm-eval under its own names, such as `acc,none`


@dataclass(frozen=True)
class TaskOptions:
    """Tasks of lm-eval by name, and how many documents of each are read."""

    names: tuple[str, ...] = ()
    folder: Path | None = None  # with further tasks as YAML files
    limit: int | None = None  # None: all
    asked_by: str = "--tasks"  # the option or the key of a recipe, for errors


def task_scores(model: Any, tokenizer_folder: Path, tasks: TaskOptions) -> Scores:
    """The scores of a model by task, subtasks of groups included.

    Raises:
        ConfigError: no such task, or its data cannot be loaded.
        MissingExtraError: lm-eval is not installed.
    """
    _require_lm_eval(tasks)
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _scores(_results(HFLM(pretrained=model.to(device), tokenizer=tokenizer, batch_size=1), tasks))


def answers_of(tokenizer: Any, tasks: TaskOptions) -> tuple[list[Answer], dict[str, dict[str, bool]]]:
    """Every answer of multiple-choice tasks in lm-eval's order, and by task and metric whether higher is better.

    Raises:
        ConfigError: no such task, one of another kind, or its data cannot be loaded.
        MissingExtraError: lm-eval is not installed.
    """
    _require_lm_eval(tasks)
    model = _scripted_model(tokenizer, None)
    results = _results(model, tasks)
    for name, settings in results["configs"].items():
        metrics = [metric["metric"] for metric in settings.get("metric_list") or []]
        if settings["output_type"] != "multiple_choice" or "exact_match" in metrics:
            raise ConfigError(
                f"{tasks.asked_by}: {name} needs more than the likelihood of given answers",
                remedy="a run evaluates multiple-choice tasks; dist-cpt evaluate --tasks has the others",
            )
    return model.asked, results["higher_is_better"]


def scores_of(tokenizer: Any, tasks: TaskOptions, log_likelihoods: Sequence[float]) -> Scores:
    """The scores by task, where `log_likelihoods` has one of each of `answers_of`, in nats."""
    return _scores(_results(_scripted_model(tokenizer, log_likelihoods), tasks))


def _require_lm_eval(tasks: TaskOptions) -> None:
    try:
        import lm_eval  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError(tasks.asked_by, "eval") from error


def _results(model: Any, tasks: TaskOptions) -> dict[str, Any]:
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager(include_path=None if tasks.folder is None else str(tasks.folder))
    unknown = [name for name in tasks.names if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(
            f"{tasks.asked_by}: lm-eval has no task {unknown[0]!r}",
            remedy="`lm_eval ls tasks` lists them; --tasks-path, or evaluate.tasks.path, names a folder with others",
        )
    try:
        return simple_evaluate(
            model=model,
            tasks=list(tasks.names),
            task_manager=manager,
            limit=tasks.limit,
            bootstrap_iters=0,
            log_samples=False,
            random_seed=None,  # of the whole process; few-shot examples have a seed of their own
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{tasks.asked_by}: {', '.join(tasks.names)}: {brief(error)}") from error


def _scores(results: dict[str, Any]) -> Scores:
    return {
        task: {key: float(value) for key, value in scores.items() if isinstance(value, int | float)}
        for task, scores in results["results"].items()
    }


def _scripted_model(tokenizer: Any, log_likelihoods: Sequence[float] | None) -> Any:
    """What lm-eval takes for a model: it remembers the answers in `asked`, and says what it was given, or zeros."""
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]

    class ScriptedModel(TemplateLM):
        def __init__(self) -> None:
            super().__init__()
            self.asked: list[Answer] = []

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            if add_special_tokens is None:  # as lm-eval's own model: BOS where the tokenizer adds it, but once
                add_special_tokens = not (tokenizer.bos_token and string.startswith(tokenizer.bos_token))
            return tokenizer.encode(string, add_special_tokens=add_special_tokens)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            first = len(self.asked)
            self.asked += [(question, answer) for _, question, answer in requests]
            given = [0.0] * len(requests) if log_likelihoods is None else log_likelihoods[first : len(self.asked)]
            return [(value, False) for value in given]

        def loglikelihood_rolling(self, requests: Any, **_: Any) -> list[float]:
            return [0.0] * len(requests)  # `answers_of` refuses such tasks

        def generate_until(self, requests: Any, **_: Any) -> list[str]:
            return [""] * len(requests)  # as above

    return ScriptedModel()
