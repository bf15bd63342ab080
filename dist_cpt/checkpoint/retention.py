"""Which checkpoints are kept: the newest valid ones, and never none."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from dist_cpt.checkpoint.quick_check import quick_check
from dist_cpt.errors import CheckpointError
from dist_cpt.run_folder.checkpoints import (
    checkpoints_folder,
    published,
    read_manifest,
    step_name,
    step_of,
    superseded,
    superseded_folder,
)
from dist_cpt.run_folder.claim import Claim
from dist_cpt.run_folder.json_files import fsync_path

LOGGER = logging.getLogger("dist_cpt")


def prune(claim: Claim, newest: Path, keep: int, landmarks: Sequence[int] = ()) -> list[str]:
    """Remove all but the `keep` newest valid checkpoints up to `newest`, which was just published, and the newest valid
    one up to each step of `landmarks`.

    Only checkpoints older than the last one kept are removed, so a damaged one never counts as kept, and `newest`,
    whose every byte was re-read, always stays. Returns the names of the removed ones.

    Raises:
        Superseded: a later attempt has claimed the run; what it may need is untouched, or was put back.
    """
    up_to_newest = [path for path in published(claim.folder) if path.name <= newest.name]
    valid = [path for path in up_to_newest if path == newest or not quick_check(path)]
    old = [path for path in up_to_newest if path.name < valid[keep - 1].name] if len(valid) >= keep else []
    kept = [next((path for path in valid if step_of(path) <= step), None) for step in landmarks]
    old = [path for path in old if path not in kept]
    # The last one moved aside stays, so that what happened can be looked up; so do those of steps to come.
    aside = sorted(superseded(claim.folder), key=lambda path: path.lstat().st_mtime)[:-1]
    old += [path for path in aside if step_of(path) <= step_of(newest)]
    for path in old:
        # The new name first: a half-deleted folder must not look like a published one.
        doomed = path.with_name(f"{path.name}.pruned-{secrets.token_hex(4)}.tmp")
        with claim.change("prune", lambda doomed=doomed, path=path: _put_back(doomed, path)):
            os.rename(path, doomed)
        remove_folder(doomed)
    return [path.name for path in old]


def set_aside(claim: Claim, path: Path) -> Path:
    """Move a published checkpoint to `superseded/`; returns where it is now. Rank 0 only.

    Raises:
        Superseded: a later attempt has claimed the run; a checkpoint that it published is untouched, or was put back.
    """
    aside = superseded_folder(claim.folder)
    target = aside / f"{path.name}.{secrets.token_hex(4)}"

    def put_back() -> None:
        if _attempt_of(target) > claim.attempt:  # else it was moved before that attempt began, or means nothing to it
            _put_back(target, path)

    with claim.change("aside", put_back):
        aside.mkdir(exist_ok=True)
        if path.is_symlink():  # it must lead to the same place from there
            anchored = target.with_suffix(".tmp")
            os.symlink(os.path.realpath(path), anchored)
            os.replace(anchored, path)
        os.rename(path, target)
    fsync_path(aside)
    fsync_path(aside.parent)
    return target


def set_aside_after(claim: Claim, step: int) -> list[str]:
    """Move published checkpoints after `step`, from which the run continues, to `superseded/`; returns their names.

    They are damaged or were rolled back: the next start must not prefer them. Rank 0 only.

    Raises:
        as `set_aside`.
    """
    moved = []
    for path in published(claim.folder):
        if path.name > step_name(step):
            with contextlib.suppress(FileNotFoundError):  # an overtaken attempt has just moved it
                moved.append(set_aside(claim, path).name)
    return moved


def reinstate(claim: Claim, restored: Path, step: int) -> None:
    """Publish a checkpoint that had been moved aside again, now that the run continues from it. Rank 0 only.

    Raises:
        Superseded: a later attempt has claimed the run.
    """
    final = checkpoints_folder(claim.folder) / step_name(step)
    if restored != final and not os.path.lexists(final):
        with contextlib.suppress(FileNotFoundError), claim.change("reinstate", lambda: _put_back(final, restored)):
            os.rename(restored, final)
        fsync_path(final.parent)


def remove_staging(run_folder: Path, before_attempt: int) -> list[str]:
    """Remove the `.tmp` folders of earlier attempts, whose claim is over even if they live; returns their names."""
    removed = []
    for folder in (checkpoints_folder(run_folder), superseded_folder(run_folder)):
        with contextlib.suppress(OSError):
            for name in os.listdir(folder):
                staged = re.search(r"\.attempt-(\d+)-[0-9a-f]+\.tmp$", name)
                if (staged and int(staged[1]) < before_attempt) or re.search(r"\.pruned-[0-9a-f]+\.tmp$", name):
                    remove_folder(folder / name)
                    removed.append(name)
    return removed


def remove_folder(path: Path) -> None:
    """Delete a folder if it exists, of a link only the link; a failure is logged, because it harms no checkpoint."""
    try:
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        LOGGER.warning("cannot remove %s: %s", path, error.strerror)


def _put_back(moved: Path, path: Path) -> None:
    """Undo a rename, unless the name has been used again."""
    if os.path.lexists(moved) and not os.path.lexists(path):
        os.rename(moved, path)


def _attempt_of(checkpoint: Path) -> int:
    """The attempt that published it; -1 if its manifest cannot be read."""
    try:
        return read_manifest(checkpoint).attempt
    except CheckpointError:
        return -1
