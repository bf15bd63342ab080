"""What is inside a checkpoint, or in all checkpoints of a run? Reads JSON only: no tensor, no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dist_cpt.checkpoint.quick_check import outline_problems
from dist_cpt.errors import CheckpointError, ConfigError
from dist_cpt.run_folder.checkpoints import published, read_manifest, read_state, superseded
from dist_cpt.run_folder.json_files import strict_json
from dist_cpt.run_folder.manifest import Manifest
from dist_cpt.run_folder.names import MANIFEST
from dist_cpt.run_folder.train_state import TrainState
from dist_cpt.training_state import STATE_KINDS

_FP32_BYTES = 4


@dataclass(frozen=True)
class _Opened:
    path: Path
    manifest: Manifest
    state: TrainState
    num_bytes: int  # of all files
    saved: str  # when its manifest was written, UTC; a copy made without times shows when it was copied


@dataclass(frozen=True)
class _Family:
    """The readable checkpoints of a run: what a lineage is made of."""

    by_path: dict[Path, _Opened]
    by_state: dict[str, _Opened]


def inspect_path(path: Path) -> dict[str, Any]:
    """The content of a checkpoint folder, or of a run folder, as one JSON object.

    Raises:
        ConfigError: the path is neither.
        CheckpointError: a checkpoint that cannot be read, or a run without one that holds in outline.
    """
    if (path / MANIFEST).exists() or (path.name.startswith("step-") and path.is_dir()):
        return _checkpoint(_open(path), _family(_run_of(path)))
    if (path / "recipe.yaml").exists() or (path / "checkpoints").is_dir():
        return _run(path)
    raise ConfigError(f"{path} is neither a run folder nor a checkpoint", remedy="give a run folder or a checkpoint")


def _run(run_folder: Path) -> dict[str, Any]:
    found = [*published(run_folder), *superseded(run_folder)]
    if not found:
        raise CheckpointError(f"{run_folder} holds no checkpoint")
    family = _family(run_folder)
    rows = [_row(path, family) for path in found]
    whole = [path for path, row in zip(found, rows, strict=True) if row["problem"] is None and path in family.by_path]
    if not whole:
        raise CheckpointError(
            f"no checkpoint in {run_folder} holds: " + "; ".join(f"{row['name']}: {row['problem']}" for row in rows),
            remedy="restore the folder from a copy, or start again under another name",
        )
    return {
        "kind": "run",
        "path": str(run_folder),
        "checkpoints": rows,
        "newest": _checkpoint(family.by_path[whole[0]], family),
    }


def _row(path: Path, family: _Family) -> dict[str, Any]:
    """One checkpoint of a run in short; what a damaged one does not tell is null."""
    one = family.by_path.get(path)
    parent = family.by_state.get(one.state.parent or "") if one else None
    return {
        "name": path.name,
        "superseded": path.parent.name == "superseded",
        "step": one.manifest.step if one else None,
        "saved": one.saved if one else None,
        "num_bytes": one.num_bytes if one else None,
        "attempt": one.manifest.attempt if one else None,
        "state_sha256": one.manifest.state_sha256 if one else None,
        "parent": one.state.parent if one else None,
        "parent_step": parent.manifest.step if parent else None,
        "problem": _problem(path),
    }


def _checkpoint(one: _Opened, family: _Family) -> dict[str, Any]:
    manifest, state = one.manifest, one.state
    num_parameters = sum(math.prod(tensor.shape) for tensor in manifest.tensors)
    base = {key: value for key, value in manifest.base.items() if key != "config"}
    lineage, origin = _lineage(one, family.by_state)
    return {
        "kind": "checkpoint",
        "path": str(one.path),
        "problem": _problem(one.path),
        "step": state.step,
        "position": state.position,
        "tokens": state.tokens,
        "tokens_by_source": state.tokens_by_source,
        "skipped_steps": state.skipped_total,
        "skipped_windows": [list(window) for window in state.skipped_windows],
        "saved": one.saved,
        "saved_by": {
            "engine": manifest.engine,
            "world_size": manifest.world_size,
            "attempt": manifest.attempt,
            "versions": manifest.versions,
        },
        "adapter": manifest.adapter,
        "num_parameters": num_parameters,
        "num_bytes": one.num_bytes,
        "bytes_per_parameter": one.num_bytes / num_parameters if num_parameters else None,
        "groups": _groups(manifest),
        "files": [
            {"name": name, "num_bytes": entry.num_bytes, "sha256": entry.sha256}
            for name, entry in sorted(manifest.files.items())
        ],
        "base": base,
        "data": manifest.data,
        "recipe": manifest.recipe,
        "schedule": state.schedule,
        "wandb_run_id": state.wandb_run_id,
        "probe_loss": state.probe.loss,
        "state_sha256": manifest.state_sha256,
        "parent": state.parent,
        "lineage": [
            {"step": link.manifest.step, "attempt": link.manifest.attempt, "name": link.path.name} for link in lineage
        ],
        "origin": origin,
        "certificate": _certificate(_run_of(one.path)),
    }


def _groups(manifest: Manifest) -> list[dict[str, Any]]:
    """Per parameter group; bytes are those of the fp32 values, a tied matrix's second key aside."""
    groups = []
    for name in dict.fromkeys(tensor.group for tensor in manifest.tensors):
        tensors = [tensor for tensor in manifest.tensors if tensor.group == name]
        num_parameters = sum(math.prod(tensor.shape) for tensor in tensors)
        shapes = Counter("x".join(map(str, tensor.shape)) for tensor in tensors)
        groups.append(
            {
                "name": name,
                "num_tensors": len(tensors),
                "num_parameters": num_parameters,
                "compute_dtypes": sorted({tensor.dtype for tensor in tensors}),
                "shapes": dict(shapes.most_common()),
                "master_bytes": _FP32_BYTES * num_parameters,
                "moment_bytes": _FP32_BYTES * num_parameters * (len(STATE_KINDS) - 1),
            }
        )
    return groups


