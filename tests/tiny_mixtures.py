"""Tiny mixtures of experts of every tested model type: four experts, two of them for a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests import tiny

_MOE = tiny.llama() | {"head_dim": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "pad_token_id": 0}
_LATENT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 4},
    "olmoe": {"num_experts": 4},
    "granitemoe": {"num_local_experts": 4, "logits_scaling": 6.0},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "glm4_moe": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 8},
}


def write_moe(folder: Path, kind: str, **sizes: int) -> Path:
    known = {**AutoConfig.for_model(kind).to_dict(), **AutoConfig.for_model(kind).attribute_map}
    given = _MOE | KINDS[kind] | sizes
    values = {key: value for key, value in given.items() if key in known and key != "model_type"}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values)).save_pretrained(folder)
    return folder
