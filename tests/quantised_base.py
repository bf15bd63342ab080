"""Random models and recipes for the tests of quantised bases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from dist_cpt.config.schema import RunConfig
from dist_cpt.model.load import TrainableModel


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


def write_adapter(folder: Path, model: TrainableModel) -> Path:
    """A folder with what a merge reads of a checkpoint: the model's adapter, its B matrices made random."""
    folder.mkdir()
    for name, parameter in model.trainable.items():
        if "lora_B" in name:
            nn.init.normal_(parameter.data, std=0.02)
    save_file({name: p.data for name, p in model.trainable.items()}, folder / "adapter_model.safetensors")
    model.write_config(folder)
    (folder / "manifest.json").write_text(json.dumps({"adapter": True, "base": model.identity}))
    return folder
