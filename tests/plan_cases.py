"""Models and recipes for the tests of plans: nothing is trained, so they may be as large as one likes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def model_folder(folder: Path, config: dict[str, Any]) -> str:
    """A folder with a config.json and nothing else."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def recipe(path: str = "llama", weights: str = "bf16", rank: int = 64, **sections: Any) -> dict[str, Any]:
    """LoRA on all linear maps, 65,536 tokens a step; `sections` replace whole sections."""
    return {
        "name": "planned",
        "model": {"path": path, "weights": weights},
        "adapter": {"rank": rank},
        "data": {"seq_len": 4096, "sources": [{"path": "text"}]},
        "batch": {"global_tokens": 262144},
        "train": {"tokens": 65536},
    } | sections
