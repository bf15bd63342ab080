"""The claim on a run folder: one attempt at a time may train in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from dist_cpt.config.load import load_recipe
from dist_cpt.config.resolve import fingerprint, require_same_recipe, to_yaml
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import CheckpointError, ConfigError, Superseded, WriteError
from dist_cpt.run_folder.checkpoints import published, read_manifest, read_state
from dist_cpt.run_folder.json_files import read_object, replace_file, write_object
from dist_cpt.run_folder.names import EXIT, LOCK, RECIPE, RUN


@dataclass(frozen=True)
class Claim:
    """Rank 0's claim on a run folder; released with `close` or by the end of the process.

    The lock separates two starts on one host. It may not reach another host, where an old attempt may still run
    after the scheduler has given it up; run.json therefore has the token of the current claim, and an attempt that
    finds another token there has been superseded.
    """

    folder: Path
    attempt: int  # 0 for the first start
    wandb_run_id: str
    token: str
    lock: TextIO

    def is_current(self) -> bool:
        """Whether no later attempt has claimed the folder; True also while run.json is missing or damaged."""
        return read_object(self.folder / RUN).get("token", self.token) == self.token

    def require_current(self) -> None:
        """The fence before anything is published.

        Raises:
            Superseded: a later attempt has claimed the folder.
        """
        if not self.is_current():
            later = read_object(self.folder / RUN).get("attempts", 0) - 1
            raise Superseded(
                f"attempt {self.attempt} is superseded in {self.folder}: attempt {later} has claimed it",
                remedy="nothing to do: the later attempt continues from the last checkpoint",
            )

    def close(self) -> None:
        """Let another process train in the folder."""
        self.lock.close()


def claim(folder: Path, config: RunConfig, new_run_id: str) -> Claim:
    """Claim the folder for a new attempt, and count it.

    A batch job that starts again (same DIST_CPT_JOB or SLURM_JOB_ID), or the next one of a chain
    (DIST_CPT_PREDECESSOR), supersedes the earlier start even if that is still alive.

    Raises:
        ConfigError: the folder has a run of another recipe, or another process trains in it.
        WriteError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
    except OSError as error:
        raise WriteError(
            f"run folder {folder} cannot be written: {error.strerror}", remedy="choose another output_dir"
        ) from error
    try:
        changed = _accepted_changes(folder, config)
        attempts, wandb_run_id = _earlier_starts(folder)
        now = round(time.time(), 3)
        started = {
            "wandb_run_id": wandb_run_id or new_run_id,
            "attempts": attempts + 1,
            "fingerprint": fingerprint(config),
            "accepted_changes": changed,
            "token": secrets.token_hex(8),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": _job(),
            "first_started": read_object(folder / RUN).get("first_started", now),
            "started": now,
            "ends": _earlier_ends(folder, attempts - 1),
        }
        recorded = config.model_copy(update={"accept_changes": ()})  # consent is for this start
        replace_file(folder / RECIPE, to_yaml(recorded).encode())
        write_object(folder / RUN, started)
        (folder / EXIT).unlink(missing_ok=True)
    except OSError as error:
        lock.close()
        raise WriteError(f"run folder {folder} cannot be written: {error.strerror}") from error
    except Exception:
        lock.close()
        raise
    return Claim(folder, started["attempts"] - 1, started["wandb_run_id"], started["token"], lock)


def _lock(folder: Path) -> TextIO:
    path = folder / LOCK
    lock = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except OSError:
        lock.close()
    current = read_object(folder / RUN)
    if _job() is None or current.get("job") not in (_job(), os.environ.get("DIST_CPT_PREDECESSOR")):
        where = f" (process {current['pid']} on {current['host']})" if {"pid", "host"} <= current.keys() else ""
        raise ConfigError(
            f"another process trains in {folder}{where}",
            remedy="wait for it, stop it, or give this run another name",
        )
    path.unlink(missing_ok=True)  # the earlier start keeps its lock on the removed file
    lock = path.open("a", encoding="utf-8")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def _earlier_starts(folder: Path) -> tuple[int, str | None]:
    """(starts so far, W&B run id) from run.json, or from the newest readable checkpoint if that file is lost."""
    run = read_object(folder / RUN)
    attempts, wandb_run_id = run.get("attempts"), run.get("wandb_run_id")
    if isinstance(attempts, int) and isinstance(wandb_run_id, str):
        return attempts, wandb_run_id
    for path in published(folder):
        try:
            state = read_state(path)
        except CheckpointError:
            continue
        return state.attempt + 1, state.wandb_run_id
    return 0, None


def _earlier_ends(folder: Path, attempt: int) -> list[dict[str, Any]]:
    """How earlier attempts ended, where recorded; exit.json has the latest end and is about to be removed."""
    ends = read_object(folder / RUN).get("ends")
    ends = list(ends) if isinstance(ends, list) else []
    latest = read_object(folder / EXIT)
    if "code" in latest:
        ends.append({"attempt": attempt} | {key: latest.get(key) for key in ("code", "reason", "step")})
    return ends


def _job() -> str | None:
    """The batch job of this process: a requeued one keeps its number, a restarted JobSet its name."""
    return os.environ.get("DIST_CPT_JOB") or os.environ.get("SLURM_JOB_ID")


def _accepted_changes(folder: Path, config: RunConfig) -> list[str]:
    """The settings that this and earlier attempts changed with consent.

    Raises:
        ConfigError: recipe.yaml or the newest readable checkpoint has another recipe.
    """
    recorded = [load_recipe(folder / RECIPE)] if (folder / RECIPE).exists() else []
    for path in published(folder):
        with contextlib.suppress(CheckpointError):  # damaged: a restore says so
            recorded += [recipe for recipe in [read_manifest(path).recipe_config()] if recipe is not None]
            break
    changed = read_object(folder / RUN).get("accepted_changes", [])
    return sorted({*changed, *(key for one in recorded for key in require_same_recipe(one, config, str(folder)))})
