"""`dist-cpt branch`: a new run folder that continues from a checkpoint of another run and leaves that run unchanged."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_cpt.checkpoint.byte_check import wrong_files
from dist_cpt.checkpoint.quick_check import summary
from dist_cpt.config.exclusions import num_steps
from dist_cpt.config.load import apply_overrides, build, load_recipe
from dist_cpt.config.resolve import (
    differences,
    fingerprint,
    resolve_paths,
    run_folder,
    settings_of_place,
    source_name,
    to_yaml,
    with_tokens,
)
from dist_cpt.config.resume_changes import how_may_change, is_below
from dist_cpt.config.schema import DataConfig, RunConfig, ScheduleShape, SourceConfig, StageConfig
from dist_cpt.errors import CheckpointError, ConfigError
from dist_cpt.optim.continued_schedule import PHASES, pinned
from dist_cpt.optim.schedule import rates_at
from dist_cpt.run_folder.checkpoints import published, read_manifest, read_state, step_of
from dist_cpt.run_folder.json_files import cannot_write, encode_row, fsync_path, json_bytes, parse_row
from dist_cpt.run_folder.lineage import Lineage, lineage_content, lineage_entry
from dist_cpt.run_folder.names import (
    BASE_LOSSES,
    CHECKPOINTS,
    CONTINUED,
    EVALUATIONS,
    EVENTS,
    INITIAL_ADAPTER,
    LINEAGE,
    MANIFEST,
    METRICS,
    RECIPE,
    ROLLBACKS,
    RUN,
)
from dist_cpt.run_folder.records import CheckpointRecord
from dist_cpt.run_folder.staging import staged
from dist_cpt.run_folder.train_state import TrainState, past_windows
from dist_cpt.storage import is_there, read_bytes


@dataclass(frozen=True)
class Branched:
    """A new branch."""

    folder: Path
    source: RunConfig  # the recipe of the checkpoint
    config: RunConfig
    lineage: Lineage


def branch(run: Path, step: int, name: str, overrides: Sequence[str] = ()) -> Branched:
    """Make `<output_dir>/<name>` from the checkpoint of `step` of a run, which may be training; a resume trains it.

    Its files are links to the run's, or copies, with every byte verified; metrics and evaluations up to the step are
    copied. `overrides` change its recipe.

    Raises:
        ConfigError: no such run, a name that is taken, or a change that a checkpoint cannot be continued with.
        CheckpointError: no such checkpoint, or it is damaged.
        WriteError: the new folder cannot be written.
    """
    checkpoint = _checkpoint(run, step)
    saved = read_manifest(checkpoint).recipe_config()
    if saved is None:
        raise CheckpointError(f"{checkpoint} has no recipe (format 1)", remedy="resume the run, and branch from there")
    config = _branched_recipe(run, read_state(checkpoint), name, overrides)
    changed = differences(saved, config)
    _require_continuable(saved, config, changed, step)
    folder = run_folder(config)
    if os.path.lexists(folder):
        raise ConfigError(f"{folder} exists", remedy="give the branch another --name")
    try:
        with staged(folder) as staging:
            lineage = _fill(staging, run, checkpoint, config, (tuple(overrides), changed))
    except OSError as error:
        raise cannot_write(folder, error) from error
    return Branched(folder, saved, config, lineage)


def branch_lines(made: Branched) -> list[str]:
    """What was made, what changed, and how the learning rates continue."""
    step, total = made.lineage.step, num_steps(made.config)
    before, after = rates_at(made.source, step), rates_at(made.config, step + 1) if total else {}
    rates = [f"{name} {before.get(name, 0.0):.3g} -> {rate:.3g}" for name, rate in after.items()]
    return [
        f"{made.folder}: from step {step} of {made.lineage.run} (state {made.lineage.state_sha256[:12]})",
        *(f"  {key}: {text}" for key, text in made.lineage.changed.items()),
        *([f"  rates of steps {step} and {step + 1}: {', '.join(rates)}"] if rates else []),
        f"dist-cpt resume {made.folder} trains steps {step + 1} to {total or 'the end'}",
    ]


def recipe_of(run: Path) -> RunConfig:
    """The recorded recipe of a run where it is now."""
    recorded = load_recipe(run / RECIPE)
    return resolve_paths(load_recipe(run / RECIPE, settings_of_place(recorded, run)))


def _checkpoint(run: Path, step: int) -> Path:
    there = published(run)
    for path in there:
        if step_of(path) == step:
            return path
    steps = ", ".join(str(step_of(path)) for path in reversed(there)) or "none"
    raise CheckpointError(f"{run} has no checkpoint of step {step}", remedy=f"its checkpoints are of steps: {steps}")


def settled(recipe: RunConfig, state: TrainState) -> RunConfig:
    """A run's recipe with its length in tokens; for `train.epochs` the checkpoints record it."""
    if recipe.train.tokens is not None:
        return recipe
    return with_tokens(recipe, int(state.schedule["num_steps"]) * recipe.batch.global_tokens)


