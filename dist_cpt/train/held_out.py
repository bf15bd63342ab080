"""The held-out sets of a run, evaluated on schedule."""

from __future__ import annotations

from dist_cpt.run_folder.records import EvaluationRecord
from dist_cpt.runtime.collectives import all_reduce_ints
from dist_cpt.train.build import Run
from dist_cpt.train.class_scores import class_scores
from dist_cpt.train.evaluate import evaluate
from dist_cpt.train.progress import Progress


def evaluate_all(run: Run, progress: Progress) -> None:
    """Evaluate every held-out set and tell the observers. Collective."""
    context, head = run.context, run.model.class_head
    context.watchdog.tick("evaluating", progress.step)
    for loader in run.data.held_out:
        if head is not None:
            head.take_confusion()  # discards the counts of probes since the last evaluation
        blocks = range(loader.num_blocks)
        micro_batch = context.shape.micro_batch
        result = evaluate(run.engine, loader.batch, blocks, loader.num_blocks, context.env, micro_batch=micro_batch)
        scores = {} if head is None else class_scores(all_reduce_ints(head.take_confusion()))
        numbers = (result.loss, result.perplexity, result.num_tokens)
        record = EvaluationRecord(progress.step, loader.name, loader.role, *numbers, context.attempt, scores)
        context.observers.on_evaluation(record)
