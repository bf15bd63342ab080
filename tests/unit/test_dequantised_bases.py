"""Checkpoints in MXFP4 are read as plain 16-bit models, value for value, and written as such."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dist_cpt.adapters.quantize import load_plain, load_quantised, stored_weights
from dist_cpt.errors import ConfigError

LEVELS = torch.tensor(
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
)  # of an e2m1 code's last three bits; the first is the sign
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """gpt-oss as it is published: experts in 4-bit codes with a power of two for 32 of them."""
    path = tmp_path_factory.mktemp("mxfp4")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **SIZES)).bfloat16().save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_are_the_values_of_their_codes(folder, dtype, tmp_path):
    model = load_plain(folder, None, dtype)
    stored = load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        if f"{name}_blocks" not in stored:
            continue
        codes, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
        nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).int()
        values = torch.where(nibbles > 7, -1.0, 1.0) * LEVELS[nibbles & 7] * torch.exp2(scales.float() - 127)[..., None]
        assert torch.equal(parameter.data, values.flatten(-2).transpose(1, 2).to(dtype)), name
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_they_are_not_quantised_a_second_time(folder):
    assert stored_weights(folder) is None
    with pytest.raises(ConfigError, match="mxfp4 weights: they would have to be quantised again to nf4"):
        load_quantised(folder, None, torch.device("cpu"), "nf4")
