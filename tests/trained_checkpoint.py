"""A checkpoint of a tiny model whose trainable tensors have all moved, and the logits that an export must give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dist_cpt.config.load import build
from dist_cpt.model.load import TrainableModel, load_model
from tests.tiny import VOCAB_SIZE

CPU = torch.device("cpu")
IDS = torch.randint(0, VOCAB_SIZE, (1, 12), generator=torch.Generator().manual_seed(5))


def trained(model: dict[str, Any], **changes: Any) -> TrainableModel:
    """A model whose trainable tensors have all moved."""
    values = {
        "name": "x",
        "model": model,
        "adapter": {"rank": 4, "alpha": 4},
        "embeddings": {"train": ["embed_tokens", "lm_head"]},
        "data": {"seq_len": 16, "tokenizer": "t", "sources": [{"path": "x"}]},
        "batch": {"global_tokens": 16},
        "train": {"tokens": 16},
    }
    loaded = load_model(build(values | changes, where="test"), device=CPU)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in loaded.trainable.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return loaded


def write_checkpoint(folder: Path, model: TrainableModel, tokenizer: Path) -> Path:
    """The parts of a checkpoint that an export reads."""
    folder.mkdir()
    adapter = model.adapter_config is not None
    tensors = {name: p.detach() for name, p in model.trainable.items()}
    tensors |= {alias: tensors[name].clone() for alias, name in model.aliases.items()} | dict(model.buffers)
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    save_file(tensors, folder / name, metadata={"format": "pt"})
    model.write_config(folder)
    manifest = {"content": {"adapter": adapter, "base": model.identity}, "sha256": "-"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    return folder


def trainer_logits(model: TrainableModel, input_ids: torch.Tensor) -> torch.Tensor:
    """fp32 logits [1, L, V], one position at a time through the entry point that training uses."""
    model.module.eval()
    logits = []
    with torch.no_grad():
        for length in range(1, input_ids.shape[1] + 1):
            cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
            logits.append(model.module(input_ids[:, :length], torch.arange(length)[None], cu_seqlens, length))
    return torch.stack(logits, dim=1)


def plain_logits(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits [1, L, V] of a Hugging Face model."""
    with torch.no_grad():
        return model.eval()(input_ids=input_ids).logits
