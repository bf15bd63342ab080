"""Find the newest valid checkpoint, and read from it what each rank needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dist_cpt.checkpoint.plan_files import reading_order
from dist_cpt.checkpoint.quick_check import summary
from dist_cpt.checkpoint.safetensors_stream import TensorFile
from dist_cpt.checkpoint.verify import verify_checkpoint, verify_together
from dist_cpt.errors import CheckpointError
from dist_cpt.run_folder.checkpoints import published, read_manifest, read_state, step_of, superseded
from dist_cpt.run_folder.manifest import Identity, Manifest
from dist_cpt.run_folder.train_state import TrainState
from dist_cpt.runtime.collectives import on_rank_zero, world_size
from dist_cpt.training_state import ReadingOrder, StateKind, TensorSpec

# Of an identity: places, which may all move since the content is compared, and what only explains a difference.
_NOT_COMPARED = {"path", "revision", "stores", "tokens"}


class LoadedCheckpoint:
    """An open checkpoint: its manifest and state, and slices of its tensors on demand, one file open at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        self.state: TrainState = read_state(path)
        self._entries = {tensor.name: tensor for tensor in self.manifest.tensors}
        self._file: tuple[str, TensorFile] | None = None

    def read(self, kind: StateKind, name: str, start: int, stop: int) -> torch.Tensor:
        """Flat fp32 CPU [stop - start]: these elements of a full tensor in C order, read from the disk now.

        Raises:
            CheckpointError: no such tensor or slice.
            StorageError: the file system does not answer.
        """
        entry = self._entries.get(name)
        if entry is None or kind not in entry.file:
            raise CheckpointError(f"{self.path.name} has no {kind} of {name}")
        return self._open(entry.file[kind]).read(name if kind == "master" else f"{kind}.{name}", start, stop)

    def reading_order(self) -> ReadingOrder:
        """Which rank reads which tensor for all: the files it has verified, one by one."""
        return reading_order(self.manifest, world_size())

    def close(self) -> None:
        """Close the file that is open."""
        if self._file is not None:
            self._file[1].close()
            self._file = None

    def _open(self, name: str) -> TensorFile:
        if self._file is None or self._file[0] != name:
            self.close()
            self._file = (name, TensorFile(self.path / name))
        return self._file[1]

    def __enter__(self) -> LoadedCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def newest_valid(run_folder: Path, up_to_step: int | None = None) -> tuple[Path | None, list[tuple[str, str]]]:
    """The newest checkpoint that passes `verify_together`, and (name, problem) of newer ones that do not. Collective.

    With `up_to_step` only those of that step or earlier. (None, []) when the run has none yet. Checkpoints that were
    moved aside come last: one may be all there is, if a crash hit the moment between the two renames.

    Raises:
        CheckpointError: there are checkpoints, but none is valid.
        StorageError: one of them cannot be read: it may be the one to take.
    """

    def candidates() -> list[str]:
        listed = [*published(run_folder), *superseded(run_folder)]
        return [
            str(path.relative_to(run_folder)) for path in listed if up_to_step is None or step_of(path) <= up_to_step
        ]

    names: list[str] = on_rank_zero("checkpoints", candidates)
    skipped: list[tuple[str, str]] = []
    for name in names:
        problems = verify_together(run_folder / name)
        if not problems:
            return run_folder / name, skipped
        skipped.append((Path(name).name, summary(problems)))
    if skipped:
        error = CheckpointError(
            f"no valid checkpoint in {run_folder}: {'; '.join(f'{name}: {problem}' for name, problem in skipped)}",
            remedy="restore the folder from a copy, or start again under another name",
        )
        error.agreed = True  # all ranks have the same problems
        raise error
    return None, []


def load(path: Path, *, verified: bool = False) -> LoadedCheckpoint:
    """Open a checkpoint after `verify_checkpoint`, unless `newest_valid` has just verified it. Not collective.

    Raises:
        CheckpointError: it is damaged; names the first problem.
    """
    problems = [] if verified else verify_checkpoint(path)
    if problems:
        raise CheckpointError(f"{path}: {summary(problems)}", remedy="use another checkpoint of the run")
    return LoadedCheckpoint(path)


def require_fit(manifest: Manifest, specs: Sequence[TensorSpec], identity: Identity) -> None:
    """Refuse a checkpoint with other tensors, another base or other data than this run.

    Raises:
        CheckpointError: names the first difference.
    """
    saved = {tensor.name: tensor.shape for tensor in manifest.tensors}
    here = {spec.name: tuple(spec.shape) for spec in specs}
    for name in sorted(saved.keys() ^ here.keys()):
        where = "the checkpoint, but does not train here" if name in saved else "this run, but not in the checkpoint"
        raise CheckpointError(f"step {manifest.step}: {name} is in {where}", remedy="resume with the same recipe")
    for name, shape in here.items():
        if saved[name] != shape:
            raise CheckpointError(
                f"step {manifest.step}: {name} has shape {list(saved[name])} in the checkpoint, {list(shape)} here",
                remedy="resume with the same model, rank and vocabulary",
            )
    if list(saved) != list(here):
        raise CheckpointError(f"step {manifest.step}: the checkpoint has the same tensors in another order")
    for what, recorded, current in (("base", manifest.base, identity.base), ("data", manifest.data, identity.data)):
        for key in sorted((recorded.keys() | current.keys()) - _NOT_COMPARED):
            saved_value, value = _without_version(recorded.get(key)), _without_version(current.get(key))
            if saved_value != value:
                note = f" (model.revision: {recorded['revision']})" if recorded.get("revision") else ""
                note += _other_tokens(recorded.get("tokens"), current.get("tokens"))
                raise CheckpointError(
                    f"step {manifest.step}: {what}.{key} is {saved_value!r} in the checkpoint, {value!r} here",
                    remedy=f"resume with the {what} the run was started with{note}",
                )


def _other_tokens(recorded: Any, current: Any) -> str:
    """The sources and held-out sets with another number of tokens, in parentheses; nothing if that is not known."""
    if not (isinstance(recorded, dict) and isinstance(current, dict)):
        return ""
    changed = [name for name in {**recorded, **current} if recorded.get(name) != current.get(name)]
    listed = ", ".join(f"{name}: {recorded.get(name, 0):,} tokens, here {current.get(name, 0):,}" for name in changed)
    return f" ({listed})" if listed else ""


def _without_version(value: Any) -> Any:
    """A model's configuration without the version of the transformers that read it."""
    return {k: v for k, v in value.items() if k != "transformers_version"} if isinstance(value, dict) else value
