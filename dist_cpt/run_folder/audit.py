"""Whether the files of a run folder agree with each other and with its checkpoints.

Every step once, every block once, tokens that add up, one recipe, one W&B run, and a certificate of the latest
resume. Rows after the newest checkpoint are normal while the run is in progress, or after it was killed.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from dist_cpt import __version__
from dist_cpt.config.load import load_recipe
from dist_cpt.config.resolve import differences, fingerprint
from dist_cpt.errors import EXIT_DONE, EXIT_STOPPED, CheckpointError, DistCptError
from dist_cpt.run_folder.checkpoints import published, read_manifest, read_state, step_of, superseded
from dist_cpt.run_folder.json_files import read_rows, strict_json
from dist_cpt.run_folder.lineage import inherited_attempt
from dist_cpt.run_folder.manifest import Manifest
from dist_cpt.run_folder.names import CERTIFICATE, EVALUATIONS, EVENTS, EXIT, METRICS, RECIPE, ROLLBACKS, RUN
from dist_cpt.run_folder.train_state import TrainState, first_line, past_windows
from dist_cpt.storage import patiently, read_bytes


class _Row(BaseModel):
    """The columns of metrics.jsonl that must add up."""

    step: int
    position: tuple[int, int]
    num_tokens: int
    tokens: int
    tokens_by_source: dict[str, int]
    skipped: bool
    skipped_total: int
    totals_by_source: dict[str, tuple[int, int, int]] = {}  # blocks, tokens, targets; none by earlier versions


@dataclass(frozen=True)
class _Checkpoint:
    name: str
    manifest: Manifest
    state: TrainState


def record_problems(run_folder: Path) -> list[str]:
    """Every contradiction among the files of a run folder and its checkpoints, one line each.

    Unreadable checkpoints are left to `verify_run`.

    Raises:
        StorageError: the file system does not answer.
    """
    problems = _problems(run_folder)
    if problems and not (run_folder / EXIT).exists():
        # The run may be writing: files are read at different moments, and only problems that stay are real.
        again = _problems(run_folder)
        problems = [problem for problem in problems if problem in again]
    return problems


def _problems(run_folder: Path) -> list[str]:
    paths = published(run_folder)  # before the rows: those of a published step are on the disk already
    checkpoints = _readable(paths)
    newest_step = step_of(paths[0]) if paths else 0
    objects, problems = _objects(run_folder)
    run, end = objects.get(RUN, {}), objects.get(EXIT, {})
    rows, bad_rows = _rows(run_folder / METRICS, _Row.model_validate)
    events, bad_events = _rows(run_folder / EVENTS, dict)
    evaluations, bad_evaluations = _rows(run_folder / EVALUATIONS, lambda row: (int(row["step"]), str(row["name"])))
    problems += bad_rows + bad_events + bad_evaluations
    windows, bad_windows = _windows(objects.get(ROLLBACKS, {}), checkpoints)
    problems += bad_windows
    if not bad_rows:
        problems += _step_problems([row.step for row in rows])
        ended_well = end.get("code") in (EXIT_DONE, EXIT_STOPPED)
        # A kill may come between the record of a rollback and the rollback: then the rows do not show it yet.
        done = windows if ended_well or not checkpoints else checkpoints[0].state.skipped_windows
        problems += _sequence_problems(rows, windows, done)
        problems += [problem for one in checkpoints for problem in _checkpoint_problems(one, rows)]
        problems += _end_problems(end, rows[-1].step if rows else 0, newest_step) if ended_well else []
    problems += _recipe_problems(run_folder, run, checkpoints)
    own = [one for one in checkpoints if one.state.attempt > inherited_attempt(run_folder)]
    problems += _wandb_problems(run, events, own)
    aside = _readable(superseded(run_folder))
    problems += _certificate_problems(objects.get(CERTIFICATE), events, checkpoints, aside)
    problems += [
        f"{EVALUATIONS}: {name} has {count} rows of step {step}"
        for (step, name), count in Counter(evaluations).items()
        if count > 1
    ]
    return problems


def _step_problems(steps: Sequence[int]) -> list[str]:
    if list(steps) == list(range(1, len(steps) + 1)):
        return []
    counts = Counter(steps)
    doubled = sorted(step for step, count in counts.items() if count > 1)
    missing = sorted(set(range(1, max(steps) + 1)) - counts.keys())
    wrong = [(doubled, "has several rows"), (missing, "is missing")]
    problems = [f"{METRICS}: step {listed[0]} {what}{_more(listed)}" for listed, what in wrong if listed]
    return problems or [f"{METRICS}: the steps are not in order from 1"]


def _windows(
    rollbacks: Mapping[str, Any], checkpoints: Sequence[_Checkpoint]
) -> tuple[list[tuple[int, int]], list[str]]:
    """The blocks that rollbacks left out; rollbacks.json must list those that a checkpoint records."""
    try:
        listed = {(int(start), int(stop)) for start, stop in rollbacks.get("windows", [])}
    except (TypeError, ValueError):
        return [], [f"{ROLLBACKS}: `windows` is not a list of [start, stop]"]
    recorded = [(one.name, window) for one in checkpoints for window in one.state.skipped_windows]
    problems = [
        f"{name} left out blocks {start} to {stop - 1}, which {ROLLBACKS} does not list"
        for name, (start, stop) in recorded
        if (start, stop) not in listed
    ]
    return sorted(listed.union(window for _, window in recorded)), problems


def _sequence_problems(
    rows: Sequence[_Row], windows: Sequence[tuple[int, int]], done: Sequence[tuple[int, int]]
) -> list[str]:
    """Whether each row starts where the one before ended, or after the `windows` (or those `done`) that follow."""
    blocks, tokens, skipped = [], [], []
    before = _Row(step=0, position=(0, 0), num_tokens=0, tokens=0, tokens_by_source={}, skipped=False, skipped_total=0)
    for row in rows:
        starts = [past_windows(before.position[1], skipped_blocks) for skipped_blocks in (windows, done)]
        if row.position[0] not in starts or row.position[1] <= row.position[0]:
            blocks.append(
                f"step {row.step} took blocks {row.position[0]} to {row.position[1]}, expected from {starts[0]}"
            )
        if row.tokens != before.tokens + row.num_tokens:
            tokens.append(f"step {row.step} has {row.tokens} tokens, not {before.tokens} + {row.num_tokens}")
        if row.skipped_total != before.skipped_total + row.skipped:
            skipped.append(f"step {row.step} counts {row.skipped_total} skipped steps after {before.skipped_total}")
        before = row
    return [f"{METRICS}: {listed[0]}{_more(listed)}" for listed in (blocks, tokens, skipped) if listed]


def _checkpoint_problems(one: _Checkpoint, rows: Sequence[_Row]) -> list[str]:
    """Whether a checkpoint has the counts of the rows up to its step."""
    state = one.state
    until = [row for row in rows if row.step <= state.step]
    by_source: Counter[str] = Counter()
    for row in until:
        by_source.update(row.tokens_by_source)
    at = until[-1] if until and until[-1].step == state.step else None
    if at is None and state.step > 0:
        return [f"{METRICS} has no row of step {state.step}, the step of {one.name}"]
    pairs = {
        "position": (state.position, at.position[1] if at else 0),
        "tokens": (state.tokens, at.tokens if at else 0),
        "skipped_total": (state.skipped_total, at.skipped_total if at else 0),
        "tokens_by_source": (dict(+Counter(state.tokens_by_source)), dict(+by_source)),
    }
    if state.blocks_by_source is not None and state.targets_by_source is not None and at is not None:
        totals = at.totals_by_source
        pairs["blocks_by_source"] = (state.blocks_by_source, {name: counts[0] for name, counts in totals.items()})
        pairs["targets_by_source"] = (state.targets_by_source, {name: counts[2] for name, counts in totals.items()})
    return [
        f"{one.name}: {name} is {saved}, by {METRICS} {counted}"
        for name, (saved, counted) in pairs.items()
        if saved != counted
    ]


def _end_problems(end: Mapping[str, Any], last_step: int, newest_step: int) -> list[str]:
    """A run that ended well has saved its last step."""
    problems = []
    if last_step != newest_step:
        problems.append(
            f"{EXIT} has code {end['code']}, but the last step is {last_step} and the newest checkpoint {newest_step}"
        )
    if end.get("step") != last_step:
        problems.append(f"{EXIT} is of step {end.get('step')}, {METRICS} ends at step {last_step}")
    return problems


def _recipe_problems(run_folder: Path, run: Mapping[str, Any], checkpoints: Sequence[_Checkpoint]) -> list[str]:
    """Checkpoints of another recipe; the fingerprint of run.json, unless another version of dist-cpt computed it."""
    problems = []
    try:
        recipe = load_recipe(run_folder / RECIPE)
        for one in checkpoints:
            saved = one.manifest.recipe_config()
            changed = {} if saved is None else differences(saved, recipe)
            listed = [f"{k}: {text}" for k, text in changed.items() if k not in run.get("accepted_changes", ())]
            problems += [f"{one.name} has another recipe than {RECIPE}: {listed[0]}{_more(listed)}"] if listed else []
    except DistCptError as error:
        return [error.message]
    recorded, expected = run.get("fingerprint"), fingerprint(recipe)
    newest = checkpoints[0].manifest if checkpoints else None
    if newest is None or newest.format_version == 1 or newest.versions.get("dist-cpt") != __version__:
        return problems
    if recorded not in (None, expected):
        problems.append(f"{RUN} has the recipe fingerprint {str(recorded)[:12]}, {RECIPE} {expected[:12]}")
    return problems


def _wandb_problems(
    run: Mapping[str, Any], events: Sequence[Mapping[str, Any]], checkpoints: Sequence[_Checkpoint]
) -> list[str]:
    """Several W&B runs in the record; `checkpoints` are this run's own, without the one that it was branched from."""
    recorded = [(RUN, run.get("wandb_run_id"))]
    recorded += [
        (f"{EVENTS}, attempt {event.get('attempt')}", event.get("wandb_run_id"))
        for event in events
        if event.get("kind") in ("start", "resume")
    ]
    recorded += [(one.name, one.state.wandb_run_id) for one in checkpoints]
    by_id: dict[str, list[str]] = {}
    for place, run_id in recorded:
        by_id.setdefault(str(run_id), []).append(place)
    if len(by_id) == 1:
        return []
    shown = "; ".join(f"{run_id} in {places[0]}{_more(places)}" for run_id, places in by_id.items())
    return [f"several W&B run ids: {shown}"]


