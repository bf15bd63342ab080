"""Does a run's own record agree with itself and with the checkpoints?

Every step once, every block once, tokens that add up, one recipe, one W&B run, and a proof for the latest
resume. Rows after the newest checkpoint are normal while a run goes on, or after it was killed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from dist_cpt import __version__
from dist_cpt.config.load import load_recipe
from dist_cpt.config.resolve import fingerprint
from dist_cpt.errors import EXIT_DONE, EXIT_STOPPED, CheckpointError, DistCptError
from dist_cpt.run_folder.checkpoints import published, read_manifest, read_state, superseded
from dist_cpt.run_folder.json_files import read_rows, strict_json
from dist_cpt.run_folder.manifest import Manifest
from dist_cpt.run_folder.names import EVALUATIONS, EVENTS, METRICS
from dist_cpt.run_folder.train_state import TrainState, first_line


class _Row(BaseModel):
    """What of a row of metrics.jsonl has to add up."""

    step: int
    position: tuple[int, int]
    num_tokens: int
    tokens: int
    tokens_by_source: dict[str, int]
    skipped: bool
    skipped_total: int


@dataclass(frozen=True)
class _Saved:
    name: str
    manifest: Manifest
    state: TrainState


def record_problems(run_folder: Path) -> list[str]:
    """Every contradiction among the files of a run folder and its checkpoints, one line each.

    Checkpoints that cannot be read are left to `verify_run`, which names them.
    """
    problems = _problems(run_folder)
    if problems and not (run_folder / "exit.json").exists():
        # The run may go on, and two files were read at two moments: what is wrong is so at a second look too.
        again = _problems(run_folder)
        problems = [problem for problem in problems if problem in again]
    return problems


def _problems(run_folder: Path) -> list[str]:
    paths = published(run_folder)  # before the rows: those of a published step are on the disk already
    saved = _readable(paths)
    newest_step = int(paths[0].name.removeprefix("step-")) if paths else 0
    objects, problems = _objects(run_folder)
    rows, unreadable = _rows(run_folder / METRICS, _Row.model_validate)
    events, no_events = _rows(run_folder / EVENTS, dict)
    evaluations, no_evaluations = _rows(run_folder / EVALUATIONS, lambda row: (int(row["step"]), str(row["name"])))
    problems += unreadable + no_events + no_evaluations
    windows, lost = _windows(objects.get("rollbacks.json", {}), saved)
    problems += lost
    if not unreadable:
        problems += _step_problems([row.step for row in rows])
        ended_well = objects.get("exit.json", {}).get("code") in (EXIT_DONE, EXIT_STOPPED)
        # A kill may have hit between the decision to roll back and the deed: then the rows know nothing of it yet.
        done = windows if ended_well or not saved else saved[0].state.skipped_windows
        problems += _sequence_problems(rows, windows, done)
        problems += [problem for one in saved for problem in _saved_problems(one, rows)]
        problems += _end_problems(objects.get("exit.json", {}), rows, newest_step)
    problems += _recipe_problems(run_folder, objects.get("run.json", {}), saved)
    problems += _wandb_problems(objects.get("run.json", {}), events, saved)
    problems += _certificate_problems(objects.get("certificate.json"), events, saved, _readable(superseded(run_folder)))
    problems += [
        f"{EVALUATIONS}: {name} stands {count} times at step {step}"
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
    wrong = [(doubled, "stands more than once"), (missing, "is missing")]
    found = [f"{METRICS}: step {listed[0]} {what}{_more(listed)}" for listed, what in wrong if listed]
    return found or [f"{METRICS}: the steps are not in order from 1"]


def _windows(rollbacks: Mapping[str, Any], saved: Sequence[_Saved]) -> tuple[list[tuple[int, int]], list[str]]:
    """The blocks that rollbacks left out; those a checkpoint knows of must stand in rollbacks.json too."""
    try:
        known = {(int(start), int(stop)) for start, stop in rollbacks.get("windows", [])}
    except (TypeError, ValueError):
        return [], ["rollbacks.json: `windows` is no list of [start, stop]"]
    lost = [
        f"{one.name} left out blocks {start} to {stop - 1}, rollbacks.json does not say so"
        for one in saved
        for start, stop in one.state.skipped_windows
        if (start, stop) not in known
    ]
    return sorted(known.union(*(one.state.skipped_windows for one in saved))), lost


def _sequence_problems(
    rows: Sequence[_Row], windows: Sequence[tuple[int, int]], done: Sequence[tuple[int, int]]
) -> list[str]:
    """Whether each row begins where the one before it ended, or after the `windows`, or those `done`, that follow."""
    blocks, tokens, skipped = [], [], []
    before = _Row(step=0, position=(0, 0), num_tokens=0, tokens=0, tokens_by_source={}, skipped=False, skipped_total=0)
    for row in rows:
        starts = [_past(before.position[1], left_out) for left_out in (windows, done)]
        if row.position[0] not in starts or row.position[1] <= row.position[0]:
            blocks.append(f"step {row.step} took blocks {row.position[0]} to {row.position[1]}, {starts[0]} was next")
        if row.tokens != before.tokens + row.num_tokens:
            tokens.append(f"step {row.step} has {row.tokens} tokens, not {before.tokens} + {row.num_tokens}")
        if row.skipped_total != before.skipped_total + row.skipped:
            skipped.append(f"step {row.step} counts {row.skipped_total} skipped steps after {before.skipped_total}")
        before = row
    return [f"{METRICS}: {found[0]}{_more(found)}" for found in (blocks, tokens, skipped) if found]


def _past(position: int, windows: Sequence[tuple[int, int]]) -> int:
    """The first position from `position` on that lies in none of the windows."""
    for start, stop in windows:
        position = stop if start <= position < stop else position
    return position


def _saved_problems(one: _Saved, rows: Sequence[_Row]) -> list[str]:
    """Whether a checkpoint stands where the row of its step says the run stood."""
    state = one.state
    until = [row for row in rows if row.step <= state.step]
    by_source: Counter[str] = Counter()
    for row in until:
        by_source.update(row.tokens_by_source)
    at = until[-1] if until and until[-1].step == state.step else None
    if at is None and state.step > 0:
        return [f"{METRICS} has no row of step {state.step}, which {one.name} holds"]
    pairs = {
        "position": (state.position, at.position[1] if at else 0),
        "tokens": (state.tokens, at.tokens if at else 0),
        "skipped_total": (state.skipped_total, at.skipped_total if at else 0),
        "tokens_by_source": (+Counter(state.tokens_by_source), +by_source),
    }
    return [
        f"{one.name}: {name} is {_plain(here)}, by {METRICS} {_plain(there)}"
        for name, (here, there) in pairs.items()
        if here != there
    ]


def _end_problems(ended: Mapping[str, Any], rows: Sequence[_Row], newest_step: int) -> list[str]:
    """A run that ended well has saved its last step."""
    last = rows[-1].step if rows else 0
    if ended.get("code") not in (EXIT_DONE, EXIT_STOPPED):
        return []
    problems = []
    if last != newest_step:
        problems.append(
            f"exit.json says {ended['code']}, but the last step is {last} and the newest checkpoint step {newest_step}"
        )
    if ended.get("step") != last:
        problems.append(f"exit.json is of step {ended.get('step')}, {METRICS} ends at step {last}")
    return problems


def _recipe_problems(run_folder: Path, run: Mapping[str, Any], saved: Sequence[_Saved]) -> list[str]:
    """Fingerprints; those of another version of dist-cpt, which has other keys, say nothing."""
    try:
        expected = fingerprint(load_recipe(run_folder / "recipe.yaml"))
    except DistCptError as error:
        return [error.message]
    recorded = {one.name: one.manifest.recipe for one in saved if one.manifest.versions.get("dist-cpt") == __version__}
    if saved and saved[0].name in recorded and "fingerprint" in run:
        recorded["run.json"] = str(run["fingerprint"])
    return [
        f"{name} is of the recipe {found[:12]}, recipe.yaml has the fingerprint {expected[:12]}"
        for name, found in recorded.items()
        if found != expected
    ]


def _wandb_problems(run: Mapping[str, Any], events: Sequence[Mapping[str, Any]], saved: Sequence[_Saved]) -> list[str]:
    places = [("run.json", run.get("wandb_run_id"))]
    places += [
        (f"{EVENTS}, attempt {event.get('attempt')}", event.get("wandb_run_id"))
        for event in events
        if event.get("kind") in ("start", "resume")
    ]
    places += [(one.name, one.state.wandb_run_id) for one in saved]
    by_id: dict[str, list[str]] = {}
    for place, run_id in places:
        by_id.setdefault(str(run_id), []).append(place)
    if len(by_id) == 1:
        return []
    shown = "; ".join(f"{run_id} in {where[0]}{_more(where)}" for run_id, where in by_id.items())
    return [f"not one W&B run: {shown}"]


def _certificate_problems(
    certificate: Mapping[str, Any] | None,
    events: Sequence[Mapping[str, Any]],
    saved: Sequence[_Saved],
    aside: Sequence[_Saved],
) -> list[str]:
    resumed = [
        event["attempt"] for event in events if event.get("kind") == "resume" and isinstance(event.get("attempt"), int)
    ]
    if certificate is None:
        return [f"attempt {resumed[-1]} was resumed, but there is no certificate.json"] if resumed else []
    problems = []
    if certificate.get("verdict") != "pass":
        problems.append(f"certificate.json: verdict {certificate.get('verdict')}, failed {certificate.get('failed')}")
    attempt, step = certificate.get("attempt"), certificate.get("step")
    if resumed and not (isinstance(attempt, int) and attempt >= resumed[-1]):
        problems.append(f"certificate.json is of attempt {attempt}, the latest resume was attempt {resumed[-1]}")
    known = {one.manifest.state_sha256 for one in (*saved, *aside)} | {one.state.parent for one in saved}
    pruned = isinstance(step, int) and all(step < one.state.step for one in saved)
    if certificate.get("state_sha256") not in known and not pruned:
        problems.append(f"certificate.json is of a state at step {step} that no checkpoint here holds")
    return problems


def _readable(paths: Sequence[Path]) -> list[_Saved]:
    found = []
    for path in paths:
        try:
            found.append(_Saved(path.name, read_manifest(path), read_state(path)))
        except CheckpointError:
            continue
    return found


def _objects(run_folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The JSON objects of a run folder by file name, and what is wrong with the others."""
    found, problems = {}, []
    for path in sorted({run_folder / "run.json", *run_folder.glob("*.json")}):
        try:
            content = strict_json(path.read_bytes())
        except OSError as error:
            problems.append(f"{path.name}: {error.strerror}")
        except (ValueError, RecursionError):
            problems.append(f"{path.name}: not a JSON object")
        else:
            if isinstance(content, dict):
                found[path.name] = content
            else:
                problems.append(f"{path.name}: not a JSON object")
    return found, problems


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


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Counter) else value


def _more(found: Sequence[Any]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""
