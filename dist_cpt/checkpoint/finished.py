"""Whether a run has nothing left to do, told from its files alone. Torch-free."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dist_cpt.checkpoint.quick_check import quick_check
from dist_cpt.config.load import load_recipe
from dist_cpt.config.resolve import differences, run_folder
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import EXIT_DONE, ConfigError, say
from dist_cpt.run_folder.checkpoints import published, read_manifest, step_of
from dist_cpt.run_folder.json_files import read_object
from dist_cpt.run_folder.names import EXIT, RECIPE
from dist_cpt.storage import PatientFile

HASHED_BYTES = 256 * 2**20  # of a checkpoint whose every byte is read here: half a second; `verify` reads larger ones


def says_finished(config: RunConfig) -> bool:
    """Whether the run of a resolved recipe is complete, and then one line that says so. Changes nothing."""
    folder = run_folder(config)
    step = finished_step(folder, config)
    if step is not None:
        say(f"{folder} is complete: step {step} is saved, and nothing is left to train")
    return step is not None


def finished_step(folder: Path, config: RunConfig) -> int | None:
    """The last step of the finished run of `config` in `folder`; None if another start has something to do.

    Raises:
        StorageError: the file system does not answer.
    """
    end = read_object(folder / EXIT)
    newest = next(iter(published(folder)), None)
    if end.get("code") != EXIT_DONE or newest is None or step_of(newest) != end.get("step"):
        return None
    try:
        recorded = load_recipe(folder / RECIPE)
        then, now = recorded.evaluate, config.evaluate
        if differences(recorded, config) or (then.forgetting, then.best) != (now.forgetting, now.best):  # it may go on
            return None
    except ConfigError:
        return None
    return None if _is_damaged(newest) else step_of(newest)


def _is_damaged(checkpoint: Path) -> bool:
    if quick_check(checkpoint):
        return True
    manifest = read_manifest(checkpoint)
    if manifest.num_bytes() > HASHED_BYTES:
        return False
    for name, entry in manifest.files.items():
        with PatientFile(checkpoint / name, expected=True) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:  # type: ignore[arg-type]
                return True
    return False