def _branched_recipe(run: Path, state: TrainState, name: str, overrides: Sequence[str]) -> RunConfig:
    """The run's recipe with the overrides; what has been trained stays as it was."""
    recipe = settled(recipe_of(run), state)
    values = recipe.model_dump(mode="json")
    changed = apply_overrides(values, overrides)
    given = {item.partition("=")[0].strip() for item in overrides}
    changed["schedule"] = _schedule(recipe, state.step, changed, (given, overrides))
    if isinstance(changed["data"], dict):
        _set_mixture(recipe, past_windows(state.position, state.skipped_windows), changed["data"])
    return resolve_paths(build(changed | {"name": name}, where=f"the branch {name}"))


def _schedule(
    recipe: RunConfig, step: int, changed: dict[str, Any], asked: tuple[set[str], Sequence[str]]
) -> dict[str, Any]:
    """The schedule of a branch: of another kind it begins at `step`; in a run of another length its past is pinned."""
    given, overrides = asked
    values, schedule = recipe.model_dump(mode="json"), changed["schedule"]
    if not isinstance(schedule, dict):
        return schedule  # the schema refuses it
    if _kinds(schedule) != _kinds(values["schedule"]):
        own = "schedule" in given or "schedule.start_step" in given
        return {"start_step": step} | schedule if own else schedule | {"start_step": step}
    if "schedule" not in given and changed["train"] != values["train"]:
        pinned_values = values | {"schedule": pinned(recipe, step).model_dump(mode="json")}
        schedule = apply_overrides(pinned_values, overrides)["schedule"]
    for phase in PHASES:  # one of the two replaces the other
        steps, fraction = f"{phase}_steps", f"{phase}_fraction"
        if f"schedule.{steps}" in given and f"schedule.{fraction}" not in given:
            schedule[fraction] = ScheduleShape.model_fields[fraction].default
        if f"schedule.{fraction}" in given and f"schedule.{steps}" not in given:
            schedule[steps] = None
    return schedule


def _set_mixture(recipe: RunConfig, num_blocks: int, data: dict[str, Any]) -> None:
    """Other weights or stages in `data` follow the blocks that have been read, as stages of their own."""
    old = recipe.data.model_dump(mode="json")
    stages, weights = data.get("stages") or [], _weights(data.get("sources") or [])
    if stages == old["stages"] and (stages or weights == _weights(old["sources"])):
        return
    following = stages if stages != old["stages"] else [{"weights": weights}]
    data["stages"] = [*_stages_until(recipe.data, num_blocks), *following]
    if stages == old["stages"] or weights == _weights(old["sources"]):  # else both are given, which is refused
        for source in data["sources"]:
            source["weight"] = SourceConfig.model_fields["weight"].default


