"""The claim on a run folder: one attempt at a time may train in it, and every change of the folder goes through it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from dist_cpt.config.load import load_recipe
from dist_cpt.config.resolve import fingerprint, require_same_recipe, to_yaml
from dist_cpt.config.schema import RunConfig
from dist_cpt.errors import CheckpointError, ConfigError, Superseded, WriteError
from dist_cpt.run_folder.checkpoints import published, read_manifest, read_state, step_of, superseded
from dist_cpt.run_folder.json_files import (
    cannot_write,
    glance,
    is_at,
    json_bytes,
    read_object,
    remove_quietly,
    replace_file,
    rows_or_problem,
    swap_in,
    write_object,
    write_temporary,
)
from dist_cpt.run_folder.lineage import agreed_changes
from dist_cpt.run_folder.names import (
    APPENDED,
    BAD_NODES,
    EVENTS,
    EXIT,
    LAUNCHES,
    LOCK,
    LOGS,
    METRICS,
    PREFLIGHT,
    RECIPE,
    REPLACED,
    RUN,
    UNTRAINED,
    rewound_name,
)
from dist_cpt.run_folder.staging import remove_abandoned
from dist_cpt.storage import is_there, patiently, read_bytes

MOVES = ("stage", "publish", "aside", "reinstate", "prune")  # of checkpoints
CHANGES = (*MOVES, *REPLACED, *(f"append.{name}" for name in APPENDED))  # what `Claim.change` is asked for

TAIL_BYTES = 65536  # of metrics.jsonl, for its last row
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # Lustre without -o flock, NFS without lockd


class Occupied(ConfigError):
    """Another attempt trains in the run folder."""


@dataclass(frozen=True)
class Claim:
    """An attempt's claim on a run folder; released with `close` or by the end of the process.

    The lock separates two starts on one host. It may not reach another host, where an old attempt may still run
    after the scheduler has given it up; run.json therefore has the token of the current claim, and an attempt that
    finds another token there has been superseded.
    """

    folder: Path
    attempt: int  # 0 for the first start
    wandb_run_id: str
    token: str
    lock: TextIO | None = None  # rank 0's, where the file system has locks
    reached: Callable[[str], object] = lambda change: None  # a planned fault, in the middle of a change

    def is_current(self) -> bool:
        """Whether no later attempt is seen to have claimed the folder; True also while run.json cannot be read.

        To end early and to be silent; what changes the folder asks `require_current`.
        """
        return glance(self.folder / RUN).get("token", self.token) == self.token

    def _is_current(self) -> bool:
        """For certain; True also if run.json is missing or damaged, since a later attempt writes it."""
        return read_object(self.folder / RUN).get("token", self.token) == self.token

    def require_current(self) -> None:
        """The fence.

        Raises:
            Superseded: a later attempt has claimed the folder.
            StorageError: run.json cannot be read.
        """
        if not self._is_current():
            later = read_object(self.folder / RUN).get("attempts", 0) - 1
            raise Superseded(
                f"attempt {self.attempt} is superseded in {self.folder}: attempt {later} has claimed it",
                remedy="nothing to do: the later attempt continues from the last checkpoint",
            )

    @contextlib.contextmanager
    def change(self, what: str, undo: Callable[[], object] | None = None) -> Iterator[None]:
        """The one door to the run folder: `with claim.change("prune"):` around a single rename, write or append.

        The process may freeze anywhere and wake up when another attempt trains. A freeze in the middle is noticed
        after the change, which `undo` then takes back.

        Raises:
            Superseded: a later attempt has claimed the folder.
            StorageError: run.json cannot be read.
        """
        self.require_current()
        self.reached(what)
        try:
            yield
        except (OSError, WriteError):
            self.require_current()  # the later attempt may be why it failed
            raise
        if undo is not None and not self._is_current():
            with contextlib.suppress(OSError):
                undo()
        self.require_current()

    def replace(self, name: str, content: bytes) -> None:
        """Replace a file of the folder: after a crash it has the old content or the new one.

        Raises:
            Superseded: a later attempt has claimed the folder; its file is untouched, or was put back.
            WriteError: the file cannot be written.
        """
        path = self.folder / name
        patiently(path, lambda: self.put(write_temporary(path, content), name))

    def put(self, temporary: Path, name: str) -> None:
        """Replace a file of the folder by a complete one from beside it.

        Raises:
            as `replace`.
        """
        path = self.folder / name
        undo: list[Callable[[], None]] = []
        try:
            with self.change(name, lambda: undo[0]()):
                undo.append(swap_in(temporary, path))
        except OSError as error:
            raise cannot_write(path, error) from error
        finally:
            remove_quietly(temporary)

    def write(self, name: str, value: Any) -> None:
        """Replace a JSON file of the folder.

        Raises:
            as `replace`.
        """
        self.replace(name, json_bytes(value))

    def close(self) -> None:
        """Let another process train in the folder."""
        if self.lock is not None:
            self.lock.close()


def claim(
    folder: Path, config: RunConfig, new_run_id: str, living: Callable[[Path], object] = lambda folder: None
) -> Claim:
    """Claim the folder for a new attempt, and count it.

    A batch job that starts again (same DIST_CPT_JOB or SLURM_JOB_ID), or the next one of a chain
    (DIST_CPT_PREDECESSOR), supersedes the earlier start even if that is still alive. Where the file system has no
    locks, `living` finds a rank of one that is.

    Raises:
        Occupied: another process trains in the folder.
        ConfigError: it has a run of another recipe.
        WriteError: it cannot be made or written.
    """

    def lock_folder() -> TextIO | None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return _lock(folder, living)
        except OSError as error:
            raise WriteError(
                f"run folder {folder} cannot be written: {error.strerror}", remedy="choose another output_dir"
            ) from error

    lock = patiently(folder, lock_folder)
    try:
        changed = _accepted_changes(folder, config)
        attempts, wandb_run_id = _earlier_starts(folder)
        if changed is None:
            _begin_anew(folder)
            changed, wandb_run_id = [], None
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
        if lock is not None and not patiently(folder / LOCK, lambda: is_at(lock.fileno(), folder / LOCK)):
            raise Superseded(f"another attempt has claimed {folder} meanwhile")
        recorded = config.model_copy(update={"accept_changes": ()})  # consent is for this start
        replace_file(folder / RECIPE, to_yaml(recorded).encode())
        write_object(folder / RUN, started)
        patiently(folder / EXIT, lambda: (folder / EXIT).unlink(missing_ok=True))
        with contextlib.suppress(OSError):
            for left_over in folder.glob("*.tmp"):  # an earlier attempt that still lives is superseded now
                remove_quietly(left_over)
        remove_abandoned(folder)
    except BaseException as error:
        if lock is not None:
            lock.close()
        if isinstance(error, OSError):
            raise WriteError(f"run folder {folder} cannot be written: {error.strerror}") from error
        raise
    return Claim(folder, started["attempts"] - 1, started["wandb_run_id"], started["token"], lock)


def record_killed(folder: Path, code: int, reason: str) -> None:
    """Write exit.json for the attempt that this launcher has started, if it was killed before it wrote its own.

    Raises:
        Superseded: a later attempt has claimed the folder.
        WriteError: it cannot be written.
    """
    run = read_object(folder / RUN)
    here = run.get("host") == socket.gethostname() and not Path(f"/proc/{run.get('pid')}").exists()
    if "token" not in run or is_there(folder / EXIT) or not (here if _job() is None else run.get("job") == _job()):
        return
    steps = [row.get("step", 0) for row in rows_or_problem(folder / METRICS, [], TAIL_BYTES)]
    dead = Claim(folder, run["attempts"] - 1, run["wandb_run_id"], run["token"])
    dead.write(EXIT, {"code": code, "reason": reason, "step": max(steps, default=0)})


def _lock(folder: Path, living: Callable[[Path], object]) -> TextIO | None:
    path = folder / LOCK
    lock = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except OSError as error:
        lock.close()
        has_locks = error.errno not in _NO_LOCKS
        if has_locks and not isinstance(error, BlockingIOError):
            raise
    current = read_object(folder / RUN)
    same_job = _job() is not None and current.get("job") in (_job(), os.environ.get("DIST_CPT_PREDECESSOR"))
    if not same_job and (has_locks or living(folder)):
        where = f" (process {current['pid']} on {current['host']})" if {"pid", "host"} <= current.keys() else ""
        raise Occupied(
            f"another process trains in {folder}{where}",
            remedy="wait for it, stop it, or give this run another name",
        )
    if not has_locks:
        return None
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


def _accepted_changes(folder: Path, config: RunConfig) -> list[str] | None:
    """The settings that this and earlier attempts changed with consent; None where another recipe never trained a step.

    Raises:
        ConfigError: recipe.yaml or the newest readable checkpoint has another recipe.
    """
    path = folder / RECIPE
    known = is_there(path) or any(is_there(folder / name) for name in (RUN, EVENTS))
    changed = set(read_object(folder / RUN).get("accepted_changes", []))
    try:
        recorded = [load_recipe(path)] if known and _expect(path) else []
        for checkpoint in published(folder):
            with contextlib.suppress(CheckpointError):  # damaged: a restore says so
                recorded += [recipe for recipe in [read_manifest(checkpoint).recipe_config()] if recipe is not None]
                break
        agreed = agreed_changes(folder)
        return sorted(changed.union(*(require_same_recipe(one, config, str(folder), agreed) for one in recorded)))
    except ConfigError:
        if ever_trained(folder):
            raise
        return None


def _expect(path: Path) -> bool:
    """Whether a file that an earlier attempt wrote is there."""
    try:
        return bool(patiently(path, path.stat, expected=True))
    except OSError:
        return False


def ever_trained(folder: Path) -> bool:
    """Whether a step of any recipe was ever trained in a run folder; else it belongs to nobody."""
    rows = (folder / METRICS, folder / rewound_name(METRICS))
    return any(is_there(path) and read_bytes(path, num_bytes=1) for path in rows) or any(
        step_of(path) > 0 for path in (*published(folder), *superseded(folder))
    )


def _begin_anew(folder: Path) -> None:
    """Put what another recipe left here aside, except what is about the folder and its attempts."""
    aside = folder / UNTRAINED / secrets.token_hex(4)
    aside.mkdir(parents=True)
    for name in set(os.listdir(folder)) - {LOCK, RUN, EXIT, UNTRAINED, LOGS, LAUNCHES, BAD_NODES, PREFLIGHT}:
        os.rename(folder / name, aside / name)
