"""What `inspect` found, for people: plain text in aligned columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dist_cpt.errors import printable

_SHAPES_SHOWN = 4


def as_text(content: Mapping[str, Any]) -> str:
    """`inspect_path`'s answer for people."""
    lines: list[str] = []
    if content["kind"] == "run":
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
                "holds" if row["problem"] is None else f"DOES NOT HOLD: {row['problem']}",
            ]
        )
    return _table(["checkpoint", "saved", ">size", ">attempt", "parent", "outline"], rows)


def _facts(content: Mapping[str, Any]) -> list[str]:
    by, base, data = content["saved_by"], content["base"], content["data"]
    steps = " <- ".join(f"step {link['step']} (attempt {link['attempt']})" for link in content["lineage"])
    certificate = content["certificate"]
    windows = ", ".join(f"{start} to {stop - 1}" for start, stop in content["skipped_windows"])
    per_parameter = content["bytes_per_parameter"]
    facts = [
        ("outline", "holds" if content["problem"] is None else f"DOES NOT HOLD: {content['problem']}"),
        ("step", f"{content['step']:,} ({content['skipped_steps']:,} skipped)"),
        ("position", f"{content['position']:,} packed blocks" + (f", left out {windows}" if windows else "")),
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


def _ranks(world_size: int) -> str:
    return "1 rank" if world_size == 1 else f"{world_size:,} ranks"


def _certificate_words(certificate: Mapping[str, Any] | None) -> str:
    if certificate is None:
        return "none: the run was not resumed yet"
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
    """Aligned columns; a head that starts with > stands above numbers."""
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
