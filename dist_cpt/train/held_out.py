"""The held-out sets of a run: their loss under the base once, then on schedule, and what the run has forgotten."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any

from dist_cpt.data.batch import Batch
from dist_cpt.data.loader import ValidationLoader
from dist_cpt.data.prepared import PreparedSource
from dist_cpt.errors import ConfigError
from dist_cpt.model.loss import PositionLosses
from dist_cpt.run_folder.evaluations import (
    best_step,
    describe_rise,
    keeps_best,
    numbers_of,
    over_limit,
    previous_step,
    reason_to_end,
)
from dist_cpt.run_folder.json_files import canonical_json, read_object, rows_or_problem
from dist_cpt.run_folder.names import BASE_LOSSES, EVALUATIONS
from dist_cpt.run_folder.records import EvaluationRecord, HeldOut
from dist_cpt.runtime.collectives import all_reduce_floats, all_reduce_ints, on_rank_zero
from dist_cpt.runtime.log import LOGGER
from dist_cpt.train.build import Run
from dist_cpt.train.evaluate import evaluate
from dist_cpt.train.progress import Progress
from dist_cpt.train.tasks import log_likelihoods


def with_base_losses(run: Run) -> Run:
    """The run with the loss of every held-out set under the base, evaluated if it is not in its record. Collective.

    To be called before anything is restored or imported: the engine then has the weights before the run's own adapter,
    whose update is still zero, on a resume too. Neither a second model nor an adapter to switch off is needed.
    """
    context, config = run.context, run.context.config
    if config.evaluate.against is None or config.model.path is None or config.task == "classify":
        return run
    sets = dict(zip(run.data.held_out, run.data.prepared.validation, strict=True))
    keys = {loader.name: _content_key(run, source) for loader, source in sets.items()}
    recorded: dict[str, Any] = on_rank_zero("base losses", lambda: read_object(context.folder / BASE_LOSSES))
    known = {name: entry for name, entry in recorded.items() if keys.get(name) == entry["content"]}
    missing = [loader for loader in sets if loader.name not in known]
    if missing:
        context.watchdog.tick("evaluating", 0)
        found = {loader.name: asdict(_measure(run, loader, 0)) for loader in missing}
        known |= {name: result | {"content": keys[name]} for name, result in found.items()}
        on_rank_zero("base losses", lambda: context.claim.write(BASE_LOSSES, known))
        if config.adapter.kind == "none":
            LOGGER.info("held-out losses are compared with those of step 0, the weights that this run began with")
    names = [field.name for field in fields(HeldOut)]
    results = {name: {key: entry[key] for key in names if key in entry} for name, entry in known.items()}
    return replace(run, base_losses={name: HeldOut(**result) for name, result in results.items()})


def evaluate_all(run: Run, progress: Progress) -> None:
    """Evaluate every held-out set and tell the observers, except of sets that have a row of this step. Collective."""
    context, head = run.context, run.model.class_head
    context.watchdog.tick("evaluating", progress.step)
    rows: list[dict[str, Any]] = on_rank_zero("evaluate", partial(_recorded, run))
    done = [row.get("name") for row in rows if row.get("step") == progress.step]  # by the attempt before
    prior = context.config.adapter.continue_from
    is_base = progress.step == 0 and (prior is None or prior.mode != "train")
    for loader in run.data.held_out:
        if loader.name in done:
            continue
        if head is not None:
            head.take_confusion()  # discards the counts of probes since the last evaluation
        base = run.base_losses.get(loader.name)
        result = base if is_base and base is not None else _measure(run, loader, progress.step)
        record = EvaluationRecord(
            step=progress.step,
            name=loader.name,
            role=loader.role,
            loss=result.loss,
            perplexity=result.perplexity,
            num_tokens=result.num_tokens,
            attempt=context.attempt,
            scores={} if head is None else class_scores(all_reduce_ints(head.take_confusion())),
            bits_per_byte=result.bits_per_byte,
            base_loss=None if base is None else base.loss,
            loss_by_position=result.by_position,
        )
        context.observers.on_evaluation(record)
    task_rows = _task_rows(run, progress.step, done)
    for record in task_rows:
        context.observers.on_evaluation(record)
    if task_rows or any(loader.name not in done for loader in run.data.held_out):
        on_rank_zero("evaluate", lambda: _judge(run, progress.step))


def why_end_early(run: Run, progress: Progress) -> str | None:
    """Why the evaluation of this step ends the run, going by its record; None: it continues. Collective."""
    config = run.context.config.evaluate
    return on_rank_zero("evaluate", lambda: reason_to_end(_recorded(run), progress.step, config))


def _task_rows(run: Run, step: int, done: Sequence[str | None]) -> list[EvaluationRecord]:
    """The scores of the run's tasks, but of those that are in its record. Collective."""
    context, tasks = run.context, run.data.tasks
    if tasks is None or set(tasks.options.names).issubset(done):
        return []
    seq_len, head = context.config.data.seq_len, run.model.module.loss_head
    found = log_likelihoods(run.engine, head, tasks.answers, seq_len, context.shape.micro_batch * seq_len)
    return [
        EvaluationRecord(step, name, "task", None, None, tasks.num_targets, context.attempt, scores)
        for name, scores in tasks.scores(found).items()
        if name not in done
    ]


