"""Resume: the newest valid checkpoint into the engine, with a certificate that nothing was lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dist_cpt.checkpoint.certificate import ReplayedLoss, certify
from dist_cpt.checkpoint.load import LoadedCheckpoint, load, newest_valid, require_fit
from dist_cpt.checkpoint.plan_files import owners
from dist_cpt.checkpoint.retention import reinstate, set_aside_after
from dist_cpt.config.resolve import differences, require_same_recipe
from dist_cpt.config.schema import ScheduleConfig
from dist_cpt.data.budget import require_enough
from dist_cpt.data.prepared import of_earlier_recipe
from dist_cpt.errors import CheckpointError, NumericsError
from dist_cpt.optim.eight_bit import within_half_step
from dist_cpt.optim.groups import eight_bit_names
from dist_cpt.run_folder.checkpoints import checkpoints_folder
from dist_cpt.run_folder.json_files import cannot_write, read_complete_rows, read_object
from dist_cpt.run_folder.lineage import agreed_changes
from dist_cpt.run_folder.manifest import Identity
from dist_cpt.run_folder.names import CERTIFICATE, EVENTS, ROLLBACKS
from dist_cpt.runtime.collectives import on_every_rank, on_rank_zero
from dist_cpt.runtime.log import LOGGER
from dist_cpt.runtime.seed import first_draws
from dist_cpt.storage import is_there, patiently
from dist_cpt.train.build import Run
from dist_cpt.train.probe import Stream
from dist_cpt.train.progress import Progress, Windows, progress_of
from dist_cpt.training_state import StateKind

# The replayed loss is the same forward pass in another summation order: rounding of one token's loss, averaged.
REPLAY_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3, "nf4": 2e-3, "int8": 2e-3, "fp8": 2e-3}


def restore(run: Run) -> Progress | None:
    """The newest valid checkpoint into the engine; None if there is none, and the run starts. Collective.

    Raises:
        CheckpointError: it was not restored as it was saved (certificate.json names the failure), or checkpoints that
            were published are gone.
    """
    progress = _restore(run, recorded_windows(run))
    if progress is None:
        on_rank_zero("checkpoints", lambda: _require_none_published(run.context.folder))
        on_rank_zero("metrics", lambda: run.metrics.rewind(-1))
    return progress


def _require_none_published(folder: Path) -> None:
    """Lost checkpoints must not look like a run that has saved none yet."""
    events, _ = patiently(folder / EVENTS, lambda: read_complete_rows(folder / EVENTS))
    names = [str(event.get("path")) for event in events if event.get("kind") == "checkpoint"]
    if names:
        raise CheckpointError(
            f"{names[-1]} was published in {checkpoints_folder(folder)}, where no checkpoint is now",
            remedy="move or link them back, or start over with dist-cpt launch --from-start",
        )


def roll_back(run: Run, progress: Progress) -> Progress:
    """Return to the newest checkpoint from before the bad steps, and leave their data out from now on. Collective.

    Raises:
        NumericsError: there is none.
    """
    assert progress.bad_since is not None
    bad_step, bad_position = progress.bad_since
    run.saver.finish()
    windows = tuple(sorted([*progress.skipped_windows, (bad_position, progress.position)]))
    on_rank_zero("rollback", lambda: run.context.claim.write(ROLLBACKS, {"windows": windows}))
    restored = _restore(run, windows, up_to_step=bad_step - 1)
    if restored is None:
        raise NumericsError(
            f"steps {bad_step} to {progress.step} were bad, and there is no valid checkpoint from before them",
            remedy="save more often (checkpoint.every_steps), lower the learning rate, or inspect that data",
        )
    text = (
        f"steps {bad_step} to {progress.step} were bad: back to {restored.resumed_from}, "
        f"blocks {bad_position} to {windows[-1][1] - 1} are left out"
    )
    LOGGER.warning("%s", text)
    run.context.observers.on_message(text)
    return restored


def recorded_windows(run: Run) -> Windows:
    """The blocks that rollbacks of earlier attempts left out; the checkpoint they returned to is older. Collective.

    Raises:
        CheckpointError: rollbacks.json is damaged.
    """
    path = run.context.folder / ROLLBACKS

    def read() -> list[list[int]]:
        if not is_there(path):
            return []
        try:
            return [[int(start), int(stop)] for start, stop in read_object(path)["windows"]]
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"{path} is damaged: the data that a rollback left out is not known",
                remedy="restore it from a copy, or remove it if the run may see that data again",
            ) from None

    recorded: list[list[int]] = on_rank_zero("rollbacks", read)
    return tuple((start, stop) for start, stop in recorded)


def _restore(run: Run, windows: Windows, up_to_step: int | None = None) -> Progress | None:
    run.context.watchdog.tick("restoring", 0 if up_to_step is None else up_to_step)
    folder = run.context.folder
    newest, skipped = newest_valid(folder, up_to_step)
    for name, problem in skipped:
        LOGGER.warning("checkpoint %s is invalid and is skipped: %s", name, problem)
    if newest is None:
        return None
    run.context.fault("restore", 0)
    on_rank_zero("data", lambda: _require_enough_data(run, windows))
    with on_every_rank("checkpoint", lambda: load(newest, verified=True)) as checkpoint:
        changes = on_every_rank("recipe", lambda: _recipe_changes(run, checkpoint))
        run.data.loader.learn(checkpoint.state.stream or {})
        identity, stream = on_every_rank("data", lambda: _recorded_data(run, checkpoint, changes[0]))
        on_every_rank("checkpoint", lambda: require_fit(checkpoint.manifest, run.specs, identity))
        progress = _with_blocks(progress_of(checkpoint.state, newest.name, windows), run)
        run.engine.import_state(checkpoint.read, checkpoint.state.optimizer_steps, checkpoint.reading_order())
        _certify(run, checkpoint, stream, changes)
        run.saver.resumed_from(progress.step, checkpoint.manifest.state_sha256)
    on_rank_zero("checkpoints", lambda: patiently(folder, lambda: _leave_behind(run, newest, progress.step)))
    run.context.watchdog.tick("starting", progress.step)
    return progress


def _require_enough_data(run: Run, windows: Windows) -> None:
    """What rollbacks left out makes the run reach further into the stream."""
    shape = run.context.shape
    left_out = sum(stop - start for start, stop in windows)
    require_enough(run.data.prepared, run.data.loader, shape.num_steps * shape.blocks_per_step + left_out)


def _with_blocks(progress: Progress, run: Run) -> Progress:
    """The progress with its blocks by source, which a checkpoint of an earlier version does not have."""
    if any(counts.blocks for counts in progress.counts_by_source.values()):
        return progress
    blocks = Counter(run.data.loader.blocks_read(progress.position))
    for start, stop in progress.skipped_windows:
        if stop <= progress.position:
            blocks.subtract(run.data.loader.blocks_read(stop))
            blocks.update(run.data.loader.blocks_read(start))
    counted = {name: counts._replace(blocks=blocks[name]) for name, counts in progress.counts_by_source.items()}
    return replace(progress, counts_by_source=counted)


def _leave_behind(run: Run, restored: Path, step: int) -> None:
    """Move checkpoints and rows of later steps aside: they are no longer part of this run. Idempotent."""
    claim = run.context.claim
    try:
        for name in set_aside_after(claim, step):
            LOGGER.warning("a checkpoint does not descend from %s and was moved to superseded/%s", restored.name, name)
        reinstate(claim, restored, step)
        run.metrics.rewind(step)
    except OSError as error:
        raise cannot_write(claim.folder, error) from error


def _recipe_changes(run: Run, checkpoint: LoadedCheckpoint) -> tuple[dict[str, str], dict[str, str]]:
    """The changes against the checkpoint's recipe: all of them, and those that this start accepts.

    Raises:
        ConfigError: they differ.
    """
    saved, config = checkpoint.manifest.recipe_config(), run.context.config
    if saved is None:
        LOGGER.warning("%s has no recipe (format 1): rates, decay and betas are not compared", checkpoint.path.name)
        return {}, {}
    accepted = require_same_recipe(saved, config, checkpoint.path.name, agreed_changes(run.context.folder))
    for key, text in accepted.items():
        LOGGER.warning("%s: %s from step %d on", key, text, checkpoint.state.step + 1)
    return differences(saved, config), accepted


def _recorded_data(run: Run, checkpoint: LoadedCheckpoint, changed: dict[str, str]) -> tuple[Identity, Stream]:
    """The data and its order under the checkpoint's recipe, which a branch may have left: for comparison.

    Raises:
        CheckpointError: what was read until then is not what this run's order has before that position.
    """
    saved = checkpoint.manifest.recipe_config()
    if saved is None or not any(key.startswith("data.") for key in changed):
        return run.identity, run.stream
    prepared = of_earlier_recipe(run.data.prepared, saved.data)
    loader = run.data.loader.with_data(prepared)
    position = progress_of(checkpoint.state, checkpoint.path.name, ()).next_position
    before, read = (+Counter(one.blocks_read(position)) for one in (loader, run.data.loader))
    if before != read:
        raise CheckpointError(
            f"{checkpoint.path.name} has read blocks {dict(before)}, this run's data.stages begin with {dict(read)}",
            remedy="dist-cpt branch writes down the stages that have passed",
        )
    identity = replace(run.identity, data=run.identity.data | {"identity": prepared.identity})
    return identity, replace(run.stream, loader=loader)


def _certify(
    run: Run, checkpoint: LoadedCheckpoint, stream: Stream, changes: tuple[dict[str, str], dict[str, str]]
) -> None:
    """Compare what was restored with what was saved, and write certificate.json."""
    config, context, state = run.context.config, run.context, checkpoint.state
    placed = owners(run.specs, context.env.world_size, config.adapter.kind == "lora")
    seed, next_step = config.seed, state.step + 1
    certificate = certify(
        checkpoint.manifest,
        run.engine.export_state(lambda kind, name: placed[kind, name]),
        facts={
            "next_block_ids": (
                list(state.next_block_ids),
                list(stream.next_block_ids(progress_of(state, checkpoint.path.name, ()))),
            ),
            "random": ([state.random.seed, state.random.step], [seed, state.step]),
            "random_of_every_rank": (
                [list(draws) for draws in state.random.next_draws],
                [first_draws(seed, next_step, rank) for rank in range(len(state.random.next_draws))],
            ),
            "recipe": changes,
        }
        | ({} if changes[0] else {"schedule": (_with_defaults(state.schedule), run.schedule)}),
        loss=ReplayedLoss(
            recorded=state.probe.loss,
            replayed=stream.probe_loss(state.probe.block_ids),
            tolerance=REPLAY_TOLERANCE[config.model.weights] * max(1.0, abs(state.probe.loss)),
        ),
        tolerates=_requantised(run, checkpoint),
    )
    certificate |= {
        "attempt": context.attempt,
        "restored_by": {"engine": run.engine.kind, "world_size": context.env.world_size},
    }
    on_rank_zero("certificate", lambda: context.claim.write(CERTIFICATE, certificate))
    if certificate["verdict"] != "pass":
        raise CheckpointError(
            f"{checkpoint.path.name} was not restored as it was saved: {', '.join(certificate['failed'])} failed",
            remedy="see certificate.json",
        )
    LOGGER.info("resumed from %s, certificate passes", checkpoint.path.name)


def _with_defaults(schedule: dict[str, Any]) -> dict[str, Any]:
    """A recorded schedule with the keys that a later version has added."""
    known = ScheduleConfig.model_validate({key: value for key, value in schedule.items() if key != "num_steps"})
    return {"num_steps": schedule.get("num_steps"), **known.model_dump(mode="json")}


def _requantised(run: Run, checkpoint: LoadedCheckpoint) -> Callable[[StateKind, str, torch.Tensor], bool] | None:
    """Which restored moments may differ from the saved ones: 8-bit ones whose blocks have other borders here."""
    saved_by = (checkpoint.manifest.engine, checkpoint.manifest.world_size)
    same_place = saved_by == (run.engine.kind, run.context.env.world_size)
    same_place = same_place and run.engine.kind != "fsdp-hybrid"  # whose dp_shard may differ
    eight_bit = eight_bit_names(run.groups, run.context.config.optim)
    if same_place or not eight_bit:
        return None

    def close(kind: StateKind, name: str, values: torch.Tensor) -> bool:
        if kind == "master" or name not in eight_bit:
            return False
        return within_half_step(kind, values.reshape(-1), checkpoint.read(kind, name, 0, values.numel()))

    return close
