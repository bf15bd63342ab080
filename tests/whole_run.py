"""A whole run in this process, as the command would start it on one rank."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

from dist_cpt.config.load import build
from dist_cpt.config.resolve import resolve_paths
from dist_cpt.config.schema import RunConfig
from dist_cpt.runtime.faults import VARIABLE
from dist_cpt.runtime.stop import StopRequest


class StopAfter(StopRequest):
    """Stops a run by a signal at the boundary after `step`."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.fault = f"step:step{step + 1}:term"


def train(values: dict[str, Any], stop: StopRequest | None = None) -> int:
    """The exit code of training a recipe."""
    from dist_cpt.train.run import train as train_run

    config = resolve_paths(build(values, "recipe.yaml"))
    if not isinstance(stop, StopAfter):
        return train_run(config, stop or StopRequest())[0]
    with stop, mock.patch.dict(os.environ, {VARIABLE: stop.fault}):
        return train_run(config, stop)[0]


def built(values: dict[str, Any]) -> RunConfig:
    """A recipe as the command resolves it."""
    return resolve_paths(build(values, "recipe.yaml"))


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
