"""What a checkpoint consists of: which rank writes which tensor into which file, and the list of it all."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from dist_cpt.checkpoint.state import canonical_json, first_line
from dist_cpt.config.schema import Frozen
from dist_cpt.errors import CheckpointError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
INITIAL_ADAPTER = "initial_adapter.safetensors"  # what PiSSA took out of the base: no training state, kept as it is
MODEL_INDEX = "model.safetensors.index.json"

StateKind = Literal["master", "exp_avg", "exp_avg_sq"]
STATE_KINDS: tuple[StateKind, ...] = ("master", "exp_avg", "exp_avg_sq")
TensorKey = tuple[StateKind, str]
Owners = dict[TensorKey, int]


@dataclass(frozen=True)
class TensorSpec:
    """One trainable tensor by canonical name; `dtype` is what it computes in, stored is always fp32."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: str


@dataclass(frozen=True)
class Identity:
    """What the tensors belong to: a resume compares these, `engine` and `world_size` aside."""

    base: dict[str, Any]  # path, revision, hash of the frozen weights
    data: dict[str, Any]  # token stores by hash
    recipe: str  # fingerprint
    engine: str  # for the record


@dataclass(frozen=True)
class PlannedFile:
    """A tensor file, the rank that writes it, and for each key of the file the tensor it holds."""

    name: str
    owner: int
    tensors: dict[str, TensorKey]


class FileEntry(Frozen):
    num_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class TensorEntry(Frozen):
    """One trainable tensor: the file of each kind, and the sha256 of each kind's fp32 bytes in C order."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: str
    file: dict[StateKind, str]
    sha256: dict[StateKind, str]


class Manifest(Frozen):
    """The content of manifest.json; `tensors` in the order of the optimizer's groups."""

    format_version: Literal[1]
    step: int = Field(ge=0)
    attempt: int = Field(ge=0)
    adapter: bool
    files: dict[str, FileEntry]
    tensors: tuple[TensorEntry, ...]
    aliases: dict[str, str]  # second key in the adapter file -> canonical name of the same tensor
    base: dict[str, Any]
    data: dict[str, Any]
    recipe: str
    engine: str
    world_size: int = Field(ge=1)
    versions: dict[str, str]
    state_sha256: str  # of step, position and all tensors: equal states are equal here

    @field_validator("files")
    @classmethod
    def _inside(cls, value: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in value:
            check_relative(name)
        return value

    def names(self) -> list[str]:
        """Trainable names in order."""
        return [tensor.name for tensor in self.tensors]


def owners(specs: Sequence[TensorSpec], world_size: int, adapter: bool) -> Owners:
    """The rank that writes each tensor: an adapter's masters rank 0 (one file), the rest balanced by bytes.

    Greedy, largest first to the least loaded rank; the same answer on every rank.
    """
    load = [0] * world_size
    placed: Owners = {}
    free: list[tuple[int, int, TensorKey]] = []
    for index, spec in enumerate(specs):
        for kind in STATE_KINDS:
            if adapter and kind == "master":
                placed[kind, spec.name] = 0
                load[0] += math.prod(spec.shape)
            else:
                free.append((math.prod(spec.shape), index, (kind, spec.name)))
    for size, _, key in sorted(free, key=lambda item: (-item[0], item[1])):
        rank = load.index(min(load))
        placed[key] = rank
        load[rank] += size
    return placed


def plan_files(
    specs: Sequence[TensorSpec], aliases: Mapping[str, str], placed: Owners, adapter: bool
) -> list[PlannedFile]:
    """The tensor files of a checkpoint: one model file and one optimizer file per rank that owns any."""
    second_keys: dict[str, list[str]] = {}
    for alias, name in aliases.items():
        second_keys.setdefault(name, []).append(alias)
    model: dict[int, dict[str, TensorKey]] = {}
    optimizer: dict[int, dict[str, TensorKey]] = {}
    for spec in specs:
        for kind in STATE_KINDS:
            rank = placed[kind, spec.name]
            if kind == "master":
                for key in (spec.name, *second_keys.get(spec.name, [])):
                    model.setdefault(rank, {})[key] = (kind, spec.name)
            else:
                optimizer.setdefault(rank, {})[f"{kind}.{spec.name}"] = (kind, spec.name)
    stem = None if adapter else "model"
    return [*_numbered(stem, model), *_numbered("optimizer", optimizer)]


def model_index(files: Iterable[PlannedFile], specs: Sequence[TensorSpec]) -> bytes:
    """model.safetensors.index.json as transformers reads it."""
    weight_map = {key: file.name for file in files for key, (kind, _) in file.tensors.items() if kind == "master"}
    total = sum(math.prod(spec.shape) for spec in specs)
    metadata = {"total_parameters": total, "total_size": 4 * total}
    return canonical_json({"metadata": metadata, "weight_map": weight_map})


def state_digest(step: int, position: int, tensors: Sequence[TensorEntry]) -> str:
    """One hash for the whole training state, whoever wrote it, wherever its tensors lie."""
    facts = [step, position, [[t.name, t.shape, t.sha256] for t in tensors]]
    return hashlib.sha256(canonical_json(facts)).hexdigest()


def manifest_to_bytes(manifest: Manifest) -> bytes:
    """manifest.json: the content and a sha256 of it, in one fixed layout."""
    content = manifest.model_dump(mode="json")
    return canonical_json({"content": content, "sha256": hashlib.sha256(canonical_json(content)).hexdigest()})


def manifest_from_bytes(raw: bytes) -> Manifest:
    """The manifest in a manifest.json; any byte that differs from what was written is an error.

    Raises:
        CheckpointError: damaged, or of a format this version does not know.
    """
    try:
        outer = json.loads(raw)
        content = outer["content"]
        version = content["format_version"]
        intact = outer["sha256"] == hashlib.sha256(canonical_json(content)).hexdigest()
        same_layout = canonical_json(outer) == raw
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST} is damaged: {first_line(error)}") from None
    if not (intact and same_layout):
        raise CheckpointError(f"{MANIFEST} is damaged: its own sha256 does not hold")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{MANIFEST} has format {version}, this version reads {FORMAT_VERSION}",
            remedy="use the dist-cpt version that wrote it",
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"{MANIFEST} does not fit its format: {first_line(error)}") from None


def check_relative(name: str) -> None:
    """Refuse a file name that could lead out of the checkpoint folder.

    Raises:
        ValueError: absolute, empty, with `..`, a backslash or a NUL.
    """
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or str(path) != name:
        raise ValueError(f"{name!r} is not a plain path inside the checkpoint")


def _numbered(stem: str | None, by_rank: dict[int, dict[str, TensorKey]]) -> list[PlannedFile]:
    count = len(by_rank)
    return [
        PlannedFile(
            ADAPTER_WEIGHTS if stem is None else f"{stem}-{number:05d}-of-{count:05d}.safetensors",
            rank,
            by_rank[rank],
        )
        for number, rank in enumerate(sorted(by_rank), start=1)
    ]
