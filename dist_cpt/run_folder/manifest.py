"""manifest.json: every file and tensor of a checkpoint, and what they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from dist_cpt.config.load import build
from dist_cpt.config.schema import Frozen, RunConfig
from dist_cpt.errors import CheckpointError
from dist_cpt.run_folder.json_files import canonical_json
from dist_cpt.run_folder.names import MANIFEST
from dist_cpt.run_folder.train_state import first_line
from dist_cpt.training_state import StateKind

FORMAT_VERSION = 2
_READ_VERSIONS = (1, FORMAT_VERSION)  # 1 has only the fingerprint of the recipe


@dataclass(frozen=True)
class Identity:
    """What the tensors belong to; a resume compares base, data and recipe."""

    base: dict[str, Any]  # path, revision, hash of the frozen weights
    data: dict[str, Any]  # token stores by hash
    recipe: str | dict[str, Any]  # resolved, with every default; of format 1 the fingerprint
    engine: str  # not compared


class FileEntry(Frozen):
    num_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class TensorEntry(Frozen):
    """One trainable tensor: per kind its file, and the sha256 of its fp32 bytes in C order."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: str
    file: dict[StateKind, str]
    sha256: dict[StateKind, str]


class Manifest(Frozen):
    """The content of manifest.json; `tensors` in the order of the optimizer's groups."""

    format_version: Literal[1, 2]
    step: int = Field(ge=0)
    attempt: int = Field(ge=0)
    adapter: bool
    files: dict[str, FileEntry]
    tensors: tuple[TensorEntry, ...]
    aliases: dict[str, str]  # second key in the adapter file -> canonical name of the same tensor
    base: dict[str, Any]
    data: dict[str, Any]
    recipe: str | dict[str, Any]  # in format 1 its fingerprint
    engine: str
    world_size: int = Field(ge=1)
    versions: dict[str, str]
    state_sha256: str  # of step, position and all tensors: equal for equal states

    @field_validator("files")
    @classmethod
    def _inside(cls, value: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in value:
            check_relative(name)
        return value

    def recipe_config(self) -> RunConfig | None:
        """The recipe that was trained; None in format 1.

        Raises:
            ConfigError: it has keys that this version does not know.
        """
        return None if isinstance(self.recipe, str) else build(self.recipe, f"the recipe in {MANIFEST}")

    def names(self) -> list[str]:
        """Trainable names in order."""
        return [tensor.name for tensor in self.tensors]

    def num_bytes(self) -> int:
        """Of all files but the manifest itself."""
        return sum(entry.num_bytes for entry in self.files.values())


def state_digest(step: int, position: int, tensors: Sequence[TensorEntry]) -> str:
    """One hash of the whole training state, independent of engine, world size and files."""
    content = [step, position, [[t.name, t.shape, t.sha256] for t in tensors]]
    return hashlib.sha256(canonical_json(content)).hexdigest()


def manifest_to_bytes(manifest: Manifest) -> bytes:
    """The bytes of manifest.json: the content and its sha256, in one fixed layout."""
    content = manifest.model_dump(mode="json")
    return canonical_json({"content": content, "sha256": hashlib.sha256(canonical_json(content)).hexdigest()})


def manifest_from_bytes(raw: bytes) -> Manifest:
    """The manifest in a manifest.json; any byte that differs from what was written is an error.

    Raises:
        CheckpointError: damaged, or of a format this version does not read.
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
        raise CheckpointError(f"{MANIFEST} is damaged: its content does not have the sha256 in it")
    if version not in _READ_VERSIONS:
        raise CheckpointError(
            f"{MANIFEST} has format {version}, this version reads {' and '.join(map(str, _READ_VERSIONS))}",
            remedy="use the dist-cpt version that wrote it",
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"{MANIFEST} is invalid: {first_line(error)}") from None


def check_relative(name: str) -> None:
    """Refuse a file name that could leave the checkpoint folder.

    Raises:
        ValueError: absolute, empty, with `..`, a backslash or a NUL.
    """
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or str(path) != name:
        raise ValueError(f"{name!r} is not a plain path inside the checkpoint")
