"""The recipes of recipes/ at the size of a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_cpt.config.load import parse_yaml
from tests import tiny

RECIPES = Path(__file__).parents[1] / "recipes"
SIZE = {"batch": {"global_tokens": 4 * tiny.SEQ_LEN, "micro_batch": 2}, "track": {"wandb": {"mode": "disabled"}}}


def recipe_file(name: str, folder: Path, steps: int, data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A recipe by its file's name, its data and size made tiny; `changes` replace whole sections."""
    values = parse_yaml((RECIPES / f"{name}.yaml").read_text(), name)
    values["data"] |= {"seq_len": tiny.SEQ_LEN} | data
    small = {"output_dir": str(folder), "train": {"tokens": steps * 4 * tiny.SEQ_LEN}, "engine": "single"}
    return values | small | SIZE | changes
