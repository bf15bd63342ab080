"""Sizes of tiny hybrids beside those of a Llama: each has a recurrence or convolution, and attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests import tiny

_DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": "auto", "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 2}
KINDS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": _MIXTURE | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "qwen3_next": _DELTA_NET | _MIXTURE | {"shared_expert_intermediate_size": 24},
    "qwen3_5_text": _DELTA_NET,
    "qwen3_5_moe_text": _DELTA_NET | _MIXTURE | {"shared_expert_intermediate_size": 24},
    "granitemoehybrid": _MAMBA
    | {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 4, "num_experts_per_tok": 2}
    | {
        "shared_intermediate_size": 40,
        "logits_scaling": 6.0,
        "residual_multiplier": 0.22,
        "embedding_multiplier": 12.0,
    },
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 32, "lm_head_multiplier": 0.5, "mamba_rms_norm": True},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
    },
}
REQUIRED = {"lfm2_moe": {"layer_types": ["conv", "full_attention"]}}  # settings without a default


def write_hybrid(folder: Path, kind: str) -> Path:
    """A folder with a random model of two or three layers, fp32."""
    known = {**AutoConfig.for_model(kind).to_dict(), **AutoConfig.for_model(kind).attribute_map}
    values = tiny.llama() | {"head_dim": 16, "pad_token_id": 0} | KINDS[kind]
    named = known.keys() - {"model_type", "tie_word_embeddings"}
    config = AutoConfig.for_model(kind, **{key: value for key, value in values.items() if key in named})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder
