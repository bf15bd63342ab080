"""Which checkpoints stay: the newest that are whole, and never none."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from pathlib import Path

from dist_cpt.checkpoint.quick_check import outline_problems
from dist_cpt.run_folder.checkpoints import checkpoints_folder, published, step_name, superseded, superseded_folder
from dist_cpt.run_folder.json_files import fsync_path

LOGGER = logging.getLogger("dist_cpt")


def prune(run_folder: Path, newest: Path, keep: int) -> list[str]:
    """Remove all but the `keep` newest whole checkpoints up to `newest`, which was just published.

    Only what is older than the last one kept goes, so a damaged folder never counts as one of them, and
    `newest`, whose every byte was re-read, always stays. Returns the names of the removed ones.
    """
    up_to_here = [path for path in published(run_folder) if path.name <= newest.name]
    whole = [path for path in up_to_here if path == newest or not outline_problems(path)]
    old = [path for path in up_to_here if path.name < whole[keep - 1].name] if len(whole) >= keep else []
    # Of those moved aside the last one stays, for whoever wants to know what happened.
    old += sorted(superseded(run_folder), key=lambda path: path.lstat().st_mtime)[:-1]
    for path in old:
        # The new name first: a half-deleted folder must not look like a published one.
        doomed = path.with_name(f"{path.name}.pruned-{secrets.token_hex(4)}.tmp")
        os.rename(path, doomed)
        remove_folder(doomed)
    return [path.name for path in old]


def set_aside_after(run_folder: Path, step: int) -> list[str]:
    """Move published checkpoints of later steps than `step`, from which the run goes on, to `superseded/`.

    They are damaged, or of a line that was given up: the next start must not prefer them. Returns their names;
    rank 0 only.
    """
    aside = superseded_folder(run_folder)
    moved = []
    for path in published(run_folder):
        if path.name > step_name(step):
            aside.mkdir(exist_ok=True)
            os.rename(path, aside / f"{path.name}.{secrets.token_hex(4)}")
            moved.append(path.name)
    if moved:
        fsync_path(aside)
        fsync_path(aside.parent)
    return moved


def bring_back(run_folder: Path, restored: Path, step: int) -> None:
    """Publish a checkpoint again that had been moved aside, now that the run goes on from it; rank 0 only."""
    final = checkpoints_folder(run_folder) / step_name(step)
    if restored != final and not os.path.lexists(final):
        os.rename(restored, final)
        fsync_path(final.parent)


def remove_stale_staging(run_folder: Path, older_than_seconds: float) -> list[str]:
    """Remove `.tmp` folders that nobody has written to for so long; rank 0, at the start of an attempt.

    An older attempt may still be alive somewhere, and its save with it: give it the time.
    """
    folders = [checkpoints_folder(run_folder), superseded_folder(run_folder)]
    removed = []
    for path in (child for folder in folders if folder.is_dir() for child in folder.glob("*.tmp")):
        if time.time() - _last_change(path) >= older_than_seconds:
            remove_folder(path)
            removed.append(path.name)
    return removed


def remove_folder(path: Path) -> None:
    """Delete a folder of ours if it is there; a failure is logged, because it harms no checkpoint."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        LOGGER.warning("could not remove %s: %s", path, error.strerror)


def _last_change(path: Path) -> float:
    times = [path.lstat().st_mtime]
    for child in path.rglob("*"):
        try:
            times.append(child.lstat().st_mtime)
        except FileNotFoundError:  # its owner is at work
            return time.time()
    return max(times)