def _measure(run: Run, loader: ValidationLoader, step: int) -> HeldOut:
    def batch_of(indices: Sequence[int]) -> Batch:
        run.context.fault("evaluate", step)
        return loader.batch(indices)

    head = None if run.model.class_head is not None else run.model.module.loss_head
    if head is not None:
        head.recorder = PositionLosses(run.context.config.data.seq_len, run.context.device)
    result = evaluate(
        run.engine,
        batch_of,
        range(loader.num_blocks),
        loader.num_blocks,
        run.context.shape.share(run.context.env.rank),
        micro_batch=run.context.shape.micro_batch,
        text_bytes=run.data.text_bytes,
    )
    if head is None or not isinstance(positions := head.recorder, PositionLosses):
        return result
    head.recorder = None
    sums = all_reduce_floats(positions.sums.flatten().tolist())
    ranges = zip(positions.starts, sums[::2], sums[1::2], strict=True)
    return replace(result, by_position=[(start, loss / count, int(count)) for start, loss, count in ranges if count])


def _content_key(run: Run, source: PreparedSource) -> str:
    """What the loss of a set under the base is a function of: the base wherever it lies, the tokens, their blocks."""
    config = run.context.config
    base = {key: value for key, value in run.identity.base.items() if key not in ("path", "revision")}
    blocks = [config.data.seq_len, source.stride, config.evaluate.max_blocks]
    return hashlib.sha256(canonical_json([base, source.store.manifest.content_hash, blocks])).hexdigest()


def _recorded(run: Run) -> list[dict[str, Any]]:
    return rows_or_problem(run.context.folder / EVALUATIONS, [])


def _judge(run: Run, step: int) -> None:
    """Say when a set first passes its limit, and have a best state saved.

    Raises:
        ConfigError: the rows lack what `evaluate.best` compares.
    """
    context, config = run.context, run.context.config.evaluate
    rows = _recorded(run)
    if (best := config.best) is not None and step == 0:
        name, key = best.name_and_key
        if key not in (numbers := numbers_of(rows, step, best)):
            raise ConfigError(
                f"evaluate.best.of: {best.of}: the evaluation of {name} has no finite {key!r}",
                remedy=f"use one of {', '.join(sorted(numbers))}",
            )
    if (limit := config.forgetting) is not None:
        before = previous_step(rows, step)
        passed = over_limit(rows, step, limit.loss_rise).keys()
        if passed - (over_limit(rows, before, limit.loss_rise).keys() if before is not None else set()):
            text = f"forgetting: {describe_rise(rows, step, limit.loss_rise)}"
            LOGGER.warning("%s", text)
            context.observers.on_message(text)
    if keeps_best(config) and step and best_step(rows, config) == step:
        run.saver.request(step)
        context.observers.on_message(f"the best evaluation so far is that of step {step}, whose checkpoint is kept")


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
