"""A short continuation by the model as it stands in the engine, sharded or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dist_cpt.engines.engine import Engine
from dist_cpt.runtime.collectives import on_rank_zero
from dist_cpt.train.folder import write_json

NEW_TOKENS = 48


def write_sample(engine: Engine, tokenizer: Any, prompt: Sequence[int], folder: Path, step: int, *, rank: int) -> None:
    """Continue `prompt` (token ids) greedily and write sample.json. Collective: every rank runs the forwards."""
    ids = list(prompt)
    device = None
    for _ in range(NEW_TOKENS):
        logits = engine.logits(torch.tensor([ids], dtype=torch.int64, device=device))
        ids.append(int(logits.argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    sample = {
        "prompt": tokenizer.decode(ids[: len(prompt)]),
        "text": tokenizer.decode(ids[len(prompt) :]),
        "step": step,
    }
    on_rank_zero("sample", lambda: write_json(folder / "sample.json", sample))
