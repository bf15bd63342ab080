"""Which ranks see the same folder: a path may name another file system on every host."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from pathlib import Path

from dist_cpt.errors import ConfigError
from dist_cpt.runtime.collectives import broadcast_json, gather_json, named_ranks, rank, world_size
from dist_cpt.storage import patience_seconds

HIDDEN_SECONDS = 40.0  # for which caches of a network file system may hide a new folder (nfs(5): acdirmin is 30)
MARK_SECONDS = 2.0  # the same for a new file in a folder that is known


def first_that_sees(folder: Path, seconds: float, *, marks: bool) -> int | None:
    """The lowest rank whose `folder` is also this rank's, of those with `marks`; None: of none. Collective.

    A rank with `marks` makes the folder and, for the moment, a file in it; one that cannot is no such rank.
    """
    token = broadcast_json(secrets.token_hex(8))

    def mark_of(number: int) -> Path:
        return folder / f".seen-{token}-{number}"

    marked = False
    if marks:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            mark_of(rank()).touch()
            marked = True
    marking = [number for number, has_mark in enumerate(gather_json(marked)) if has_mark]
    deadline = time.monotonic() + seconds
    while True:
        seen = next((number for number in marking if os.path.exists(mark_of(number))), None)
        if seen == (marking[0] if marking else None) or time.monotonic() >= deadline:
            break
        time.sleep(0.1)
    gather_json(None)  # every rank has looked
    if marked:
        mark_of(rank()).unlink(missing_ok=True)
    return seen


def require_shared(folder: Path, what: str, remedy: str) -> None:
    """Refuse a folder that not every rank sees as rank 0 does; a new one may be hidden for a while. Collective.

    Raises:
        ConfigError: on every rank; names the ranks that do not.
    """
    if world_size() == 1:
        return
    seen = first_that_sees(folder, min(HIDDEN_SECONDS, patience_seconds()), marks=rank() == 0)
    blind = [number for number, first in enumerate(gather_json(seen)) if first is None]
    if blind:
        error = ConfigError(f"{what}: {named_ranks(blind)} cannot see the folder {folder} of rank 0", remedy=remedy)
        error.agreed = True
        raise error
