"""What a run folder holds, read so that a report of a crashed or half-written run still comes out."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class RunFiles:
    """The parsed files of one run folder; absent ones are empty, unreadable ones are named in `problems`."""

    folder: Path
    recipe_text: str
    recipe: dict[str, Any]
    steps: list[dict[str, Any]]
    rewound: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    contract: dict[str, Any]
    certificate: dict[str, Any]
    exit: dict[str, Any]
    sample: dict[str, Any]
    checkpoints: list[str]
    problems: list[str] = field(default_factory=list)


def read_run(folder: Path) -> RunFiles:
    """Read every file of a run folder that the report shows."""
    problems: list[str] = []
    text = _text(folder / "recipe.yaml", problems)
    try:
        recipe = yaml.safe_load(text) if text else {}
    except (yaml.YAMLError, ValueError) as error:
        recipe = {}
        problems.append(f"recipe.yaml: {' '.join(str(error).split())[:200]}")
    saved = folder / "checkpoints"
    return RunFiles(
        folder=folder,
        recipe_text=text,
        recipe=recipe if isinstance(recipe, dict) else {},
        steps=_rows(folder / "metrics.jsonl", problems),
        rewound=_rows(folder / "metrics.rewound.jsonl", problems),
        evaluations=_rows(folder / "evaluations.jsonl", problems),
        events=_rows(folder / "events.jsonl", problems),
        contract=object_or_problem(folder / "contract.json", problems),
        certificate=object_or_problem(folder / "certificate.json", problems),
        exit=object_or_problem(folder / "exit.json", problems),
        sample=object_or_problem(folder / "sample.json", problems),
        checkpoints=sorted(p.name for p in saved.iterdir() if (p / "manifest.json").exists()) if saved.is_dir() else [],
        problems=problems,
    )


def _text(path: Path, problems: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        problems.append(f"{path.name}: {error.strerror}")
        return ""


def object_or_problem(path: Path, problems: list[str]) -> dict[str, Any]:
    """The object in a JSON file, empty if it is absent; a damaged or unreadable file adds a line to `problems`."""
    text = _text(path, problems)
    try:
        value = json.loads(text) if text else {}
    except ValueError:
        value = None
    if not isinstance(value, dict):
        problems.append(f"{path.name}: not a JSON object")
        return {}
    return value


def _rows(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    broken: list[int] = []
    for number, line in enumerate(_text(path, problems).split("\n"), start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken.append(number)
    if broken:
        problems.append(f"{path.name}: line {', '.join(map(str, broken[:5]))} cannot be read")
    return rows
