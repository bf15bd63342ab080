"""The content of a checkpoint, or of all checkpoints of a run, as JSON or as text. Reads no tensor. Torch-free."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dist_cpt.checkpoint.quick_check import quick_check, summary
from dist_cpt.config.resolve import fingerprint
from dist_cpt.errors import CheckpointError, ConfigError, printable
from dist_cpt.run_folder.checkpoints import published, read_manifest, read_state, superseded
from dist_cpt.run_folder.json_files import strict_json
from dist_cpt.run_folder.lineage import read_lineage
from dist_cpt.run_folder.manifest import Manifest
from dist_cpt.run_folder.names import CERTIFICATE, CHECKPOINTS, MANIFEST, RECIPE, SUPERSEDED
from dist_cpt.run_folder.train_state import TrainState
from dist_cpt.training_state import STATE_KINDS

_FP32_BYTES = 4
_SHAPES_SHOWN = 4


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
        CheckpointError: a checkpoint that cannot be read, or a run without one that passes `quick_check`.
    """
    if (path / MANIFEST).exists() or (path.name.startswith("step-") and path.is_dir()):
        return _checkpoint(_open(path), _family(_run_of(path)))
    if (path / RECIPE).exists() or (path / CHECKPOINTS).is_dir():
        return _run(path)
    raise ConfigError(f"{path} is neither a run folder nor a checkpoint", remedy="give a run folder or a checkpoint")


def _run(run_folder: Path) -> dict[str, Any]:
    paths = [*published(run_folder), *superseded(run_folder)]
    if not paths:
        raise CheckpointError(f"{run_folder} has no checkpoint")
    family = _family(run_folder)
    rows = [_row(path, family) for path in paths]
    valid = [path for path, row in zip(paths, rows, strict=True) if row["problem"] is None and path in family.by_path]
    if not valid:
        raise CheckpointError(
            f"no valid checkpoint in {run_folder}: " + "; ".join(f"{row['name']}: {row['problem']}" for row in rows),
            remedy="restore the folder from a copy, or start again under another name",
        )
    return {
        "kind": "run",
        "path": str(run_folder),
        "lineage": read_lineage(run_folder),
        "checkpoints": rows,
        "newest": _checkpoint(family.by_path[valid[0]], family),
    }


