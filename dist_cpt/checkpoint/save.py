"""Save a checkpoint so that a crash at any point leaves the earlier ones whole.

Stage in a folder of this save's own, write, sync, read back, agree, manifest last, rename, sync the
parent, and only then remove old ones.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_cpt.checkpoint.plan_files import Owners, PlannedFile, model_index, owners, plan_files
from dist_cpt.checkpoint.quick_check import outline_problems
from dist_cpt.checkpoint.retention import LOGGER, prune, remove_folder
from dist_cpt.checkpoint.safetensors_stream import StreamWriter, file_sha256, scan
from dist_cpt.checkpoint.verify import Exported, verify_checkpoint
from dist_cpt.errors import CheckpointError, DistCptError, Superseded, WriteError
from dist_cpt.run_folder.checkpoints import (
    checkpoints_folder,
    read_manifest,
    staging_name,
    step_name,
    superseded_folder,
    write_error,
)
from dist_cpt.run_folder.json_files import fsync_path
from dist_cpt.run_folder.manifest import FileEntry, Identity, Manifest, TensorEntry, manifest_to_bytes, state_digest
from dist_cpt.run_folder.names import MANIFEST, MODEL_INDEX, STATE
from dist_cpt.run_folder.train_state import TrainState, state_to_bytes
from dist_cpt.runtime.collectives import agree, barrier, broadcast_json, gather_json, rank, world_size
from dist_cpt.training_state import STATE_KINDS, StateKind, TensorSpec

# Where the protocol can be cut; `fault` is called with these names, in this order, on every rank.
# "aside" only where an older checkpoint of the same step has to make way; the last five on rank 0 only.
SAVE_POINTS = (
    "staged",
    "tensor",
    "written",
    "sidecars",
    "reread",
    "agreed",
    "manifest",
    "aside",
    "renamed",
    "published",
    "pruned",
)

ExportState = Callable[[Callable[[StateKind, str], int]], Iterable[Exported]]
_VISIBLE_SECONDS = 60.0  # shared file systems have shown a new folder this late


@dataclass(frozen=True)
class CheckpointInfo:
    path: Path
    num_bytes: int
    seconds: float
    state_sha256: str


@dataclass(frozen=True)
class _Share:
    """What one rank wrote: its files, and the sha256 of its tensors as `kind.name`."""

    files: dict[str, tuple[int, str]]
    tensors: dict[str, str]


def save(
    run_folder: Path,
    export: ExportState,
    *,
    specs: Sequence[TensorSpec],
    adapter: bool,
    state: TrainState,
    identity: Identity,
    sidecars: Sequence[Callable[[Path], object]],
    aliases: Mapping[str, str] | None = None,
    keep: int = 3,
    trial: bool = False,
    fence: Callable[[], object] = lambda: None,
    fault: Callable[[str], None] = lambda point: None,
) -> CheckpointInfo:
    """Write, verify and publish `checkpoints/step-N`, then prune to the `keep` newest. Collective.

    `export` is the engine's `export_state`. `sidecars` write what makes the folder open elsewhere
    (adapter_config.json or config.json, the tokenizer); rank 0 calls them with the staging folder.
    `aliases` are second keys of tied matrices in an adapter file. A `trial` does everything but publish, and
    leaves nothing behind. `fence` is called on rank 0 before the first file, before the last rename, and
    before old checkpoints go; it raises when a later attempt has taken over the run.

    Raises:
        Superseded: from `fence`.
        WriteError: the file system refused on some rank; earlier checkpoints are untouched.
        NumericsError: a tensor is not finite; nothing is published.
        CheckpointError: the engine exported something else than `specs`.
    """
    begun = time.perf_counter()
    placed = owners(specs, world_size(), adapter)
    files = plan_files(specs, aliases or {}, placed, adapter)
    mine = [file for file in files if file.owner == rank()]
    staging = _stage(run_folder, state, fence)
    fault("staged")
    hashes, error = _write_tensors(staging, mine, export, specs, placed, fault)
    share = None
    if error is None:
        try:
            extra = _write_sidecars(staging, sidecars, state, files, specs, adapter) if rank() == 0 else []
            fault("sidecars")
            share = _read_back(staging, mine, specs, hashes, extra)
            fault("reread")
        except Exception as caught:  # a sidecar may raise anything; the other ranks must hear of it
            error = caught
    _agree_or_clean(error, staging, run_folder, state.step)
    fault("agreed")
    shares = gather_json(None if share is None else [share.files, share.tensors])
    num_bytes = sum(num_bytes for listed, _ in shares for num_bytes, _ in listed.values())
    manifest = _manifest(shares, specs, files, adapter, state, identity, aliases or {})
    if trial:
        if rank() == 0:
            remove_folder(staging)
        return CheckpointInfo(staging, num_bytes, time.perf_counter() - begun, manifest.state_sha256)
    path = _commit(staging, run_folder, manifest, fence, fault)
    if rank() == 0:
        _prune(run_folder, path, keep, fence)
        fault("pruned")
    return CheckpointInfo(path, num_bytes, time.perf_counter() - begun, manifest.state_sha256)


def _stage(run_folder: Path, state: TrainState, fence: Callable[[], object]) -> Path:
    """Rank 0 makes a new folder; everyone waits until it is visible from here."""
    name = broadcast_json(staging_name(state.step, state.attempt))
    staging = checkpoints_folder(run_folder) / name
    error: Exception | None = None
    if rank() == 0:
        try:
            fence()
            staging.parent.mkdir(parents=True, exist_ok=True)
            staging.mkdir()
        except Superseded as caught:
            error = caught
        except OSError as caught:
            error = write_error(caught, run_folder, state.step)
    agree(error, "save")
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not staging.is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    if not staging.is_dir():
        error = WriteError(
            f"{staging}, made by rank 0, is not visible after {_VISIBLE_SECONDS:g} s",
            remedy="output_dir must lie on a file system that all nodes share",
        )
    agree(error, "save")
    return staging


def _write_tensors(
    staging: Path,
    mine: Sequence[PlannedFile],
    export: ExportState,
    specs: Sequence[TensorSpec],
    placed: Owners,
    fault: Callable[[str], None],
) -> tuple[dict[str, str], Exception | None]:
    """Stream this rank's tensors into its files; returns their hashes and the first error.

    The export is collective, so it is drained to its end also after an error here. An error of the export
    itself is raised at once: the other ranks are inside its collectives and learn of it there.
    """
    shapes = {spec.name: spec.shape for spec in specs}
    targets: dict[tuple[str, str], list[tuple[StreamWriter, str]]] = {}
    writers: list[StreamWriter] = []
    hashes: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    error: Exception | None = None
    try:
        try:
            for file in mine:
                layout = {key: shapes[name] for key, (_, name) in file.tensors.items()}
                writers.append(StreamWriter(staging / file.name, layout))
                for key, (kind, name) in file.tensors.items():
                    targets.setdefault((kind, name), []).append((writers[-1], key))
        except (OSError, DistCptError) as caught:
            error = caught
        for tensor in export(lambda kind, name: placed[kind, name]):
            seen.add((tensor.kind, tensor.name))
            if error is not None or (tensor.kind, tensor.name) not in targets:
                continue
            try:
                hashes[f"{tensor.kind}.{tensor.name}"] = _write_tensor(tensor, targets[tensor.kind, tensor.name])
                fault("tensor")
            except (OSError, DistCptError) as caught:
                error = caught
        unknown = seen.symmetric_difference((kind, spec.name) for spec in specs for kind in STATE_KINDS)
        if unknown:
            kind, name = min(unknown)
            what = "exported, but not declared" if (kind, name) in seen else "declared, but not exported"
            error = error or CheckpointError(f"{kind}.{name} was {what}")
        try:
            for writer in writers if error is None else []:
                writer.finish()
            fault("written")
        except (OSError, DistCptError) as caught:
            error = caught
    finally:
        for writer in writers:
            writer.close()
    return hashes, error


def _write_tensor(tensor: Exported, targets: Sequence[tuple[StreamWriter, str]]) -> str:
    if tensor.values is None:
        raise CheckpointError(f"{tensor.kind}.{tensor.name} did not arrive at its owner, rank {rank()}")
    sha256 = ""
    for writer, key in targets:  # several where a tied matrix has two keys
        sha256 = writer.write(key, tensor.values)
    return sha256


def _write_sidecars(
    staging: Path,
    sidecars: Sequence[Callable[[Path], object]],
    state: TrainState,
    files: Sequence[PlannedFile],
    specs: Sequence[TensorSpec],
    adapter: bool,
) -> list[str]:
    """The small files, by rank 0; returns their names."""
    tensor_files = {file.name for file in files}
    for write in sidecars:
        write(staging)
    (staging / STATE).write_bytes(state_to_bytes(state))
    if not adapter:
        (staging / MODEL_INDEX).write_bytes(model_index(files, specs))
    names = [path.relative_to(staging).as_posix() for path in sorted(staging.rglob("*")) if path.is_file()]
    names = [name for name in names if name not in tensor_files]
    for name in names:
        fsync_path(staging / name)
    for folder in {(staging / name).parent for name in names} - {staging}:
        fsync_path(folder)
    return names


def _read_back(
    staging: Path,
    mine: Sequence[PlannedFile],
    specs: Sequence[TensorSpec],
    hashes: Mapping[str, str],
    extra: Sequence[str],
) -> _Share:
    """Read every file that this rank wrote again, and compare it with what was handed over.

    Raises:
        WriteError: the disk gave back something else.
    """
    shapes = {spec.name: spec.shape for spec in specs}
    listed = {name: file_sha256(staging / name) for name in extra}
    for file in mine:
        found = scan(staging / file.name)
        listed[file.name] = (found.num_bytes, found.sha256)
        for key, (kind, name) in file.tensors.items():
            tensor = found.tensors.get(key)
            expected = (shapes[name], hashes[f"{kind}.{name}"], True)
            if tensor is None or (tensor.shape, tensor.sha256, tensor.finite) != expected:
                raise WriteError(
                    f"{staging / file.name}: {key} reads back differently than it was written",
                    remedy="the disk or its driver loses data; the earlier checkpoints are kept",
                )
    return _Share(listed, dict(hashes))


def _agree_or_clean(error: Exception | None, staging: Path, run_folder: Path, step: int) -> None:
    """Raise on all ranks if any failed, after this save's own folder is gone."""
    try:
        agree(None if error is None else _as_ours(error, run_folder, step), "save")
    except DistCptError:
        if rank() == 0:
            remove_folder(staging)
        raise


def _as_ours(error: Exception, run_folder: Path, step: int) -> Exception:
    # Libraries in Rust (tokenizers, safetensors) raise their own classes with "(os error 28)" in the text.
    if isinstance(error, OSError) or re.search(r"\(os error \d+\)", str(error)):
        return write_error(error, run_folder, step)
    return error


def _commit(
    staging: Path,
    run_folder: Path,
    manifest: Manifest,
    fence: Callable[[], object],
    fault: Callable[[str], None],
) -> Path:
    """Rank 0 writes the manifest and publishes; all return when it is done."""
    error: Exception | None = None
    if rank() == 0:
        try:
            (staging / MANIFEST).write_bytes(manifest_to_bytes(manifest))
            fsync_path(staging / MANIFEST)
            fsync_path(staging)
            problems = outline_problems(staging)
            if problems:
                raise CheckpointError(f"step {manifest.step} is not published: {problems[0]}")
            fault("manifest")
            fence()
            _publish(staging, run_folder, manifest, fault)
        except Exception as caught:  # the other ranks wait for this verdict
            error = caught
    _agree_or_clean(error, staging, run_folder, manifest.step)
    barrier()
    return checkpoints_folder(run_folder) / step_name(manifest.step)


def _publish(staging: Path, run_folder: Path, manifest: Manifest, fault: Callable[[str], None]) -> None:
    """Rename into place; what has the name already is kept if it is the same state, else moved aside."""
    final = checkpoints_folder(run_folder) / step_name(manifest.step)
    if _holds(final, manifest.state_sha256):
        LOGGER.info("%s holds this very state already", final.name)
        remove_folder(staging)
        return
    if os.path.lexists(final):
        aside = superseded_folder(run_folder)
        aside.mkdir(exist_ok=True)
        os.rename(final, aside / f"{final.name}.{secrets.token_hex(4)}")
        fsync_path(aside)
        LOGGER.warning("%s of an earlier attempt was moved to %s", final.name, aside)
        fault("aside")
    os.rename(staging, final)
    fault("renamed")
    fsync_path(final.parent)
    fault("published")