def _weights(sources: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By the names that the sources will have."""
    places = [(one, one.get("name") or source_name(str(one.get("path") or one.get("store")))) for one in sources]
    return {name: one.get("weight", 1.0) for one, name in places}


def _stages_until(data: DataConfig, num_blocks: int) -> list[dict[str, Any]]:
    """The stages in which the first blocks of the stream were read."""
    mixed = {source.name or "": source.weight for source in data.sources}
    past, left = [], num_blocks
    for stage in data.stages or (StageConfig(weights=mixed),):
        length = left if stage.tokens is None else min(left, -(-stage.tokens // data.seq_len))
        if length:
            past.append({"tokens": length * data.seq_len, "weights": dict(stage.weights)})
        left -= length
    return past


def _kinds(schedule: dict[str, Any]) -> dict[str, Any]:
    shapes = {"": schedule} | (schedule.get("per_group") or {})
    return {group: (shape or {}).get("kind", "cosine") for group, shape in shapes.items()}


def _require_continuable(saved: RunConfig, config: RunConfig, changed: dict[str, str], step: int) -> None:
    new = [f"data.sources.{number}" for number in range(len(saved.data.sources), len(config.data.sources))]
    new += [f"data.validation.{number}" for number in range(len(saved.data.validation), len(config.data.validation))]
    refused = [
        f"{key}: {text}"
        for key, text in changed.items()
        if how_may_change(key) not in ("accepted", "branched") and not any(is_below(key, added) for added in new)
    ]
    if refused:
        raise ConfigError(
            f"a branch cannot change {'; '.join(refused)}: the checkpoint was trained with the first",
            remedy="leave it out, or start a new run with it (adapter.continue_from, model.path)",
        )
    if config.train.tokens is not None and num_steps(config) <= step:
        raise ConfigError(
            f"train.tokens {config.train.tokens} end at step {num_steps(config)}, the branch begins at step {step}",
            remedy=f"--set train.tokens=N with more than {step * config.batch.global_tokens}",
        )


def _fill(
    folder: Path, run: Path, source: Path, config: RunConfig, asked: tuple[tuple[str, ...], dict[str, str]]
) -> Lineage:
    """Everything that a resume reads, in a new folder."""
    checkpoint = folder / CHECKPOINTS / source.name
    checkpoint.mkdir(parents=True)
    manifest, state = read_manifest(source), read_state(source)
    try:
        for name in (*manifest.files, MANIFEST):
            _link(source / name, checkpoint / name)
    except FileNotFoundError as error:
        raise CheckpointError(f"{source} was removed meanwhile", remedy="branch from a newer checkpoint") from error
    if problems := wrong_files(checkpoint):
        raise CheckpointError(f"{source}: {summary(problems)}", remedy="branch from another checkpoint")
    lineage = lineage_entry("branch", run, checkpoint, *asked)
    record = CheckpointRecord(state.step, source.name, 0.0, manifest.num_bytes(), 0.0)
    events = [{"kind": "branch", **asdict(lineage)}, {"time": lineage.time, "kind": "checkpoint", **asdict(record)}]
    now = round(time.time(), 3)
    started = {
        "wandb_run_id": secrets.token_hex(4),
        "attempts": state.attempt + 1,
        "fingerprint": fingerprint(config),
        "accepted_changes": sorted(lineage.changed),
        "first_started": now,
        "started": now,
        "ends": [],
    }
    files = {
        METRICS: _rows_until(run / METRICS, state.step),
        EVALUATIONS: _rows_until(run / EVALUATIONS, state.step),
        EVENTS: b"".join(map(encode_row, events)),
        LINEAGE: json_bytes(lineage_content(run, lineage)),
        ROLLBACKS: json_bytes({"windows": state.skipped_windows}) if state.skipped_windows else b"",
        RUN: json_bytes(started),
        RECIPE: to_yaml(config).encode(),
    }
    for name, content in files.items():
        if content:
            (folder / name).write_bytes(content)
    for name in (CONTINUED, INITIAL_ADAPTER, BASE_LOSSES):
        if is_there(run / name):
            shutil.copyfile(run / name, folder / name)
    for path in (*folder.rglob("*"), folder):
        fsync_path(path)
    return lineage


def _link(source: Path, target: Path) -> None:
    """A hard link where the file system has them; checkpoints are never changed in place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def _rows_until(path: Path, step: int) -> bytes:
    """The lines of a file of rows up to a step."""
    if not is_there(path):
        return b""
    lines = read_bytes(path).splitlines(keepends=True)
    rows = [(line, parse_row(line)) for line in lines if line.endswith(b"\n")]
    return b"".join(line for line, row in rows if row is not None and row.get("step", step + 1) <= step)
