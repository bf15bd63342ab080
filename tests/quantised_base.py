"""Random models and recipes for the tests of quantised bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dist_cpt.config.schema import RunConfig


def recipe(base: Path, weights: str = "nf4", **sections: Any) -> RunConfig:
    values: dict[str, Any] = {
        "name": "nf4",
        "model": {"path": str(base), "weights": weights},
        "adapter": {"rank": 4, "alpha": 4},
        "embeddings": {"train": ["embed_tokens", "lm_head"]},
        "data": {"seq_len": 64, "sources": [{"path": "none.jsonl"}]},
        "batch": {"global_tokens": 64},
        "train": {"tokens": 64},
    }
    return RunConfig.model_validate(values | sections)


def save(folder: Path, **values: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).save_pretrained(folder)
    return folder


def source(base: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(base / "model.safetensors")
