"""Multiple-choice tasks inside a run: rank 0 has lm-eval, all ranks compute how likely the answers are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_cpt.config.schema import RunConfig
from dist_cpt.data.batch import IGNORE_INDEX, Batch
from dist_cpt.engines.engine import Engine
from dist_cpt.errors import ConfigError
from dist_cpt.model.loss import DocumentLosses, LossHead
from dist_cpt.model.tasks import Answer, Scores, TaskOptions, answers_of, scores_of
from dist_cpt.runtime.collectives import all_reduce_floats, on_rank_zero, rank, world_size
from dist_cpt.runtime.liveness import made_progress


@dataclass(frozen=True)
class RunTasks:
    """The tasks of a run, read once; every rank has the same answers."""

    options: TaskOptions
    tokenizer: Any
    answers: list[Answer]

    @property
    def num_targets(self) -> int:
        """Tokens of all answers."""
        return sum(len(answer) for _, answer in self.answers)

    def scores(self, log_likelihoods: Sequence[float]) -> Scores:
        """By task. Collective."""
        return on_rank_zero("evaluate.tasks", lambda: scores_of(self.tokenizer, self.options, log_likelihoods))


def open_tasks(config: RunConfig, tokenizer: Any) -> RunTasks | None:
    """The tasks of a recipe, None without any. Collective.

    Raises:
        ConfigError: no such task, one of another kind, no data for it, or `evaluate.best.better` contradicts lm-eval.
        MissingExtraError: rank 0 has no lm-eval.
    """
    tasks = config.evaluate.tasks
    if tasks is None:
        return None
    folder = None if tasks.path is None else Path(tasks.path)
    options = TaskOptions(tasks.names, folder, tasks.limit, "evaluate.tasks")
    return RunTasks(options, tokenizer, on_rank_zero("evaluate.tasks", partial(_answers, config, tokenizer, options)))


def _answers(config: RunConfig, tokenizer: Any, options: TaskOptions) -> list[Answer]:
    answers, higher_is_better = answers_of(tokenizer, options)
    names = {held_out.name for held_out in config.data.validation}
    if twice := sorted(names.intersection(higher_is_better)):
        raise ConfigError(f"evaluate.tasks: {twice[0]} is a held-out set too", remedy="give that another name")
    if (best := config.evaluate.best) is not None:
        name, key = best.name_and_key
        higher = higher_is_better.get(name, {}).get(key.partition(",")[0])
        if higher is not None and higher == best.less_is_better:
            word = "higher" if higher else "lower"
            raise ConfigError(f"evaluate.best: a {word} {best.of} is better", remedy=f"set better: {word}")
    return answers


def log_likelihoods(
    engine: Engine, head: LossHead, answers: Sequence[Answer], longest: int, budget: int
) -> list[float]:
    """Of every answer after its question, in nats. Collective: each rank does its part.

    Questions are cut from the left to `longest` tokens with their answer; about `budget` tokens are in one forward.
    """
    cut = [([*question, *answer][-longest - 1 :], min(len(answer), longest)) for question, answer in answers]
    batches = list(_batches([len(ids) for ids, _ in cut], budget))
    found = [0.0] * len(answers)
    try:
        for start in range(0, len(batches), world_size()):
            own = batches[start + rank()] if start + rank() < len(batches) else []
            head.recorder = losses = DocumentLosses(max(1, len(own)))
            engine.evaluate(_batch_of([cut[index] for index in own] or [([0, 0], 0)]))
            for index, loss in zip(own, losses.sums[:, 0].tolist(), strict=False):
                found[index] = -loss
            made_progress()
    finally:
        head.recorder = None
    return all_reduce_floats(found)


def _batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of texts that are about `budget` tokens together, the longest first."""
    batch: list[int] = []
    size = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and size + lengths[index] > budget:
            yield batch
            batch, size = [], 0
        batch.append(index)
        size += lengths[index]
    if batch:
        yield batch


def _batch_of(texts: Sequence[tuple[list[int], int]]) -> Batch:
    """Documents side by side in one row; of each the last tokens, that many, are targets."""
    inputs, labels, positions, borders = [], [], [], [0]
    for ids, num_targets in texts:
        inputs += ids[:-1]
        length = len(ids) - 1
        labels += [IGNORE_INDEX] * (length - num_targets) + ids[len(ids) - num_targets :]
        positions += range(length)
        borders.append(borders[-1] + length)
    return Batch(
        input_ids=torch.tensor([inputs]),
        labels=torch.tensor([labels]),
        position_ids=torch.tensor([positions]),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        max_seqlen=int(np.diff(borders).max()),
        num_targets=sum(count for _, count in texts),
        counts_by_source=np.zeros((1, 3), np.int64),
        block_ids=(0,),
    )
