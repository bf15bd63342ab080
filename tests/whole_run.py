"""A whole run in this process, as the command would start it on one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_cpt.config.load import build
from dist_cpt.config.resolve import resolve_paths
from dist_cpt.config.schema import RunConfig
from dist_cpt.runtime.stop import StopRequest


class StopAfter(StopRequest):
    """Requests a stop, as a signal would, once metrics.jsonl has `step` rows."""

    def __init__(self, metrics: Path, step: int) -> None:
        super().__init__()
        self._metrics, self._step = metrics, step

    def __getattribute__(self, name: str) -> Any:
        if name == "requested":
            metrics = object.__getattribute__(self, "_metrics")
            if metrics.is_file() and len(metrics.read_text().splitlines()) >= object.__getattribute__(self, "_step"):
                return "SIGTERM"
            return None
        return super().__getattribute__(name)


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
