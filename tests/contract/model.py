"""A tiny model, ragged batches and a recipe: what every engine of the contract suite trains.

Sizes are odd on purpose: no tensor divides by the ranks, LoRA shards are empty on some of them, and ZeRO-3
pads its last part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_cpt.config.schema import RunConfig
from dist_cpt.data.batch import IGNORE_INDEX, Batch

VOCAB = 131
SEQ_LEN = 20
FULL = ("full", "8bit")  # the variants without an adapter
BLOCKS_PER_STEP = 8
VARIANTS = ("lora", "lora-tied", "full")  # the first two train the embeddings and the head as well


def save_base(folder: str, sizes: dict[str, Any]) -> None:
    """Write a random Llama in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if Path(folder, "config.json").exists():
        return
    torch.manual_seed(0)
    tiny = {
        "vocab_size": VOCAB,
        "hidden_size": 30,
        "intermediate_size": 45,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    LlamaForCausalLM(LlamaConfig(**(tiny | sizes))).save_pretrained(folder)


def recipe(base: str, engine: dict[str, Any], variant: str, weights: str, **model: Any) -> RunConfig:
    """A recipe around the base folder; the optimizer's numbers make clipping and every group matter."""
    weights = variant if variant in ("nf4", "int8", "fp8") else weights  # these variants are LoRA over a quantised base
    state = "8bit" if variant == "8bit" else "fp32"  # the variant trains every parameter
    adapter: dict[str, Any] = {"adapter": {"kind": "none"}}
    if variant not in FULL:
        adapter = {
            "adapter": {"kind": "lora", "rank": 3, "alpha": 6},
            "embeddings": {"train": [] if variant == "lora-only" else ["embed_tokens", "lm_head"]},
        }
    return RunConfig.model_validate(
        {
            "name": "contract",
            "model": {"path": base, "weights": weights} | model,
            "data": {"seq_len": SEQ_LEN, "sources": [{"path": "none.jsonl"}]},
            "batch": {"global_tokens": SEQ_LEN * BLOCKS_PER_STEP},
            "train": {"tokens": 10_000},
            "optim": {"lr": 3e-3, "embedding_lr": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.5, "state": state},
            "engine": engine,
            **adapter,
        }
    )


def batches(step: int, rank: int, world_size: int, num_parts: int = 1) -> list[Batch]:
    """The micro-batches of one rank: the same BLOCKS_PER_STEP blocks a step at every world size, whole or its part."""
    numbers = range(rank // num_parts, BLOCKS_PER_STEP, world_size // num_parts)
    return [block(step, number).cut(rank % num_parts, num_parts) for number in numbers]


def num_tokens(step: int) -> int:
    """Target tokens of a whole step over all ranks."""
    return sum(block(step, number).num_targets for number in range(BLOCKS_PER_STEP))


def block(step: int, number: int) -> Batch:
    """One block of two documents; its number of targets varies, and is 0 in one block of every third step."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    ids = torch.randint(0, VOCAB, (1, SEQ_LEN), generator=generator)
    border = int(torch.randint(2, SEQ_LEN - 2, (1,), generator=generator))
    used = int(torch.randint(border + 2, SEQ_LEN + 1, (1,), generator=generator))
    labels = torch.full_like(ids, IGNORE_INDEX)
    if not (step % 3 == 0 and number == 5):
        labels[0, : border - 1] = ids[0, 1:border]
        labels[0, border : used - 1] = ids[0, border + 1 : used]
    positions = torch.cat([torch.arange(border), torch.arange(SEQ_LEN - border)])[None]
    targets = int((labels != IGNORE_INDEX).sum())
    borders = torch.tensor([0, border, SEQ_LEN], dtype=torch.int32)
    return Batch(ids, labels, positions, borders, SEQ_LEN, targets, np.array([[1, used, targets]]), (number,))
