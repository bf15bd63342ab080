"""A whole run in this process, as the command would start it on one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_cpt.config.load import build
from dist_cpt.config.resolve import resolve_paths
from dist_cpt.config.schema import RunConfig
from dist_cpt.runtime.stop import StopRequest


def train(values: dict[str, Any], stop: StopRequest | None = None) -> int:
    """The exit code of training a recipe."""
    from dist_cpt.train.run import train as train_run

    return train_run(resolve_paths(build(values, "recipe.yaml")), stop or StopRequest())[0]


def built(values: dict[str, Any]) -> RunConfig:
    """A recipe as the command resolves it."""
    return resolve_paths(build(values, "recipe.yaml"))


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
