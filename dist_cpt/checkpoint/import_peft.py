"""Start a run from a PEFT adapter folder.

Imported: the weights, as fp32 masters; on request AdamW's moments and step count, from one of our checkpoints or
from a Trainer's optimizer.pt. Data order, learning rates and the run's step start afresh. Tensors are matched by
name: what this run would not train the same way is refused, never adapted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from dist_cpt.adapters.peft_folder import canonical_key, read_adapter_config, require_adapter_folder
from dist_cpt.adapters.prior_adapter import require_same_base, require_same_tokens
from dist_cpt.checkpoint.byte_check import file_sha256
from dist_cpt.checkpoint.import_peft_match import require_match, trained_apart, vocabulary_keys
from dist_cpt.checkpoint.import_trainer import OPTIMIZER, WEIGHTS_ONLY, TrainerMoments, require_betas
from dist_cpt.checkpoint.load import LoadedCheckpoint, load
from dist_cpt.checkpoint.safetensors_stream import is_finite
from dist_cpt.checkpoint.verify import verify_together
from dist_cpt.config.load import parse_yaml
from dist_cpt.config.schema import ContinueFromConfig, OptimConfig
from dist_cpt.errors import CheckpointError, printable
from dist_cpt.model.load import TrainableModel
from dist_cpt.run_folder.checkpoints import read_manifest
from dist_cpt.run_folder.names import ADAPTER_WEIGHTS, MANIFEST, RECIPE
from dist_cpt.run_folder.train_state import first_line
from dist_cpt.runtime.collectives import on_every_rank, on_rank_zero
from dist_cpt.runtime.log import LOGGER
from dist_cpt.storage import read_bytes
from dist_cpt.training_state import ExportState, ReadState, StateKind, TensorSpec

_KEY = "adapter.continue_from"
_FLOATS = ("F32", "BF16", "F16")  # widen to fp32 exactly
_COMPARE_ELEMENTS = 1 << 24


class Importer(Protocol):
    """The part of an engine that an import needs."""

    @property
    def export_state(self) -> ExportState: ...

    def import_state(self, read: ReadState, step: int) -> None: ...


@dataclass(frozen=True)
class StartedFrom:
    """What a run has imported."""

    step: int  # AdamW's counter
    description: str  # for logs
    sha256: str  # of the adapter file


class PeftAdapter:
    """An open PEFT folder: its configuration, and slices of its tensors by canonical name."""

    def __init__(self, folder: Path) -> None:
        """Open adapter_config.json and adapter_model.safetensors; no other file of the folder is read.

        Raises:
            ConfigError: not such a folder; the message names what it seems to be.
            CheckpointError: one of the two files is damaged.
        """
        require_adapter_folder(folder)
        self.folder = folder
        self.config = read_adapter_config(folder)
        self.moments: TrainerMoments | LoadedCheckpoint | None = None
        self._file, self._keys = _open_tensors(folder / ADAPTER_WEIGHTS)
        self.shapes = {name: tuple(self._file.get_slice(keys[0]).get_shape()) for name, keys in self._keys.items()}

    @property
    def step(self) -> int:
        """AdamW's counter: 0 without moments."""
        if isinstance(self.moments, LoadedCheckpoint):
            return self.moments.state.optimizer_steps
        return 0 if self.moments is None else self.moments.step

    def read(self, kind: StateKind, name: str, start: int, stop: int) -> torch.Tensor:
        """Flat fp32 CPU [stop - start]: these elements of a tensor in C order; moments are zero without an optimizer.

        Raises:
            CheckpointError: no such tensor, or a value is not finite.
        """
        if kind == "master":
            values = self._slice(self._keys[name][0], start, stop)
        elif self.moments is None:
            return torch.zeros(stop - start)
        else:
            values = self.moments.read(kind, name, start, stop)
        if values.numel() and not is_finite(values):
            raise CheckpointError(f"{self.folder}: {kind} of {name} has values that are not finite")
        return values

    def master(self, name: str) -> torch.Tensor:
        """fp32 CPU, full shape."""
        shape = self.shapes[name]
        return self.read("master", name, 0, math.prod(shape)).view(shape)

    def close(self) -> None:
        """Close the files."""
        if isinstance(self.moments, LoadedCheckpoint):
            self.moments.close()
        del self._file

    def require_unique_values(self, aliases: Mapping[str, str]) -> None:
        """Refuse a tensor with two different values in the file, under two spellings or as a tied pair.

        Raises:
            ConfigError: embedding and head of a tied base were trained apart.
            CheckpointError: two spellings of one name have different values.
        """
        for alias, name in aliases.items():
            if alias in self._keys and not self._same(self._keys[alias][0], self._keys[name][0]):
                raise trained_apart(self.folder, name, alias)
        for keys in self._keys.values():
            for other in keys[1:]:
                if not self._same(keys[0], other):
                    raise CheckpointError(f"{self.folder}: {keys[0]} and {other} are one tensor, but differ")

    def _slice(self, key: str, start: int, stop: int) -> torch.Tensor:
        tensor = self._file.get_slice(key)
        columns = math.prod(tensor.get_shape()[1:])
        first, last = start // columns, -(-stop // columns)
        return tensor[first:last].reshape(-1)[start - first * columns : stop - first * columns].float()

    def _same(self, left: str, right: str) -> bool:
        shape = self._file.get_slice(left).get_shape()
        if self._file.get_slice(right).get_shape() != shape:
            return False
        size = math.prod(shape)
        cuts = [(start, min(start + _COMPARE_ELEMENTS, size)) for start in range(0, size, _COMPARE_ELEMENTS)]
        return all(torch.equal(self._slice(left, *cut), self._slice(right, *cut)) for cut in cuts)


