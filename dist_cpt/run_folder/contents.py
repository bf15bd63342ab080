"""What a run folder contains, readable also while the run is in progress or after a crash."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dist_cpt.run_folder import names
from dist_cpt.run_folder.json_files import rows_or_problem


@dataclass(frozen=True)
class RunFiles:
    """The parsed files of one run folder; absent ones are empty, damaged ones are listed in `problems`."""

    folder: Path
    recipe_text: str
    recipe: dict[str, Any]
    steps: list[dict[str, Any]]
    rewound: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    evaluated: list[dict[str, Any]]
    events: list[dict[str, Any]]
    contract: dict[str, Any]
    certificate: dict[str, Any]
    exit: dict[str, Any]
    plan: dict[str, Any]
    sample: dict[str, Any]
    checkpoints: list[str]
    problems: list[str]


def read_run(folder: Path) -> RunFiles:
    """Read every file of a run folder that the report shows."""
    problems: list[str] = []
    text, recipe = recipe_or_problem(folder, problems)
    return RunFiles(
        folder=folder,
        recipe_text=text,
        recipe=recipe,
        steps=rows_or_problem(folder / names.METRICS, problems, ended=True),
        rewound=rows_or_problem(folder / names.METRICS_REWOUND, problems, ended=True),
        evaluations=rows_or_problem(folder / names.EVALUATIONS, problems, ended=True),
        evaluated=rows_or_problem(folder / names.EVALUATED, problems, ended=True),
        events=rows_or_problem(folder / names.EVENTS, problems, ended=True),
        contract=object_or_problem(folder / names.CONTRACT, problems),
        certificate=object_or_problem(folder / names.CERTIFICATE, problems),
        exit=object_or_problem(folder / names.EXIT, problems),
        plan=object_or_problem(folder / names.PLAN, problems),
        sample=object_or_problem(folder / names.SAMPLE, problems),
        checkpoints=sorted(path.parent.name for path in (folder / names.CHECKPOINTS).glob(f"*/{names.MANIFEST}")),
        problems=problems,
    )


def recipe_or_problem(folder: Path, problems: list[str]) -> tuple[str, dict[str, Any]]:
    """The recorded recipe as text and as a mapping, empty if it is absent; a damaged one adds a line to `problems`."""
    text = _text(folder / names.RECIPE, problems)
    try:
        recipe = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        recipe = None
        problems.append(f"{names.RECIPE}: {' '.join(str(error).split())[:200]}")
    return text, recipe if isinstance(recipe, dict) else {}


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


def _text(path: Path, problems: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        problems.append(f"{path.name}: {error.strerror}")
        return ""