def _holds(final: Path, state_sha256: str) -> bool:
    return final.is_dir() and not verify_checkpoint(final) and read_manifest(final).state_sha256 == state_sha256


def _prune(run_folder: Path, newest: Path, keep: int, fence: Callable[[], object]) -> None:
    try:
        fence()
        prune(run_folder, newest, keep)
    except Superseded:  # the old ones are the later attempt's now; the next boundary ends this one
        LOGGER.warning("a later attempt has taken over: no old checkpoint is removed")
    except OSError as error:  # the new checkpoint is safe; too many old ones are no reason to stop
        LOGGER.warning("could not remove old checkpoints in %s: %s", newest.parent, error.strerror)


def _manifest(
    shares: Sequence[Any],
    specs: Sequence[TensorSpec],
    files: Sequence[PlannedFile],
    adapter: bool,
    state: TrainState,
    identity: Identity,
    aliases: Mapping[str, str],
) -> Manifest:
    hashes: dict[str, str] = {}
    listed: dict[str, FileEntry] = {}
    for share_files, share_tensors in shares:
        hashes |= share_tensors
        listed |= {name: FileEntry(num_bytes=size, sha256=sha) for name, (size, sha) in share_files.items()}
    place = {tensor: file.name for file in files for tensor in file.tensors.values()}
    tensors = tuple(
        TensorEntry(
            name=spec.name,
            shape=spec.shape,
            dtype=spec.dtype,
            group=spec.group,
            file={kind: place[kind, spec.name] for kind in STATE_KINDS},
            sha256={kind: hashes[f"{kind}.{spec.name}"] for kind in STATE_KINDS},
        )
        for spec in specs
    )
    return Manifest(
        format_version=1,
        step=state.step,
        attempt=state.attempt,
        adapter=adapter,
        files=listed,
        tensors=tensors,
        aliases=dict(aliases),
        base=identity.base,
        data=identity.data,
        recipe=identity.recipe,
        engine=identity.engine,
        world_size=world_size(),
        versions=_versions(),
        state_sha256=state_digest(state.step, state.position, tensors),
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("dist-cpt", "torch", "transformers", "peft", "deepspeed"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found
