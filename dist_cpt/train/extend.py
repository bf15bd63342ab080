"""`dist-cpt extend`: a new total for a run, under which the phases that have passed keep their lengths."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from dist_cpt.checkpoint.quick_check import quick_check
from dist_cpt.checkpoint.retention import set_aside_after
from dist_cpt.config.exclusions import num_steps
from dist_cpt.config.load import build
from dist_cpt.config.resolve import differences
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import EXIT_STOPPED, CheckpointError, ConfigError
from dist_cpt.health.rivals import living
from dist_cpt.optim.continued_schedule import last_step_before_decay, pinned, require_extendable
from dist_cpt.run_folder.checkpoints import published, read_manifest, read_state, step_of
from dist_cpt.run_folder.claim import claim
from dist_cpt.run_folder.lineage import Lineage, lineage_content, lineage_entry
from dist_cpt.run_folder.metrics import MetricsFile
from dist_cpt.run_folder.names import EXIT, LINEAGE
from dist_cpt.train.branch import recipe_of, settled


@dataclass(frozen=True)
class Extended:
    """A run with a new total."""

    folder: Path
    config: RunConfig
    step: int  # that it continues from
    begun: int | None  # the step at which the decay had begun, if the run continues from before it

    def lines(self) -> list[str]:
        """What a resume will do."""
        why = "" if self.begun is None else f", since its decay began after step {self.begun}"
        return [
            f"{self.folder}: {self.config.train.tokens:,} tokens, {num_steps(self.config):,} steps",
            f"it continues from step {self.step}{why}: dist-cpt resume {self.folder}",
        ]


def extend(run: Path, tokens: int) -> Extended:
    """Set a larger `train.tokens` for a run that is not training; a resume continues as if it had begun with it.

    Where the decay has begun, what came after the newest checkpoint before it is moved aside.

    Raises:
        ConfigError: not more tokens, a schedule that decays over the whole run, or another process trains in it.
        CheckpointError: there is no checkpoint to continue from.
        WriteError: the run folder cannot be written.
    """
    recorded = recipe_of(run)
    recipe = settled(recorded, read_state(_newest(run, None)))
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"tokens": tokens})})
    if num_steps(longer) <= num_steps(recipe):
        raise ConfigError(
            f"{run} has {recipe.train.tokens:,} tokens, {num_steps(recipe):,} steps: {tokens:,} are not more",
            remedy="give more --tokens; for a shorter run: dist-cpt branch",
        )
    require_extendable(recipe)
    decays_after = last_step_before_decay(recipe, num_steps(recipe))
    checkpoint = _newest(run, decays_after)
    step, newest = step_of(checkpoint), step_of(published(run)[0])
    values = longer.model_dump(mode="json") | {"schedule": pinned(recipe, step).model_dump(mode="json")}
    config = build(values, where=f"{run} with {tokens} tokens")
    saved = read_manifest(checkpoint).recipe_config()
    changed = {} if saved is None else differences(saved, config)
    entry = lineage_entry("extend", run, checkpoint, (f"train.tokens={tokens}",), changed)
    _record(run, recorded, config, entry)
    return Extended(run, config, step, decays_after if newest > step else None)


def _newest(run: Path, up_to_step: int | None) -> Path:
    usable = (path for path in published(run) if up_to_step is None or step_of(path) <= up_to_step)
    for path in usable:
        if not quick_check(path):
            return path
    before = "" if up_to_step is None else f" up to step {up_to_step}, after which the rates decay"
    raise CheckpointError(
        f"{run} has no valid checkpoint{before}",
        remedy="dist-cpt branch RUN --at STEP --name NEW --set train.tokens=N, with a schedule that begins there",
    )


def _record(run: Path, recipe: RunConfig, config: RunConfig, entry: Lineage) -> None:
    """In an order in which a kill leaves the old run, or the new one."""
    old = claim(run, recipe, secrets.token_hex(4), living)
    try:
        old.write(LINEAGE, lineage_content(run, entry))
        set_aside_after(old, entry.step)
        MetricsFile(old).rewind(entry.step)
    finally:
        old.close()
    new = claim(run, config, secrets.token_hex(4), living)
    try:
        reason = f"extended to {config.train.tokens} tokens: a resume continues from step {entry.step}"
        new.write(EXIT, {"code": EXIT_STOPPED, "reason": reason, "step": entry.step})
    finally:
        new.close()