def start_from(
    engine: Importer, source: ContinueFromConfig, specs: Sequence[TensorSpec], model: TrainableModel, optim: OptimConfig
) -> StartedFrom:
    """Import the adapter of `source` into an engine that has not trained yet. Collective.

    `specs` are the engine's tensors, `model` is what it was built from.

    Raises:
        ConfigError: the folder is not an adapter, or not one that this recipe continues.
        CheckpointError: it is damaged, or its optimizer cannot be matched to names.
    """
    folder = Path(source.path)
    is_checkpoint = on_rank_zero(_KEY, lambda: (folder / MANIFEST).is_file())
    if is_checkpoint and (problems := verify_together(folder)):
        raise CheckpointError(f"{_KEY}: {folder}: {problems[0]}", remedy="use another checkpoint of that run")

    def open_matching() -> PeftAdapter:
        adapter = PeftAdapter(folder)
        require_match(adapter, specs, model)
        if is_checkpoint:
            base = read_manifest(folder).base
            if not source.other_base:
                require_same_base(folder, base["sha256"], model.identity["sha256"])
            if vocabulary_keys(model).keys() & adapter.shapes.keys():
                require_same_tokens(folder, base, model.identity)
        if source.optimizer:
            adapter.moments = _open_moments(adapter, is_checkpoint, list(model.trainable), optim)
        return adapter

    adapter = on_every_rank(_KEY, open_matching)
    sha256 = on_rank_zero(_KEY, lambda: _require_consistent(adapter, model))
    engine.import_state(adapter.read, adapter.step)
    _require_imported(engine, adapter)
    adapter.close()
    kind = "checkpoint" if is_checkpoint else "PEFT folder"
    optimizer = f"AdamW's moments after {adapter.step} steps" if source.optimizer else "a fresh optimizer"
    return StartedFrom(adapter.step, f"started from {folder} ({kind}): {len(specs)} tensors, {optimizer}", sha256)


def _open_moments(
    adapter: PeftAdapter, is_checkpoint: bool, order: list[str], optim: OptimConfig
) -> TrainerMoments | LoadedCheckpoint:
    if is_checkpoint:
        require_betas(_betas_of_run(adapter.folder, optim), optim.betas)
        return load(adapter.folder, verified=True)
    path = adapter.folder / OPTIMIZER
    if not path.is_file():
        raise CheckpointError(
            f"{_KEY}: {adapter.folder} has no {OPTIMIZER} (optimizer files of FSDP or DeepSpeed are not read)",
            remedy=WEIGHTS_ONLY,
        )
    moments = TrainerMoments(path, order, adapter.shapes)
    require_betas(moments.betas, optim.betas)
    return moments


def _require_consistent(adapter: PeftAdapter, model: TrainableModel) -> str:
    """The checks that read whole tensors, on one rank; returns the sha256 of the adapter file."""
    theirs, here = adapter.config.get("base_model_name_or_path"), model.identity["path"]
    if theirs != here:
        LOGGER.warning("%s was trained on the base %s, this run has %s", adapter.folder, printable(str(theirs)), here)
    adapter.require_unique_values(model.aliases)
    if isinstance(adapter.moments, TrainerMoments):
        head = next((name for name, word in vocabulary_keys(model).items() if word == "lm_head"), None)
        adapter.moments.require_agreement(adapter.master, head)
    return file_sha256((adapter.folder / ADAPTER_WEIGHTS).resolve())[1]


def _require_imported(engine: Importer, adapter: PeftAdapter) -> None:
    """Compare the engine's masters with the file: a loss would not show one missing tensor of many. Collective.

    Raises:
        CheckpointError: a tensor differs.
    """
    exported = engine.export_state(lambda kind, name: 0, ("master",))
    wrong = [t.name for t in exported if t.values is not None and not torch.equal(t.values, adapter.master(t.name))]
    if differing := on_rank_zero(_KEY, lambda: wrong):
        raise CheckpointError(
            f"{_KEY}: {adapter.folder}: {len(differing)} of {len(adapter.shapes)} tensors in the engine differ "
            f"from the file, first {differing[0]}",
            remedy="this is a defect of dist-cpt: report it",
        )


def _betas_of_run(checkpoint: Path, optim: OptimConfig) -> Sequence[float]:
    """The betas in the recipe beside the checkpoint; this run's where it was copied away from its run."""
    recipe = checkpoint.parent.parent / RECIPE
    if not recipe.is_file():
        return optim.betas
    return parse_yaml(read_bytes(recipe).decode(), str(recipe))["optim"]["betas"]


def _open_tensors(path: Path) -> tuple[Any, dict[str, list[str]]]:
    """The open file, and the keys of each canonical name in it."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt", device="cpu")
        by_name: dict[str, list[str]] = {}
        for key in sorted(file.keys()):
            if (name := canonical_key(key)) is not None:
                by_name.setdefault(name, []).append(key)
                dtype = file.get_slice(key).get_dtype()
                if dtype not in _FLOATS:
                    raise CheckpointError(
                        printable(f"{path}: {key} is {dtype}"), remedy=f"only {', '.join(_FLOATS)} are read"
                    )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a valid safetensors file ({first_line(error)})") from None
    return file, by_name