def _certificate_problems(
    certificate: Mapping[str, Any] | None,
    events: Sequence[Mapping[str, Any]],
    checkpoints: Sequence[_Checkpoint],
    aside: Sequence[_Checkpoint],
) -> list[str]:
    resumed = [
        event["attempt"] for event in events if event.get("kind") == "resume" and isinstance(event.get("attempt"), int)
    ]
    if certificate is None:
        return [f"attempt {resumed[-1]} was resumed, but there is no {CERTIFICATE}"] if resumed else []
    problems = []
    if certificate.get("verdict") != "pass":
        problems.append(f"{CERTIFICATE}: verdict {certificate.get('verdict')}, failed {certificate.get('failed')}")
    attempt, step = certificate.get("attempt"), certificate.get("step")
    if resumed and not (isinstance(attempt, int) and attempt >= resumed[-1]):
        problems.append(f"{CERTIFICATE} is of attempt {attempt}, the latest resume was attempt {resumed[-1]}")
    known = {one.manifest.state_sha256 for one in (*checkpoints, *aside)} | {one.state.parent for one in checkpoints}
    steps = [one.state.step for one in checkpoints]  # the best one and the landmark may be older than those pruned
    pruned = isinstance(step, int) and step not in steps and (not steps or step < max(steps))
    if certificate.get("state_sha256") not in known and not pruned:
        problems.append(f"{CERTIFICATE} is of a state at step {step} that is in no checkpoint here")
    return problems


