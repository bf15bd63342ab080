"""A short continuation by the model as it stands in the engine, sharded or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dist_cpt.engines.engine import Engine
from dist_cpt.run_folder.json_files import write_object
from dist_cpt.runtime.collectives import broadcast_json, on_rank_zero

NEW_TOKENS = 48
TEMPERATURE = 0.8
TOP_K = 40


def write_sample(
    engine: Engine, tokenizer: Any, prompt: Sequence[int], folder: Path, step: int, *, rank: int, context: int
) -> None:
    """Continue `prompt` (token ids) and write sample.json. Collective: every rank runs the forwards.

    The model sees the last `context` tokens: more than it was trained on may be more positions than it has. Rank 0
    draws each token from its TOP_K likeliest at TEMPERATURE: greedy text of a small model only repeats.
    """
    ids = list(prompt)
    draw = torch.Generator().manual_seed(step)
    device = None
    for _ in range(NEW_TOKENS):
        logits = engine.logits(torch.tensor([ids[-context:]], dtype=torch.int64, device=device))
        top = (logits[0].float().cpu() / TEMPERATURE).topk(min(TOP_K, logits.shape[-1]))
        chosen = top.indices[torch.multinomial(top.values.softmax(-1), 1, generator=draw)]
        ids.append(broadcast_json(int(chosen)))
        if ids[-1] == tokenizer.eos_token_id:
            break
    sample = {
        "prompt": tokenizer.decode(ids[: len(prompt)]),
        "text": tokenizer.decode(ids[len(prompt) :]),
        "step": step,
    }
    on_rank_zero("sample", lambda: write_object(folder / "sample.json", sample))
