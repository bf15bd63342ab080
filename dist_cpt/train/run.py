"""A run from its first line to its last."""

from __future__ import annotations

import contextlib
from pathlib import Path

from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import EXIT_DONE, EXIT_STOPPED, DistCptError, NumericsError
from dist_cpt.runtime.stop import StopRequest
from dist_cpt.train.attempt import RunContext, run_attempt
from dist_cpt.train.build import (
    agree_on_recipe,
    build_model,
    check_before_hours_of_work,
    open_data,
    open_run,
    settle_length,
)
from dist_cpt.train.held_out import evaluate_all, why_end_early, with_base_losses
from dist_cpt.train.loop import train_loop
from dist_cpt.train.prediction import settle_engine, write_prediction
from dist_cpt.train.restore import restore, roll_back
from dist_cpt.train.sample import write_sample
from dist_cpt.train.start import announce, open_contract, start


def train(config: RunConfig, stop: StopRequest, *, even_if_finished: bool = True) -> tuple[int, Path | None]:
    """Train, or resume, the run of `config` as one of its ranks. Collective.

    Without `even_if_finished` a run with nothing left to do is left as it is; else it is restored and certified again.

    Returns the exit code, and on rank 0 the run folder, for the report.
    """
    return run_attempt(config, stop, train_attempt, even_if_finished=even_if_finished)


def train_attempt(context: RunContext) -> tuple[int, str]:
    """Build, restore or start, train to the end or to a stop, save. (Exit code, reason); collective."""
    context = agree_on_recipe(context)
    start_point = check_before_hours_of_work(context)
    data = open_data(context, start_point)
    context = settle_length(context, data)
    context = settle_engine(context, data)
    model = build_model(context, start_point, data)
    run = open_run(context, data, model)
    run = with_base_losses(run)  # nothing is restored yet: the engine has the weights before the run's own adapter
    progress = restore(run) or start(run)
    contract = open_contract(run)
    announce(run, contract, progress)
    with contextlib.closing(run.engine), contextlib.closing(data.loader), contextlib.closing(run.profile):
        if progress.resumed_from is None:
            evaluate_all(run, progress)
            write_sample(run, progress)
        try:
            if why_end_early(run, progress) is not None:  # the attempt before ended here for it
                outcome = "ended early"
            else:
                outcome, progress = train_loop(run, contract, progress)
            while outcome == "rollback":
                outcome, progress = train_loop(run, contract, roll_back(run, progress))
        except NumericsError:  # raised on all ranks; a save still in progress is of a state from before
            with contextlib.suppress(DistCptError):
                run.saver.finish()
            raise
        if outcome in ("done", "ended early"):
            context.watchdog.tick("saving", progress.step)
            run.saver.save_now(progress)  # before the last evaluation, which may take long or fail
        context.require_claim()
        contract.close(progress.step)
        if outcome == "stopped":
            reason = f"{context.stop.requested or 'another rank'}: stopped and saved at step {progress.step}"
            context.observers.on_message(reason)
            return EXIT_STOPPED, reason
        evaluate_all(run, progress)
        context.watchdog.tick("ending", progress.step)
        context.require_claim()
        write_sample(run, progress)
        write_prediction(run)
        reason = f"ended early: {why_end_early(run, progress)}" if outcome == "ended early" else "done"
    return EXIT_DONE, reason
