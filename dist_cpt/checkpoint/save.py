"""Save a checkpoint so that a crash at any point leaves the earlier ones intact.

Stage in a new folder, write, sync and read back in parts, agree, write the manifest last, rename, sync the parent,
and only then remove old checkpoints.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dist_cpt.checkpoint.byte_check import file_sha256
from dist_cpt.checkpoint.plan_files import model_index, owners, plan_files
from dist_cpt.checkpoint.quick_check import quick_check
from dist_cpt.checkpoint.retention import LOGGER, prune, remove_folder, remove_staging, set_aside
from dist_cpt.checkpoint.tensor_files import TensorFiles
from dist_cpt.checkpoint.verify import verify_checkpoint
from dist_cpt.errors import CheckpointError, DistCptError, StorageError, Superseded, WriteError
from dist_cpt.run_folder.checkpoints import (
    checkpoints_folder,
    read_manifest,
    staging_name,
    step_name,
    write_error,
)
from dist_cpt.run_folder.claim import Claim
from dist_cpt.run_folder.json_files import fsync_path
from dist_cpt.run_folder.manifest import (
    FORMAT_VERSION,
    FileEntry,
    Identity,
    Manifest,
    TensorEntry,
    manifest_to_bytes,
    state_digest,
)
from dist_cpt.run_folder.names import MANIFEST, MODEL_BUFFERS, MODEL_INDEX, STATE
from dist_cpt.run_folder.train_state import TrainState, state_to_bytes
from dist_cpt.runtime.collectives import agree, barrier, broadcast_json, gather_json_to_rank_zero, rank, world_size
from dist_cpt.runtime.versions import package_versions
from dist_cpt.storage import os_error
from dist_cpt.training_state import STATE_KINDS, ExportState, TensorKey, TensorSpec

# Where a save can be interrupted: `fault` is called with these names, in this order; the others on rank 0 only, and
# "aside" only where another checkpoint of the same step is moved away.
POINTS_ON_EVERY_RANK = ("staged", "tensor", "written", "sidecars", "reread", "agreed")
SAVE_POINTS = (*POINTS_ON_EVERY_RANK, "manifest", "aside", "renamed", "published", "pruned")

_VISIBLE_SECONDS = 60.0  # shared file systems have shown a new folder this late


@dataclass(frozen=True)
class RunCheckpoints:
    """What all checkpoints of one run have in common.

    `sidecars` write what makes the folder usable elsewhere (adapter_config.json or config.json, the tokenizer);
    rank 0 calls them with the staging folder.
    """

    claim: Claim  # on the run's folder; every change goes through it
    specs: Sequence[TensorSpec]
    identity: Identity
    adapter: bool
    sidecars: Sequence[Callable[[Path], object]]
    aliases: Mapping[str, str] = field(default_factory=dict)  # second keys of tied matrices in an adapter file
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)  # of a full-parameter model: they never train
    keep: int = 3
    landmark_step: int | None = None  # the newest checkpoint up to it is kept besides: a longer run continues from it
    best_step: Callable[[], int | None] = lambda: None  # the checkpoint of the best evaluation is kept besides
    fault: Callable[[str, int], object] = lambda point, step: None  # (save.POINT or trial.POINT, step)

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.claim.folder


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint that was saved; `path` of a trial no longer exists."""

    path: Path
    num_bytes: int
    seconds: float
    state_sha256: str


def save(run: RunCheckpoints, export: ExportState, state: TrainState, *, trial: bool = False) -> CheckpointInfo:
    """Write, verify and publish `checkpoints/step-N`, then prune to the `keep` newest. Collective.

    `export` is the engine's `export_state`. A `trial` does everything but publish, and leaves nothing behind.

    Raises:
        Superseded: a later attempt has claimed the run.
        WriteError: the file system refused on some rank; earlier checkpoints are untouched.
        NumericsError: a tensor is not finite; nothing is published.
        CheckpointError: the exported tensors differ from the specs.
    """
    begun = time.perf_counter()
    running = _Save(run, state, "trial" if trial else "save")
    running.make_staging_folder()
    files: dict[str, tuple[int, str]] = {}
    with closing(running.tensor_files) as tensor_files:
        error = running.write_tensors(export)
        if error is None:
            try:
                files = running.write_sidecars() if rank() == 0 else {}
                running.fault("sidecars")
                files |= tensor_files.read_back()
                running.fault("reread")
            except Exception as caught:  # a sidecar may raise anything; the other ranks must learn of it
                error = caught
    running.agree_or_clean(error)
    running.fault("agreed")
    shares = gather_json_to_rank_zero([files, running.tensor_files.hashes])
    manifest = None if shares is None else running.manifest(shares)
    num_bytes, state_sha256 = broadcast_json(
        None if manifest is None else [manifest.num_bytes(), manifest.state_sha256]
    )
    path = running.staging if trial else running.commit(manifest)
    if rank() == 0 and trial:
        remove_folder(path)
    elif rank() == 0:
        _prune(run, path)
        running.fault("pruned")
    return CheckpointInfo(path, num_bytes, time.perf_counter() - begun, state_sha256)