def _lineage(one: _Opened, siblings: Mapping[str, _Opened]) -> tuple[list[_Opened], str]:
    """The checkpoints this one came from that are still there, itself first, and where the chain ends."""
    chain = [one]
    while (parent := chain[-1].state.parent) is not None:
        if parent not in siblings:
            return chain, "parent pruned"
        if siblings[parent].manifest.step >= chain[-1].manifest.step:
            return chain, f"broken: its parent {siblings[parent].path.name} is not of an earlier step"
        chain.append(siblings[parent])
    return chain, "start" if "parent" in chain[-1].state.model_fields_set else "parent not recorded"


def _certificate(run_folder: Path | None) -> dict[str, Any] | None:
    """Verdict of the run's latest resume; None if it was never resumed, or the checkpoint lies alone."""
    path = run_folder / "certificate.json" if run_folder else None
    if path is None or not path.is_file():
        return None
    try:
        content = strict_json(path.read_bytes())
        return {key: content.get(key) for key in ("verdict", "failed", "step", "attempt", "state_sha256")}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {"verdict": "unreadable"}


def _open(path: Path) -> _Opened:
    try:
        manifest, state = read_manifest(path), read_state(path)
        stat = (path / MANIFEST).stat()
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{path}: {getattr(error, 'message', error)}") from None
    num_bytes = stat.st_size + sum(entry.num_bytes for entry in manifest.files.values())
    saved = datetime.fromtimestamp(stat.st_mtime, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    return _Opened(path, manifest, state, num_bytes, saved)


def _family(run_folder: Path | None) -> _Family:
    family = _Family({}, {})
    for path in [*published(run_folder), *superseded(run_folder)] if run_folder else []:
        try:
            one = family.by_path[path] = _open(path)
            family.by_state.setdefault(one.manifest.state_sha256, one)
        except CheckpointError:  # `_row` names its problem
            continue
    return family


def _run_of(checkpoint: Path) -> Path | None:
    parent = checkpoint.resolve().parent
    parent = parent.parent if parent.name == "superseded" else parent
    return parent.parent if parent.name == "checkpoints" else None


def _problem(path: Path) -> str | None:
    problems = outline_problems(path)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return problems[0] + more if problems else None
