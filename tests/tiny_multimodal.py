"""Tiny multimodal checkpoints, with the text models inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests import tiny
from tests.tiny_hybrids import KINDS as HYBRIDS

TEXT = tiny.llama() | {"head_dim": 16, "sliding_window": 8, "pad_token_id": 0}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "depth": 2,
    "num_heads": 4,
    "out_hidden_size": 64,
}
# model type -> (type of its text model, more settings of it, the names of what is beside the text model)
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma3": ("gemma3_text", {"tie_word_embeddings": True}, "vision_tower"),
    "mistral3": ("mistral", {}, "vision_tower"),
    "qwen2_5_vl": (
        "qwen2_5_vl_text",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        "visual",
    ),
    "qwen3_vl": (
        "qwen3_vl_text",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
        "visual",
    ),
    "qwen3_5": ("qwen3_5_text", HYBRIDS["qwen3_5_text"], "visual"),
    "llava": ("llama", {}, "vision_tower"),
    "gemma4": ("gemma4_text", {"tie_word_embeddings": True}, "vision_tower"),
}


def config_of(kind: str) -> Any:
    text_type, more, _ = KINDS[kind]
    config_class: Any = CONFIG_MAPPING[kind]
    vision_config = config_class().vision_config or config_class.sub_configs["vision_config"]()
    vision = {key: value for key, value in VISION.items() if key in vision_config.to_dict()}
    vision["model_type"] = vision_config.model_type
    known = CONFIG_MAPPING[text_type]().to_dict()
    text = {key: value for key, value in (TEXT | more).items() if key in known} | {"model_type": text_type}
    tied = more.get("tie_word_embeddings", False)
    return config_class(text_config=text, vision_config=vision, tie_word_embeddings=tied)


def write_multimodal(folder: Path, kind: str, tokenizer: Path) -> Path:
    """A random multimodal checkpoint in bf16 with its tokenizer and a processor's settings."""
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config_of(kind)).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    (folder / "preprocessor_config.json").write_text('{"size": 28}')
    return folder
