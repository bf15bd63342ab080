"""lineage.json: the checkpoint that a run was branched from, and how it was extended; the oldest entry first.

An entry records the changes of the recipe that were asked for then, as `key: old -> new`. A resume from a checkpoint
with the old value has agreed to these, and to no others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from dist_cpt.run_folder.checkpoints import read_manifest
from dist_cpt.run_folder.json_files import read_object
from dist_cpt.run_folder.names import LINEAGE, MANIFEST
from dist_cpt.storage import read_bytes


@dataclass(frozen=True)
class Lineage:
    """One branch or extension."""

    kind: Literal["branch", "extend"]
    run: str  # folder of the run with the checkpoint
    step: int
    checkpoint: str  # its folder's name
    state_sha256: str
    manifest_sha256: str
    attempt: int  # that saved the checkpoint
    group: str  # the name of the run that is the root of all branches
    set: tuple[str, ...]  # as given
    changed: dict[str, str]  # all settings that differ from the checkpoint's recipe
    time: str


def lineage_entry(
    kind: Literal["branch", "extend"], run: Path, checkpoint: Path, given: Sequence[str], changed: dict[str, str]
) -> Lineage:
    """The entry, of now, for a run that continues from a checkpoint of the run in the folder `run`."""
    manifest = read_manifest(checkpoint)
    return Lineage(
        kind=kind,
        run=str(run.absolute()),
        step=manifest.step,
        checkpoint=checkpoint.name,
        state_sha256=manifest.state_sha256,
        manifest_sha256=hashlib.sha256(read_bytes(checkpoint / MANIFEST)).hexdigest(),
        attempt=manifest.attempt,
        group=group_of(run, run.absolute().name),
        set=tuple(given),
        changed=changed,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def read_lineage(run_folder: Path) -> list[dict[str, Any]]:
    """The entries of a run; none for a run of its own, or if the file is damaged: then nothing is agreed to.

    Raises:
        StorageError: the file system does not answer.
    """
    entries = read_object(run_folder / LINEAGE).get("entries", [])
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def lineage_content(run_folder: Path, entry: Lineage) -> dict[str, Any]:
    """The file with one more entry after those of a run."""
    return {"entries": [*read_lineage(run_folder), asdict(entry)]}


def agreed_changes(run_folder: Path) -> frozenset[tuple[str, str]]:
    """(key, `old -> new`) of the changes that were asked for."""
    entries = read_lineage(run_folder)
    return frozenset((key, text) for entry in entries for key, text in entry.get("changed", {}).items())


def inherited_attempt(run_folder: Path) -> int:
    """The last attempt of another run whose checkpoint and rows this one has; -1 if it has none."""
    return max((entry["attempt"] for entry in read_lineage(run_folder) if entry.get("kind") == "branch"), default=-1)


def inherited_step(run_folder: Path) -> int:
    """The last step of another run whose rows this one has; 0 if it has none."""
    return max((entry["step"] for entry in read_lineage(run_folder) if entry.get("kind") == "branch"), default=0)


def group_of(run_folder: Path, name: str) -> str:
    """The name that a run shares with all its branches, and with what it was branched from."""
    return next((str(entry["group"]) for entry in read_lineage(run_folder) if "group" in entry), name)
