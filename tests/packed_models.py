"""Tiny models of every architecture under packed attention, and blocks of several documents."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dist_cpt.model.architectures import check_config, parts_of
from dist_cpt.model.attention import choose, install
from dist_cpt.model.loss import CausalLMForLoss, install_loss_head
from tests.tiny_hybrids import KINDS as HYBRIDS

V, L = 61, 24
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": V,
}
# a window in every other layer, scores divided by another number than the head's width
_GEMMA = _LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 20, "sliding_window": 5, "pad_token_id": 0}
KINDS = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 5},
    "qwen2": _LLAMA | {"tie_word_embeddings": True},
    "qwen2-sliding": _LLAMA | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": _LLAMA | {"head_dim": 16},
    "phi3": _LLAMA | {"pad_token_id": 0, "sliding_window": 5},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 0.3, "final_logit_softcapping": 2.0},
    "gemma2-wide-window": _GEMMA | {"attn_logit_softcapping": 50.0, "sliding_window": 9},
    "gemma3_text": _GEMMA | {"num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    "granite": _LLAMA | {"logits_scaling": 6.0, "residual_multiplier": 0.22, "embedding_multiplier": 12.0},
    "hyperclovax": _LLAMA | {"logits_scaling": 0.3, "tie_word_embeddings": True},
    "cohere": _LLAMA | {"logit_scale": 0.0625, "pad_token_id": 0},
    "cohere2": _LLAMA | {"logit_scale": 0.25, "pad_token_id": 0, "sliding_window": 5},
    "minicpm3": _LLAMA
    | {
        "num_key_value_heads": 4,
        "dim_model_base": 8,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 16,
    },
    "gpt_oss": _LLAMA
    | {"head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 5, "pad_token_id": 0},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "vocab_size": V,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    **{kind: _LLAMA | {"head_dim": 8} | sizes for kind, sizes in HYBRIDS.items()},
}
# two blocks: several documents with one of a single token, and one document that fills its block
LENGTHS = ((7, 1, 11, 5), (24,))


def build(kind: str, choice=None):
    torch.manual_seed(0)
    plain, packed = (
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind.partition("-")[0], **KINDS[kind]), attn_implementation="eager"
        )
        for _ in range(2)
    )
    for name, parameter in plain.named_parameters():  # a visible attention pattern, biases that are not zero
        parameter.data += torch.randn_like(parameter) * (0.02 if name.endswith("bias") else 0.1)
    packed.load_state_dict(plain.state_dict())
    check_config(packed.config)
    install_loss_head(parts_of(packed).head, packed.config, use_reference=False)
    choice = choice or choose(torch.device("cpu"), packed.config)
    install(packed, choice)
    return plain.train(), CausalLMForLoss(packed, choice).train()


def blocks():
    ids = torch.randint(0, V, (2, L), generator=torch.Generator().manual_seed(1))
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in block]) for block in LENGTHS])
    sizes = [n for block in LENGTHS for n in block]
    cu_seqlens = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    labels = ids.roll(-1, 1)
    labels.view(-1)[cu_seqlens[1:].long() - 1] = -100
    return ids, position_ids, cu_seqlens, labels
