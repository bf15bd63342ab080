"""A tiny model, ragged batches and a recipe: what every engine of the contract suite trains.

Sizes are odd on purpose: no tensor divides by the ranks, LoRA shards are empty on some of them, and ZeRO-3
pads its last part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dist_cpt.config.schema import RunConfig
from dist_cpt.data.batch import IGNORE_INDEX, Batch

VOCAB = 131
SEQ_LEN = 20
BLOCKS_PER_STEP = 8


@dataclass(frozen=True)
class Model:
    """What build_engine takes."""

    module: nn.Module
    trainable: dict[str, nn.Parameter]
    layers: list[nn.Module]


def recipe(engine: Any, variant: str, weights: str = "fp32", **engine_options: Any) -> RunConfig:
    """Variants: lora (embeddings and untied head train too), lora-tied, full."""
    lora = variant != "full"
    return RunConfig.model_validate(
        {
            "name": "contract",
            "model": {"path": "tiny", "weights": weights},
            "adapter": {"kind": "lora", "rank": 3, "alpha": 6} if lora else {"kind": "none"},
            "embeddings": {"train": ["embed_tokens", "lm_head"]} if lora else {},
            "data": {"seq_len": SEQ_LEN, "sources": [{"path": "none.jsonl"}]},
            "batch": {"global_tokens": SEQ_LEN * BLOCKS_PER_STEP},
            "train": {"tokens": 10_000},
            "optim": {"lr": 3e-3, "embedding_lr": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.5},
            "engine": dict(engine) | engine_options,
        }
    )


def batches(step: int, rank: int, world_size: int) -> list[Batch]:
    """The micro-batches of one rank: the same BLOCKS_PER_STEP blocks a step at every world size."""
    return [block(step, number) for number in range(rank, BLOCKS_PER_STEP, world_size)]


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
    return Batch(ids, labels, positions, borders, SEQ_LEN, targets, np.array([used]), (number,))


class Head(nn.Linear):
    """The output matrix with the loss inside, called as a module by the wrapper below."""

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        logits = F.linear(hidden, self.weight).float()
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


class LossModel(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, position_ids, cu_seqlens, max_seqlen, labels, scale):
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        hidden = inner.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        if labels is None:
            return inner.lm_head(hidden[:, -1])
        loss = inner.lm_head(hidden, labels)
        return loss * scale, loss.detach()


def build_model(config: RunConfig, seed: int = 0, dropout: float = 0.0, tied: bool = False) -> Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=30,
            intermediate_size=45,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    )
    llama.lm_head.__class__ = Head
    compute = torch.bfloat16 if config.model.weights == "bf16" else torch.float32
    inner = llama
    if config.adapter.kind == "lora":
        from peft import LoraConfig, get_peft_model

        llama.to(compute)
        lora = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules="all-linear", use_rslora=True)
        inner = get_peft_model(llama, lora)
        for name, parameter in inner.named_parameters():
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                parameter.requires_grad_(True)
    module = LossModel(inner)
    trainable = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            trainable[name.removeprefix("model.")] = parameter
    return Model(module, trainable, list(llama.model.layers))
