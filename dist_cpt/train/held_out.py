"""The held-out sets of a run, evaluated on schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from dist_cpt.data.batch import Batch
from dist_cpt.data.loader import ValidationLoader
from dist_cpt.run_folder.json_files import rows_or_problem
from dist_cpt.run_folder.names import EVALUATIONS
from dist_cpt.run_folder.records import EvaluationRecord
from dist_cpt.runtime.collectives import all_reduce_ints, on_rank_zero
from dist_cpt.train.build import Run
from dist_cpt.train.evaluate import evaluate
from dist_cpt.train.progress import Progress


def evaluate_all(run: Run, progress: Progress) -> None:
    """Evaluate every held-out set and tell the observers, except of sets that have a row of this step. Collective."""
    context, head = run.context, run.model.class_head
    context.watchdog.tick("evaluating", progress.step)

    def evaluated() -> list[str]:
        rows = rows_or_problem(context.folder / EVALUATIONS, [])
        return [str(row.get("name")) for row in rows if row.get("step") == progress.step]

    done: list[str] = on_rank_zero("evaluate", evaluated)

    def batch_of(loader: ValidationLoader, indices: Sequence[int]) -> Batch:
        context.fault("evaluate", progress.step)
        return loader.batch(indices)

    for loader in run.data.held_out:
        if loader.name in done:  # by the attempt before, which ended here
            continue
        if head is not None:
            head.take_confusion()  # discards the counts of probes since the last evaluation
        blocks = range(loader.num_blocks)
        micro_batch = context.shape.micro_batch
        result = evaluate(
            run.engine, partial(batch_of, loader), blocks, loader.num_blocks, context.env, micro_batch=micro_batch
        )
        scores = {} if head is None else class_scores(all_reduce_ints(head.take_confusion()))
        numbers = (result.loss, result.perplexity, result.num_tokens)
        record = EvaluationRecord(progress.step, loader.name, loader.role, *numbers, context.attempt, scores)
        context.observers.on_evaluation(record)


def class_scores(confusion: Sequence[int]) -> dict[str, float]:
    """`accuracy` and `macro_f1` of counts [C * C], true class first, in C order; NaN without any text.

    A class's F1 is 2 TP / (2 TP + FP + FN); macro-F1 is the plain mean over the classes that occur, as truth or as
    prediction.
    """
    classes = math.isqrt(len(confusion))
    rows = [confusion[start : start + classes] for start in range(0, len(confusion), classes)]
    total = sum(confusion)
    if not total:
        return {"accuracy": math.nan, "macro_f1": math.nan}
    hits = [rows[c][c] for c in range(classes)]
    seen = [sum(rows[c]) + sum(row[c] for row in rows) for c in range(classes)]  # 2 TP + FP + FN
    f1 = [2 * hit / all_ for hit, all_ in zip(hits, seen, strict=True) if all_]
    return {"accuracy": sum(hits) / total, "macro_f1": sum(f1) / len(f1)}