def _row(path: Path, family: _Family) -> dict[str, Any]:
    """One checkpoint of a run in short; what cannot be read of a damaged one is null."""
    one = family.by_path.get(path)
    parent = family.by_state.get(one.state.parent or "") if one else None
    return {
        "name": path.name,
        "superseded": path.parent.name == SUPERSEDED,
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
    recipe = manifest.recipe_config()
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
        "recipe": manifest.recipe if recipe is None else fingerprint(recipe),
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
    """The certificate of the run's latest resume; None if it was never resumed, or the checkpoint is a copy."""
    path = run_folder / CERTIFICATE if run_folder else None
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
    parent = parent.parent if parent.name == SUPERSEDED else parent
    return parent.parent if parent.name == CHECKPOINTS else None


def _problem(path: Path) -> str | None:
    problems = quick_check(path)
    return summary(problems) if problems else None


_LINEAGE = {"branch": "branched from", "extend": "extended:"}


def as_text(content: Mapping[str, Any]) -> str:
    """The object from `inspect_path` as plain text in aligned columns."""
    lines: list[str] = []
    if content["kind"] == "run":
        lines += [
            f"{_LINEAGE.get(entry.get('kind', ''), '?')} {entry.get('run')}, step {entry.get('step')}, "
            f"{entry.get('time')}: {' '.join(entry.get('set', ()))}"
            for entry in content["lineage"]
        ]
        lines += [f"{content['path']}: {len(content['checkpoints'])} checkpoints", *_run_table(content), ""]
        content = content["newest"]
    lines += [content["path"], *_facts(content), "", *_group_table(content), "", *_file_table(content)]
    return "\n".join(printable(line) for line in lines)


def _run_table(content: Mapping[str, Any]) -> list[str]:
    rows = []
    for row in content["checkpoints"]:
        parent = "start" if row["parent"] is None else f"step {row['parent_step']}"
        parent = "pruned" if row["parent"] is not None and row["parent_step"] is None else parent
        known = row["step"] is not None
        rows.append(
            [
                row["name"] + (" (superseded)" if row["superseded"] else ""),
                row["saved"] or "",
                _size(row["num_bytes"]) if known else "",
                f"{row['attempt']}" if known else "",
                parent if known else "",
                _validity(row["problem"]),
            ]
        )
    return _table(["checkpoint", "saved", ">size", ">attempt", "parent", "check"], rows)


def _facts(content: Mapping[str, Any]) -> list[str]:
    by, base, data = content["saved_by"], content["base"], content["data"]
    steps = " <- ".join(f"step {link['step']} (attempt {link['attempt']})" for link in content["lineage"])
    certificate = content["certificate"]
    windows = ", ".join(f"{start} to {stop - 1}" for start, stop in content["skipped_windows"])
    per_parameter = content["bytes_per_parameter"]
    facts = [
        ("check", _validity(content["problem"])),
        ("step", f"{content['step']:,} ({content['skipped_steps']:,} skipped)"),
        ("position", f"{content['position']:,} packed blocks" + (f", without {windows}" if windows else "")),
        ("tokens", f"{content['tokens']:,} targets; read " + _pairs(content["tokens_by_source"])),
        ("saved", f"{content['saved']} by {by['engine']} on {_ranks(by['world_size'])}, attempt {by['attempt']}"),
        ("versions", _pairs(by["versions"])),
        (
            "parameters",
            f"{content['num_parameters']:,} trained, " + ("adapter" if content["adapter"] else "whole model"),
        ),
        ("size", f"{_size(content['num_bytes'])}, {per_parameter or 0:.2f} bytes per trained parameter"),
        ("base", _pairs(base)),
        ("data", _pairs(data)),
        ("recipe", content["recipe"][:12]),
        ("schedule", _pairs(content["schedule"])),
        ("W&B run", content["wandb_run_id"]),
        ("probe loss", f"{content['probe_loss']} nats"),
        ("state", content["state_sha256"][:12]),
        ("lineage", f"{steps} <- {content['origin']}"),
        ("certificate", _certificate_words(certificate)),
    ]
    return [f"  {name:<13}{value}" for name, value in facts]


def _validity(problem: str | None) -> str:
    return "valid" if problem is None else f"DAMAGED: {problem}"


def _ranks(world_size: int) -> str:
    return "1 rank" if world_size == 1 else f"{world_size:,} ranks"


def _certificate_words(certificate: Mapping[str, Any] | None) -> str:
    if certificate is None:
        return "none: the run has not been resumed"
    if certificate["verdict"] == "unreadable":
        return "unreadable"
    failed = f" ({certificate['failed']})" if certificate.get("failed") else ""
    return f"{certificate['verdict']}{failed}: step {certificate['step']} restored by attempt {certificate['attempt']}"


def _group_table(content: Mapping[str, Any]) -> list[str]:
    rows = []
    for group in content["groups"]:
        shapes = [shape if count == 1 else f"{count} of {shape}" for shape, count in group["shapes"].items()]
        rest = len(shapes) - _SHAPES_SHOWN
        rows.append(
            [
                group["name"],
                f"{group['num_tensors']:,}",
                f"{group['num_parameters']:,}",
                ", ".join(group["compute_dtypes"]),
                _size(group["master_bytes"]),
                _size(group["moment_bytes"]),
                ", ".join(shapes[:_SHAPES_SHOWN]) + (f", {rest} more shapes" if rest > 0 else ""),
            ]
        )
    return _table(["group", ">tensors", ">parameters", "computes in", ">master", ">moments", "shapes"], rows)


def _file_table(content: Mapping[str, Any]) -> list[str]:
    rows = [[file["name"], f"{file['num_bytes']:,}", file["sha256"][:12]] for file in content["files"]]
    return _table(["file", ">bytes", "sha256"], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns; those whose head starts with > are aligned to the right."""
    right = [head.startswith(">") for head in heads]
    cells = [[head.lstrip(">") for head in heads], *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    return [
        "  " + "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]


def _pairs(values: Mapping[str, Any]) -> str:
    """`a 1, b x`; hashes cut to 12 digits, empty values left out."""
    shown = []
    for key, value in values.items():
        if value is None or value in ({}, []):
            continue
        text = (
            f"{value:,}"
            if type(value) is int
            else ", ".join(map(str, value))
            if isinstance(value, list)
            else f"{value}"
        )
        shown.append(f"{key} {text[:12] if key in ('sha256', 'identity') else text}")
    return ", ".join(shown)


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