class _Save:
    """One save in progress on this rank. Every method but `fault` is collective or for rank 0."""

    def __init__(self, run: RunCheckpoints, state: TrainState, kind: str) -> None:
        self._run, self._state, self._kind = run, state, kind
        self._owners = owners(run.specs, world_size(), run.adapter)
        self._files = plan_files(run.specs, run.aliases, self._owners, run.adapter)
        name = broadcast_json(staging_name(state.step, state.attempt))
        self.staging = checkpoints_folder(run.folder) / name
        mine = [file for file in self._files if file.owner == rank()]
        shapes = {spec.name: spec.shape for spec in run.specs}
        self.tensor_files = TensorFiles(self.staging, mine, shapes, partial(self.fault, "tensor"))

    def fault(self, point: str) -> None:
        """A point of the protocol has been reached."""
        self._run.fault(f"{self._kind}.{point}", self._state.step)

    def make_staging_folder(self) -> None:
        """Rank 0 makes it; every rank waits until it is visible."""
        error: Exception | None = None
        if rank() == 0:
            try:
                with self._run.claim.change("stage"):
                    self.staging.mkdir(parents=True)
            except Exception as caught:  # the other ranks wait for the outcome
                error = self._as_write_error(caught)
        agree(error, "save")
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while not (visible := os.path.isdir(self.staging)) and time.monotonic() < deadline:  # False on an errno too
            time.sleep(0.05)
        if not visible:
            error = WriteError(
                f"{self.staging}, made by rank 0, is not visible after {_VISIBLE_SECONDS:g} s",
                remedy="put output_dir on a file system that all nodes share",
            )
        agree(error, "save")
        self.fault("staged")

    def write_tensors(self, export: ExportState) -> Exception | None:
        """Stream this rank's tensors into its files, to the disk; returns the first error.

        The export is collective, so it is drained to its end after an error here too. An error of the export
        itself is raised at once: the other ranks are inside its collectives and learn of it there.
        """
        exported: set[TensorKey] = set()
        error = _error_of(self.tensor_files.open)
        for tensor in export(lambda kind, name: self._owners[kind, name]):
            exported.add((tensor.kind, tensor.name))
            error = error or _error_of(partial(self.tensor_files.write, tensor))
        return error or _error_of(lambda: self._finish(exported))

    def _finish(self, exported: set[TensorKey]) -> None:
        self.tensor_files.finish_writes()
        self._require_declared(exported)
        self.fault("written")
        self.tensor_files.finish()

    def write_sidecars(self) -> dict[str, tuple[int, str]]:
        """Write the small files, on rank 0; returns (bytes, sha256) of each as read from the disk."""
        for write in self._run.sidecars:
            write(self.staging)
        (self.staging / STATE).write_bytes(state_to_bytes(self._state))
        if not self._run.adapter:
            buffers = dict(self._run.buffers)
            if buffers:
                save_file(buffers, self.staging / MODEL_BUFFERS, {"format": "pt"})
            sizes = {name: buffer.nbytes for name, buffer in buffers.items()}
            (self.staging / MODEL_INDEX).write_bytes(model_index(self._files, self._run.specs, sizes))
        written = {path.relative_to(self.staging).as_posix() for path in self.staging.rglob("*") if path.is_file()}
        names = sorted(written - {file.name for file in self._files})
        for name in names:
            fsync_path(self.staging / name)
        for folder in {(self.staging / name).parent for name in names} - {self.staging}:
            fsync_path(folder)
        return {name: file_sha256(self.staging / name) for name in names}

    def agree_or_clean(self, error: Exception | None) -> None:
        """Raise on all ranks if any failed, after this save's staging folder is removed."""
        try:
            agree(None if error is None else self._as_write_error(error), "save")
        except DistCptError:
            if rank() == 0:
                remove_folder(self.staging)
                remove_staging(self._run.folder, self._state.attempt + 1)  # room for the next try
            raise

    def manifest(self, shares: Sequence[Any]) -> Manifest:
        """The manifest, from the (files, tensor hashes) of every rank."""
        run, state = self._run, self._state
        hashes = {key: sha256 for _, tensors in shares for key, sha256 in tensors.items()}
        place = {tensor: file.name for file in self._files for tensor in file.tensors.values()}
        tensors = tuple(
            TensorEntry(
                name=spec.name,
                shape=spec.shape,
                dtype=spec.dtype,
                group=spec.group,
                file={kind: place[kind, spec.name] for kind in STATE_KINDS},
                sha256={kind: hashes[f"{kind}.{spec.name}"] for kind in STATE_KINDS},
            )
            for spec in run.specs
        )
        return Manifest(
            format_version=FORMAT_VERSION,
            step=state.step,
            attempt=state.attempt,
            adapter=run.adapter,
            files={
                name: FileEntry(num_bytes=size, sha256=sha256)
                for files, _ in shares
                for name, (size, sha256) in files.items()
            },
            tensors=tensors,
            aliases=dict(run.aliases),
            base=run.identity.base,
            data=run.identity.data,
            recipe=run.identity.recipe,
            engine=run.identity.engine,
            world_size=world_size(),
            versions=package_versions(),
            state_sha256=state_digest(state.step, state.position, tensors),
        )

    def commit(self, manifest: Manifest | None) -> Path:
        """Rank 0 writes its manifest and publishes; returns the published folder on every rank, once it is there."""
        final = checkpoints_folder(self._run.folder) / step_name(self._state.step)
        error: Exception | None = None
        if manifest is not None:
            try:
                (self.staging / MANIFEST).write_bytes(manifest_to_bytes(manifest))
                fsync_path(self.staging / MANIFEST)
                fsync_path(self.staging)
                if problems := quick_check(self.staging):
                    raise CheckpointError(f"step {manifest.step} is not published: {problems[0]}")
                self.fault("manifest")
                self._publish(final, manifest.state_sha256)
            except Exception as caught:  # the other ranks wait for the outcome
                error = caught
        self.agree_or_clean(error)
        barrier()
        return final

    def _publish(self, final: Path, state_sha256: str) -> None:
        """Rename to `final`; a checkpoint already there is kept if it has the same state, else moved aside."""
        if final.is_dir() and not verify_checkpoint(final) and read_manifest(final).state_sha256 == state_sha256:
            LOGGER.info("%s already has this state", final.name)
            remove_folder(self.staging)
            return
        if os.path.lexists(final):
            LOGGER.warning("%s of an earlier attempt was moved to %s", final.name, set_aside(self._run.claim, final))
            self.fault("aside")
        with self._run.claim.change("publish"):
            os.rename(self.staging, final)
        self.fault("renamed")
        fsync_path(final.parent)
        self.fault("published")

    def _require_declared(self, exported: set[TensorKey]) -> None:
        differing = exported.symmetric_difference((kind, spec.name) for spec in self._run.specs for kind in STATE_KINDS)
        if differing:
            kind, name = min(differing)
            what = "exported, but not declared" if (kind, name) in exported else "declared, but not exported"
            raise CheckpointError(f"{kind}.{name} was {what}")

    def _as_write_error(self, error: Exception) -> Exception:
        if isinstance(error, OSError | StorageError) or os_error(error):
            return write_error(error, self._run.folder, self._state.step)
        return error


def _error_of(step: Callable[[], object]) -> Exception | None:
    try:
        step()
    except (OSError, DistCptError) as error:
        return error
    return None


def _prune(run: RunCheckpoints, newest: Path) -> None:
    try:
        prune(run.claim, newest, run.keep, [step for step in (run.landmark_step, run.best_step()) if step is not None])
    except Superseded:  # the old ones belong to the later attempt now; the next boundary ends this one
        LOGGER.warning("a later attempt has claimed the run: no old checkpoint is removed")
    except (OSError, StorageError) as error:  # the new checkpoint is safe; too many old ones are no reason to stop
        LOGGER.warning("cannot remove old checkpoints in %s: %s", newest.parent, error)