def _readable(paths: Sequence[Path]) -> list[_Checkpoint]:
    checkpoints = []
    for path in paths:
        with contextlib.suppress(CheckpointError):
            checkpoints.append(_Checkpoint(path.name, read_manifest(path), read_state(path)))
    return checkpoints


def _objects(run_folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The JSON objects of a run folder by file name, and the problems of the other JSON files."""
    objects, problems = {}, []
    names = patiently(run_folder, lambda: os.listdir(run_folder))
    for path in sorted({run_folder / RUN, *(run_folder / name for name in names if name.endswith(".json"))}):
        try:
            content = strict_json(read_bytes(path))
        except OSError as error:
            problems.append(f"{path.name}: {error.strerror}")
        except (ValueError, RecursionError):
            problems.append(f"{path.name}: not a JSON object")
        else:
            if isinstance(content, dict):
                objects[path.name] = content
            else:
                problems.append(f"{path.name}: not a JSON object")
    return objects, problems


def _rows(path: Path, convert: Callable[[dict[str, Any]], Any]) -> tuple[list[Any], list[str]]:
    rows = []
    try:
        for row in read_rows(path):
            rows.append(convert(row))
    except DistCptError as error:
        return [], [error.message]
    except (ValidationError, ValueError, TypeError, KeyError, RecursionError) as error:
        return [], [f"{path.name}, row {len(rows) + 1}: {type(error).__name__} {first_line(error)}"]
    return rows, []


def _more(listed: Sequence[Any]) -> str:
    return f" (and {len(listed) - 1} more)" if len(listed) > 1 else ""
